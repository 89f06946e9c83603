"""Every row that is not ignored, as the sampling-free mechanism has it (arXiv 1909.04868)."""

from ..selection import SAMPLERS, Sampler


@SAMPLERS.register
class AllSampler(Sampler):
    """Take every row that is not ignored, whatever the quota."""

    takes_all = True

    def __call__(self, rows, quota, generator=None):
        """Return the (N, R) mask of the rows taken; see :class:`Sampler`."""
        return rows.takes_part
