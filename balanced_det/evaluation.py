"""LVIS average precision: the nine summary numbers and one row a class, from one evaluation.

The protocol is that of Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation"
(arXiv 1908.03195), computed by ``faster_coco_eval`` in its LVIS mode:

* an image counts for a class only where its annotators looked for that class: the class is
  annotated there or listed in the image's ``neg_category_ids``;
* a detection that matches nothing is ignored where the class is in the image's
  ``not_exhaustive_category_ids``;
* the ``max_dets`` best detections of an image count, all classes together.

:func:`evaluate_lvis` needs no data set registered with Detectron2;
:class:`BalancedLVISEvaluator` is the evaluator for Detectron2's loops.
"""

import itertools
import json
import logging
import math
import os
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO, COCOeval_faster
from tabulate import tabulate

from .errors import InputError

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
IOU_TYPES = ("bbox", "segm")
GROUPS = ("r", "c", "f")  # rare, common, frequent in the training set
ABSENT = -1.0  # the convention of the `lvis` package for "nothing to average"


@dataclass(frozen=True)
class ClassResult:
    """Average precision of one class.

    Attributes:
        category_id: the class's id in the annotation file.
        name: the class's name there.
        group: "r", "c" or "f", None where it is unknown.
        ap: AP over IoU 0.50:0.95, a fraction; -1 where the class has no object to find.
    """

    category_id: int
    name: str
    group: str | None
    ap: float


@dataclass(frozen=True)
class LVISResult:
    """What one evaluation gives.

    Attributes:
        metrics: the nine numbers of :data:`METRICS` as fractions; -1 where nothing is averaged.
        classes: a :class:`ClassResult` for each class, by ascending category id.
    """

    metrics: dict
    classes: list


def evaluate_lvis(annotations, detections, iou_type="bbox", max_dets=300, class_groups=None):
    """Return AP, AP50, AP75, APs, APm, APl, APr, APc, APf of ``detections`` as fractions.

    The numbers are those of the ``lvis`` package, also its -1 where nothing is to be averaged (no
    object of that size, no class of that group); such classes take part in no average. No
    detections at all give 0, where that package fails.

    Args:
        annotations: LVIS v0.5, LVIS v1 or COCO format, a path or the dictionary itself. An image
            without ``neg_category_ids`` (COCO) counts as annotated with every class.
        detections: dictionaries with ``image_id``, ``category_id`` (as in the annotations),
            ``score`` and ``bbox`` (x, y, width, height in pixels) or, for masks, ``segmentation``
            (run lengths). Sizes are box areas for "bbox" and mask areas for "segm".
        iou_type: "bbox" or "segm".
        max_dets: detections that count in an image, those of the highest scores.
        class_groups: category id -> "r", "c" or "f", for classes whose annotation has no
            ``frequency``; neither gives APr, APc and APf of -1.

    Nothing that is passed in is modified.

    Raises:
        InputError: annotations that cannot be read, or a detection of an image or class that
            they do not list.
    """
    return lvis_result(annotations, detections, iou_type, max_dets, class_groups).metrics


def lvis_result(annotations, detections, iou_type="bbox", max_dets=300, class_groups=None):
    """Evaluate as :func:`evaluate_lvis` does and return the :class:`LVISResult`."""
    return _evaluate(_GroundTruth(annotations), detections, iou_type, max_dets, class_groups)


class BalancedLVISEvaluator(DatasetEvaluator):
    """LVIS evaluation for Detectron2's loops, of any data set in LVIS or COCO format.

    :meth:`evaluate` returns ``{"bbox": {"AP": ...}, "segm": {...}}`` in percent (NaN where nothing
    is averaged), logs them with one row a class, and writes into ``output_dir``

    * ``lvis_instances_results.json``: the detections, with the data set's own category ids;
    * ``lvis_results.json``: ``{"bbox": {...}, "segm": {...}, "classes": [{"name", "group",
      "train_images", "bbox", "segm"}]}``, AP in percent, null where nothing is averaged.

    Args:
        dataset_name: a registered data set whose metadata has ``json_file`` and
            ``thing_dataset_id_to_contiguous_id``.
        output_dir: where the two files go; None writes none.
        tasks: of "bbox" and "segm"; None evaluates masks where the model predicts them and the
            annotations have them.
        distributed: gather the detections of all workers; otherwise this process's alone.
        max_dets_per_image: as ``max_dets`` of :func:`evaluate_lvis`.
        train_statistics: :class:`~balanced_det.data.statistics.DatasetStatistics` of the training
            set: each class's training images, and its group where the annotations give none.
    """

    def __init__(
        self,
        dataset_name,
        output_dir=None,
        *,
        tasks=None,
        distributed=True,
        max_dets_per_image=300,
        train_statistics=None,
    ):
        metadata = MetadataCatalog.get(dataset_name)
        for key in ("json_file", "thing_dataset_id_to_contiguous_id"):
            if metadata.get(key) is None:
                raise InputError(f"Data set '{dataset_name}' has no `{key}` in its metadata.")
        for task in tasks or ():
            if task not in IOU_TYPES:
                raise InputError(f"Unknown task '{task}'; known are: {', '.join(IOU_TYPES)}.")
        self._json_file = metadata.json_file
        self._category_ids = {
            contiguous: category_id
            for category_id, contiguous in metadata.thing_dataset_id_to_contiguous_id.items()
        }
        if train_statistics is not None and len(train_statistics.group) != len(self._category_ids):
            raise InputError(
                f"The training statistics have {len(train_statistics.group)} classes but data set "
                f"'{dataset_name}' has {len(self._category_ids)}."
            )
        self._output_dir = output_dir
        self._tasks = tasks
        self._distributed = distributed
        self._max_dets = max_dets_per_image
        self._statistics = train_statistics
        self.reset()

    def reset(self):
        """Forget the detections of an earlier evaluation."""
        self._detections = []
        self._num_images = 0
        self._num_dropped = 0
        self._has_masks = False

    def process(self, inputs, outputs):
        """Keep the ``instances`` of ``outputs``; rows with non-finite boxes or scores are dropped.

        Args:
            inputs: the model's inputs; ``image_id`` is used.
            outputs: dictionaries with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes``
                and, optionally, ``pred_masks`` at the size of the input image.
        """
        for image, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            finite = instances.scores.isfinite()
            finite &= instances.pred_boxes.tensor.isfinite().all(dim=1)
            self._num_images += 1
            self._num_dropped += int((~finite).sum())
            self._has_masks |= instances.has("pred_masks")
            for row in instances_to_coco_json(instances[finite], image["image_id"]):
                row["category_id"] = self._category_ids[row["category_id"]]
                self._detections.append(row)

    def evaluate(self):
        """Return, log and write the results (see the class); None but on the main process."""
        collected = (self._detections, self._num_images, self._num_dropped, self._has_masks)
        gathered = [collected]
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(collected, dst=0)
            if not comm.is_main_process():
                return None
        detections, num_images, num_dropped, has_masks = zip(*gathered)
        detections = list(itertools.chain.from_iterable(detections))
        if sum(num_images) == 0:
            logger.warning("The evaluation saw no image.")
            return {}
        if sum(num_dropped):
            logger.warning(f"Dropped {sum(num_dropped)} detections with a non-finite box or score.")
        if self._output_dir:
            _write_json(detections, self._output_dir, "lvis_instances_results.json")
        truth = _GroundTruth(self._json_file)
        if not truth.annotations:
            logger.info(f"{truth.source} holds no annotation: nothing is evaluated.")
            return {}

        tasks = self._tasks
        if tasks is None:
            tasks = IOU_TYPES if any(has_masks) and truth.has_masks else IOU_TYPES[:1]
        results = OrderedDict(
            (task, _evaluate(truth, detections, task, self._max_dets, self._class_groups()))
            for task in tasks
        )
        percents = OrderedDict(
            (task, {name: _percent(value) for name, value in result.metrics.items()})
            for task, result in results.items()
        )
        classes = self._class_rows(results)
        for task, numbers in percents.items():
            logger.info(f"LVIS results for {task}, in percent:\n{create_small_table(numbers)}")
        logger.info(f"LVIS results of each class, in percent:\n{_class_table(classes, tasks)}")
        if self._output_dir:
            written = _null_for_nan({**percents, "classes": classes})
            _write_json(written, self._output_dir, "lvis_results.json")
        return percents

    def _class_groups(self):
        if self._statistics is None:
            return {}
        return {
            category_id: self._statistics.group[contiguous]
            for contiguous, category_id in self._category_ids.items()
        }

    def _class_rows(self, results):
        contiguous_ids = {v: k for k, v in self._category_ids.items()}
        rows = []
        for of_class in zip(*(result.classes for result in results.values())):
            first = of_class[0]
            train_images = None
            if self._statistics is not None and first.category_id in contiguous_ids:
                index = contiguous_ids[first.category_id]
                train_images = int(self._statistics.image_count[index])
            rows.append(
                {
                    "name": first.name,
                    "group": first.group,
                    "train_images": train_images,
                    **{task: _percent(one.ap) for task, one in zip(results, of_class)},
                }
            )
        return rows


def build_evaluator(cfg, dataset_name, output_folder=None, train_statistics=None):
    """Return the evaluator that fits the ``evaluator_type`` in a data set's metadata.

    "lvis" gives :class:`BalancedLVISEvaluator`, "coco" Detectron2's ``COCOEvaluator`` (without its
    compiled part); anything else is an InputError. ``output_folder`` defaults to ``inference`` in
    ``cfg.OUTPUT_DIR``.
    """
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "lvis":
        return BalancedLVISEvaluator(dataset_name, output_folder, train_statistics=train_statistics)
    if evaluator_type == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_folder, use_fast_impl=False)
    raise InputError(
        f"Data set '{dataset_name}' has evaluator_type '{evaluator_type}'; known are: coco, lvis."
    )


class _GroundTruth:
    """Annotations in LVIS or COCO format, checked; what is passed in is never modified."""

    def __init__(self, annotations):
        if isinstance(annotations, dict):
            self.source = "The annotation dictionary"
        else:
            self.source = f"'{annotations}'"
            annotations = self._read(annotations)
        for key in ("images", "annotations", "categories"):
            if not isinstance(annotations.get(key), list):
                raise InputError(f"{self.source} has no list of `{key}`.")
        self.categories = self._by_id(annotations, "categories")
        if not self.categories:
            raise InputError(f"{self.source} lists no category.")
        # Sets answer "is this class among them" at once; the library asks once a detection.
        every_class = frozenset(self.categories)
        self.images = {
            image["id"]: {
                "id": image["id"],
                "height": image.get("height"),
                "width": image.get("width"),
                "neg_category_ids": frozenset(image.get("neg_category_ids", every_class)),
                "not_exhaustive_category_ids": frozenset(
                    image.get("not_exhaustive_category_ids", ())
                ),
            }
            for image in self._by_id(annotations, "images").values()
        }
        self.annotations = annotations["annotations"]
        for annotation in self.annotations:
            for key, known in (("image_id", self.images), ("category_id", self.categories)):
                if annotation.get(key) not in known:
                    raise InputError(
                        f"{self.source}: annotation {annotation.get('id')} has {key} "
                        f"{annotation.get(key)}, which is not listed."
                    )
            if not _is_box(annotation.get("bbox")):
                raise InputError(
                    f"{self.source}: annotation {annotation.get('id')} has no `bbox` of four "
                    "finite numbers."
                )

    def _read(self, path):
        try:
            with open(path) as file:
                annotations = json.load(file)
        except OSError as error:
            raise InputError(
                f"Annotation file {self.source} cannot be read: {error.strerror}."
            ) from None
        except ValueError as error:
            raise InputError(f"Annotation file {self.source} is not valid JSON: {error}.") from None
        if not isinstance(annotations, dict):
            raise InputError(f"Annotation file {self.source} does not hold a JSON object.")
        return annotations

    def _by_id(self, annotations, key):
        for row in annotations[key]:
            if not isinstance(row, dict) or not isinstance(row.get("id"), int):
                raise InputError(f"{self.source}: an entry of `{key}` has no integer `id`.")
        return {row["id"]: row for row in annotations[key]}

    @property
    def has_masks(self):
        return all(annotation.get("segmentation") for annotation in self.annotations)

    def groups(self, class_groups):
        """Each class's "r", "c" or "f" or None: the annotation's own, else of ``class_groups``."""
        groups = {}
        for category_id, category in self.categories.items():
            group = category.get("frequency") or class_groups.get(category_id)
            if group not in (*GROUPS, None):
                raise InputError(
                    f"{self.source}: category {category_id} has frequency '{group}'; known are: "
                    f"{', '.join(GROUPS)}."
                )
            groups[category_id] = group
        return groups

    def objects(self, iou_type):
        """New annotation dictionaries, since the library writes into those it gets."""
        objects = []
        # Numbered from 1: the library keeps 0 for "matched nothing".
        for number, annotation in enumerate(self.annotations, start=1):
            _, _, width, height = annotation["bbox"]
            new = {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": list(annotation["bbox"]),
                "area": annotation.get("area", width * height),
                "iscrowd": annotation.get("iscrowd", 0),
            }
            if iou_type == "segm":
                image = self.images[annotation["image_id"]]
                if not annotation.get("segmentation"):
                    raise InputError(
                        f"{self.source}: annotation {annotation.get('id')} has no mask to evaluate "
                        "masks with."
                    )
                if image["height"] is None or image["width"] is None:
                    raise InputError(
                        f"{self.source}: image {image['id']} has no `height` and `width`."
                    )
                new["segmentation"] = annotation["segmentation"]
            objects.append(new)
        return objects


def _evaluate(truth, detections, iou_type, max_dets, class_groups):
    if iou_type not in IOU_TYPES:
        raise InputError(f"iou_type is '{iou_type}'; known are: {', '.join(IOU_TYPES)}.")
    if isinstance(max_dets, bool) or not isinstance(max_dets, int) or max_dets < 1:
        raise InputError(f"max_dets is {max_dets}; it must be a positive integer.")
    groups = truth.groups(class_groups or {})
    objects = truth.objects(iou_type)
    found = _checked_detections(truth, detections, iou_type)
    found = _best_of_each_image(found, max_dets)
    # The library drops these too, but fails on the mask of one in an image without objects.
    found = _where_looked_for(found, truth, objects)
    objects, found = _by_class(objects), _by_class(found)
    classes = sorted(truth.categories)
    precision = np.stack(
        [_precision(truth, objects[c], found[c], iou_type, max_dets) for c in classes], axis=2
    )  # (10 IoU thresholds, 101 recalls, classes, 4 size ranges)

    all_sizes = precision[:, :, :, 0]
    metrics = {
        "AP": _mean(all_sizes),
        "AP50": _mean(all_sizes[0]),
        "AP75": _mean(all_sizes[5]),
        "APs": _mean(precision[:, :, :, 1]),
        "APm": _mean(precision[:, :, :, 2]),
        "APl": _mean(precision[:, :, :, 3]),
    }
    for group in GROUPS:
        members = [groups[category_id] == group for category_id in classes]
        metrics[f"AP{group}"] = _mean(all_sizes[:, :, members])
    rows = [
        ClassResult(
            category_id,
            str(truth.categories[category_id].get("name", category_id)),
            groups[category_id],
            _mean(all_sizes[:, :, index]),
        )
        for index, category_id in enumerate(classes)
    ]
    return LVISResult(metrics, rows)


def _precision(truth, objects, found, iou_type, max_dets):
    """Precision of one class, (10 IoU thresholds, 101 recalls, 4 size ranges).

    Classes do not influence each other, and the library keeps an entry for each pair of image and
    class: LVIS's 20,000 x 1,203 of them are nearly all empty, so it is given one class at a time.
    """
    if not objects:
        return np.full((10, 101, 4), ABSENT)
    images = {row["image_id"] for row in itertools.chain(objects, found)}
    ground_truth = COCO(
        {
            "images": [truth.images[image_id] for image_id in images],
            # The library insists on a group; ours are averaged from the precision it returns.
            "categories": [{"id": objects[0]["category_id"], "frequency": "f"}],
            "annotations": objects,
        }
    )
    evaluation = COCOeval_faster(
        ground_truth,
        ground_truth.loadRes(found),
        iou_type,
        lvis_style=True,
        print_function=logger.debug,
    )
    evaluation.params.maxDets = [max_dets]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, 0, :, 0]


def _checked_detections(truth, detections, iou_type):
    """New dictionaries with what the evaluation of ``iou_type`` reads."""
    checked = []
    for index, detection in enumerate(detections):
        for key, known in (("image_id", truth.images), ("category_id", truth.categories)):
            if detection.get(key) not in known:
                raise InputError(
                    f"Detection {index} has {key} {detection.get(key)}, which {truth.source} does "
                    "not list."
                )
        if not _is_finite(detection.get("score")):
            raise InputError(f"Detection {index} has no finite `score`.")
        new = {
            "image_id": int(detection["image_id"]),
            "category_id": int(detection["category_id"]),
            "score": float(detection["score"]),
        }
        # One of the two alone: the library takes sizes from the box where there is one.
        if iou_type == "bbox":
            if not _is_box(detection.get("bbox")):
                raise InputError(f"Detection {index} has no `bbox` of four finite numbers.")
            new["bbox"] = [float(value) for value in detection["bbox"]]
        else:
            if not isinstance(detection.get("segmentation"), dict):
                raise InputError(f"Detection {index} has no `segmentation` in run lengths.")
            new["segmentation"] = detection["segmentation"]
        checked.append(new)
    return checked


def _best_of_each_image(detections, max_dets):
    counts = Counter(detection["image_id"] for detection in detections)
    if not counts or max(counts.values()) <= max_dets:
        return detections
    of_image = defaultdict(list)
    for detection in detections:
        of_image[detection["image_id"]].append(detection)
    best = []
    for rows in of_image.values():
        if len(rows) > max_dets:
            rows = sorted(rows, key=lambda row: row["score"], reverse=True)[:max_dets]
        best.extend(rows)
    return best


def _where_looked_for(detections, truth, objects):
    """Without those of classes that an image is not annotated with."""
    present = {(row["image_id"], row["category_id"]) for row in objects}
    return [
        row
        for row in detections
        if (row["image_id"], row["category_id"]) in present
        or row["category_id"] in truth.images[row["image_id"]]["neg_category_ids"]
    ]


def _by_class(rows):
    of_class = defaultdict(list)
    for row in rows:
        of_class[row["category_id"]].append(row)
    return of_class


def _mean(precision):
    present = precision[precision > ABSENT]
    return float(present.mean()) if present.size else ABSENT


def _percent(fraction):
    return math.nan if fraction == ABSENT else 100 * fraction


def _is_finite(value):
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _is_box(value):
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(_is_finite, value))


def _class_table(classes, tasks):
    """Two classes a line, as Detectron2 prints classes side by side."""
    columns = ("name", "group", "train_images", *tasks)
    cells = [["-" if row[key] is None else row[key] for key in columns] for row in classes]
    half = (len(cells) + 1) // 2
    lines = [
        left + right
        for left, right in itertools.zip_longest(cells[:half], cells[half:], fillvalue=[])
    ]
    headers = ["class", "group", "train images", *(f"AP {task}" for task in tasks)] * 2
    return tabulate(lines, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left")


def _write_json(content, folder, name):
    """Write whole or not at all: a file of that name is complete, whatever interrupts us."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(f"{path}.partial", "w") as file:
        json.dump(content, file, allow_nan=False)
    os.replace(f"{path}.partial", path)


def _null_for_nan(content):
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {key: _null_for_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_null_for_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
