"""The one currency of this project: rows and their labels.

A detector labels rows: RetinaNet's are anchors, FCOS's are points, a region head's are proposals.
Detectron2 labels all of them alike, and so do all methods here: ``0 ... K-1`` an object class,
``K`` background, ``-1`` ignored.
"""

import torch


def foreground(labels, num_classes):
    """Return the boolean mask of the rows that carry an object class; same shape as ``labels``."""
    return (labels >= 0) & (labels < num_classes)


def ignore_others(labels, kept):
    """Return a copy of ``labels`` (R,) in which all rows but those in ``kept`` are ignored (-1)."""
    chosen = torch.full_like(labels, -1)
    chosen[kept] = labels[kept]
    return chosen


def level_rows(prediction, channels):
    """View a head's output for one pyramid level as rows, without a copy.

    Args:
        prediction: (N, A * channels, H, W), as a convolution leaves it.
        channels: numbers predicted for each of the A anchors of a location.

    Returns:
        (N, H, W, A, channels), a view in the order of Detectron2's anchors (H, then W, then A).
    """
    n, _, h, w = prediction.shape
    return prediction.view(n, -1, channels, h, w).permute(0, 3, 4, 1, 2)


def split_levels(labels, levels):
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


def objectness_labels(labels):
    """Turn Detectron2's RPN labels (1 object, 0 background) into those of one class (0, and 1)."""
    return torch.where(labels >= 0, 1 - labels, labels)
