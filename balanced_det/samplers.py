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
far as there is any. They work on the device of their input and copy nothing to the host but how
many rows they took.
"""

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
    larger; what a range is short of is filled at random from the rest (section 3.1).

    With a ``floor_threshold`` >= 0, the rows below it (at 0: those of IoU 0) are kept apart: of the
    N background rows to take, ``int(N (1 - floor_fraction))`` come from the ranges, the others at
    random from below; if one side is short, the other fills up.

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
    kinds = _kinds(labels, bg_label)
    counts = _counts(kinds, num_samples, positive_fraction)
    chance, fresh_chance = _chances(labels, generator)
    balanced = kinds[1]
    if floor_threshold >= 0:
        balanced = balanced & (ious > 0 if floor_threshold == 0 else ious >= floor_threshold)
    num_balanced = counts[1]
    if floor_fraction > 0:
        num_balanced = (num_balanced.double() * (1 - floor_fraction)).floor()

    offset = torch.where(balanced, ious.float() - max(floor_threshold, 0.0), -1.0)
    width = offset.amax().clamp(min=torch.finfo(torch.float32).tiny)
    bins = (offset / width * num_bins).floor().clamp(-1, num_bins - 1)  # -1: in no range
    # One sort ranks both kinds: background rows in their range, foreground rows in their object.
    groups = bins
    if instance_balanced:
        groups = torch.where(kinds[0], num_bins + matched_idxs, bins)
    rank = _rank_within(groups, chance)

    # The shares floor((n + b) / B), b = 0 ... B-1, add up to n (Hermite's identity), and
    # rank >= floor((n + b) / B) is this:
    level = (rank + 1) * num_bins - bins > num_balanced
    # The numbers of the rows beyond a share are high, the higher the larger the drawn part of
    # their range is, so that another draw decides which of them fill what other ranges lack.
    if floor_fraction > 0:
        # These come before the rows below the floor, and the rest beyond the shares after them.
        place = _rank_within(level.long().masked_fill(~balanced, -1), fresh_chance)
        missing = num_balanced - (balanced & ~level).sum()
        level = torch.where(level & (place >= missing), 3, level.long())
    if floor_threshold >= 0:
        level = torch.where(balanced, level, 2)

    positive_keys = rank + fresh_chance if instance_balanced else chance
    keys = torch.stack((positive_keys, level + fresh_chance))
    return _lowest(keys, kinds, counts, num_samples)


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
    kinds = _kinds(labels, bg_label)
    chance, fresh_chance = _chances(labels, generator)
    rank = _rank_within(torch.where(kinds[0], matched_idxs, -1), chance)
    # Which objects give the last rows is drawn anew, see iou_balanced_sample.
    keys = (rank + fresh_chance).expand(2, -1)
    counts = (kinds[0].sum().clamp(max=num), kinds[1].sum().clamp(max=0))
    return _lowest(keys, kinds, counts, num)[0]


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
    counts = _counts(kinds, num_samples, positive_fraction)
    losses = losses.float().nan_to_num(nan=torch.finfo(torch.float32).max)
    return _lowest(-losses.expand(2, -1), kinds, counts, num_samples)


class _Sampler:
    """What a sampler asks its caller for beyond the labels."""

    needs_ious = False  # `ious`, and `matched_idxs` where it balances over objects
    needs_losses = False  # `losses`, known only after the classifier has run

    def __repr__(self):
        parameters = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"


@SAMPLERS.register
class RandomSampler(_Sampler):
    """:func:`random_sample` as a method of ``BALANCE``."""

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
        """Return (positive_idx, negative_idx); arguments as in :func:`random_sample`."""
        return random_sample(
            labels, ious, num_samples, positive_fraction, bg_label, generator=generator
        )


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
        """Return (positive_idx, negative_idx); arguments as in :func:`iou_balanced_sample`."""
        return iou_balanced_sample(
            labels,
            ious,
            num_samples,
            positive_fraction,
            bg_label,
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
        """Return (positive_idx, negative_idx); arguments as in :func:`hard_example_sample`."""
        return hard_example_sample(labels, losses, num_samples, positive_fraction, bg_label)


@SAMPLERS.register
class AllSampler(_Sampler):
    """:func:`all_sample` as a method of ``BALANCE``."""

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
        """Return (positive_idx, negative_idx); arguments as in :func:`all_sample`."""
        return all_sample(labels, ious, num_samples, positive_fraction, bg_label)


def _kinds(labels, bg_label):
    """(2, R): which rows are foreground, and which are background."""
    negative = labels == bg_label
    return torch.stack(((labels >= 0) ^ negative, negative))


def _counts(kinds, num_samples, positive_fraction):
    """How many rows of each kind to take, two scalars left on the device."""
    positive, negative = kinds.sum(dim=1)
    positive = positive.clamp(max=int(num_samples * positive_fraction))
    return positive, torch.minimum(negative, num_samples - positive)


def _shuffled(indices, generator):
    order = torch.randperm(len(indices), generator=generator, device=indices.device)
    return indices[order]


def _chances(labels, generator):
    """Two random numbers in [0, 1) for each row, (2, R).

    They are float32 numbers in float64, so that an integer is added without rounding.
    """
    shape = (2, len(labels))
    return torch.rand(shape, generator=generator, device=labels.device).double()


def _rank_within(groups, chance):
    """Each row's place, from 0, among the rows of its group, by ascending ``chance``; (R,)."""
    order = (groups + chance).argsort()
    groups = groups[order]
    place = torch.arange(len(groups), device=groups.device) - torch.searchsorted(groups, groups)
    return torch.empty_like(place).scatter_(0, order, place)


def _lowest(keys, kinds, counts, num_samples):
    """Return the rows of the lowest keys of each kind, as many as ``counts`` says.

    Args:
        keys, kinds: (2, R).
        counts: two scalars on the device, at most ``num_samples``.
    """
    keys = keys.masked_fill(~kinds, torch.inf)
    rows = keys.topk(min(num_samples, keys.shape[1]), largest=False).indices
    num_positive, num_negative = torch.stack(counts).tolist()  # the one copy to the host
    return rows[0, :num_positive], rows[1, :num_negative]
