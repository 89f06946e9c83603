"""How a tensor of logits lies in memory, so that every pass can walk it in that order.

A convolutional head leaves its logits as (N, A*K, H, W); the losses see them as (N, H, W, A, K)
through strides. Walking the tensor in its own memory order keeps reads coalesced and lets the
gradient come back in the same layout, so that the convolution's backward needs no copy either.
"""

import math

import torch


def memory_order(logits):
    """Return the dimensions of ``logits`` (*lead, K), from the largest stride to the smallest.

    Dimensions of one element, whose stride means nothing, come first; a class dimension of one
    element comes last, since rows of one class are the simplest layout.
    """
    last = logits.dim() - 1
    shape, strides = logits.shape, logits.stride()

    def key(dim):
        if shape[dim] > 1:
            return -strides[dim]
        return 1 if dim == last else -math.inf

    return sorted(range(logits.dim()), key=key)


def is_dense(logits, order):
    """Say whether ``logits``, walked in ``order``, covers one block of memory without gaps."""
    expected = 1
    for dim in reversed(order):
        if logits.shape[dim] > 1:
            if logits.stride(dim) != expected:
                return False
            expected *= logits.shape[dim]
    return True


def empty_gradient(logits):
    """Return an uninitialised tensor like ``logits``, dense and in the same memory order."""
    order = memory_order(logits)
    if is_dense(logits, order):
        return torch.empty_like(logits)  # Keeps the strides.
    inverse = sorted(range(logits.dim()), key=order.__getitem__)
    return logits.new_empty([logits.shape[dim] for dim in order]).permute(inverse)
