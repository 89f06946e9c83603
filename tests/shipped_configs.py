"""The files of ``configs``: which are bases and of which detector, which fragments fit it."""

import re
from pathlib import Path

from balanced_det.config import load_config

FOLDER = Path(__file__).parents[1] / "configs"
FRAGMENTS = FOLDER / "methods"
# Complete configs; a name that begins with "Base-" is a part of some.
FILES = sorted(
    path
    for path in FOLDER.rglob("*.yaml")
    if FRAGMENTS not in path.parents and path.name != "resnet101.yaml"
)
CONFIGS = [path for path in FILES if not path.name.startswith("Base-")]
# {detector: (the folders of its fragments, its bases)}; a base's name ends where a method's begins.
_KINDS = {"rcnn": r"\w+_rcnn", "retinanet": "retinanet", "fcos": "fcos"}
_FOLDERS = {"rcnn": ["rcnn"], "retinanet": ["dense", "retinanet"], "fcos": ["dense", "fcos"]}
BASES = {
    detector: [
        str(path.relative_to(FOLDER).with_suffix(""))
        for path in CONFIGS
        if re.fullmatch(rf"({kind})(_R_50_FPN_1x)?", path.stem)
    ]
    for detector, kind in _KINDS.items()
}
# Configs of region heads that are bases as well, of runs of one's own.
BASES["rcnn"] += ["Base-lite0-RCNN", "bccd", "quickstart", "quickstart_softmax"]
# {detector: names that --with finds for it}
FITTING = {
    detector: sorted(
        path.stem
        for folder in (FRAGMENTS, *(FRAGMENTS / name for name in folders))
        for path in folder.glob("*.yaml")
    )
    for detector, folders in _FOLDERS.items()
}
# A small base of each detector to build models of.
SMALL = {"rcnn": "shapes/faster_rcnn", "retinanet": "shapes/retinanet", "fcos": "shapes/fcos"}


def relative(path: Path) -> str:
    """Return a file's path within ``configs``."""
    return str(path.relative_to(FOLDER))


def load(base: str, *fragments: str, opts=()):
    """Return the config of a base, without its ".yaml", and fragments over it, for the CPU."""
    path = str(FOLDER / f"{base}.yaml")
    return load_config(path, opts, fragments=fragments, MODEL__DEVICE="cpu")
