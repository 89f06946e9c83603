"""Every row that is not ignored, as the sampling-free mechanism has it (arXiv 1909.04868)."""

import torch

from ..selection import SAMPLERS, Quota, Rows, Sampler


@SAMPLERS.register
class AllSampler(Sampler):
    """Take every row that is not ignored, whatever the quota."""

    takes_all = True

    def __call__(
        self, rows: Rows, quota: Quota, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (N, R) mask of the rows taken; see :class:`Sampler`."""
        return rows.takes_part
