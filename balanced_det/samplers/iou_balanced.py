"""IoU-balanced sampling of Libra R-CNN (arXiv 1904.02701, section 3.1).

Background rows come in equal shares from ``num_bins`` ranges of IoU, of equal width, which reach
from ``floor_threshold``, or 0, to the largest IoU of a background row of the image. The shares
differ by one row at most, the ranges of higher IoU having the larger; what a range is short of is
drawn at random from what the ranges have left.

With a ``floor_threshold``, the rows below it (at 0: those of IoU 0) are kept apart: of the N
background rows to take, ``int(N (1 - floor_fraction))`` come from the ranges, the others at random
from below; if one side is short, the other has the more to give.

With ``instance_balanced`` the foreground rows come in turn from the objects that they belong to:
each object gives one row at random, then each that has more another one, until there are enough.

The official code differs in four points, which ``as_published`` takes over: its ranges reach to the
largest IoU of any row, foreground too, so that the highest stay nearly empty; a share is rounded
down and the remainder filled at random; the row of the largest IoU is in no range; and an object
gives at most ``round(N / objects) + 1`` of N foreground rows, while what all are short of is filled
at random.

Two slips of it no option has. It sets a floor of -1 to 0 after its first image, and is built anew
for each batch: the first image of a batch has rows of IoU 0 in its lowest range, and the others
keep them apart, as ``floor_threshold`` 0 does. And what it fills up where objects are short may be
rows that it has taken already, so that it ends with a few less.

Letters: N images, R rows of an image, B ranges of IoU.
"""

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..selection import SAMPLERS, Quota, Rows, Sampler
from .draw import take, uniform
from .random import choice


@SAMPLERS.register
class IoUBalancedSampler(Sampler):
    """Take background rows in equal shares from ranges of IoU; see the module's docstring.

    Args:
        num_bins: number of ranges.
        floor_threshold: an IoU in [0, 1); None for no floor.
        floor_fraction: the share of background rows from below the floor, 0 to 1.
        instance_balanced: take foreground rows in turn from their objects, not at random.
        as_published: ranges and shares of rows and objects as the official code has them.
    """

    needs_ious = True

    def __init__(
        self,
        num_bins: int = 3,
        floor_threshold: float | None = None,
        floor_fraction: float = 0.0,
        instance_balanced: bool = False,
        as_published: bool = False,
    ):
        if num_bins < 1:
            raise InputError(f"IoUBalancedSampler: num_bins is {num_bins}; it must be at least 1.")
        if floor_threshold is not None and not 0 <= floor_threshold < 1:
            raise InputError(
                f"IoUBalancedSampler: floor_threshold is {floor_threshold}; it must be in [0, 1), "
                "or None for no floor."
            )
        if not 0 <= floor_fraction <= 1:
            raise InputError(
                f"IoUBalancedSampler: floor_fraction is {floor_fraction}; it must be in [0, 1]."
            )
        self.num_bins = num_bins
        self.floor_threshold = floor_threshold
        self.floor_fraction = floor_fraction
        self.instance_balanced = instance_balanced
        self.as_published = as_published

    def __call__(
        self, rows: Rows, quota: Quota, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (N, R) mask of the rows taken; see :class:`Sampler`."""
        num_foreground, num_background = quota.numbers(rows)  # (N,)
        chance = uniform(rows.labels, generator)  # (N, R)
        most = quota.rows_per_image
        priority = chance
        if self.instance_balanced:
            priority = self._turns(rows, num_foreground, chance, generator)
        positive = take(rows.foreground, priority, num_foreground, most)
        return positive | self._background(rows, num_background, most, chance, generator)

    def _background(
        self,
        rows: Rows,
        number: torch.Tensor,
        most: int,
        chance: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Return the (N, R) mask of the ``number`` (N,) background rows to take."""
        ranges, above = self._ranges(rows)  # (N, B, R), (N, R)
        below = rows.background & ~above
        num_above, num_below = above.sum(dim=1), below.sum(dim=1)  # (N,)
        from_ranges = (number.double() * (1 - self.floor_fraction)).long()
        from_ranges = from_ranges.maximum(number - num_below).minimum(num_above)
        # n rows in B shares that differ by one at most, the later ones larger, are
        # floor((n + b) / B) for b = 0 ... B-1: 8 rows in 3 shares are 2, 3 and 3.
        index = torch.arange(self.num_bins, device=number.device)
        if self.as_published:
            index = torch.zeros_like(index)
        shares = (from_ranges.unsqueeze(1) + index) // self.num_bins  # (N, B)
        taken = take(ranges, chance.unsqueeze(1), shares, most).any(dim=1)  # (N, R)
        missing = from_ranges - taken.sum(dim=1)
        # By new random numbers: the rows that are left have the low ones of their range, so that by
        # the old numbers a range of which many were taken would hardly get another.
        taken |= take(above & ~taken, uniform(chance, generator), missing, most)
        if self.floor_threshold is not None:
            taken |= take(below, chance, number - from_ranges, most)
        return taken

    def _ranges(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the background rows of each range, (N, B, R) bool, and all of them, (N, R)."""
        ious = rows.known("ious").float()
        background = rows.background
        floor = self.floor_threshold or 0.0
        above = background & ((ious > 0) if self.floor_threshold == 0 else (ious >= floor))
        counted = rows.takes_part if self.as_published else above
        largest = (ious * counted).amax(dim=1, keepdim=True)  # (N, 1)
        # Where the floor is the largest IoU, the width is not 0, and all rows are in range 0.
        width = ((largest - floor) / self.num_bins).clamp(min=torch.finfo(ious.dtype).tiny)
        place = ((ious - floor) / width).long().clamp(min=0)  # (N, R)
        if not self.as_published:
            place = place.clamp(max=self.num_bins - 1)
        index = torch.arange(self.num_bins, device=ious.device).view(1, -1, 1)
        return above.unsqueeze(1) & (place.unsqueeze(1) == index), above

    def _turns(
        self,
        rows: Rows,
        number: torch.Tensor,
        chance: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Return the priority (N, R) by which ``number`` (N,) rows are taken of the objects."""
        # Sorted by object, and at random within one: of objects 0 and 1 the keys are 0 to 0.5 and 1
        # to 1.5, so no rounding makes a row of object 0 one of object 1.
        keys = torch.where(rows.foreground, rows.known("matched") + chance / 2, torch.inf)
        keys, order = keys.sort(dim=1)
        place = torch.arange(keys.shape[1], device=keys.device)
        turn = place - torch.searchsorted(keys, keys.floor())  # the how-manieth of its object
        if self.as_published:
            num_objects = ((turn == 0) & keys.isfinite()).sum(dim=1)
            most = (number / num_objects.clamp(min=1)).round() + 1  # (N,), of an object
            rank = (turn < most.unsqueeze(1)).float()
        else:
            rank = -turn
        # Rows of one turn are of different objects; new random numbers say which come first.
        priority = rank + uniform(chance, generator)
        return torch.empty_like(priority).scatter_(1, order, priority)


def iou_balanced_sample(
    foreground: list[int],
    background: list[int],
    ious: Sequence[float],
    matched: Sequence[int],
    quota: Quota,
    sampler: IoUBalancedSampler,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Say what :class:`IoUBalancedSampler` draws of one image.

    Args:
        foreground, background: the image's rows of each kind, as lists of indices.
        ious, matched: each row's largest IoU and object, lists.
        quota: how many of them.
        sampler: has the parameters.

    Returns:
        Two lists of indices, of the foreground and of the background.
    """
    num_foreground = min(len(foreground), int(quota.rows_per_image * quota.positive_fraction))
    num_background = min(len(background), quota.rows_per_image - num_foreground)
    floor, num_bins = sampler.floor_threshold or 0.0, sampler.num_bins
    is_below = (lambda iou: iou == 0) if sampler.floor_threshold == 0 else (lambda iou: iou < floor)
    below = [row for row in background if is_below(ious[row])]
    above = [row for row in background if not is_below(ious[row])]

    from_ranges = int(num_background * (1 - sampler.floor_fraction))
    from_ranges = min(max(from_ranges, num_background - len(below)), len(above))
    counted = [*background, *foreground] if sampler.as_published else above
    width = (max((ious[row] for row in counted), default=0.0) - floor) / num_bins
    highest = num_bins if sampler.as_published else num_bins - 1  # num_bins is no range
    chosen = []
    for index in range(num_bins):
        inside = [row for row in above if _range(ious[row] - floor, width, highest) == index]
        more = 0 if sampler.as_published else index
        chosen += choice(inside, (from_ranges + more) // num_bins, generator)
    left_over = [row for row in above if row not in chosen]
    chosen += choice(left_over, from_ranges - len(chosen), generator)
    chosen += choice(below, num_background - from_ranges, generator)
    if not sampler.instance_balanced:
        return choice(foreground, num_foreground, generator), chosen
    if sampler.as_published:
        return _capped(foreground, matched, num_foreground, generator), chosen
    return _in_turn(foreground, matched, num_foreground, generator), chosen


def _range(above_floor: float, width: float, highest: int) -> int:
    return min(int(above_floor / width), highest) if width > 0 else 0


def _capped(
    rows: list[int], matched: Sequence[int], number: int, generator: torch.Generator | None
) -> list[int]:
    """Return ``number`` of ``rows``, first of those that each object may give, then of the rest."""
    objects = {matched[row] for row in rows}
    most = round(number / max(len(objects), 1)) + 1
    given: list[int] = []
    for index in sorted(objects):
        given += choice([row for row in rows if matched[row] == index], most, generator)
    chosen = choice(given, number, generator)
    left = [row for row in rows if row not in given]
    return chosen + choice(left, number - len(chosen), generator)


def _in_turn(
    rows: list[int], matched: Sequence[int], number: int, generator: torch.Generator | None
) -> list[int]:
    """Return ``number`` of ``rows``, taken in turn from the objects that they are matched to."""
    chosen: list[int] = []
    while len(chosen) < min(number, len(rows)):
        left = choice([row for row in rows if row not in chosen], len(rows), generator)
        one_each = {matched[row]: row for row in left}  # a random row of each object
        turn = choice(list(one_each.values()), len(one_each), generator)
        chosen += turn[: number - len(chosen)]
    return chosen
