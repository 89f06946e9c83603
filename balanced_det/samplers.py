"""Which rows take part in a loss: at random, balanced over IoU, the hardest, or all.

Rows carry Detectron2's labels: 0 ... K-1 an object class, ``bg_label`` background, -1 ignored. A
sampler is called as ``(labels, ious, num_samples, positive_fraction, bg_label)`` and returns the
indices of the foreground and of the background rows it takes:

* :func:`random_sample`, in ``SAMPLERS`` as :class:`RandomSampler`: Faster R-CNN, arXiv 1506.01497;
* :func:`iou_balanced_sample` and :func:`instance_balanced_positives`, :class:`IoUBalancedSampler`:
  Libra R-CNN, arXiv 1904.02701, section 3.1;
* :func:`hard_example_sample`, :class:`OHEMSampler`: arXiv 1604.03540;
* :func:`all_sample`, :class:`AllSampler`: every row that is not ignored, arXiv 1909.04868.

All but the last take the same number of rows: ``min(int(num_samples * positive_fraction),
foreground rows)`` of the foreground, and what is missing to ``num_samples`` of the background, as
far as there is any. They work on the device of their input and copy nothing to the host but counts
of rows.
"""

import functools
import itertools

import torch

from .errors import InputError
from .registry import Registry

SAMPLERS = Registry("sampler")


def random_sample(labels, ious, num_samples, positive_fraction, bg_label, *, generator=None):
    """Take rows at random; the rows of Detectron2's ``subsample_labels`` for the same seed.

    Args:
        labels: (R,) integers.
        ious: not used, may be None.
        num_samples: the rows to take in all.
        positive_fraction: the largest share of foreground rows among them, 0 to 1.
        bg_label: the label of background.
        generator: a ``torch.Generator`` of the labels' device; None is torch's own.

    Returns:
        (positive_idx, negative_idx): (P,) and (N,) LongTensors, P + N <= num_samples.
    """
    positive, negative = all_sample(labels, ious, num_samples, positive_fraction, bg_label)
    num_positive = min(len(positive), int(num_samples * positive_fraction))
    num_negative = min(len(negative), num_samples - num_positive)
    return (
        _shuffled(positive, generator)[:num_positive],
        _shuffled(negative, generator)[:num_negative],
    )


def all_sample(labels, ious, num_samples, positive_fraction, bg_label):
    """Take every row that is not ignored; see :func:`random_sample` for the arguments."""
    positive, negative = _kinds(labels, bg_label)
    return positive.nonzero().squeeze(1), negative.nonzero().squeeze(1)


@torch.no_grad()
def iou_balanced_sample(
    labels,
    ious,
    num_samples,
    positive_fraction,
    bg_label,
    num_bins=3,
    floor_threshold=-1.0,
    floor_fraction=0.0,
    instance_balanced=False,
    matched_idxs=None,
    *,
    generator=None,
):
    """Take background rows in equal shares from ``num_bins`` ranges of IoU (arXiv 1904.02701).

    The ranges, of equal width, reach from ``max(floor_threshold, 0)`` to the largest IoU of a
    background row. The shares differ by one row at most, the ranges of higher IoU having the
    larger; what a range is short of comes from the rest (section 3.1), from each range in
    proportion to what it has left, as a random draw gives it on average.

    With a ``floor_threshold`` >= 0, the rows below it (at 0: those of IoU 0) are kept apart: of the
    N background rows to take, ``int(N (1 - floor_fraction))`` come from the ranges, the others at
    random from below; if one side is short, the other has the more to give.

    The official code differs in three points: its ranges reach to the largest IoU of any row,
    foreground too, so that the highest stay nearly empty; a share is rounded down and the
    remainder filled at random; and the row of the largest IoU is in no range.

    Args:
        labels, num_samples, positive_fraction, bg_label, generator: as in :func:`random_sample`.
        ious: (R,), each row's largest IoU with any object.
        num_bins: number of ranges.
        floor_threshold: -1, or an IoU in [0, 1).
        floor_fraction: 0 to 1.
        instance_balanced: take foreground rows by :func:`instance_balanced_positives`, not at
            random.
        matched_idxs: (R,) integers, the object that a foreground row belongs to; needed for that.

    Returns:
        (positive_idx, negative_idx): LongTensors, as many as :func:`random_sample` returns.
    """
    if len(labels) == 0:
        return all_sample(labels, ious, num_samples, positive_fraction, bg_label)
    # The time is that of launching kernels, so these are few: one sort puts every row at a random
    # place of its group. Groups: 0 the foreground (or an object each: 0, -1, ...), 1 background
    # below the floor, then the ranges, and at last the ignored rows.
    base, slope, firsts = _range_bounds(num_bins, floor_threshold, labels.device)
    negative = labels == bg_label
    largest = (ious * negative).amax()
    if floor_threshold >= 0:
        largest = largest.clamp(min=floor_threshold)
    places = torch.where(negative, ious.float(), torch.rsub(labels, -2.0, alpha=4))
    groups = torch.bucketize(places, torch.addcmul(base, slope, largest), right=True)
    if instance_balanced:
        groups = torch.addcmul(groups, matched_idxs, groups == 0, value=-1)
    keys, order = _sort_within(groups, generator)
    # Group g is order[edges[g] : edges[g + 1]]; this is the one copy to the host.
    edges = [0, *torch.searchsorted(keys, firsts).tolist()]
    num_foreground, num_below, *num_in_range = (b - a for a, b in itertools.pairwise(edges))

    num_positive = min(num_foreground, int(num_samples * positive_fraction))
    num_negative = min(num_below + sum(num_in_range), num_samples - num_positive)
    from_ranges = int(num_negative * (1 - floor_fraction))
    from_ranges = min(max(from_ranges, num_negative - num_below), sum(num_in_range))
    shares = [num_negative - from_ranges, *_shares(num_in_range, from_ranges)]
    negative = torch.cat([order[a : a + share] for a, share in zip(edges[1:], shares)])
    if instance_balanced:
        foreground = slice(num_foreground)
        return _in_turn(keys[foreground], order[foreground], num_positive, generator), negative
    return order[:num_positive], negative


@torch.no_grad()
def instance_balanced_positives(labels, matched_idxs, num, bg_label, *, generator=None):
    """Take ``num`` foreground rows in turn from the objects that they belong to.

    Each object gives one row at random, then each that has more another one, until there are
    ``num``: shares are equal to within one but for objects with fewer rows. (The official code of
    arXiv 1904.02701 fills up at random what such objects are short of.)

    Args:
        labels, bg_label, generator: as in :func:`random_sample`.
        matched_idxs: (R,) integers, the object that a foreground row belongs to.
        num: rows to take; all if there are fewer.

    Returns:
        LongTensor of at most ``num`` indices.
    """
    rows, _ = all_sample(labels, None, None, None, bg_label)
    keys, order = _sort_within(matched_idxs[rows], generator)
    return _in_turn(keys, rows[order], num, generator)


@torch.no_grad()
def hard_example_sample(labels, losses, num_samples, positive_fraction, bg_label):
    """Take the rows of the largest loss (online hard example mining, arXiv 1604.03540).

    As common implementations do, the hardest foreground rows and the hardest background rows are
    taken apart, in the numbers of random sampling; the paper has no such numbers, but takes
    the hardest of both after suppressing rows that overlap.

    Args:
        labels, num_samples, positive_fraction, bg_label: as in :func:`random_sample`.
        losses: (R,), each row's loss; NaN counts as the largest.

    Returns:
        (positive_idx, negative_idx): LongTensors, hardest first.
    """
    kinds = _kinds(labels, bg_label)
    losses = losses.float().nan_to_num(nan=torch.finfo(torch.float32).max)
    losses = losses.expand(2, -1).masked_fill(~kinds, -torch.inf)
    rows = losses.topk(min(num_samples, len(labels))).indices  # (2, at most num_samples)
    num_positive, num_negative = kinds.sum(dim=1).tolist()  # the one copy to the host
    num_positive = min(num_positive, int(num_samples * positive_fraction))
    num_negative = min(num_negative, num_samples - num_positive)
    return rows[0, :num_positive], rows[1, :num_negative]


class _Sampler:
    """The one call of all samplers; a subclass says in ``_take`` what it makes of it."""

    needs_ious = False  # `ious`, and `matched_idxs` where it balances over objects
    needs_losses = False  # `losses`, known only after the classifier has run

    def __call__(
        self,
        labels,
        ious,
        num_samples,
        positive_fraction,
        bg_label,
        *,
        matched_idxs=None,
        losses=None,
        generator=None,
    ):
        """Return (positive_idx, negative_idx), LongTensors.

        Args:
            labels, num_samples, positive_fraction, bg_label, generator: as in
                :func:`random_sample`.
            ious, matched_idxs: as in :func:`iou_balanced_sample`; may be None unless
                ``needs_ious``.
            losses: as in :func:`hard_example_sample`; may be None unless ``needs_losses``.
        """
        counts = (num_samples, positive_fraction, bg_label)
        return self._take(
            labels,
            counts,
            ious=ious,
            matched_idxs=matched_idxs,
            losses=losses,
            generator=generator,
        )

    def __repr__(self):
        parameters = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"


@SAMPLERS.register
class RandomSampler(_Sampler):
    """:func:`random_sample` as a method of ``BALANCE``."""

    def _take(self, labels, counts, *, generator, **_):
        return random_sample(labels, None, *counts, generator=generator)


@SAMPLERS.register
class IoUBalancedSampler(_Sampler):
    """:func:`iou_balanced_sample` as a method of ``BALANCE``.

    Args:
        num_bins, floor_threshold, floor_fraction, instance_balanced: as there.
    """

    needs_ious = True

    def __init__(
        self, num_bins=3, floor_threshold=-1.0, floor_fraction=0.0, instance_balanced=False
    ):
        if num_bins < 1:
            raise InputError(f"IoUBalancedSampler: num_bins is {num_bins}; it must be at least 1.")
        if floor_threshold != -1 and not 0 <= floor_threshold < 1:
            raise InputError(
                f"IoUBalancedSampler: floor_threshold is {floor_threshold}; it must be -1 or in "
                "[0, 1)."
            )
        if not 0 <= floor_fraction <= 1:
            raise InputError(
                f"IoUBalancedSampler: floor_fraction is {floor_fraction}; it must be in [0, 1]."
            )
        self.num_bins = num_bins
        self.floor_threshold = floor_threshold
        self.floor_fraction = floor_fraction
        self.instance_balanced = instance_balanced

    def _take(self, labels, counts, *, ious, matched_idxs, generator, **_):
        return iou_balanced_sample(
            labels,
            ious,
            *counts,
            self.num_bins,
            self.floor_threshold,
            self.floor_fraction,
            self.instance_balanced,
            matched_idxs,
            generator=generator,
        )


@SAMPLERS.register
class OHEMSampler(_Sampler):
    """:func:`hard_example_sample` as a method of ``BALANCE``."""

    needs_losses = True

    def _take(self, labels, counts, *, losses, **_):
        return hard_example_sample(labels, losses, *counts)


@SAMPLERS.register
class AllSampler(_Sampler):
    """:func:`all_sample` as a method of ``BALANCE``."""

    def _take(self, labels, counts, **_):
        return all_sample(labels, None, *counts)


def _kinds(labels, bg_label):
    """(2, R): which rows are foreground, and which are background."""
    negative = labels == bg_label
    return torch.stack(((labels >= 0) ^ negative, negative))


def _shuffled(indices, generator):
    order = torch.randperm(len(indices), generator=generator, device=indices.device)
    return indices[order]


@functools.cache
def _range_bounds(num_bins, floor_threshold, device):
    """What :func:`iou_balanced_sample` compares with; kept, as a copy to a device takes long.

    A row's place is its IoU if it is background, -2 or less if it is foreground, 2 or more if it is
    ignored. Group g has the places from ``bounds[g - 1]`` up to ``bounds[g]``.

    Returns:
        (base, slope, firsts): the bounds are ``base + slope * (the largest background IoU)``; the
        keys of :func:`_sort_within` of group g are from ``firsts[g - 1]`` up to ``firsts[g]``.
    """
    # No IoU is below 0. Of a floor at 0, the rows of IoU 0 are below.
    floor = max(floor_threshold, 1e-30) if floor_threshold >= 0 else 0.0
    parts = [index / num_bins for index in range(num_bins)]
    base = [-1.0, *(floor * (1 - part) for part in parts), 1.5]
    slope = [0.0, *parts, 0.0]
    firsts = [float(group) for group in range(1, num_bins + 3)]
    return tuple(torch.tensor(values, device=device) for values in (base, slope, firsts))


def _sort_within(groups, generator):
    """Sort rows by group, at random within each.

    Args:
        groups: (R,) integers.

    Returns:
        (keys, order): the sorted keys, each less than 1 above its group's number; the rows.
    """
    # Chances below one half do not round up to the next group. The few that are equal in single
    # precision stay in the order of their rows.
    chance = torch.rand(groups.shape, generator=generator, device=groups.device)
    return torch.add(groups, chance, alpha=0.5).sort()


def _shares(sizes, count):
    """Return how many of ``count`` rows come from each group: an equal share, and from the rest.

    Args:
        sizes: the rows that each group has; ``count`` is at most their sum.
    """
    # floor((n + b) / B), b = 0 ... B-1, add up to n (Hermite's identity).
    shares = [min(size, (count + index) // len(sizes)) for index, size in enumerate(sizes)]
    rest = [size - share for size, share in zip(sizes, shares)]
    missing, passed = count - sum(shares), 0
    if missing:
        for index, more in enumerate(rest):
            # In proportion, rounded so that they add up, and none gives more than it has.
            before, passed = passed, passed + more
            shares[index] += missing * passed // sum(rest) - missing * before // sum(rest)
    return shares


def _in_turn(keys, rows, count, generator):
    """Take ``count`` rows in turn from the groups of :func:`_sort_within`.

    Args:
        keys: (P,) sorted.
        rows: (P,), in the order of ``keys``.
        count: all if there are fewer.
    """
    if count >= keys.numel():
        return rows
    turn = torch.arange(keys.numel(), device=keys.device) - torch.searchsorted(keys, keys.floor())
    # Which groups give the last rows is drawn anew: a row of a late turn has a high chance, the
    # higher the smaller its group is.
    turn = turn + torch.rand(keys.shape, generator=generator, device=keys.device)
    return rows.index_select(0, turn.topk(count, largest=False, sorted=False).indices)
