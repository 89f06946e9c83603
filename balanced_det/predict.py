"""Detect objects with a checkpoint alone: ``python -m balanced_det.predict CHECKPOINT IMAGES ...``.

A checkpoint of this project brings its classes, its config and, after an evaluation, what precision
each class had at which score. So nothing else is needed: no config file and no annotations. Written
are a picture of each image, or a video, with the objects and their names, and ``predictions.json``
in COCO format, with the data set's own category ids and a ``score`` for each object.

Detectron2's own tools work too: :func:`predictor_config` returns a config for its
``DefaultPredictor``, whose metadata name the classes for its ``Visualizer``.
"""

import argparse
import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, transforms
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from . import detectors
from .build import counting
from .config import load_config
from .config.imports import import_modules, resolve_imports
from .config.saved import saved_config
from .data.annotations import read_json
from .data.images import read_image
from .engine.checkpoint import Checkpointer, read_checkpoint, untrained
from .errors import InputError, printable
from .evaluation.evaluator import run_lengths_of
from .evaluation.operating_points import OperatingPoints, with_fallback
from .logs import escape_log_records
from .report import write_json
from .report.pictures import class_color, draw_objects

logger = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
BEST_F1 = "best-f1"


@dataclass(frozen=True, eq=False)
class Served:
    """What a checkpoint brings to be used alone.

    Attributes:
        path: the file.
        cfg: its config; ``MODEL.WEIGHTS`` is the file, and ``DATASETS.TEST`` names a data set whose
            metadata have the classes.
        names, ids: of the K classes; ids are those of the training data's file.
        points: measured on validation data, or None.
    """

    path: str
    cfg: CfgNode
    names: list[str]
    ids: list
    points: OperatingPoints | None


class Predictor:
    """Detects objects in images, with the thresholds that were chosen.

    Args:
        served: of :func:`serve`.
        thresholds: (K,) the least score of each class; None for the config's own threshold.

    Attributes:
        model: the detector, in evaluation mode.
    """

    def __init__(self, served: Served, thresholds: np.ndarray | None = None):
        self.served = served
        self.thresholds = None if thresholds is None else torch.as_tensor(thresholds).float()
        cfg = served.cfg
        with counting(False):
            self.model = modeling.build_model(cfg)
        detectors.fold_frozen_norms(self.model)
        checkpointer = Checkpointer(self.model)
        checkpointer.load(served.path)
        missing = untrained(checkpointer)
        if missing:
            raise InputError(
                f"The checkpoint '{served.path}' lacks {len(missing)} of the model's weights, the "
                f"first is '{missing[0]}': it is of another config."
            )
        self.model.eval()
        self._resize = transforms.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
        )

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Return the objects of an image, on the CPU, by falling score.

        Args:
            image: (H, W, 3) uint8, RGB, upright.

        Returns:
            ``pred_boxes`` (corners in pixels of ``image``), ``scores``, ``pred_classes`` and, of a
            model that has them, ``pred_masks`` (n, H, W).
        """
        height, width = image.shape[:2]
        if self.served.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        resized = self._resize.get_transform(image).apply_image(np.ascontiguousarray(image))
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))  # (3, h, w)
        output = self.model([{"image": tensor, "height": height, "width": width}])[0]
        found = output["instances"].to("cpu")
        keep = found.scores.isfinite() & found.pred_boxes.tensor.isfinite().all(dim=1)
        if self.thresholds is not None:
            keep &= found.scores >= self.thresholds[found.pred_classes]
        found = found[keep]
        return found[found.scores.argsort(descending=True, stable=True)]


# --- What the checkpoint brings -------------------------------------------------------------------


def serve(
    checkpoint: str | os.PathLike,
    *,
    config_file: str | None = None,
    opts: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> Served:
    """Read what a checkpoint brings beside its weights.

    Args:
        checkpoint: a .pth file that this project wrote.
        config_file: a config to use in the place of the checkpoint's own, for one that has none.
        opts: KEY VALUE ... to set after that.
        imports: modules or .py files of yours that the config's methods need. What a checkpoint
            names is never imported by itself, since that would run code that it chooses.

    Raises:
        InputError: the file is damaged, no checkpoint, or lacks classes or a config.
    """
    path = os.fspath(checkpoint)
    content = read_checkpoint(path)
    classes = content.get("classes")
    if not classes:
        raise InputError(
            f"The checkpoint '{path}' does not tell its classes: evaluate or train with this "
            "version to write one that does."
        )
    import_modules(resolve_imports(list(imports), ""))
    if config_file is not None:
        cfg = load_config(config_file, list(opts))
    else:
        cfg = _config_of(content, path, opts)
    cfg = cfg.clone()
    cfg.defrost()
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        cfg.MODEL.DEVICE = "cpu"
    names, ids = list(classes["names"]), list(classes["ids"])
    cfg.MODEL.WEIGHTS = path
    cfg.DATASETS.TRAIN = ()  # nothing is counted in it
    cfg.DATASETS.TEST = (_name_classes(names, ids),)
    cfg.freeze()
    points = content.get("operating_points")
    if points is not None:
        points = _checked_points(OperatingPoints.from_json(points, f"'{path}'"), names, path)
    return Served(path, cfg, names, ids, points)


def predictor_config(checkpoint: str | os.PathLike, **options: Any) -> CfgNode:
    """Return a config with which Detectron2's ``DefaultPredictor`` serves a checkpoint.

    Its ``metadata`` then have the class names. Arguments and errors are those of :func:`serve`.
    """
    return serve(checkpoint, **options).cfg


def choose_thresholds(
    served: Served, choice: str | float, points: OperatingPoints | None = None
) -> np.ndarray:
    """Return the (K,) least score of each class.

    Args:
        served: of :func:`serve`.
        choice: "best-f1"; "precision=0.9", the lowest score at which a class had that precision;
            or one number for all classes.
        points: in the place of the checkpoint's own.

    A class of which nothing is known, for lack of validation objects, has the median of the others;
    a class that never had the wanted precision is not shown at all.
    """
    points = points if points is not None else served.points
    kind, _, number = str(choice).partition("=")
    if kind not in (BEST_F1, "precision"):
        return np.full(len(served.names), _fraction(choice, "--threshold"))
    if points is None:
        raise InputError(
            f"The checkpoint '{served.path}' has no operating points, which an evaluation after "
            f"training adds: give --points FILE of an evaluation, or a number as --threshold."
        )
    if kind == BEST_F1:
        return with_fallback(points.of_best_f1())
    thresholds = points.of_precision(_fraction(number, "precision"))
    is_measured = (points.precision >= 0).any(axis=0)
    thresholds = np.where(is_measured & np.isnan(thresholds), math.inf, thresholds)
    known = thresholds[np.isfinite(thresholds)]
    return with_fallback(thresholds, float(np.median(known)) if known.size else math.inf)


def read_points(path: str | os.PathLike, served: Served) -> OperatingPoints:
    """Read an ``operating_points.json`` of an evaluation of the same classes."""
    content = read_json(os.fspath(path), "file of operating points")
    points = OperatingPoints.from_json(content, f"'{os.fspath(path)}'")
    return _checked_points(points, served.names, path)


def _checked_points(points, names, path):
    if points.num_classes != len(names):
        raise InputError(
            f"'{os.fspath(path)}' has operating points of {points.num_classes} classes, but the "
            f"model has {len(names)}."
        )
    return points


def _config_of(content, path, opts):
    text = content.get("config")
    if not isinstance(text, str):
        raise InputError(
            f"The checkpoint '{path}' brings no config (it is older, or of a Python config): give "
            "its own with --config-file."
        )
    cfg, needed = saved_config(text, f"'{path}'", opts)
    if needed:
        logger.warning(
            "The checkpoint's config imports %s, which is not done by itself: --imports does.",
            printable(", ".join(map(str, needed))),
        )
    return cfg


def _name_classes(names, ids):
    """Return the name of a data set whose metadata have these classes."""
    digest = zlib.crc32(repr((names, ids)).encode("utf-8", "replace"))
    name = f"classes of a checkpoint {digest:08x}"
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        metadata.set(
            thing_classes=names,
            thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(ids)},
            thing_colors=[class_color(i) for i in range(len(names))],
        )
    return name


def _fraction(value, what):
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise InputError(f"{what} is '{value}'; it must be a number from 0 to 1, or {BEST_F1}.")
    return number


# --- What is looked at ----------------------------------------------------------------------------


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Return the images and videos of paths; of a folder all that are in it, in order of names.

    Raises:
        InputError: a path is missing, is of no known kind, or holds none.
    """
    found = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _kind(p) and p.is_file())
            if not inside:
                raise InputError(f"The folder '{path}' holds no image or video.")
            found += inside
        elif not path.is_file():
            raise InputError(f"'{path}' does not exist.")
        elif not _kind(path):
            known = ", ".join(IMAGES + VIDEOS)
            raise InputError(f"'{path}' is no image or video that can be read: {known}.")
        else:
            found.append(path)
    return found


def read_frames(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yield the frames of a video, (H, W, 3) uint8, RGB."""
    video = _opened(path)
    try:
        while True:
            is_there, frame = video.read()
            if not is_there:
                return
            yield np.ascontiguousarray(frame[:, :, ::-1])
    finally:
        video.release()


def _kind(path):
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGES else "video" if suffix in VIDEOS else None


def _opened(path):
    video = cv2.VideoCapture(os.fspath(path))
    if not video.isOpened():
        raise InputError(f"The video '{os.fspath(path)}' cannot be read.")
    return video


# --- What is written ------------------------------------------------------------------------------


class Predictions:
    """Collects what was found, as a data set in COCO format whose objects have a score.

    Args:
        names, ids: of the classes.
    """

    def __init__(self, names: Sequence[str], ids: Sequence):
        self._ids = ids
        self._content = {
            "images": [],
            "categories": [{"id": k, "name": n} for k, n in zip(ids, names, strict=True)],
            "annotations": [],
        }

    def add(self, file_name: str, size: tuple[int, int], found: Instances, **more: Any) -> None:
        """Add an image and what was found in it.

        Args:
            file_name: as it is written.
            size: height and width in pixels.
            found: of :class:`Predictor`.
            more: further entries of the image, a frame's number for example.
        """
        images, objects = self._content["images"], self._content["annotations"]
        image_id = len(images) + 1
        height, width = size
        images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width, **more}
        )
        masks = run_lengths_of(found, torch.ones(len(found), dtype=torch.bool))
        corners = found.pred_boxes.tensor.double().tolist()
        for i, (left, top, right, bottom) in enumerate(corners):
            box = [left, top, right - left, bottom - top]
            entry = {
                "id": len(objects) + 1,
                "image_id": image_id,
                "category_id": self._ids[int(found.pred_classes[i])],
                "bbox": [round(x, 2) for x in box],
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "score": round(float(found.scores[i]), 6),
            }
            if masks is not None:
                entry["segmentation"] = masks[i]
                entry["area"] = float(mask_util.area(masks[i]))
            objects.append(entry)

    @property
    def num_objects(self) -> int:
        """How many were found in all images."""
        return len(self._content["annotations"])

    def write(self, path: str | os.PathLike) -> Path:
        """Write all of it, whole or not at all."""
        return write_json(path, self._content)


def drawn(image: np.ndarray, found: Instances, names: Sequence[str]) -> Image.Image:
    """Return an image with what was found in it: boxes, masks, names and scores in percent."""
    classes = found.pred_classes.tolist()
    labels = [f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, found.scores.tolist())]
    return draw_objects(
        image,
        found.pred_boxes.tensor.tolist(),
        labels,
        [class_color(c) for c in classes],
        found.pred_masks.numpy() if found.has("pred_masks") else None,
    )


def predict_files(
    predictor: Predictor, files: Sequence[Path], out: Path, *, pictures: bool = True
) -> tuple[Predictions, list[str]]:
    """Detect in images and videos, and write pictures and ``predictions.json`` into ``out``.

    Returns:
        what was found, and a sentence for each file that could not be read; these are left out.
    """
    names = predictor.served.names
    predictions = Predictions(names, predictor.served.ids)
    failures = []
    targets = _targets(files, out)
    for file in tqdm(files, desc="Detecting", unit="file", disable=len(files) < 2):
        name, target = targets[file]
        target = target if pictures else None
        try:
            if _kind(file) == "video":
                _predict_video(predictor, file, name, target, predictions)
                continue
            image = read_image(file)
        except InputError as error:
            failures.append(str(error))
            continue
        found = predictor(image)
        predictions.add(name, image.shape[:2], found)
        if target is not None:
            _save(drawn(image, found, names), target)
    predictions.write(out / "predictions.json")
    return predictions, failures


def _targets(files, out):
    """Return {file: (its name in predictions.json, where its picture or video goes)}.

    Folders are kept, since two of them may hold files of one name.
    """
    absolute = [Path(os.path.abspath(file)) for file in files]
    base = os.path.commonpath([file.parent for file in absolute])
    targets = {}
    for file, whole in zip(files, absolute, strict=True):
        name = whole.relative_to(base)
        target = out / name
        own = (".mp4",) if _kind(file) == "video" else (".jpg", ".jpeg", ".png")
        if file.suffix.lower() not in own:  # what is read in more formats than are written
            target = target.with_name(target.name + own[-1])
        if target.exists() and target.resolve() == whole.resolve():
            raise InputError(f"--out '{out}' is where '{file}' lies, which would be replaced.")
        targets[file] = name.as_posix(), target
    return targets


def _save(picture, path):
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")
    os.replace(partial, path)


def _predict_video(predictor, file, name, target, predictions):
    video = _opened(file)
    rate, total = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    video.release()
    rate = rate if 0 < rate < 1000 else 25.0
    writer, partial = None, None
    frames = tqdm(
        read_frames(file), desc=printable(file.name), unit="frame", total=max(total, 0) or None
    )
    try:
        for number, image in enumerate(frames):
            found = predictor(image)
            predictions.add(name, image.shape[:2], found, frame=number)
            if target is None:
                continue
            picture = np.asarray(drawn(image, found, predictor.served.names))
            if writer is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".partial-{target.name}")
                size = picture.shape[1], picture.shape[0]
                code = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(os.fspath(partial), code, rate, size)
                if not writer.isOpened():
                    raise InputError(f"The video '{target}' cannot be written.")
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
        if writer is not None:
            writer.release()
            os.replace(partial, target)
            partial = None
    finally:
        if writer is not None:
            writer.release()
        if partial is not None and partial.exists():
            partial.unlink()


# --- The command line -----------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.predict",
        description="Detect objects in images and videos with a checkpoint alone.",
    )
    parser.add_argument("checkpoint", help="model_best.pth or another that a training wrote")
    parser.add_argument("inputs", nargs="+", help="images, videos, or folders of them")
    parser.add_argument("--out", default="output/predictions", help="folder (%(default)s)")
    parser.add_argument(
        "--threshold",
        help=f"{BEST_F1}: of each class the score with the best F1 on validation data; "
        "precision=0.9: the lowest score with that precision; or a number for all classes "
        f"({BEST_F1} where the checkpoint was evaluated, else 0.5)",
    )
    parser.add_argument(
        "--points",
        help="operating_points.json of an evaluation, for a checkpoint that has none",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write predictions.json alone")
    parser.add_argument("--config-file", help="for a checkpoint that brings no config")
    parser.add_argument(
        "--imports",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules or .py files of yours that the model needs; they run",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (a GPU where there is one)")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ... of the config"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    escape_log_records()
    options = _parser().parse_args(arguments)
    try:
        files = find_files(options.inputs)
        opts = [*options.opts, *(["MODEL.DEVICE", options.device] if options.device else [])]
        served = serve(
            options.checkpoint,
            config_file=options.config_file,
            opts=opts,
            imports=options.imports,
        )
        points = read_points(options.points, served) if options.points else served.points
        choice = options.threshold or (BEST_F1 if points is not None else 0.5)
        thresholds = choose_thresholds(served, choice, points)
        predictions, failures = predict_files(
            Predictor(served, thresholds),
            files,
            Path(options.out),
            pictures=not options.no_pictures,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"left out: {failure}", file=sys.stderr)
    print(
        f"{predictions.num_objects} objects in {len(files) - len(failures)} files, threshold "
        f"{choice}. Written to {Path(options.out) / 'predictions.json'}"
    )
    if not predictions.num_objects and len(failures) < len(files):
        print("Nothing scores that high; a lower --threshold shows what scores less.")
    return 2 if len(failures) == len(files) else 0


if __name__ == "__main__":
    sys.exit(main())
