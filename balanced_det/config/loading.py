"""From config files and a command line to a config: read, merged key by key, mistakes named."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from ..data.registration import num_classes, register_datasets
from ..errors import InputError
from .files import Layer, read_layers
from .imports import import_modules, resolve_imports
from .keys import add_balanced_det_config, add_own_node, slot_keys
from .lazy import is_lazy_file, load_lazy_config
from .reads import all_values, value_of
from .values import check_values

logger = logging.getLogger(__name__)

COMMAND_LINE = "the command line"
# Fragments that --with finds by name.
FRAGMENTS = Path(__file__).parents[1] / "configs" / "methods"
# MODEL.META_ARCHITECTURE: the folders of what fits it, beside those that fit every detector.
_FRAGMENT_FOLDERS = {
    "GeneralizedRCNN": ("rcnn",),
    "BalancedRetinaNet": ("dense", "retinanet"),
    "BalancedFCOS": ("dense", "fcos"),
}
# Keys that may be "auto": as many classes as the data sets have.
CLASS_NUMBERS = tuple(f"MODEL.{node}.NUM_CLASSES" for node in ("ROI_HEADS", "RETINANET", "FCOS"))
# What yacs raises for a key or value that it refuses, and Python for text that is no value.
_CONFIG_ERRORS = (KeyError, ValueError, TypeError, AssertionError, RecursionError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a key got its value.

    Attributes:
        source: the file, or "the command line".
        slots: {full name of a slot: the method that it named} when that file was merged.
    """

    source: str
    slots: dict


def load_config(
    config_file: str, opts: Sequence[str] = (), *, fragments: Sequence[str] = (), **overrides: Any
) -> CfgNode:
    """Read a config file of this project and register the data sets that it names.

    Args:
        config_file: path of a YAML file, or of a Python config (:mod:`balanced_det.config.lazy`).
        opts: ["KEY", "VALUE", ...] to set after that, as on the command line; for a Python config
            ["path.key=value", ...].
        fragments: config files to merge between the two: paths, or names of those in
            ``configs/methods`` that fit the detector.
        overrides: more keys to set, with "__" for each dot.

    Returns:
        The config, not frozen.

    Raises:
        InputError: a file cannot be used, a key does not exist or has a new name, a value is of the
            wrong type or out of its range.
    """
    if is_lazy_file(config_file):
        if fragments or overrides:
            raise InputError(f"'{config_file}' is a Python config; it takes path.key=value alone.")
        return checked(load_lazy_config(config_file, opts))
    if len(opts) % 2:
        raise InputError(f"Not pairs of KEY VALUE: {' '.join(map(str, opts))}{_pairs_hint(opts)}.")
    given = dict(zip(opts[::2], opts[1::2]))
    given.update({key.replace("__", "."): value for key, value in overrides.items()})
    allow_urls = str(given.get("BALANCE.BASE_FROM_URL", False)) == "True"
    layers = read_layers(config_file, allow_urls=allow_urls)
    for fragment in fragments:
        layers += read_layers(_fragment(fragment, layers), allow_urls=allow_urls)
    layers.append(Layer(COMMAND_LINE, given))
    return merged(layers)


def merged(layers: list[Layer]) -> CfgNode:
    """Merge layers over the defaults and check the result."""
    _import_modules(layers)
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    origins = {}
    automatic = {}  # {key of a number of classes: whether the data gives it}
    for layer in layers:
        for key, value in layer.values.items():
            if key in CLASS_NUMBERS:
                automatic[key] = value == "auto"
                if automatic[key]:
                    continue
            _set(cfg, key, value, layer.source)
        slots = {slot: value_of(cfg, slot) for slot in (*slot_keys(), "MODEL.BACKBONE.NAME")}
        origins.update(dict.fromkeys(layer.values, Origin(layer.source, slots)))
    # Beside the keys, for what reads the config to say who set them; see balanced_det.build.
    cfg.BALANCE.__dict__["origins"] = origins
    checked(cfg)
    for key in (key for key, is_automatic in automatic.items() if is_automatic):
        cfg.merge_from_list([key, num_classes(cfg)])
    return cfg


def checked(cfg: CfgNode) -> CfgNode:
    """Check a config's values, register its data sets, and return it."""
    check_values(cfg)
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        logger.warning("No GPU is available: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    return cfg


def _set(cfg, key, value, source):
    if key == "VERSION" and value != cfg.VERSION:
        raise InputError(
            f"{source}: VERSION is {value}; this project reads files of Detectron2's version "
            f"{cfg.VERSION}."
        )
    try:
        add_own_node(cfg, key)
        cfg.merge_from_list([key, _number(cfg, key, value)])
    except _CONFIG_ERRORS as error:
        where = f"{key} {value}" if source == COMMAND_LINE else source
        raise InputError(f"{where}: {_reason(error)}{_nearest_key(cfg, key)}.") from None


def _number(cfg, key, value):
    """Return an integer as a float where the key holds one: 1 for 1.0, which yacs refuses.

    What is no key at all is left to yacs to refuse; it does not tell nodes from values.
    """
    *parents, name = key.split(".")
    node = cfg
    for parent in parents:
        node = node.get(parent)
        if not isinstance(node, CfgNode):
            if node is not None:
                raise ValueError(f"{key}: {parent} is a value, and has no key '{name}'")
            return value
    if isinstance(node.get(name), CfgNode):
        raise ValueError(f"{key} holds keys, it is no value to set")
    if isinstance(node.get(name), float) and type(CfgNode._decode_cfg_value(value)) is int:
        return float(CfgNode._decode_cfg_value(value))
    return value


def _pairs_hint(opts):
    """Say what was meant by a word that is neither KEY nor VALUE."""
    if str(opts[0]).endswith((".yaml", ".yml", ".py")):
        return "; a config file follows --config-file"
    return "; a space stands between the two, and no '='" if "=" in " ".join(map(str, opts)) else ""


def _nearest_key(cfg, key):
    """Say which key a misspelt one is nearest to; nothing of one that exists, or is like none."""
    known = all_values(cfg)
    near = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    return f"; the nearest is {near[0]}" if near else ""


def _reason(error):
    return str(error.args[0] if error.args else error).rstrip(".!")


def _import_modules(layers):
    names = []
    for layer in layers:
        if "BALANCE.IMPORTS" in layer.values:
            value = CfgNode._decode_cfg_value(layer.values["BALANCE.IMPORTS"])
            folder = "" if layer.source == COMMAND_LINE else os.path.dirname(layer.source)
            layer.values["BALANCE.IMPORTS"] = names = resolve_imports(value, folder)
    import_modules(names)


def _fragment(name, layers):
    """Return the file that a name of ``--with`` means for the detector of ``layers``."""
    if name.endswith((".yaml", ".yml")):
        return name
    settings = [layer.values.get("MODEL.META_ARCHITECTURE") for layer in layers]
    architecture = next((s for s in reversed(settings) if s), "GeneralizedRCNN")
    folders = _fragment_folders(architecture)
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return str(folder / f"{name}.yaml")
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise InputError(
        f"--with {name}: unknown for {architecture}{_fragment_hint(name, known)}; known are: "
        f"{', '.join(known)}, or the path of a .yaml file."
    )


def _fragment_folders(architecture):
    return [FRAGMENTS, *(FRAGMENTS / name for name in _FRAGMENT_FOLDERS.get(architecture, ()))]


def _fragment_hint(name, known):
    """Say which detectors a fragment is for, or which name a misspelt one is nearest to."""
    fitting = [
        architecture
        for architecture in _FRAGMENT_FOLDERS
        if any((folder / f"{name}.yaml").is_file() for folder in _fragment_folders(architecture))
    ]
    if fitting:
        return f", it is for {' and '.join(fitting)}"
    near = difflib.get_close_matches(name, known, n=1)
    return f", the nearest is {near[0]}" if near else ""
