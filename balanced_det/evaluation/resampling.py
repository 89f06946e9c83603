"""AP of resampled images: how far a number would have been another on other validation images.

The bootstrap (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979) draws as many images
as there are, with replacement, again and again. Drawing an image twice gives it the weight 2, and
whether a detection is right does not depend on other images: so images are matched once
(:func:`match_records`), and the AP of each draw comes of weights (:func:`average_precision`). With
a weight of 1 for each image it is that of :func:`~balanced_det.evaluation.evaluate_lvis`.

Letters: I images, K classes, B draws, n detections. Nothing here needs Detectron2 or torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from ..data.annotations import Annotations
from .detections import Detections
from .lvis import MAX_DETS, Matcher

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
_RECALLS = np.linspace(0.0, 1.0, 101)
_MAX_ELEMENTS = 1 << 21  # of an array of (detections, draws): what fits into the caches


@dataclass(frozen=True, eq=False)
class MatchRecords:
    """What the detections of a run are, as LVIS's protocol counts them.

    Attributes:
        num_images, num_classes: I and K.
        image: (n,) int64, each detection's index in the annotations' ``images``. Detections stand
            by class, and those of a class by falling score; of equal scores those of the first
            image are first, as in the evaluation.
        category: (n,) int64, classes 0 ... K-1.
        correct: (n, 10) bool, whether it is the one that finds an object, at each IoU threshold.
        ignored: (n, 10) bool, whether it counts neither as right nor as a false alarm.
        object_image, object_category: image and class of each object that is to be found.
    """

    num_images: int
    num_classes: int
    image: np.ndarray
    category: np.ndarray
    correct: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray


def match_records(
    truth: Annotations,
    detections: Detections,
    iou_type: str = "bbox",
    max_dets: int | None = MAX_DETS,
) -> MatchRecords:
    """Match the detections of all images once; arguments are those of :class:`Matcher`."""
    recorder = _Recorder(truth, iou_type, max_dets)
    recorder.update_all(detections)
    return recorder.records()


class _Recorder(Matcher):
    """A matcher that keeps what each detection became, where its parent keeps a state."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # Of each image and class: image, class, score, and what they are at 10 IoUs.
        flags = np.empty((0, len(IOU_THRESHOLDS)), dtype=bool)
        none = np.empty(0, dtype=np.int64)
        self._found = [(none, none, np.empty(0), flags, flags)]
        self._objects_found = [np.empty((0, 2), dtype=np.int64)]

    def _match(self) -> None:
        if not self._waiting:
            return
        images, objects, rows, shapes = self._take_waiting()
        categories = [{"id": c + 1, "name": str(c)} for c in range(len(self._truth.categories))]
        truth = hotcoco.COCO({"images": images, "annotations": objects, "categories": categories})
        evaluation = hotcoco.COCOeval(truth, truth.load_res(rows, **shapes), self._iou_type)
        evaluation.params.max_dets = [10**9]
        evaluation.params.area_rng = [[0, 1e10]]
        evaluation.params.area_rng_lbl = ["all"]
        evaluation.evaluate()
        entry: Any
        for entry in evaluation.eval_imgs:
            place = entry["image_id"] - 1, entry["category_id"] - 1
            scores = np.array(entry["dtScores"])
            image, category = (np.full(len(scores), number) for number in place)
            matched, ignored = (
                np.array(entry[key], dtype=np.bool_).reshape(len(IOU_THRESHOLDS), len(scores)).T
                for key in ("dtMatched", "dtIgnore")
            )
            self._found.append((image, category, scores, matched & ~ignored, ignored))
            self._objects_found.append(np.full((sum(entry["gtInDenominator"]), 2), place))

    def records(self) -> MatchRecords:
        """Return what was recorded."""
        self._match_rest()
        image, category, scores, correct, ignored = map(np.concatenate, zip(*self._found))
        # Stable: by class, then score; equal scores stay by image, and in it as they were given.
        order = np.lexsort((image, -scores, category))
        objects = np.concatenate(self._objects_found)
        return MatchRecords(
            len(self._truth.images),
            len(self._truth.categories),
            image[order],
            category[order],
            correct[order],
            ignored[order],
            objects[:, 0],
            objects[:, 1],
        )


def draw_images(num_images: int, draws: int, seed: int = 0) -> np.ndarray:
    """Return (I, 1 + B) float32: how often each image counts; first all once, then B draws."""
    shares = np.full(num_images, 1 / max(num_images, 1))
    drawn = np.random.default_rng(seed).multinomial(num_images, shares, size=draws)
    return np.concatenate([np.ones((1, num_images)), drawn]).T.astype(np.float32)


def average_precision(records: MatchRecords, weights: np.ndarray) -> np.ndarray:
    """Return AP of each class in each draw, by recall interpolated at 101 points.

    :func:`plain_average_precision` says what is computed. All draws are computed at once: sums run
    over the detections that are right or ignored at some IoU; those that never are, most of them,
    only lower the precision of what follows, and enter as one sum between two of the others.

    Args:
        records: of a run.
        weights: (I, B) float32, whole numbers from 0 on, how often an image counts.

    Returns:
        (10, K, B) float32, for each IoU threshold; fractions, NaN where a draw holds no object of
        the class.
    """
    result = np.full(
        (len(IOU_THRESHOLDS), records.num_classes, weights.shape[1]), np.nan, dtype=np.float32
    )
    for c, detected, objects in _classes(records):
        if not len(objects):
            continue
        matters = (records.correct[detected] | records.ignored[detected]).any(axis=1)
        right = np.flatnonzero(records.correct[detected].any(axis=1))
        last = right[-1] + 1 if len(right) else 0  # what follows finds no object
        detected, matters = detected[:last], matters[:last]
        width = max(_MAX_ELEMENTS // max(last, 1), 1)
        for start in range(0, weights.shape[1], width):
            draws = slice(start, start + width)
            part = np.ascontiguousarray(weights[:, draws])
            result[:, c, draws] = _of_class(records, detected, matters, objects, part)
    return result


def _of_class(
    records: MatchRecords,
    detected: np.ndarray,
    matters: np.ndarray,
    objects: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """(10, B) AP of one class: n ``detected``, of which m matter."""
    total = weights[objects].sum(axis=0, dtype=np.float64)  # (B,)
    precision = np.zeros((len(IOU_THRESHOLDS), weights.shape[1]))
    if matters.any():
        counts = weights[records.image[detected]]  # (n, B)
        false_alarms = np.cumsum(np.where(matters[:, None], 0, counts), axis=0)[matters]  # (m, B)
        counts, detected = counts[matters], detected[matters]
        correct, ignored = records.correct[detected], records.ignored[detected]  # (m, 10)
        for t in range(len(IOU_THRESHOLDS)):
            hits = np.flatnonzero(correct[:, t])
            if not len(hits):
                continue
            wrong = ~(correct[:, t] | ignored[:, t])
            alarms = false_alarms + np.cumsum(counts * wrong[:, None], axis=0)
            found = np.cumsum(counts[hits], axis=0, dtype=np.float64)  # (hits, B)
            precision[t] = _interpolated(found, alarms[hits], total)
    precision[:, total == 0] = np.nan
    return precision


def _interpolated(found: np.ndarray, alarms: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(B,) mean over the 101 recalls of the best precision at that recall or above.

    Args:
        found: (hits, B) objects found up to each detection that is right.
        alarms: (hits, B) false alarms up to there.
        total: (B,) objects to find.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = found / (found + alarms)
        recall = found / total
    precision[~(found > 0)] = 0.0  # its image was not drawn
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # Of the 101 recalls, those up to each detection's, less those that an earlier one reached. NaN,
    # without an object, counts as reached; such draws are no numbers in the end.
    reached = np.searchsorted(_RECALLS, recall, side="right")
    new = np.diff(reached, axis=0, prepend=0)
    return (best * new).sum(axis=0) / len(_RECALLS)


def plain_average_precision(records: MatchRecords, weights: np.ndarray) -> np.ndarray:
    """Return what :func:`average_precision` does for one draw, by what it means.

    Each detection and each object is repeated as often as its image was drawn; precision and recall
    follow the repeated list; at each of 101 recalls the best precision at that recall or above
    counts, 0 where it is never reached.

    Args:
        records: of a run.
        weights: (I,) whole numbers.

    Returns:
        (10, K), NaN where no object of the class was drawn.
    """
    weights = weights.astype(np.int64)
    result = np.full((len(IOU_THRESHOLDS), records.num_classes), np.nan)
    for c, detected, objects in _classes(records):
        total = weights[objects].sum()
        if not total:
            continue
        repeated = np.repeat(detected, weights[records.image[detected]])
        for t in range(len(IOU_THRESHOLDS)):
            counted = repeated[~records.ignored[repeated, t]]
            found = np.cumsum(records.correct[counted, t])
            precision = found / np.arange(1, len(counted) + 1)
            recall = found / total
            best = [precision[recall >= r].max(initial=0.0) for r in _RECALLS]
            result[t, c] = np.mean(best)
    return result


def _classes(records: MatchRecords) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each class, the indices of its detections, and the images of its objects."""
    bounds = np.searchsorted(records.category, np.arange(records.num_classes + 1))
    order = np.argsort(records.object_category, kind="stable")
    images = records.object_image[order]
    object_bounds = np.searchsorted(
        records.object_category[order], np.arange(records.num_classes + 1)
    )
    for c in range(records.num_classes):
        yield (
            c,
            np.arange(bounds[c], bounds[c + 1]),
            images[object_bounds[c] : object_bounds[c + 1]],
        )
