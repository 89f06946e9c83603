"""What kinds of errors a detector makes: error types, confused classes, calibration of scores.

The error types are TIDE's (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", arXiv 2008.08115), counted by ``hotcoco`` at IoU 0.50 on boxes. They see what the LVIS
evaluation sees: a detection of a class that was not looked for in its image is left out.
"""

from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np

from ..data.annotations import Annotations
from .detections import Detections
from .lvis import MAX_DETS, Matcher

# TIDE's short names, in words.
ERROR_TYPES = {
    "Cls": "wrong class",
    "Loc": "box off",
    "Both": "wrong class and box off",
    "Dupe": "found twice",
    "Bkg": "nothing there",
    "Miss": "missed",
}
MAX_IMAGES = 5_000  # all objects and detections of so many are held at once


@dataclass(frozen=True, eq=False)
class Errors:
    """What :func:`analyse_errors` counts.

    Attributes:
        num_images: how many were looked at.
        types: {word of :data:`ERROR_TYPES`: (errors, AP50 that mending them adds, in percent)}.
        confused: (true class, predicted class, times), most first; at each class's threshold.
        bins: (least score, mean score, share that is right, detections) of each tenth of the score
            that holds a detection.
        calibration_error: expected calibration error, a fraction; None without a detection.
    """

    num_images: int
    types: dict = field(default_factory=dict)
    confused: list = field(default_factory=list)
    bins: list = field(default_factory=list)
    calibration_error: float | None = None


def analyse_errors(
    truth: Annotations,
    detections: Detections,
    thresholds: np.ndarray,
    max_dets: int | None = MAX_DETS,
    max_images: int = MAX_IMAGES,
) -> Errors:
    """Sort the errors of detections by kind.

    Args:
        truth: the checked annotations.
        detections: with boxes.
        thresholds: (K,) from which score a class's detections count as a decision; for confusion.
        max_dets: detections that count in an image.
        max_images: so many, at equal distances in the file, are looked at.
    """
    images = np.arange(len(truth.images))
    if len(images) > max_images:
        images = np.unique(np.linspace(0, len(images) - 1, max_images).round().astype(int))
    collected = _Collector(truth, max_dets)
    order = np.argsort(detections.image, kind="stable")
    starts = np.searchsorted(detections.image[order], [images, images + 1])  # (2, images)
    for image, start, end in zip(images.tolist(), *starts.tolist()):
        found = detections.take(order[start:end])
        collected.update(image, found.category, found.scores, found.boxes)
    entries, objects, rows = collected.all()
    classes = len(truth.categories)
    if not objects or not len(rows):
        return Errors(len(images))
    evaluation = _evaluation(entries, objects, rows, classes)
    evaluation.evaluate()
    tide = evaluation.tide_errors()
    calibration = evaluation.calibration()
    types = {
        words: (int(tide["counts"][key]), 100 * float(tide["delta_ap"][key]))
        for key, words in ERROR_TYPES.items()
    }
    bins = [
        (b["bin_lower"], b["avg_confidence"], b["avg_accuracy"], int(b["count"]))
        for b in calibration["bins"]
        if b["count"]
    ]
    decided = rows[rows[:, 5] >= thresholds[rows[:, 6].astype(int) - 1]]
    confused = _confused(entries, [o for o in objects if not o["iscrowd"]], decided, classes)
    return Errors(len(images), types, confused, bins, float(calibration["ece"]))


class _Collector(Matcher):
    """Keeps what a matcher would match: images, objects and detections as the library takes them.

    What is matched at once is lost to everything but AP, see :class:`Matcher`.
    """

    def __init__(self, truth: Annotations, max_dets: int | None):
        super().__init__(truth, "bbox", max_dets)
        self._state = _Parts()

    def all(self) -> tuple[list[dict], list[dict], np.ndarray]:
        """Return all images, objects, and detections (n, 7)."""
        self._match()
        parts = self._state
        return parts.images, parts.objects, np.concatenate([np.empty((0, 7)), *parts.rows])


class _Parts:
    def __init__(self) -> None:
        self.images: list[dict] = []
        self.objects: list[dict] = []
        self.rows: list[np.ndarray] = []

    def update(self, images: list[dict], objects: list[dict], rows: np.ndarray) -> None:
        self.images += images
        self.objects += objects
        self.rows.append(rows)


def _evaluation(images: list[dict], objects: list[dict], rows: np.ndarray, classes: int) -> Any:
    categories = [{"id": c + 1, "name": str(c)} for c in range(classes)]
    truth = hotcoco.COCO({"images": images, "annotations": objects, "categories": categories})
    evaluation = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
    evaluation.params.max_dets = [1, 10, 10**9]  # the limit of an image was applied before
    return evaluation


def _confused(
    images: list[dict], objects: list[dict], rows: np.ndarray, classes: int
) -> list[tuple[int, int, int]]:
    if not objects or not len(rows):
        return []
    evaluation = _evaluation(images, objects, rows, classes)
    matrix = evaluation.confusion_matrix(iou_thr=0.5)["matrix"].astype(int)[:classes, :classes]
    np.fill_diagonal(matrix, 0)
    true, predicted = np.nonzero(matrix)
    times = matrix[true, predicted]
    order = np.argsort(-times, kind="stable")
    return list(zip(true[order].tolist(), predicted[order].tolist(), times[order].tolist()))
