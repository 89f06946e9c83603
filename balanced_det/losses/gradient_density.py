"""Gradient density, the statistic behind the three GHM losses (arXiv 1811.05181).

An element's gradient length g lies in [0, 1]. With B equal bins (the paper's unit regions), R_b
elements in bin b and N elements in all, the density at g is R_b B and the loss is

    L = (1 / N) sum_i beta_i L_i,  beta_i = N / density(g_i)                    (from Eq. 4 to 9)

so that every bin contributes the same total weight. R_b is smoothed over batches (section on the
exponential moving average): S_b <- momentum S_b + (1 - momentum) R_b.

The published code (the authors', in mmdetection) deviates from the paper in two ways that we keep:
B is replaced by n, the number of bins that the batch occupies, and only these update their S_b. So

    L = sum_i L_i / (n S_b(i))

where N has cancelled; a batch whose elements all fall into one bin gives their mean. One thing we
correct: S_b starts at 0, so the first batch's weights are 1 / (1 - momentum) times too large (4
times at 0.75), and so they are whenever a bin is occupied for the first time. With
``bias_correction`` the density is S_b / (1 - momentum^t_b), t_b being the number of updates of bin
b: a weighted mean of the counts of the batches that occupied b. t_b is per bin because the updates
are; a global count would leave a bin first seen at step 100 uncorrected. The buffer holds 1 -
momentum^t_b itself, which is updated like S_b with a count of 1.

Counts are summed over all workers, so that each weighs by the density of the whole batch, and the
weights are multiplied by the number of workers: averaging gradients over workers, as distributed
training does, then gives the gradient of one process that sees the whole batch.
"""

import torch
from torch import Tensor, nn

from ..distributed import num_workers, sum_over_workers
from ..errors import InputError
from ..ops.reference import bin_index

# https://github.com/libuyu/GHM_Detection/issues/15
SAMPLED_ROWS_WARNING = (
    "is known not to work on the sampled rows of a region head, say its authors: sampling has "
    "already removed the imbalance that it harmonizes"
)


class GradientDensity(nn.Module):
    """The smoothed histogram of gradient lengths and the weights that flatten it.

    Args:
        bins: B, number of equal bins over [0, 1].
        momentum: of the moving average, in [0, 1); 0 uses the batch alone.
        bias_correction: divide out the start at zero; False is the published behaviour.

    Attributes:
        counts: (B,) buffer, elements in each bin of the latest batch that had foreground, over all
            workers; of its coarsest level where levels are counted one by one.
        running: (2, B) buffer, S_b and 1 - momentum^t_b.

    In evaluation mode (``.eval()``) weights are what they would be in training, but nothing is
    stored and other workers are not asked.
    """

    counts: Tensor
    running: Tensor

    def __init__(self, bins: int, momentum: float, bias_correction: bool):
        super().__init__()
        if bins < 1:
            raise InputError(f"A gradient density needs at least one bin, not {bins}.")
        if not 0 <= momentum < 1:
            raise InputError(f"A gradient density's momentum must be in [0, 1), not {momentum}.")
        self.bins = bins
        self.momentum = momentum
        self.bias_correction = bias_correction
        # float64 holds every count exactly, and these are a few numbers.
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("running", torch.zeros(2, bins, dtype=torch.float64))

    def bin_index(self, lengths: Tensor) -> Tensor:
        """Return the bin of each gradient length, long, shaped like ``lengths``."""
        return bin_index(lengths, self.bins)

    def histogram(self, lengths: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the (B,) int64 count of gradient lengths in each bin.

        Args:
            lengths: any shape, in [0, 1].
            valid: bool, shaped like ``lengths``: which of them count; None for all.
        """
        ones = torch.ones_like(lengths, dtype=torch.int64) if valid is None else valid.long()
        counts = torch.zeros(self.bins, dtype=torch.int64, device=lengths.device)
        # torch.bincount would read its result's size on the host.
        return counts.scatter_add_(0, self.bin_index(lengths).flatten(), ones.flatten())

    @torch.no_grad()
    def weights(self, counts: Tensor, num_foreground: Tensor) -> Tensor:
        """Take a batch into the statistics and return the weight of an element in each bin.

        Args:
            counts: (B,) this worker's elements in each bin.
            num_foreground: 0-dim tensor, this worker's foreground rows. Without any on any worker
                the weights are 0 and the statistics stay as they are: the gradients of a batch of
                background say nothing about the density that the detector trains on.

        Returns:
            (B,) float64, workers / (n density_b) where bin b is occupied, else 0. Losses with these
            weights are summed and not divided by anything.
        """
        # On a device, the launch of each of these operations takes longer than its work: they are
        # few on purpose.
        batch = torch.cat([counts, num_foreground.view(1)]).to(self.running.dtype)
        workers = num_workers() if self.training else 1
        if self.training:
            sum_over_workers(batch)
        has_foreground = batch[-1] > 0
        counts = batch[:-1] * has_foreground
        occupied = counts > 0
        # A step of 0 leaves the bins alone that this batch does not occupy.
        new = torch.stack([counts, occupied])  # (2, B)
        step = new[1] * (1 - self.momentum)
        if self.training:
            running = self.running.lerp_(new, step)
            torch.where(has_foreground, counts, self.counts, out=self.counts)
        else:
            running = self.running.lerp(new, step)
        # Empty bins may divide by zero here; their weight is replaced.
        density = running[0] / running[1] if self.bias_correction else running[0]
        return torch.where(occupied, workers / (density * occupied.sum()), 0.0)

    @property
    def density(self) -> Tensor:
        """The (B,) smoothed count of each bin that weights are made of; 0 for one never seen."""
        running_counts, running_mass = self.running
        if not self.bias_correction:
            return running_counts
        return torch.where(running_mass > 0, running_counts / running_mass, 0.0)

    @torch.no_grad()
    def gradient_totals(self) -> tuple[Tensor, Tensor]:
        """Return the gradient that each bin of the latest batch contributes to the mean loss.

        Returns:
            Two (B,) tensors, before and after harmonizing: the number of elements times their
            weight times the gradient length at the bin's centre (Fig. 1, right, of the paper).
        """
        centres = (torch.arange(self.bins, device=self.counts.device) + 0.5) / self.bins
        gradient = self.counts * centres
        occupied = self.counts > 0
        before = gradient / self.counts.sum().clamp(min=1)
        after = torch.where(occupied, gradient / (self.density * occupied.sum()), 0.0)
        return before, after
