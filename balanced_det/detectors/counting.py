"""Counting the training set through the label assignment of a detector, before it trains.

The optimal prior and the class-adaptive thresholds (arXiv 1909.04868) need to know how many rows a
detector sees and how many of them are foreground. Annotations and image sizes tell: no pixel is
read, and no network runs.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from ..config.lazy import lazy_config
from ..data.statistics import objects
from ..errors import InputError
from ..priors import optimal_prior
from ..rows import foreground

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """Rows that a detector labels, summed over some training images.

    Attributes:
        num_foreground: N_f, rows that carry an object class. Counted on a part of a data set, it is
            corrected for the part's objects an image being more or fewer than the data set's.
        num_rows: N, rows that are not ignored.
        num_images: images counted.
        standard_error: of N_f / N as an estimate for the data set, relative to it; 0 when all of
            its images are counted.
    """

    num_foreground: int
    num_rows: int
    num_images: int
    standard_error: float


def count_rows(
    labeller: Any,
    backbone: Backbone,
    cfg: CfgNode,
    dataset_dicts: Iterable[dict],
    population: Sequence[dict] | None = None,
) -> RowCounts:
    """Count the rows that a detector or its RPN labels, over data set dicts.

    Images are resized and boxes transformed as the training's ``DatasetMapper`` does; each image is
    padded alone, so rows that only exist because a batch is padded to its largest image are not
    counted.

    Args:
        labeller: what labels rows: has ``num_classes``, ``label_rows(features, [instances])`` and
            ``row_features``, the names of the backbone's feature maps.
        backbone: Detectron2 ``Backbone``; only its strides are used.
        cfg: the config, for the input resizing.
        dataset_dicts: Detectron2's standard format.
        population: the records that these are drawn from at random, of which the objects alone
            are counted; None to estimate nothing beyond ``dataset_dicts``.

    Returns:
        :class:`RowCounts`.
    """
    strides = [backbone.output_shape()[name].stride for name in labeller.row_features]
    augmentations = T.AugmentationList(training_augmentations(cfg))
    device = next(backbone.parameters()).device
    of_images = []  # (foreground, rows, objects) of each
    for record in dataset_dicts:
        instances = _resized_instances(record, augmentations).to(device)
        height, width = instances.image_size
        divisor = max(backbone.size_divisibility, 1)
        sizes = [(cells(height, divisor, s), cells(width, divisor, s)) for s in strides]
        features = [torch.empty(1, 0, *size, device=device) for size in sizes]
        labels = labeller.label_rows(features, [instances])  # (1, R)
        num_foreground = foreground(labels, labeller.num_classes).sum().item()
        num_objects = len(objects(record["annotations"]))
        of_images.append((num_foreground, (labels >= 0).sum().item(), num_objects))
    return _summarize(np.asarray(of_images, dtype=np.int64).reshape(-1, 3), population)


def fit_to_training_data(model: nn.Module, cfg: CfgNode) -> None:
    """Count what ``cfg.BALANCE`` asks for and set biases and thresholds by it, before training.

    One worker counts and shares the result with all; the counts are logged, and what is set by them
    is saved with the model.
    """
    if isinstance(model, GeneralizedRCNN):
        name, labeller = "RPN", model.proposal_generator
    else:
        name, labeller = "DENSE", model
    sets_prior = cfg.BALANCE[name].OPTIMAL_PRIOR
    # The region heads count their thresholds while they train: proposals come from the network.
    threshold: Any = getattr(labeller, "score_threshold", None)
    sets_threshold = threshold is not None and threshold.counts
    if not sets_prior and not sets_threshold:
        return
    if not hasattr(labeller, "label_rows"):
        raise InputError(
            f"BALANCE.{name}.OPTIMAL_PRIOR is set, but {type(labeller).__name__} does not read "
            f"BALANCE; use Balanced{type(labeller).__name__}."
        )
    counts = _counted_once(labeller, model.backbone, cfg)
    labeller.criterion.rows_are_counted = True
    prior = optimal_prior(counts.num_foreground, counts.num_rows, labeller.num_classes)
    logger.info(
        "BALANCE.%s: %d of %d rows are foreground (%d images, standard error %.1f%%); "
        "the optimal prior is %.4g.",
        name,
        counts.num_foreground,
        counts.num_rows,
        counts.num_images,
        100 * counts.standard_error,
        prior,
    )
    if sets_prior:
        labeller.set_prior(prior)
    if sets_threshold:
        threshold.set_row_counts(counts.num_foreground, counts.num_rows)


def _counted_once(labeller: Any, backbone: Backbone, cfg: CfgNode) -> RowCounts:
    """Count on the main process; what it cannot count is an error on all of them."""
    counts = error = None
    if comm.is_main_process():
        try:
            counts = _counted(labeller, backbone, cfg)
        except InputError as caught:
            error = str(caught)
    counts, error = comm.all_gather((counts, error))[0]
    if error is not None:
        raise InputError(error)
    return counts


def _counted(labeller: Any, backbone: Backbone, cfg: CfgNode) -> RowCounts:
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        check_consistency=False,
    )
    # The choice of images, and of rows, is part of the result, so it never varies.
    order = np.random.RandomState(0).permutation(len(dicts))
    chosen = order[: cfg.BALANCE.COUNT_IMAGES]
    state = np.random.get_state()  # the augmentations draw from numpy, samplers from torch
    np.random.seed(0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            records = tqdm([dicts[i] for i in chosen], desc="Counting rows", unit="images")
            counts = count_rows(labeller, backbone, cfg, records, dicts)
    finally:
        np.random.set_state(state)
    if counts.num_foreground == 0:
        raise InputError(
            f"No row of {counts.num_images} images of {', '.join(cfg.DATASETS.TRAIN)} is "
            "foreground, so there is no optimal prior; do the anchors fit the objects?"
        )
    return counts


def training_augmentations(cfg: CfgNode) -> list[Any]:
    """Return what Detectron2's mapper does to training images, as a list."""
    if lazy_config(cfg) is not None:
        return list(instantiate(lazy_config(cfg).dataloader.train.mapper.augmentations))
    return DatasetMapper.from_config(cfg, True)["augmentations"]


def _resized_instances(record: dict[str, Any], augmentations: T.AugmentationList) -> Instances:
    image = T.AugInput(np.zeros((record["height"], record["width"]), dtype=np.uint8))
    transforms = augmentations(image)
    size = image.image.shape[:2]
    annotations = [
        # Boxes alone: rows are not labelled by masks.
        utils.transform_instance_annotations(
            {k: a[k] for k in ("bbox", "bbox_mode", "category_id")}, transforms, size
        )
        for a in objects(record["annotations"])
    ]
    return utils.filter_empty_instances(utils.annotations_to_instances(annotations, size))


def cells(size: int, divisor: int, stride: int) -> int:
    """Return the cells of a feature map along one axis of an image padded to a multiple."""
    return math.ceil(math.ceil(size / divisor) * divisor / stride)


def _summarize(of_images: np.ndarray, population: Sequence[dict] | None) -> RowCounts:
    """Estimate the counts of a population; without one, sum the (M, 3) counts of M images.

    Foreground rows vary between images mostly with their objects, and the objects of all images are
    known. A ratio estimator (Cochran, Sampling Techniques, chapter 6) uses that: it is off by a
    third as much as the sample's own sum.
    """
    totals = of_images.sum(axis=0)
    num_foreground, num_rows, num_objects = (int(n) for n in totals)
    error = math.inf
    if len(of_images) > 1 and num_foreground:
        shares = of_images / totals  # (M, 3), of each image in the sums
        residual = shares[:, 0] - shares[:, 1]
        unseen = 1.0
        if population is not None:
            residual -= shares[:, 2]
            unseen -= len(of_images) / len(population)
            all_objects = sum(len(objects(record["annotations"])) for record in population)
            objects_an_image = all_objects / len(population)
            num_foreground = round(
                num_foreground * objects_an_image / (num_objects / len(of_images))
            )
        error = math.sqrt(unseen * len(of_images) * residual.var(ddof=1))
    return RowCounts(num_foreground, num_rows, len(of_images), error)
