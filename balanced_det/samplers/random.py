"""Random sampling, as Faster R-CNN has it (arXiv 1506.01497) and Detectron2 draws it.

Of each image ``min(foreground rows, int(rows_per_image * positive_fraction))`` foreground rows,
and what is missing to ``rows_per_image`` of the background as far as there is any, each at random.
"""

import torch

from ..selection import SAMPLERS, Quota, Rows, Sampler
from .draw import take, uniform


@SAMPLERS.register
class RandomSampler(Sampler):
    """Take rows at random; see the module's docstring."""

    def __call__(
        self, rows: Rows, quota: Quota, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (N, R) mask of the rows taken; see :class:`Sampler`."""
        kinds = torch.stack([rows.foreground, rows.background], dim=1)  # (N, 2, R)
        numbers = torch.stack(quota.numbers(rows), dim=1)  # (N, 2)
        chance = uniform(rows.labels, generator).unsqueeze(1)  # (N, 1, R)
        return take(kinds, chance, numbers, quota.rows_per_image).any(dim=1)


def random_sample(
    foreground: list[int],
    background: list[int],
    quota: Quota,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Say what :class:`RandomSampler` draws of one image.

    Args:
        foreground, background: the image's rows of each kind, as lists of indices.
        quota: how many of them.

    Returns:
        Two lists of indices, of the foreground and of the background.
    """
    num_foreground = min(len(foreground), int(quota.rows_per_image * quota.positive_fraction))
    num_background = min(len(background), quota.rows_per_image - num_foreground)
    return (
        choice(foreground, num_foreground, generator),
        choice(background, num_background, generator),
    )


def choice(rows: list[int], number: int, generator: torch.Generator | None = None) -> list[int]:
    """Return ``number`` of a list of ``rows`` at random, without repeating any."""
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:number].tolist()]
