"""How a tensor of logits lies in memory, so that every pass can walk it in that order.

A convolutional head leaves its logits as (N, A*K, H, W); the losses see them as (N, H, W, A, K)
through strides. Walking the tensor in its own memory order keeps reads coalesced and lets the
gradient come back in the same layout, so that the convolution's backward needs no copy either.

Letters: N images, A anchors in each of H x W cells, K classes.
"""

import math
from collections.abc import Sequence

import torch


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the dimensions of logits (*, K), from the largest stride to the smallest.

    Dimensions of one element, whose stride means nothing, come first; a class dimension of one
    element comes last, since rows of one class are the simplest layout.
    """
    last = len(shape) - 1

    def key(dim: int) -> float:
        if shape[dim] > 1:
            return -strides[dim]
        return 1 if dim == last else -math.inf

    return sorted(range(len(shape)), key=key)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Say whether a tensor, walked in its memory order, covers one block without gaps."""
    expected = 1
    for dim in reversed(memory_order(shape, strides)):
        if shape[dim] > 1:
            if strides[dim] != expected:
                return False
            expected *= shape[dim]
    return True


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor like ``logits``, dense and in the same memory order."""
    shape, strides = logits.shape, logits.stride()
    if logits.is_contiguous() or is_dense(shape, strides):
        return torch.empty_like(logits)  # Keeps the strides.
    order = memory_order(shape, strides)
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return logits.new_empty([shape[dim] for dim in order]).permute(inverse)
