"""The evaluator for Detectron2's loops: each worker matches its images while it infers."""

import glob
import logging
import math
import os
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from torch import Tensor

from ..data.annotations import Annotations, integer, read_annotations
from ..data.registration import is_builtin
from ..data.statistics import DatasetStatistics
from ..errors import InputError
from .detections import (
    DetectionWriter,
    join_detection_files,
    lines_of_detection_file,
    row_text,
    texts_of,
)
from .lvis import FIXED_MAX_DETS, IOU_TYPES, MAX_DETS, LVISResult, Matcher, best_of_each
from .operating_points import OperatingPoints
from .per_class import (
    class_rows,
    class_table,
    percent,
    protocol_text,
    write_json,
    write_results,
)

logger = logging.getLogger(__name__)

DETECTIONS = "lvis_instances_results.json"
POINTS = "operating_points.json"
FIXED = ("AP", "APr", "APc", "APf")  # reported as "APfixed", "APrfixed", ...


class BalancedLVISEvaluator(DatasetEvaluator):
    """LVIS evaluation for Detectron2's loops, of any data set in LVIS or COCO format.

    :meth:`evaluate` returns ``{"bbox": {"AP": ...}, "segm": {...}}`` in percent (NaN where nothing
    is averaged), with fixed AP as ``APfixed``, ``APrfixed``, ``APcfixed`` and ``APffixed``, logs
    them with one row a class, and writes into ``output_dir``

    * ``lvis_instances_results.json``: the detections, with the data set's own category ids. Until
      all are there they stand in ``lvis_instances_results.partial-<worker>.json``, which is a whole
      list after every image; ``python -m balanced_det.evaluation`` evaluates either again;
    * ``lvis_results.json``: ``{"bbox": {...}, "segm": {...}, "classes": [{"name", "group",
      "train_images", "bbox", "segm"}], "protocol": {...}}``, AP in percent, null where nothing is
      averaged;
    * ``lvis_classes.csv`` and ``lvis_classes.json``: of each class AP, AR, the best F1 and its
      score threshold, training images and group;
    * ``operating_points.json``: the precision and score of each class of the model at 101 recalls.

    A data set without annotations has its detections written, and nothing else.

    Args:
        dataset_name: a registered data set whose metadata has ``json_file`` and
            ``thing_dataset_id_to_contiguous_id``.
        output_dir: where the files go; None writes none. Workers share it.
        tasks: of "bbox" and "segm"; None evaluates masks where the model predicts them and the
            annotations have them.
        distributed: bring the matches of all workers together; otherwise this process's alone.
        max_dets_per_image: as ``max_dets`` of :func:`evaluate_lvis`; None for all.
        train_statistics: :class:`~balanced_det.data.statistics.DatasetStatistics` of the training
            set: each class's training images, and its group where the annotations give none.

    Attributes:
        dataset_name: as given.
        class_rows: after :meth:`evaluate`, on the main process: those of
            :func:`~balanced_det.evaluation.per_class.class_rows`; empty where nothing is evaluated.
        operating_points: likewise, an
            :class:`~balanced_det.evaluation.operating_points.OperatingPoints` of boxes, of the
            model's classes, or None.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | os.PathLike | None = None,
        *,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        max_dets_per_image: int | None = MAX_DETS,
        train_statistics: DatasetStatistics | None = None,
    ):
        self.dataset_name = dataset_name
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
        self._output_dir: Any = None if output_dir is None else os.fspath(output_dir)
        self._tasks = tasks
        self._distributed = distributed
        self._max_dets = max_dets_per_image
        self._statistics = train_statistics
        self._truth: Any = None  # Annotations, read with the first image
        self._writer: DetectionWriter | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the detections of an earlier evaluation."""
        self._num_images = 0
        self._num_dropped = 0
        self._most_in_an_image = 0
        self._per_class = np.zeros(len(self._category_ids), dtype=np.int64)
        self._matchers: dict[str, Matcher] = {}
        self.class_rows: list[dict] = []
        self.operating_points: OperatingPoints | None = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def process(self, inputs: Iterable[dict], outputs: Iterable[dict]) -> None:
        """Match and write ``outputs``; rows with non-finite boxes or scores are dropped.

        Args:
            inputs: the model's inputs; ``image_id`` is used.
            outputs: dictionaries with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes``
                and, for masks, ``pred_masks_rle`` or ``pred_masks``, see :func:`run_lengths_of`.
        """
        if self._truth is None:
            self._read_truth()
        if self._output_dir and self._writer is None:
            self._writer = DetectionWriter(self._partial(comm.get_rank()))
        for image, output in zip(inputs, outputs):
            self._process_image(image["image_id"], output["instances"].to("cpu"))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return, log and write the results (see the class); None but on the main process."""
        if self._writer is not None:
            self._writer.close()
        collected = self._collected()
        gathered = [collected]
        if self._distributed:
            gathered = self._gather(collected)
            if not comm.is_main_process():
                return None
        gathered = [part for part in gathered if part["images"]]
        if not gathered:
            logger.warning("The evaluation saw no image.")
            return {}
        dropped = sum(part["dropped"] for part in gathered)
        if dropped:
            logger.warning(f"Dropped {dropped} detections with a non-finite box or score.")
        has_file = bool(self._output_dir) and self._join([part["path"] for part in gathered])
        if not len(self._truth):
            logger.info(f"{self._truth.source} holds no annotation: nothing is evaluated.")
            return {}
        results = OrderedDict()
        for task in self._evaluated_tasks(gathered):
            states = [part["states"][task] for part in gathered if task in part["states"]]
            matcher = Matcher.merged(self._truth, task, self._max_dets, states)
            results[task] = matcher.result(self._class_groups())
        percents = OrderedDict(
            (task, {name: percent(value) for name, value in result.metrics.items()})
            for task, result in results.items()
        )
        for task, fixed in self._fixed(results, gathered, has_file).items():
            percents[task].update(fixed)
        self._report(results, percents)
        return percents

    # --- Of each worker ---------------------------------------------------------------------------

    def _read_truth(self) -> None:
        self._truth = read_annotations(self._json_file)
        self._image_index = {image.id: i for i, image in enumerate(self._truth.images)}
        contiguous = {category.id: c for c, category in enumerate(self._truth.categories)}
        # The model's class -> the annotations' class.
        self._class_of = np.array(
            [contiguous.get(self._category_ids[c], -1) for c in range(len(self._category_ids))]
        )
        self._has_masks = bool(len(self._truth)) and self._truth.first_without_mask() is None

    def _process_image(self, image_id: Any, instances: Instances) -> None:
        index = self._image_index.get(integer(image_id))
        if index is None:
            raise InputError(
                f"The model was given image {image_id}, which {self._truth.source} does not list."
            )
        finite = instances.scores.isfinite() & instances.pred_boxes.tensor.isfinite().all(dim=1)
        self._num_images += 1
        self._num_dropped += int((~finite).sum())
        masks = run_lengths_of(instances, finite)
        if instances.has("pred_masks_rle"):
            instances.remove("pred_masks_rle")  # a list cannot be indexed by what follows
        instances = instances[finite]
        classes = instances.pred_classes.numpy()
        boxes = instances.pred_boxes.tensor.detach().clone()
        boxes[:, 2:] -= boxes[:, :2]  # x, y, width, height
        box_texts = texts_of(boxes.float().numpy() if boxes.element_size() < 4 else boxes.numpy())
        scores = instances.scores.detach()
        score_texts = texts_of((scores.float() if scores.element_size() < 4 else scores).numpy())
        if self._writer is not None:
            self._writer.write(
                row_text(
                    image_id,
                    self._category_ids[c],
                    box_texts[4 * i : 4 * i + 4],
                    score_texts[i],
                    masks[i] if masks is not None else None,
                )
                for i, c in enumerate(classes.tolist())
            )
        self._per_class += np.bincount(classes, minlength=len(self._category_ids))
        self._most_in_an_image = max(self._most_in_an_image, len(classes))
        if not len(self._truth):
            return
        # What is matched are the numbers that are written, so that the file gives the same AP.
        for task in self._tasks or (IOU_TYPES if masks is not None else IOU_TYPES[:1]):
            if task == "segm" and masks is None:
                raise InputError("The task 'segm' needs masks, but the model predicts none.")
            if task == "segm" and self._tasks is None and not self._has_masks:
                continue
            if task not in self._matchers:
                self._matchers[task] = Matcher(self._truth, task, self._max_dets)
            self._matchers[task].update(
                index,
                self._class_of[classes],
                np.array(list(map(float, score_texts))),
                np.array(list(map(float, box_texts))).reshape(-1, 4),
                masks,
            )

    def _collected(self) -> dict[str, Any]:
        return {
            "images": self._num_images,
            "dropped": self._num_dropped,
            "most_in_an_image": self._most_in_an_image,
            "per_class": self._per_class,
            "states": {task: matcher.to_bytes() for task, matcher in self._matchers.items()},
            "path": self._writer.path if self._writer is not None else None,
        }

    def _gather(self, collected: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what all workers collected, on the main process; log how much that was."""
        comm.synchronize()
        start = time.perf_counter()
        gathered = comm.gather(collected, dst=0)
        if len(gathered) > 1:
            of_others = [state for part in gathered[1:] for state in part["states"].values()]
            logger.info(
                "Gathered %d bytes of matches from %d other workers in %.3f s.",
                sum(len(matches) + given.nbytes for matches, given in of_others),
                len(gathered) - 1,
                time.perf_counter() - start,
            )
        return gathered

    def _partial(self, worker: int | str) -> str:
        name, extension = os.path.splitext(DETECTIONS)
        # Also a pattern, when the worker is "*".
        folder = glob.escape(self._output_dir) if worker == "*" else self._output_dir
        return os.path.join(folder, f"{name}.partial-{worker}{extension}")

    # --- Of the main process ----------------------------------------------------------------------

    def _join(self, paths: list[str]) -> bool:
        """Join the workers' files, and remove what interrupted runs left; whether it could."""
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            logger.warning(
                f"'{missing[0]}' is not on this machine: the detections stay in the workers' files."
            )
            return False
        join_detection_files(paths, os.path.join(self._output_dir, DETECTIONS))
        for left in glob.glob(self._partial("*")):
            os.remove(left)
        return True

    def _evaluated_tasks(self, gathered: list[dict[str, Any]]) -> list[str]:
        found = [task for task in IOU_TYPES if any(task in part["states"] for part in gathered)]
        if "segm" not in found and self._truth.has_some_masks() and not self._has_masks:
            missing = self._truth.named(self._truth.first_without_mask())
            logger.warning(f"Masks are not evaluated: of {self._truth.source}, {missing} has none.")
        return found

    def _fixed(
        self, results: Mapping[str, LVISResult], gathered: list[dict[str, Any]], has_file: bool
    ) -> dict[str, dict[str, float]]:
        """Fixed AP of each task, in percent, with the names under which it is reported."""
        per_class = sum(part["per_class"] for part in gathered)
        most = max(part["most_in_an_image"] for part in gathered)
        if per_class.max(initial=0) <= FIXED_MAX_DETS and most <= (self._max_dets or math.inf):
            fixed = results  # no limit was met, neither of an image nor of a class
        elif has_file:
            path = os.path.join(self._output_dir, DETECTIONS)
            fixed = _fixed_from_file(self._truth, path, list(results), self._class_groups())
        else:
            logger.info("Fixed AP is not computed: it needs the file of all detections.")
            return {}
        return {
            task: {f"{name}fixed": percent(result.metrics[name]) for name in FIXED}
            for task, result in fixed.items()
        }

    def _report(self, results: Mapping[str, LVISResult], percents: Mapping[str, dict]) -> None:
        rows = self.class_rows = class_rows(results, self._train_images())
        tasks = list(results)
        points = self.operating_points = self._points(results)
        for task, numbers in percents.items():
            logger.info(
                f"LVIS results for {task}, in percent ({protocol_text(results[task].protocol)}):\n"
                f"{create_small_table(numbers)}"
            )
        logger.info(f"LVIS results of each class, in percent:\n{class_table(rows, tasks)}")
        if self._output_dir:
            write_results(percents, rows, results, self._output_dir)
            write_json(points.to_json(), self._output_dir, POINTS)

    def _points(self, results: Mapping[str, LVISResult]) -> OperatingPoints:
        """The first task's curves, of the model's classes; those that are not annotated have -1."""
        task, result = next(iter(results.items()))
        is_known = self._class_of >= 0
        precision, scores = (
            np.where(is_known, curves[:, self._class_of], absent)  # (101, K)
            for curves, absent in (
                (np.asarray(result.precision), -1.0),
                (np.asarray(result.scores), 0.0),
            )
        )
        return OperatingPoints(task, self.dataset_name, precision, scores)

    def _class_groups(self) -> dict[int, str]:
        if self._statistics is None:
            return {}
        return {
            category_id: self._statistics.group[contiguous]
            for contiguous, category_id in self._category_ids.items()
        }

    def _train_images(self) -> dict[int, int]:
        if self._statistics is None:
            return {}
        return {
            category_id: int(self._statistics.image_count[contiguous])
            for contiguous, category_id in self._category_ids.items()
        }


def run_lengths_of(instances: Instances, kept: Tensor) -> list[dict] | None:
    """Return the masks of detections in compressed run lengths, None where there are no masks.

    Args:
        instances: D detections with ``pred_masks_rle``, D run lengths as
            :class:`~balanced_det.detectors.masks.MasksAsRLE` makes them, or with ``pred_masks``
            (D, H, W) as Detectron2 does.
        kept: (D,) bool, the detections that are wanted.
    """
    if instances.has("pred_masks_rle"):
        rles = [rle for rle, is_kept in zip(instances.pred_masks_rle, kept.tolist()) if is_kept]
    elif instances.has("pred_masks"):
        masks = instances.pred_masks[kept].permute(1, 2, 0).numpy()  # (H, W, kept)
        rles = mask_util.encode(np.asfortranarray(masks, dtype=np.uint8)) if masks.size else []
    else:
        return None
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in rles]


def build_evaluator(
    cfg: CfgNode,
    dataset_name: str,
    output_folder: str | os.PathLike | None = None,
    train_statistics: DatasetStatistics | None = None,
) -> DatasetEvaluator:
    """Return the evaluator that fits the ``evaluator_type`` in a data set's metadata.

    "lvis" gives :class:`BalancedLVISEvaluator`, "coco" Detectron2's ``COCOEvaluator`` (without its
    compiled part); anything else is an InputError. Detectron2's own LVIS data sets are evaluated
    with LVIS's 300 detections an image, others with ``TEST.DETECTIONS_PER_IMAGE``.

    ``output_folder`` defaults to ``inference`` in ``cfg.OUTPUT_DIR``; where ``DATASETS.TEST`` names
    several data sets, each has a folder of its name in there.
    """
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_folder = os.path.join(output_folder, urllib.parse.quote(dataset_name, safe=" "))
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "lvis":
        limit = MAX_DETS if is_builtin(dataset_name) else cfg.TEST.DETECTIONS_PER_IMAGE
        return BalancedLVISEvaluator(
            dataset_name,
            output_folder,
            max_dets_per_image=limit if limit > 0 else None,  # Detectron2: -1 keeps all
            train_statistics=train_statistics,
        )
    if evaluator_type == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_folder, use_fast_impl=False)
    raise InputError(
        f"Data set '{dataset_name}' has evaluator_type '{evaluator_type}'; known are: coco, lvis."
    )


def _fixed_from_file(
    truth: Annotations, path: str, tasks: Sequence[str], class_groups: Mapping[int, str]
) -> dict[str, LVISResult]:
    """Fixed AP from our own detection file, an image at a time, whatever its size."""
    images = {image.id: index for index, image in enumerate(truth.images)}
    classes = {category.id: index for index, category in enumerate(truth.categories)}
    category: list[int] = []
    scores: list[float] = []
    for rows in lines_of_detection_file(path):
        category.extend(classes[row["category_id"]] for row in rows)
        scores.extend(row["score"] for row in rows)
    best = best_of_each(np.array(category, dtype=np.int64), np.array(scores), FIXED_MAX_DETS)
    counted = iter(best.tolist())
    matchers = {task: Matcher(truth, task, None) for task in tasks}
    for rows in lines_of_detection_file(path):
        chosen = [row for row in rows if next(counted)]
        for matcher in matchers.values():
            matcher.update(
                images[rows[0]["image_id"]],
                np.array([classes[row["category_id"]] for row in chosen], dtype=np.int64),
                np.array([row["score"] for row in chosen], dtype=np.float64),
                np.array([row["bbox"] for row in chosen], dtype=np.float64),
                [row.get("segmentation", {}) for row in chosen],
            )
    return {task: matcher.result(class_groups) for task, matcher in matchers.items()}
