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

Matching is ``hotcoco``'s, which matches an image when it is given, so that workers match while they
infer and only their states are brought together (:class:`Matcher`). Nothing here needs Detectron2
or torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hotcoco
import numpy as np

from ..data.annotations import GROUPS, Annotations, read_annotations
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
    """

    category_id: int
    name: str
    group: str | None
    ap: float
    ar: float = ABSENT
    f1: float = ABSENT
    threshold: float = float("nan")


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
    annotations,
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


def lvis_result(
    annotations,
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
    counted = best_of_each_class(detections.category, detections.scores, per_class)
    best = detections.take(np.flatnonzero(counted))
    matcher = Matcher(truth, iou_type, None)
    matcher.update_all(best)
    result = matcher.result(class_groups)
    return LVISResult(
        result.metrics, result.classes, {**result.protocol, "max_dets_per_class": per_class}
    )


def best_of_each_class(
    category: np.ndarray, scores: np.ndarray, per_class: int = FIXED_MAX_DETS
) -> np.ndarray:
    """Return (n,) bool: whether a detection is among the ``per_class`` best of its class.

    Of equal scores the first are.
    """
    order = np.lexsort((-scores, category))  # by class, the best first
    classes = category[order]
    rank = np.arange(len(order)) - np.searchsorted(classes, classes)
    counted = np.zeros(len(order), dtype=bool)
    counted[order[rank < per_class]] = True
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
        self._state = hotcoco.StreamingEval(categories, iou_type, params=params)
        self._given = np.zeros(len(truth.images), dtype=bool)
        self._waiting: list[Any] = []
        self._rows = _objects(truth)  # indices of the objects that count
        self._objects_of = _grouped(truth.image[self._rows], len(truth.images))
        self._class_index = {category.id: c for c, category in enumerate(truth.categories)}

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
        if self._given[image]:
            raise InputError(f"Image {self._truth.images[image].id} is evaluated twice.")
        self._given[image] = True
        order = np.argsort(-scores, kind="stable")[: self._max_dets]
        if self._iou_type == "bbox":
            boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order]
            area = boxes[:, 2] * boxes[:, 3]
            masks = [None] * len(order)
        else:
            masks = [masks[i] for i in order]
            area = _mask_areas(masks, self._truth.images[image])
            # The library takes a detection's size from its box: one of the mask's area.
            boxes = np.zeros((len(order), 4))
            boxes[:, 2], boxes[:, 3] = area, 1
        rows = np.empty((len(order), 7))
        rows[:, 0] = image + 1
        rows[:, 1:5] = boxes
        rows[:, 5] = scores[order]
        rows[:, 6] = category[order] + 1
        counted = (area > 0) & (area < np.inf)  # as the `lvis` package
        counted &= self._looked_for(image, category[order])
        masks = [mask for mask, is_counted in zip(masks, counted) if is_counted]
        self._waiting.append((image, rows[counted], masks))
        if len(self._waiting) >= self._BATCH:
            self._match()

    def update_all(self, detections: Detections) -> None:
        """Match the detections of all images."""
        of_image = _grouped(detections.image, len(self._truth.images))
        for image, rows in enumerate(of_image):
            self.update(
                image,
                detections.category[rows],
                detections.scores[rows],
                None if detections.boxes is None else detections.boxes[rows],
                None if detections.masks is None else [detections.masks[i] for i in rows],
            )

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
        curves = evaluation.eval
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

    def _match_rest(self):
        """Match what waits, and the images that were not given as images without a detection."""
        for image in np.flatnonzero(~self._given):
            self._waiting.append((int(image), np.empty((0, 7)), []))
        self._match()

    def _looked_for(self, image, category):
        """(n,) bool: whether the image's annotators looked for the class."""
        negative = self._truth.images[image].neg_category_ids
        if negative is None:
            return np.ones(len(category), dtype=bool)  # COCO: for every class
        present = self._truth.category[self._rows[self._objects_of[image]]].tolist()
        return np.isin(category, present + self._listed(negative))

    def _listed(self, category_ids):
        """The classes of ids; ids that are no class's have no effect, as in `lvis`."""
        return [self._class_index[i] for i in category_ids if i in self._class_index]

    def _match(self):
        """Give the waiting images to the library, with their objects."""
        if self._waiting:
            images, objects, rows, shapes = self._take_waiting()
            self._state.update(images, objects, rows, **shapes)

    def _take_waiting(self):
        """Images, objects, detections (n, 7) and their masks as the library takes them."""
        images, objects, masks = [], [], []
        for image, rows, image_masks in self._waiting:
            entry = self._truth.images[image]
            objects_here = self._rows[self._objects_of[image]]
            images.append({"id": image + 1, "height": entry.height or 1, "width": entry.width or 1})
            objects.extend(self._object_entry(int(index)) for index in objects_here)
            found = set(rows[:, 6].astype(int).tolist())
            objects.extend(
                self._region_entry(image, c)
                for c in self._listed(entry.not_exhaustive_category_ids or ())
                if c + 1 in found
            )
            masks.extend(image_masks)
        rows = np.concatenate([rows for _, rows, _ in self._waiting])
        shapes = {"segmentation": masks} if self._iou_type == "segm" else {}
        self._waiting: list[Any] = []
        return images, objects, rows, shapes

    def _region_entry(self, image, c):
        """A crowd that holds the whole image, for a class of which not all objects are annotated.

        A detection that matches no object lies in it, so it is ignored, as LVIS has it.
        """
        entry = {
            "id": len(self._truth) + 1 + image * len(self._truth.categories) + c,
            "image_id": image + 1,
            "category_id": c + 1,
            "bbox": [-1e7, -1e7, 2e7, 2e7],
            "area": 4e14,
            "iscrowd": 1,
        }
        if self._iou_type == "segm":
            height, width = self._truth.images[image].height, self._truth.images[image].width
            entry["segmentation"] = {"size": [height, width], "counts": [0, height * width]}
        return entry

    def _object_entry(self, index):
        truth = self._truth
        image = truth.images[truth.image[index]]
        x, y, width, height = truth.boxes[index].tolist()
        entry = {
            # Numbered from 1: 0 may stand for "matched nothing".
            "id": index + 1,
            "image_id": int(truth.image[index]) + 1,
            "category_id": int(truth.category[index]) + 1,
            "bbox": [x, y, width, height],
            "iscrowd": int(truth.crowd[index]),
        }
        area = float(truth.area[index])
        if self._iou_type == "segm":
            entry["segmentation"] = _as_run_lengths(truth.segmentation[index], image)
            if np.isnan(area):
                area = _mask_area(entry["segmentation"], image)
        elif np.isnan(area):
            area = max(width, 0.0) * max(height, 0.0)
        # An area in no range of sizes is LVIS's way to ignore an object.
        return {**entry, "area": -1.0 if truth.ignore[index] else area}

    def _protocol(self):
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


def _objects(truth):
    """Indices of what counts as an object: finite boxes, and not an area of 0 (as `lvis`)."""
    no_area = np.isnan(truth.area) & ~(truth.boxes[:, 2:] > 0).all(axis=1)
    return np.flatnonzero(truth.finite() & ~(truth.area <= 0) & ~no_area)


def _grouped(values, count):
    """For each number below ``count``, the ascending indices at which ``values`` has it."""
    order = np.argsort(values, kind="stable")
    bounds = np.searchsorted(values[order], np.arange(1, count))
    return np.split(order, bounds)


def _check_masks(truth):
    index = truth.first_without_mask()
    if index is not None:
        raise InputError(
            f"{truth.source}: {truth.named(index)} has no mask to evaluate masks with."
        )
    for image in truth.images:
        if image.height is None or image.width is None:
            raise InputError(f"{truth.source}: image {image.id} has no `height` and `width`.")


def _as_run_lengths(mask, image):
    """Polygons or run lengths as the library takes them."""
    if not mask:  # polygons, of which none has three corners
        return {"size": [image.height, image.width], "counts": [image.height * image.width]}
    return mask


def _mask_area(mask, image):
    """Pixels of polygons or run lengths."""
    if isinstance(mask, list):
        parts = [hotcoco.mask.fr_poly(polygon, image.height, image.width) for polygon in mask]
        mask = hotcoco.mask.merge(parts)
    return float(hotcoco.mask.area(mask))


def _mask_areas(masks, image):
    """(n,) pixels of each mask of an image."""
    size = [image.height, image.width]
    if all(list(mask["size"]) == size for mask in masks):
        try:
            return np.asarray(hotcoco.mask.area(masks)) if masks else np.zeros(0)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"A mask detected in image {image.id} is broken: {error}.") from None
    wrong = next(list(mask["size"]) for mask in masks if list(mask["size"]) != size)
    raise InputError(f"A mask detected in image {image.id} has size {wrong}, not {size}.")


def _metrics(precision, recall, groups):
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


def _class_results(truth, groups, precision, recall, scores):
    # A class without objects is -1 throughout, and so are its means.
    ap = precision[..., 0].mean(axis=(0, 1)).round(15).tolist()  # (K,)
    ar = recall[..., 0].mean(axis=0).round(15).tolist()  # (K,)
    precision_50 = precision[0, :, :, 0]  # (101, K)
    recalls = np.linspace(0.0, 1.0, len(precision_50))[:, None]  # (101, 1)
    f1 = 2 * precision_50 * recalls / np.maximum(precision_50 + recalls, 1e-12)
    best = f1.argmax(axis=0)[None]  # (1, K)
    best_f1, threshold = (np.take_along_axis(x, best, 0)[0].tolist() for x in (f1, scores))
    rows = []
    for c, (category, group) in enumerate(zip(truth.categories, groups)):
        f1_of_class = ABSENT if ap[c] == ABSENT else best_f1[c]
        score = threshold[c] if f1_of_class > 0 else float("nan")
        rows.append(
            ClassResult(category.id, category.name, group, ap[c], ar[c], f1_of_class, score)
        )
    return rows


def _mean(values):
    present = values[values > ABSENT]
    # The library, as `lvis`, adds 2e-16 to what it divides by: a perfect class shall have 1.
    return round(float(present.mean()), 15) if present.size else ABSENT
