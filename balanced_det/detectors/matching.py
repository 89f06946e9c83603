"""Matching the rows of a whole batch to objects, as Detectron2 matches those of one image.

Letters: N images, M objects of an image at most, R rows of an image, K classes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..selection import Rows

# IoUs (or distances) that are in memory at once, of all images together: 64 MB in float32.
_MOST_PAIRS = 2**24


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of a batch; an image with fewer than another ends in empty ones.

    Attributes:
        boxes: (N, M, 4) corners in pixels, zeros where there is no object. M is at least 1.
        classes: (N, M) long, -1 where there is no object.
    """

    boxes: Tensor
    classes: Tensor

    @classmethod
    def of(cls, instances: Sequence[Instances]) -> "Objects":
        """Collect the ``gt_boxes`` and ``gt_classes`` of a list of Detectron2's ``Instances``.

        Objects without ``gt_classes``, which an RPN does not need, are all of class 0.
        """
        boxes = pad([x.gt_boxes.tensor for x in instances])
        of_images = [
            x.gt_classes if x.has("gt_classes") else x.gt_boxes.tensor.new_zeros(len(x)).long()
            for x in instances
        ]
        classes = pad(of_images, -1)
        if boxes.shape[1] == 0:
            boxes, classes = F.pad(boxes, (0, 0, 0, 1)), F.pad(classes, (0, 1), value=-1)
        return cls(boxes, classes)

    @property
    def exist(self) -> Tensor:
        """(N, M) bool: where there is an object."""
        return self.classes >= 0

    @property
    def images_with_objects(self) -> Tensor:
        """(N, 1) bool: which images have an object."""
        return self.exist[:, :1]


def pad(tensors: Iterable[Tensor], value: float = 0.0) -> Tensor:
    """Return tensors (Ri, ...) as one (N, the largest Ri, ...), the shorter filled with a value."""
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)


@dataclasses.dataclass(frozen=True)
class Match:
    """What rows are matched to; (N, R) each.

    Attributes:
        matched: long, the object of the largest IoU, the first of equal ones; 0 without an object.
        kind: int8, the matcher's label: 1 that object, 0 background, -1 ignored.
        ious: float, that IoU; 0 without an object.
    """

    matched: Tensor
    kind: Tensor
    ious: Tensor

    def rows(self, objects: Objects, num_classes: int) -> Rows:
        """Return the rows labelled by class; those of an image without objects are background."""
        labels = objects.classes.gather(1, self.matched)
        labels = labels.where(self.kind != 0, num_classes).where(self.kind >= 0, -1)
        labels = labels.where(objects.images_with_objects, num_classes)
        return Rows(labels, num_classes, self.ious, self.matched)

    def objectness_rows(self) -> Rows:
        """Return the rows labelled by one class, whatever the object's own: 0, and 1 background."""
        labels = torch.where(self.kind >= 0, 1 - self.kind, -1).long()
        return Rows(labels, 1, self.ious, self.matched)


@torch.no_grad()
def match(objects: Objects, boxes: Tensor, matcher: Matcher) -> Match:
    """Match boxes to the objects of their images by IoU.

    Args:
        objects: of the batch.
        boxes: (R, 4), the same for all images, or (N, R, 4).
        matcher: Detectron2's ``Matcher``, of which the thresholds and labels are read.

    Returns:
        :class:`Match`, each image's the matcher's own to the bit.
    """
    boxes = boxes.expand(len(objects.boxes), -1, -1) if boxes.dim() == 3 else boxes.unsqueeze(0)
    chunks = boxes.split(max(_MOST_PAIRS // objects.classes.numel(), 1), dim=1)
    whole = pairwise_iou(objects.boxes, boxes) if len(chunks) == 1 else None  # (N, M, R)

    def ious(index: int) -> Tensor:
        return pairwise_iou(objects.boxes, chunks[index]) if whole is None else whole

    values_of, matched_of, of_object = [], [], None
    for index in range(len(chunks)):
        of_chunk = ious(index)
        values, indices = of_chunk.max(dim=1)  # (N, R)
        values_of.append(values)
        matched_of.append(indices)
        if matcher.allow_low_quality_matches:
            values = of_chunk.amax(dim=2)  # (N, M)
            of_object = values if of_object is None else of_object.maximum(values)
    best, matched = torch.cat(values_of, dim=1), torch.cat(matched_of, dim=1)

    kind = torch.full_like(matched, matcher.labels[0], dtype=torch.int8)
    for threshold, label in zip(matcher.thresholds[1:-1], matcher.labels[1:], strict=True):
        kind.masked_fill_(best >= threshold, label)
    if of_object is not None:
        # The rows of an object's largest IoU are its own however small that is, 0 included.
        of_object = of_object.where(objects.exist, torch.inf).unsqueeze(2)
        low = [(ious(index) == of_object).any(dim=1) for index in range(len(chunks))]
        kind.masked_fill_(torch.cat(low, dim=1), 1)
    return Match(matched, kind, best)


def pairwise_iou(objects: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoUs (N, M, R) of objects (N, M, 4) with boxes (N or 1, R, 4).

    The operations are those of Detectron2's ``pairwise_iou``, so the numbers are, too.
    """
    left, top, right, bottom = objects.unsqueeze(2).unbind(-1)  # (N, M, 1)
    x1, y1, x2, y2 = boxes.unsqueeze(1).unbind(-1)  # (N or 1, 1, R)
    width = (right.minimum(x2) - left.maximum(x1)).clamp_(min=0)
    height = (bottom.minimum(y2) - top.maximum(y1)).clamp_(min=0)
    intersection = width.mul_(height)
    area, other = (right - left) * (bottom - top), (x2 - x1) * (y2 - y1)
    union = (area + other).sub_(intersection)
    return torch.where(intersection > 0, intersection / union, 0.0)


@torch.no_grad()
def match_points(objects: Objects, anchors: Sequence[Tensor], radius: float) -> Match:
    """Match FCOS's points to the objects of their images (arXiv 2006.09214, section 2.1).

    A point belongs to the smallest object that it lies in and near whose centre it is, if its level
    is the one for the object's distance from it; Detectron2's rule, to the bit.

    Args:
        objects: of the batch.
        anchors: (Ri, 4) a level, fine to coarse: squares around the points, of the size of the
            level's stride.
        radius: how near, in strides.

    Returns:
        :class:`Match`; ``ious`` are 0, as points have none.
    """
    sizes = [len(level) for level in anchors]
    squares = torch.cat(list(anchors))  # (R, 4)
    points = (squares[:, :2] + squares[:, 2:]) / 2  # (R, 2)
    stride = squares[:, 2] - squares[:, 0]  # (R,)
    lower, upper = stride * 4, stride * 8
    lower[: sizes[0]] = 0
    upper[len(upper) - sizes[-1] :] = torch.inf
    step = max(_MOST_PAIRS // (4 * objects.classes.numel()), 1)
    chunks = zip(*(x.split(step) for x in (points, stride, lower, upper)))
    qualities = [
        _point_quality(objects, at, of_stride, low, high, radius)
        for at, of_stride, low, high in chunks
    ]
    best, matched = (torch.cat(x, dim=1) for x in zip(*(q.max(dim=1) for q in qualities)))
    kind = (best >= 1e-5).to(torch.int8)
    return Match(matched, kind, torch.zeros_like(best))


def _point_quality(
    objects: Objects, points: Tensor, stride: Tensor, lower: Tensor, upper: Tensor, radius: float
) -> Tensor:
    """Return (N, M, R): 1e8 minus an object's area where a point may belong to it, else 0."""
    boxes = objects.boxes.unsqueeze(2)  # (N, M, 1, 4)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    is_near = (points - centres).abs().amax(dim=-1) < radius * stride
    sides = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)  # (N, M, R, 4)
    farthest = sides.amax(dim=-1)
    fits = is_near & (sides.amin(dim=-1) > 0) & (farthest > lower) & (farthest < upper)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])  # (N, M, 1)
    return fits * (1e8 - area)
