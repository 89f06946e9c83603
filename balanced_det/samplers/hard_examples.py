"""Online hard example mining (OHEM, arXiv 1604.03540): the rows of the largest loss.

As common implementations do, the hardest foreground rows and the hardest background rows are taken
apart, in the numbers of random sampling; the paper has no such numbers, but takes the hardest of
both after suppressing rows that overlap.

A region head trains its classifier and box regression on the rows taken. Its mask head trains on
all foreground proposals, since their losses say nothing of masks.
"""

from collections.abc import Sequence

import torch

from ..selection import SAMPLERS, Quota, Rows, Sampler
from .draw import take


@SAMPLERS.register
class OHEMSampler(Sampler):
    """Take the rows of the largest loss, NaN before all; see the module's docstring."""

    needs_losses = True

    def __call__(
        self, rows: Rows, quota: Quota, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (N, R) mask of the rows taken; see :class:`Sampler`."""
        kinds = torch.stack([rows.foreground, rows.background], dim=1)  # (N, 2, R)
        numbers = torch.stack(quota.numbers(rows), dim=1)  # (N, 2)
        # Infinite losses become finite: inf is NaN's alone, and -inf marks rows of other kinds.
        losses = rows.known("losses").float().nan_to_num(nan=torch.inf).unsqueeze(1)
        return take(kinds, losses, numbers, quota.rows_per_image).any(dim=1)


def hard_examples(
    foreground: list[int], background: list[int], losses: Sequence[float], quota: Quota
) -> tuple[list[int], list[int]]:
    """Say what :class:`OHEMSampler` takes of one image.

    Args:
        foreground, background: the image's rows of each kind, as lists of indices.
        losses: each row's loss, a list.
        quota: how many of them.

    Returns:
        Two lists of indices, of the foreground and of the background, hardest first.
    """

    def hardest(rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: losses[row], reverse=True)

    num_foreground = min(len(foreground), int(quota.rows_per_image * quota.positive_fraction))
    num_background = min(len(background), quota.rows_per_image - num_foreground)
    return hardest(foreground)[:num_foreground], hardest(background)[:num_background]
