"""The one currency of this project: rows and their labels.

A detector labels rows: RetinaNet's are anchors, FCOS's are points, a region head's are proposals.
Detectron2 labels all of them alike, and so do all methods here: ``0 ... K-1`` an object class,
``K`` background, ``-1`` ignored.

Letters: N images, R rows of an image, F foreground rows of a batch; L levels of H x W cells with A
anchors each, K classes.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return the boolean mask of the rows that carry an object class; same shape as ``labels``."""
    return (labels >= 0) & (labels < num_classes)


def nonzero(mask: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the indices of a mask's true elements, without asking the device how many there are.

    Args:
        mask: bool, of any shape.
        count: how many are true, known on the host.

    Returns:
        A tuple with the (count,) long indices of each dimension, as
        ``mask.nonzero(as_tuple=True)``.
    """
    flat = mask.flatten()
    # The i-th true element goes to place i, and all others to one place more, which is cut off.
    place = torch.where(flat, flat.cumsum(0) - 1, count)
    index = torch.arange(len(flat), device=mask.device)
    index = index.new_empty(count + 1).scatter_(0, place, index)[:count]
    return torch.unravel_index(index, mask.shape)


def on_device(values: Sequence[Any], like: Tensor) -> Tensor:
    """Return numbers, or tuples of them, as a tensor of the type and device of ``like``.

    The device is not waited for.
    """
    return without_waiting(torch.tensor(values, dtype=like.dtype), like.device)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor, which may be on the host, to a device without waiting for it.

    A copy from ordinary memory to a GPU waits until all that was launched before it has ended.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def level_rows(prediction: Tensor, channels: int) -> Tensor:
    """View a head's output for one pyramid level as rows, without a copy.

    Args:
        prediction: (N, A * channels, H, W), as a convolution leaves it.
        channels: numbers predicted for each of the A anchors of a location.

    Returns:
        (N, H, W, A, channels), a view in the order of Detectron2's anchors (H, then W, then A).
    """
    n, _, h, w = prediction.shape
    return prediction.view(n, -1, channels, h, w).permute(0, 3, 4, 1, 2)


def rows_of_levels(row: Tensor, sizes: Sequence[int]) -> Tensor:
    """Say which of some rows are of each pyramid level.

    Args:
        row: (F,) long, places among the rows of all levels, fine to coarse.
        sizes: how many rows each of the L levels has.

    Returns:
        (L, F) bool.
    """
    ends = on_device(list(itertools.accumulate(sizes)), row)  # (L,)
    level = torch.bucketize(row, ends, right=True)  # (F,)
    return level == torch.arange(len(sizes), device=row.device).unsqueeze(1)


def split_levels(labels: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Split the labels of all anchors by pyramid level, without a copy.

    Args:
        labels: (N, R), R the anchors of all levels, fine to coarse.
        levels: the rows of each level, (N, H, W, A, channels) each (see :func:`level_rows`).

    Returns:
        A list of views of ``labels``, (N, H, W, A) each.
    """
    sizes = [level[0, ..., 0].numel() for level in levels]
    return [
        part.view(level.shape[:-1])
        for part, level in zip(labels.split(sizes, dim=1), levels, strict=True)
    ]
