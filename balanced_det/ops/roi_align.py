"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) of boxes on several levels and images at once.

Detectron2 pools level by level: it waits for the device to learn which boxes are on a level, and
launches some ten kernels for each. Here a box says which level and image it is of, and one launch
makes the regions of all; another one makes the gradients of all levels.

Two implementations share one meaning: torchvision, level by level, and Triton kernels
(:mod:`.roi_align_triton`); see :mod:`.choice`. The kernels add up gradients in no fixed order, as
torchvision's do; ``torch.use_deterministic_algorithms`` chooses torchvision's deterministic form.

Letters: T boxes, N images, C channels, Hl x Wl pixels of level l, S x S bins of a box.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError
from .choice import uses_triton

__all__ = ["roi_align"]


def roi_align(
    features: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    image: torch.Tensor,
    level: torch.Tensor,
    scales: Sequence[float],
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> torch.Tensor:
    """Return the features of each box, averaged in S x S bins: torchvision's ``roi_align``.

    Args:
        features: (N, C, Hl, Wl) a level, floating point, all of one type. Channels-last memory is
            read as it is; other layouts are copied to it first on CUDA.
        boxes: (T, 4) corners x1, y1, x2, y2 in pixels of the image, floating point.
        image: (T,) int64 in [0, N), the image of each box.
        level: (T,) int64, the element of ``features`` that each box is pooled from. The features of
            a box whose level there is not are zero.
        scales: of each level, its pixels per pixel of the image, such as 1 / 16.
        output_size: S, or (rows, columns) of bins.
        sampling_ratio: a bin averages so many samples along each axis; 0 for as many as it has
            pixels of the level, rounded up.
        aligned: whether a pixel's center lies half a pixel from its corner, as it does; False for
            the first form of RoIAlign, which also enlarges boxes to a pixel of the level.

    Returns:
        (T, C, S, S) of the features' type and memory format. The arithmetic is float32 whatever
        their type (float64 for float64), as torchvision's under autocast; the gradients of all
        boxes are summed in it and rounded once. No gradient flows to the boxes.

    Raises:
        InputError: a wrong shape, type or device. Values of ``image`` are not checked, since that
            would wait for the device.

    With the kernels, nothing waits for the device.
    """
    features = list(features)
    bins = (output_size, output_size) if isinstance(output_size, int) else output_size
    _check(features, boxes, image, level, scales, bins)
    arithmetic = torch.promote_types(features[0].dtype, torch.float32)
    arguments = (boxes.detach().to(arithmetic), image, level, scales, bins, sampling_ratio, aligned)
    if uses_triton(features[0]) and not torch.are_deterministic_algorithms_enabled():
        return _RoIAlign.apply(*arguments, *features)
    return align_levels(features, *arguments)


def align_levels(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    bins: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Return what :func:`roi_align` does, level by level, in plain form."""
    out = features[0].new_zeros(len(boxes), features[0].shape[1], *bins)
    regions = torch.cat([image.unsqueeze(1).to(boxes), boxes], dim=1)  # (T, 5)
    for index, (x, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (level == index).nonzero().squeeze(1)
        found = torchvision.ops.roi_align(
            x.to(boxes.dtype), regions[rows], bins, scale, sampling_ratio, aligned
        )
        out[rows] = found.to(out.dtype)
    return out.contiguous(memory_format=_memory_format(features[0]))


class _RoIAlign(torch.autograd.Function):
    """The kernels' form; its backward needs no features, only their shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        boxes: Tensor,
        image: Tensor,
        level: Tensor,
        scales: Sequence[float],
        bins: tuple[int, int],
        sampling_ratio: int,
        aligned: bool,
        *features: Tensor,
    ) -> Tensor:
        boxes, image, level = boxes.contiguous(), image.contiguous(), level.contiguous()
        ctx.save_for_backward(boxes, image, level)
        ctx.options = (scales, sampling_ratio, aligned)
        ctx.shapes = [x.shape for x in features]
        ctx.memory_format = _memory_format(features[0])
        channels_last = [x.contiguous(memory_format=torch.channels_last) for x in features]
        out = _kernels().forward(
            channels_last, boxes, image, level, scales, bins, sampling_ratio, aligned
        )
        return out.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        of_out = of_out.contiguous(memory_format=torch.channels_last)
        gradients = [
            of_out.new_zeros(n, h, w, c, dtype=torch.float32).permute(0, 3, 1, 2)
            for n, c, h, w in ctx.shapes
        ]
        _kernels().backward(gradients, of_out, *ctx.saved_tensors, *ctx.options)
        for index, x in enumerate(gradients):  # One after another, so that memory is freed.
            gradients[index] = x.to(of_out.dtype, memory_format=ctx.memory_format)
        return (None,) * 7 + tuple(gradients)


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the format that a convolution of ``x`` would return: contiguous where both fit."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _check(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    bins: tuple[int, ...],
) -> None:
    if len(features) == 0 or len(features) != len(scales):
        raise InputError(f"{len(features)} levels of features and {len(scales)} scales were given.")
    first = features[0]
    for x in features:
        if x.dim() != 4 or not x.is_floating_point():
            raise InputError(
                f"features must be floating point of shape (N, C, H, W), not {x.dtype} of "
                f"{tuple(x.shape)}."
            )
        if (x.shape[:2], x.dtype, x.device) != (first.shape[:2], first.dtype, first.device):
            raise InputError(
                "features must have the same images, channels, type and device on every level."
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise InputError(
            f"boxes must be floating point of shape (T, 4), not {boxes.dtype} of "
            f"{tuple(boxes.shape)}."
        )
    for name, tensor in (("image", image), ("level", level)):
        if tensor.shape != boxes.shape[:1] or tensor.dtype != torch.int64:
            raise InputError(
                f"{name} must be int64 of shape ({len(boxes)},), not {tensor.dtype} of "
                f"{tuple(tensor.shape)}."
            )
    for name, tensor in (("boxes", boxes), ("image", image), ("level", level)):
        if tensor.device != first.device:
            raise InputError(f"{name} are on {tensor.device}, the features on {first.device}.")
    if len(bins) != 2 or min(bins) < 1:
        raise InputError(f"output_size must be positive, one number or two, not {bins}.")


@functools.cache
def _kernels() -> ModuleType:
    from . import roi_align_triton

    return roi_align_triton
