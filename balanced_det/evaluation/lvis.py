"""LVIS average precision and recall, of boxes or masks, from detections as they come.

The protocol is that of Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation"
(arXiv 1908.03195):

* an image counts for a class only where its annotators looked for that class: the class is
  annotated there or listed in the image's ``neg_category_ids``;
* a detection that matches nothing is ignored where the class is in the image's
  ``not_exhaustive_category_ids``;
* the ``max_dets`` best detections of an image count, all classes together; then objects and
  detections without area, an empty mask for example, are left out;
* objects marked ``ignore``, and crowds of COCO-format data, are no objects to find, and what
  matches them is no false alarm.

Beside it stands "fixed AP" of Dave et al., "Evaluating Large-Vocabulary Object Detectors: The
Devil is in the Details" (arXiv 2102.01066): no limit in an image, but the 10,000 best detections of
each class over the data set. A class then gains nothing from the low scores of other classes.

Boundary AP (Cheng et al., "Boundary IoU", arXiv 2103.16562), by which the LVIS challenge of 2021
ranked, is not computed: ``hotcoco`` 1.3 compares boxes, masks, oriented boxes and keypoints. The
file of detections holds all that another tool needs for it.

Matching is ``hotcoco``'s, which matches an image when it is given, so that workers match while they
infer and only their states are brought together (:class:`Matcher`). Nothing here needs Detectron2
or torch.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import hotcoco
import numpy as np

from ..data.annotations import (
    GROUPS,
    Annotations,
    Image,
    read_annotations,
    without_garbage_collection,
)
from ..errors import InputError
from .detections import Detections, read_detections

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "APr",
    "APc",
    "APf",
    "AR",
    "ARs",
    "ARm",
    "ARl",
)
IOU_TYPES = ("bbox", "segm")
SIZES = ("s", "m", "l")  # below 32^2 square pixels, up to 96^2, above
ABSENT = -1.0  # the convention of the `lvis` package for "nothing to average"
MAX_DETS = 300  # of an image, LVIS's official number
FIXED_MAX_DETS = 10_000  # of a class, for fixed AP


@dataclass(frozen=True)
class ClassResult:
    """What one class got; -1 stands for a class that has no object to find.

    Attributes:
        category_id: the class's id in the annotation file.
        name: the class's name there, made printable.
        group: "r", "c" or "f", None where it is unknown.
        ap: AP over IoU 0.50:0.95, a fraction.
        ar: recall of the counted detections, averaged over the same IoUs, a fraction.
        f1: the best F1 at IoU 0.50 of all score thresholds, a fraction.
        threshold: the score threshold that gives it; NaN where no detection is right.
        objects: how many there are to find.
    """

    category_id: int
    name: str
    group: str | None
    ap: float
    ar: float = ABSENT
    f1: float = ABSENT
    threshold: float = float("nan")
    objects: int = 0


@dataclass(frozen=True)
class LVISResult:
    """What one evaluation gives.

    Attributes:
        metrics: the numbers of :data:`METRICS` as fractions; -1 where nothing is averaged.
        classes: a :class:`ClassResult` for each class, by ascending category id.
        protocol: how they were measured, for whoever reads the numbers later.
        precision, scores: (101, K), see
            :class:`~balanced_det.evaluation.operating_points.OperatingPoints`.
    """

    metrics: dict
    classes: list
    protocol: dict = field(default_factory=dict)
    precision: np.ndarray | None = field(default=None, repr=False, compare=False)
    scores: np.ndarray | None = field(default=None, repr=False, compare=False)


def evaluate_lvis(
    annotations: Annotations | Mapping | str | os.PathLike,
    detections: Iterable[Mapping],
    iou_type: str = "bbox",
    max_dets: int = MAX_DETS,
    class_groups: Mapping[int, str] | None = None,
) -> dict[str, float]:
    """Return the numbers of :data:`METRICS` for ``detections``, as fractions.

    The numbers are those of the ``lvis`` package, also its -1 where nothing is to be averaged (no
    object of that size, no class of that group); such classes take part in no average. No
    detections at all give 0, where that package fails. ``AR`` is its ``AR@300``, at ``max_dets``.

    Args:
        annotations: LVIS v0.5, LVIS v1 or COCO format, a path or the dictionary itself
            (:mod:`balanced_det.data.annotations` has the rules), or what
            :func:`~balanced_det.data.annotations.read_annotations` returned. An image without
            ``neg_category_ids`` (COCO) counts as annotated with every class.
        detections: dictionaries with ``image_id``, ``category_id`` (as in the annotations),
            ``score`` and ``bbox`` (x, y, width, height in pixels) or, for masks, ``segmentation``
            (run lengths). Sizes are box areas for "bbox" and mask areas for "segm".
        iou_type: "bbox" or "segm".
        max_dets: detections that count in an image, those of the highest scores.
        class_groups: category id -> "r", "c" or "f", for classes whose annotation has no
            ``frequency``; neither gives APr, APc and APf of -1.

    Nothing that is passed in is modified.

    Raises:
        InputError: annotations that cannot be used, or a detection of an image or class that
            they do not list.
    """
    return lvis_result(annotations, detections, iou_type, max_dets, class_groups).metrics


@without_garbage_collection()
def lvis_result(
    annotations: Annotations | Mapping | str | os.PathLike,
    detections: Iterable[Mapping],
    iou_type: str = "bbox",
    max_dets: int = MAX_DETS,
    class_groups: Mapping[int, str] | None = None,
) -> LVISResult:
    """Evaluate as :func:`evaluate_lvis` does and return the :class:`LVISResult`."""
    truth = annotations if isinstance(annotations, Annotations) else read_annotations(annotations)
    matcher = Matcher(truth, iou_type, max_dets)  # refuses what it cannot use first
    matcher.update_all(read_detections(detections, truth, iou_type))
    return matcher.result(class_groups)


def fixed_result(
    truth: Annotations,
    detections: Detections,
    iou_type: str = "bbox",
    class_groups: Mapping[int, str] | None = None,
    per_class: int = FIXED_MAX_DETS,
) -> LVISResult:
    """Return fixed AP: the ``per_class`` best detections of each class count, in any image."""
    counted = best_of_each(detections.category, detections.scores, per_class)
    best = detections.take(np.flatnonzero(counted))
    matcher = Matcher(truth, iou_type, None)
    matcher.update_all(best)
    result = matcher.result(class_groups)
    return LVISResult(
        result.metrics, result.classes, {**result.protocol, "max_dets_per_class": per_class}
    )


def best_of_each(group: np.ndarray, scores: np.ndarray, most: int) -> np.ndarray:
    """Return (n,) bool: whether a detection is among the ``most`` best of its group.

    Of equal scores the first are.

    Args:
        group: (n,) integers of at least 0, the class or the image of each detection.
        scores: (n,) finite.
        most: detections of a group.
    """
    if np.bincount(group).max(initial=0) <= most:
        return np.ones(len(group), dtype=bool)
    order = np.lexsort((-scores, group))  # by group, the best first
    groups = group[order]
    rank = np.arange(len(order)) - np.searchsorted(groups, groups)
    counted = np.zeros(len(order), dtype=bool)
    counted[order[rank < most]] = True
    return counted


class Matcher:
    """Matches detections to objects, an image at a time, and gives the numbers in the end.

    Workers have a matcher each and give it their images; :meth:`to_bytes` and :meth:`merged` bring
    them together. Images that no matcher was given count as images without a detection.

    Args:
        truth: the checked annotations.
        iou_type: "bbox" or "segm".
        max_dets: detections that count in an image; None for all.

    Raises:
        InputError: ``iou_type`` or ``max_dets`` is unknown; "segm" and an object has no mask, or
            its image no size.
    """

    _BATCH = 64  # images that are matched at once, on all cores

    def __init__(self, truth: Annotations, iou_type: str = "bbox", max_dets: int | None = MAX_DETS):
        if iou_type not in IOU_TYPES:
            raise InputError(f"iou_type is '{iou_type}'; known are: {', '.join(IOU_TYPES)}.")
        if max_dets is not None and (type(max_dets) is not int or max_dets < 1):
            raise InputError(f"max_dets is {max_dets}; it must be a positive integer.")
        self._truth = truth
        self._iou_type = iou_type
        self._max_dets = max_dets
        if iou_type == "segm":
            _check_masks(truth)
        params = hotcoco.Params(iou_type)
        # Its limit is of an image and class: out of the way, ours is applied before. Its own LVIS
        # mode has a limit of 300 an image that cannot be changed, so what LVIS adds to COCO is done
        # here: `_looked_for` and `_region_entry`.
        params.max_dets = [10**9]
        categories = [{"id": c + 1, "name": str(c)} for c in range(len(truth.categories))]
        self._state: Any = hotcoco.StreamingEval(categories, iou_type, params=params)
        self._given = np.zeros(len(truth.images), dtype=bool)
        self._waiting: list[Any] = []
        self._num_waiting = 0
        rows = _objects(truth)  # indices of the objects that count
        self._rows = rows[np.argsort(truth.image[rows], kind="stable")]  # by image
        self._first_row = np.searchsorted(
            truth.image[self._rows], np.arange(len(truth.images) + 1)
        )  # (I + 1,)
        # Pairs of an image and a class are numbers, image * K + class, in ascending order.
        self._not_exhaustive = _listed_pairs(truth, "not_exhaustive_category_ids")
        present = truth.image[self._rows] * len(truth.categories) + truth.category[self._rows]
        self._looked_for = np.union1d(present, _listed_pairs(truth, "neg_category_ids"))
        # COCO: for every class.
        self._all_looked_for = np.array([i.neg_category_ids is None for i in truth.images])

    def update(
        self,
        image: int,
        category: np.ndarray,
        scores: np.ndarray,
        boxes: np.ndarray | None = None,
        masks: Sequence[Mapping] | None = None,
    ) -> None:
        """Match the detections of an image; each image once.

        Args:
            image: its index in the annotations' ``images``.
            category: (n,) integers, classes 0 ... K-1.
            scores: (n,) finite.
            boxes: (n, 4) float, x, y, width, height in pixels, finite; needed for "bbox".
            masks: n run lengths of the image's size; needed for "segm".

        Raises:
            InputError: the image was given before, or a mask is none of this image.
        """
        if self._iou_type == "bbox":
            boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        self._add(
            range(image, image + 1), np.full(len(scores), image), category, scores, boxes, masks
        )

    def update_all(self, detections: Detections) -> None:
        """Match the detections of all images.

        Raises:
            InputError: as :meth:`update`.
        """
        order = np.argsort(detections.image, kind="stable")
        for first in range(0, len(self._truth.images), self._BATCH):
            images = range(first, min(first + self._BATCH, len(self._truth.images)))
            start, end = np.searchsorted(detections.image, (first, images.stop), sorter=order)
            part = detections.take(order[start:end])
            self._add(images, part.image, part.category, part.scores, part.boxes, part.masks)

    def _add(
        self,
        images: range,
        image: np.ndarray,
        category: np.ndarray,
        scores: np.ndarray,
        boxes: np.ndarray | None,
        masks: Sequence[Mapping] | None,
    ) -> None:
        """Let the detections of some images wait; when they are many enough, match them.

        Args:
            images: range of the images.
            image: (n,) the image of each detection, ascending.
            category, scores, boxes, masks: as of :meth:`update`, of all of them.
        """
        given = self._given[images.start : images.stop]
        if given.any():
            twice = self._truth.images[images[int(given.argmax())]]
            raise InputError(f"Image {twice.id} is evaluated twice.")
        given[:] = True
        if self._iou_type == "bbox":
            boxes = np.asarray(boxes)
            area = boxes[:, 2] * boxes[:, 3]
        else:
            area = _mask_areas(masks or (), image, self._truth.images)
            # The library takes a detection's size from its box: one of the mask's area.
            boxes = np.tile((0.0, 0.0, 1.0, 1.0), (len(area), 1))
            boxes[:, 2] = area
        # As in the `lvis` package: what has no area may be among the best, but does not count.
        counted = (area > 0) & (area < np.inf)
        counted &= self._is_looked_for(images, image, category)
        if self._max_dets is not None:
            counted &= best_of_each(image - images.start, scores, self._max_dets)
        rows = np.empty((np.count_nonzero(counted), 7))
        rows[:, 0] = image[counted] + 1
        rows[:, 1:5] = boxes[counted]
        rows[:, 5] = scores[counted]
        rows[:, 6] = category[counted] + 1
        of_masks = list(itertools.compress(masks or (), counted.tolist()))
        self._waiting.append((images, rows, of_masks))
        self._num_waiting += len(images)
        if self._num_waiting >= self._BATCH:
            self._match()

    def to_bytes(self) -> tuple[bytes, np.ndarray]:
        """Return the state, to be handed to another process for :meth:`merged`."""
        self._match()
        return self._state.to_bytes(), np.packbits(self._given)

    @classmethod
    def merged(
        cls,
        truth: Annotations,
        iou_type: str,
        max_dets: int | None,
        states: Iterable[tuple[bytes, np.ndarray]],
    ) -> "Matcher":
        """Return the matcher that was given what those of ``states`` were given together.

        Raises:
            InputError: two of them were given the same image.
        """
        matcher = cls(truth, iou_type, max_dets)
        parts = []
        for state, packed in states:
            given = np.unpackbits(packed, count=len(truth.images)).astype(bool)
            if (given & matcher._given).any():
                image = truth.images[int((given & matcher._given).argmax())]
                raise InputError(f"Image {image.id} is evaluated by two workers.")
            matcher._given |= given
            parts.append(hotcoco.StreamingEval.from_bytes(state))
        matcher._state = hotcoco.StreamingEval.merge(parts)
        return matcher

    def result(self, class_groups: Mapping[int, str] | None = None) -> LVISResult:
        """Return the numbers; the matcher cannot be used after that.

        Args:
            class_groups: category id -> "r", "c" or "f", where the annotations have none.
        """
        groups = class_group_list(self._truth, class_groups or {})
        self._match_rest()
        evaluation = self._state.finalize()
        evaluation.accumulate()
        curves = evaluation.eval or {}
        precision = np.asarray(curves["precision"])[..., 0]  # (10 IoUs, 101 recalls, K, 4 sizes)
        recall = np.asarray(curves["recall"])[..., 0]  # (10 IoUs, K, 4 sizes)
        scores = np.asarray(curves["scores"])[0, :, :, 0, 0]  # (101 recalls, K), at IoU 0.50
        return LVISResult(
            _metrics(precision, recall, groups),
            _class_results(self._truth, groups, precision, recall, scores),
            self._protocol(),
            precision[0, :, :, 0],
            scores,
        )

    def _match_rest(self) -> None:
        """Match what waits, and the images that were not given as images without a detection."""
        for image in np.flatnonzero(~self._given).tolist():
            self._waiting.append((range(image, image + 1), np.empty((0, 7)), []))
        self._match()

    def _is_looked_for(self, images: range, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """(n,) bool: whether the image's annotators looked for the class; -1 is no class here."""
        table = np.zeros((len(images), len(self._truth.categories)), dtype=bool)
        table[self._all_looked_for[images.start : images.stop]] = True
        table.ravel()[self._pairs_of(images, self._looked_for)] = True
        return table[image - images.start, category] & (category >= 0)

    def _pairs_of(self, images: range, pairs: np.ndarray) -> np.ndarray:
        """The pairs of some images, as numbers that begin with 0 at the first of the images."""
        classes = len(self._truth.categories)
        first, last = images.start * classes, images.stop * classes
        return pairs[slice(*np.searchsorted(pairs, (first, last)))] - first

    def _match(self) -> None:
        """Give the waiting images to the library, with their objects."""
        if self._waiting:
            images, objects, rows, shapes = self._take_waiting()
            self._state.update(images, objects, rows, **shapes)

    def _take_waiting(self) -> tuple[list[dict], list[dict], np.ndarray, dict[str, Any]]:
        """Images, objects, detections (n, 7) and their masks as the library takes them."""
        images: list[dict] = []
        objects: list[dict] = []
        masks: list[Mapping] = []
        for block, rows, block_masks in self._waiting:
            for image in block:
                entry = self._truth.images[image]
                size = {"height": entry.height or 1, "width": entry.width or 1}
                images.append({"id": image + 1, **size})
            first, last = self._first_row[block.start], self._first_row[block.stop]
            objects += self._object_entries(self._rows[first:last])
            objects += self._region_entries(block, rows)
            masks += block_masks
        rows = np.concatenate([rows for _, rows, _ in self._waiting])
        shapes = {"segmentation": masks} if self._iou_type == "segm" else {}
        self._waiting, self._num_waiting = [], 0
        return images, objects, rows, shapes

    def _region_entries(self, images: range, rows: np.ndarray) -> list[dict]:
        """Crowds that hold a whole image, for classes of which not all objects are annotated.

        A detection that matches no object lies in it, so it is ignored, as LVIS has it.
        """
        classes = len(self._truth.categories)
        pairs = self._pairs_of(images, self._not_exhaustive)
        if not len(pairs):
            return []
        found = np.zeros(len(images) * classes, dtype=bool)
        image, category = rows[:, [0, 6]].astype(np.int64).T - 1
        found[(image - images.start) * classes + category] = True
        entries = []
        for pair in (pairs[found[pairs]] + images.start * classes).tolist():
            image, category = divmod(pair, classes)
            entry = {
                "id": len(self._truth) + 1 + pair,
                "image_id": image + 1,
                "category_id": category + 1,
                "bbox": [-1e7, -1e7, 2e7, 2e7],
                "area": 4e14,
                "iscrowd": 1,
            }
            if self._iou_type == "segm":
                height, width = self._truth.images[image].height, self._truth.images[image].width
                entry["segmentation"] = {"size": [height, width], "counts": [0, height * width]}
            entries.append(entry)
        return entries

    def _object_entries(self, rows: np.ndarray) -> list[dict]:
        """The objects of the annotations at ``rows`` as the library takes them."""
        truth = self._truth
        # Taken at the rows before all else: these are few of many, and there is a call an image.
        columns = (truth.image, truth.category, truth.boxes, truth.crowd.view(np.int8))
        entries = [
            # Numbered from 1: 0 may stand for "matched nothing".
            {
                "id": i + 1,
                "image_id": image + 1,
                "category_id": category + 1,
                "bbox": box,
                "iscrowd": crowd,
            }
            for i, image, category, box, crowd in zip(
                rows.tolist(), *(column[rows].tolist() for column in columns), strict=True
            )
        ]
        area = truth.area[rows]
        if self._iou_type == "segm":
            for place, (index, entry) in enumerate(zip(rows.tolist(), entries, strict=True)):
                image = truth.images[truth.image[index]]
                entry["segmentation"] = _as_run_lengths(truth.segmentation[index], image)
                if np.isnan(area[place]):
                    area[place] = _mask_area(entry["segmentation"], image)
        else:
            own = truth.boxes[rows, 2:].clip(min=0).prod(axis=1)
            area = np.where(np.isnan(area), own, area)
        # An area in no range of sizes is LVIS's way to ignore an object.
        area = np.where(truth.ignore[rows], -1.0, area)
        for entry, value in zip(entries, area.tolist(), strict=True):
            entry["area"] = value
        return entries

    def _protocol(self) -> dict[str, Any]:
        federated = any(image.neg_category_ids is not None for image in self._truth.images)
        return {
            "protocol": "LVIS" if federated else "LVIS, every class looked for in every image",
            "iou_type": self._iou_type,
            "iou_thresholds": "0.50:0.95:0.05",
            "max_dets_per_image": self._max_dets,
            "images": len(self._truth.images),
            "images_given": int(self._given.sum()),
            "objects": len(self._rows),
            "classes": len(self._truth.categories),
            "matching": f"hotcoco {hotcoco.__version__}",
        }


def class_group_list(truth: Annotations, class_groups: Mapping[int, str]) -> list[str | None]:
    """Each class's "r", "c" or "f" or None: the annotations' own, else of ``class_groups``."""
    groups = []
    for category in truth.categories:
        group = category.frequency or class_groups.get(category.id)
        if group not in (*GROUPS, None):
            raise InputError(
                f"{truth.source}: category {category.id} has frequency '{group}'; known are: "
                f"{', '.join(GROUPS)}."
            )
        groups.append(group)
    return groups


def _objects(truth: Annotations) -> np.ndarray:
    """Indices of what counts as an object: finite boxes, and not an area of 0 (as `lvis`)."""
    no_area = np.isnan(truth.area) & ~(truth.boxes[:, 2:] > 0).all(axis=1)
    return np.flatnonzero(truth.finite() & ~(truth.area <= 0) & ~no_area)


def _listed_pairs(truth: Annotations, key: str) -> np.ndarray:
    """Pairs of each image and the classes that it lists at ``key``, ascending.

    Ids that are no class's have no effect, as in `lvis`.
    """
    listed = [getattr(image, key) or () for image in truth.images]
    image = np.repeat(np.arange(len(listed)), list(map(len, listed)))
    ids = np.fromiter(itertools.chain.from_iterable(listed), np.int64, len(image))
    known = np.array([category.id for category in truth.categories])
    classes = np.searchsorted(known, ids).clip(max=len(known) - 1)
    return np.unique((image * len(known) + classes)[known[classes] == ids])


def _check_masks(truth: Annotations) -> None:
    index = truth.first_without_mask()
    if index is not None:
        raise InputError(
            f"{truth.source}: {truth.named(index)} has no mask to evaluate masks with."
        )
    for image in truth.images:
        if image.height is None or image.width is None:
            raise InputError(f"{truth.source}: image {image.id} has no `height` and `width`.")


def _as_run_lengths(mask: Any, image: Any) -> Any:
    """Polygons or run lengths as the library takes them."""
    if not mask:  # polygons, of which none has three corners
        return {"size": [image.height, image.width], "counts": [image.height * image.width]}
    return mask


def _mask_area(mask: Any, image: Any) -> float:
    """Pixels of polygons or run lengths."""
    if isinstance(mask, list):
        parts = [hotcoco.mask.fr_poly(polygon, image.height, image.width) for polygon in mask]
        mask = hotcoco.mask.merge(parts)
    return float(hotcoco.mask.area(mask))


def _mask_areas(masks: Sequence[Mapping], image: np.ndarray, images: Sequence[Image]) -> np.ndarray:
    """(n,) pixels of each mask; ``image`` (n,) ascending tells which of ``images`` it is in."""
    areas = [np.zeros(0)]
    for index, of_image in itertools.groupby(zip(image.tolist(), masks), itemgetter(0)):
        areas.append(_areas_in_image([mask for _, mask in of_image], images[index]))
    return np.concatenate(areas)


def _areas_in_image(masks: Sequence[Any], image: Image) -> np.ndarray:
    size = [image.height, image.width]
    wrong = next((list(mask["size"]) for mask in masks if list(mask["size"]) != size), None)
    if wrong is not None:
        raise InputError(f"A mask detected in image {image.id} has size {wrong}, not {size}.")
    try:
        return np.asarray(hotcoco.mask.area(list(masks)), dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"A mask detected in image {image.id} is broken: {error}.") from None


def _metrics(
    precision: np.ndarray, recall: np.ndarray, groups: Sequence[str | None]
) -> dict[str, float]:
    """The numbers of :data:`METRICS`.

    A class without objects of a size is -1 throughout, and each other class has as many numbers as
    the next, so the mean of all that are present is the mean of the classes' means.
    """
    precision = precision.mean(axis=1)  # (10 IoUs, K, 4 sizes)
    ap, ar = precision.mean(axis=0), recall.mean(axis=0)  # (K, 4 sizes)
    values = [
        _mean(ap[:, 0]),
        _mean(precision[0, :, 0]),
        _mean(precision[5, :, 0]),
        *(_mean(ap[:, size]) for size in (1, 2, 3)),
        *(_mean(ap[[group == g for group in groups], 0]) for g in GROUPS),
        *(_mean(ar[:, size]) for size in (0, 1, 2, 3)),
    ]
    return dict(zip(METRICS, values, strict=True))


def _class_results(
    truth: Annotations,
    groups: Sequence[str | None],
    precision: np.ndarray,
    recall: np.ndarray,
    scores: np.ndarray,
) -> list[ClassResult]:
    # A class without objects is -1 throughout, and so are its means.
    ap = precision[..., 0].mean(axis=(0, 1)).round(15).tolist()  # (K,)
    ar = recall[..., 0].mean(axis=0).round(15).tolist()  # (K,)
    precision_50 = precision[0, :, :, 0]  # (101, K)
    recalls = np.linspace(0.0, 1.0, len(precision_50))[:, None]  # (101, 1)
    f1 = 2 * precision_50 * recalls / np.maximum(precision_50 + recalls, 1e-12)
    best = f1.argmax(axis=0)[None]  # (1, K)
    best_f1, threshold = (np.take_along_axis(x, best, 0)[0].tolist() for x in (f1, scores))
    counted = _objects(truth)
    counted = counted[~(truth.crowd | truth.ignore)[counted]]
    objects = np.bincount(truth.category[counted], minlength=len(ap)).tolist()
    rows = []
    for c, (category, group) in enumerate(zip(truth.categories, groups)):
        f1_of_class = ABSENT if ap[c] == ABSENT else best_f1[c]
        score = threshold[c] if f1_of_class > 0 else float("nan")
        rows.append(
            ClassResult(
                category.id, category.name, group, ap[c], ar[c], f1_of_class, score, objects[c]
            )
        )
    return rows


def _mean(values: np.ndarray) -> float:
    present = values[values > ABSENT]
    # The library, as `lvis`, adds 2e-16 to what it divides by: a perfect class shall have 1.
    return round(float(present.mean()), 15) if present.size else ABSENT
