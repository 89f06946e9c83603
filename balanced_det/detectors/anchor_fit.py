"""How a detector's anchors meet the objects of a data set, before any network runs."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from ..data.statistics import objects
from ..errors import InputError
from .counting import cells

IOU_BINS = 10  # of background anchors, from 0 to 0.5
MISSED_IOU = 0.5
_DIVISOR = 32  # images are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class AnchorFit:
    """Anchors as a detector labels them, over some images.

    Attributes:
        num_images, num_objects: that were looked at.
        num_foreground, num_background, num_ignored: anchors.
        background_iou: (IOU_BINS,) how many background anchors have their largest IoU with any
            object in each bin of 0 to 0.5; what is above 0.5 counts in the last.
        missed: objects whose best anchor has an IoU below ``MISSED_IOU``.
    """

    num_images: int
    num_objects: int
    num_foreground: int
    num_background: int
    num_ignored: int
    background_iou: tuple[int, ...]
    missed: int


def fit_anchors(cfg: CfgNode, dataset_dicts: Iterable[dict]) -> AnchorFit:
    """Label the anchors of images as the configured RPN or RetinaNet does.

    Images have the middle one of ``INPUT.MIN_SIZE_TRAIN``; each is padded alone.

    Args:
        cfg: a config whose detector has anchors on pyramid levels (p2, p3, ...).
        dataset_dicts: Detectron2's standard format; no pixel is read.

    Raises:
        InputError: the detector has no anchors, or they are not on pyramid levels.
    """
    node = _anchor_node(cfg)
    strides = [_stride(name) for name in node.IN_FEATURES]
    generator = build_anchor_generator(cfg, [ShapeSpec(channels=1, stride=s) for s in strides])
    matcher = Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True)
    totals = np.zeros(6, dtype=np.int64)
    histogram = torch.zeros(IOU_BINS)
    for record in dataset_dicts:
        boxes, height, width = _resized(cfg, record)
        features = [
            torch.empty(1, 0, cells(height, _DIVISOR, s), cells(width, _DIVISOR, s))
            for s in strides
        ]
        anchors = Boxes.cat(generator(features))
        ious = pairwise_iou(boxes, anchors)  # (objects, anchors)
        _, labels = matcher(ious)
        if len(boxes):
            background = ious[:, labels == 0].amax(dim=0)
            missed = int((ious.amax(dim=1) < MISSED_IOU).sum())
        else:
            background, missed = torch.zeros(int((labels == 0).sum())), 0
        histogram += torch.histc(background.clamp(max=0.5 - 1e-6), IOU_BINS, 0, 0.5)
        counts = [int((labels == label).sum()) for label in (1, 0, -1)]
        totals += np.array([1, len(boxes), *counts, missed])
    images, found, foreground, background, ignored, missed = map(int, totals)
    return AnchorFit(
        num_images=images,
        num_objects=found,
        num_foreground=foreground,
        num_background=background,
        num_ignored=ignored,
        background_iou=tuple(int(count) for count in histogram),
        missed=missed,
    )


def _anchor_node(cfg: CfgNode) -> CfgNode:
    name = cfg.MODEL.META_ARCHITECTURE
    if name == "GeneralizedRCNN":
        return cfg.MODEL.RPN
    if name in ("RetinaNet", "BalancedRetinaNet"):
        return cfg.MODEL.RETINANET
    raise InputError(f"MODEL.META_ARCHITECTURE '{name}' has no anchors.")


def _stride(feature: str) -> int:
    if not re.fullmatch(r"p[2-9]", feature):
        raise InputError(f"The anchors' feature map '{feature}' is no level of a pyramid.")
    return 2 ** int(feature[1:])


def _resized(cfg: CfgNode, record: dict[str, Any]) -> tuple[Boxes, int, int]:
    """Return the objects' ``Boxes``, and the height and width of the image, at training size."""
    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    height, width = ResizeShortestEdge.get_output_shape(
        record["height"], record["width"], sizes[len(sizes) // 2], cfg.INPUT.MAX_SIZE_TRAIN
    )
    corners = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in objects(record.get("annotations", ()))
    ]
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    scale = torch.tensor([width / record["width"], height / record["height"]]).repeat(2)
    return Boxes(boxes * scale), height, width
