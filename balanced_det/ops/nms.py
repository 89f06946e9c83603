"""Non-maximum suppression in many groups at once.

A detector suppresses overlapping boxes within groups: the (image, level) pairs of a region
proposal network, the (image, class) pairs of a head. In each group the result is that of
``torchvision.ops.nms``, ties included, at any coordinates: a box is kept unless its intersection
over union with a kept box of higher score exceeds the threshold. ``torchvision.ops.batched_nms``
either waits for the device once a group, or moves groups apart by adding offsets to their boxes,
which rounds coordinates (at 1,203 classes in an image of 1,333 pixels to 1/8 of a pixel).

Two implementations share one meaning: torchvision, group by group, and Triton kernels
(:mod:`.nms_triton`) that treat all groups side by side; see :mod:`.choice`.
"""

import functools
from types import ModuleType

import torch
import torchvision

from ..errors import InputError
from .choice import uses_triton

__all__ = ["nms", "nms_mask"]

# Up to so many rows the kernels reserve memory as if all were one group (9 MB): that takes less
# time than asking the device how large the largest group is.
_ONE_GROUP = 1 << 13


def nms(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Return the indices of the boxes that are kept, by decreasing score.

    Args:
        boxes: (R, 4) corners x1, y1, x2, y2, floating point, in any unit.
        scores: (R,), floating point, finite.
        groups: (R,) integers of any values in any order; boxes of different groups never meet.
        iou_threshold: a box that overlaps a better one by more than this is dropped.

    Returns:
        (R',) int64. Of equal scores the smaller index comes first; within a group this is the order
        in which torchvision looks at them too.

    Raises:
        InputError: a wrong shape, type or device.

    The host waits for the device to learn how many boxes are kept.
    """
    _check(boxes, scores, groups)
    by_score = _by_score(scores)
    kept = _mask(boxes, by_score, groups, iou_threshold, None, None)
    return by_score[kept[by_score]]


def nms_mask(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    groups: torch.Tensor,
    iou_threshold: float,
    *,
    valid: torch.Tensor | None = None,
    max_group_size: int | None = None,
) -> torch.Tensor:
    """Say of each box whether it is kept: :func:`nms` as a mask, which the device need not count.

    Args:
        boxes, scores, groups, iou_threshold: as in :func:`nms`.
        valid: (R,) bool; the other rows take no part: they are not kept and suppress nothing,
            whatever they hold. None for all.
        max_group_size: no group has more rows than this, valid or not. With it the host never waits
            for the device; without it, it waits once where R is large. A larger group is an error
            that a CPU reports at once and CUDA when it comes to it.

    Returns:
        (R,) bool, in the order of ``boxes``.

    Raises:
        InputError: a wrong shape, type or device.
    """
    _check(boxes, scores, groups)
    if valid is not None and (valid.shape != scores.shape or valid.dtype != torch.bool):
        raise InputError(
            f"valid must be bool of shape {tuple(scores.shape)}, "
            f"not {valid.dtype} of {tuple(valid.shape)}."
        )
    return _mask(boxes, _by_score(scores), groups, iou_threshold, valid, max_group_size)


def _by_score(scores: torch.Tensor) -> torch.Tensor:
    return scores.sort(descending=True, stable=True).indices


def _mask(
    boxes: torch.Tensor,
    by_score: torch.Tensor,
    groups: torch.Tensor,
    iou_threshold: float,
    valid: torch.Tensor | None,
    max_group_size: int | None,
) -> torch.Tensor:
    """Sort rows by group, then score, so that a group is one range; hand them to a backend."""
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.bool, device=boxes.device)
    # 16-bit boxes are compared in float32, as Detectron2 does.
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    groups, by_group = groups[by_score].sort(stable=True)
    order = by_score[by_group]  # (R,)
    boxes = boxes[order]
    valid = None if valid is None else valid[order]
    if max_group_size is not None:
        limit = max(max_group_size, 1)
        message = f"nms_mask: a group has more than max_group_size = {max_group_size} rows."
        torch._assert_async((groups[limit:] != groups[:-limit]).all(), message)
    if uses_triton(boxes):
        if max_group_size is None:
            few = len(groups) <= _ONE_GROUP
            max_group_size = len(groups) if few else int(_largest_group(groups))
        kept = _kernels().keep_sorted(boxes, groups, iou_threshold, valid, max_group_size)
    else:
        kept = keep_sorted(boxes, groups, iou_threshold, valid)
    return torch.empty_like(kept).scatter_(0, order, kept)


def keep_sorted(
    boxes: torch.Tensor, groups: torch.Tensor, iou_threshold: float, valid: torch.Tensor | None
) -> torch.Tensor:
    """Return the mask of the kept among boxes sorted by group, and by falling score in a group.

    Args:
        boxes: (R, 4), float32 or float64.
        groups: (R,), ascending.
        iou_threshold: a number.
        valid: (R,) bool, or None.
    """
    if valid is not None:
        kept = torch.zeros_like(valid)
        rows = valid.nonzero().squeeze(1)
        kept[rows] = keep_sorted(boxes[rows], groups[rows], iou_threshold, None)
        return kept
    sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    # torchvision sorts by score again; ranks that fall leave the order as it is.
    rank = torch.arange(len(boxes), 0, -1, dtype=torch.float64, device=boxes.device).to(boxes)
    start = 0
    for size in sizes:
        if size == 1:  # most of the (image, class) groups of a detector with many classes
            kept[start] = True
        else:
            group = slice(start, start + size)
            kept[start + torchvision.ops.nms(boxes[group], rank[group], iou_threshold)] = True
        start += size
    return kept


def _largest_group(groups: torch.Tensor) -> torch.Tensor:
    """Return the number of rows of the largest group; ``groups`` (R,) is sorted."""
    position = torch.arange(len(groups), device=groups.device)
    begins = torch.ones_like(groups, dtype=torch.bool)
    torch.ne(groups[1:], groups[:-1], out=begins[1:])
    start = position.where(begins, 0).cummax(0).values  # (R,), where each row's group begins
    return (position - start).max() + 1


def _check(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise InputError(
            f"boxes must be floating point of shape (R, 4), not {boxes.dtype} of "
            f"{tuple(boxes.shape)}."
        )
    for name, tensor in (("scores", scores), ("groups", groups)):
        if tensor.shape != boxes.shape[:1]:
            raise InputError(
                f"{name} must have the shape ({len(boxes)},) of the boxes' rows, "
                f"not {tuple(tensor.shape)}."
            )
        if tensor.device != boxes.device:
            raise InputError(f"{name} are on {tensor.device}, the boxes on {boxes.device}.")
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise InputError(f"groups must be integers, not {groups.dtype}.")


@functools.cache
def _kernels() -> ModuleType:
    from . import nms_triton

    return nms_triton
