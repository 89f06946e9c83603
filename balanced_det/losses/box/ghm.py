"""GHM-R (arXiv 1811.05181, section on GHM-R loss) harmonizes the authentic smooth L1

    ASL1(d) = sqrt(d^2 + mu^2) - mu,  g = |d| / sqrt(d^2 + mu^2),  L = sum_i ASL1_i / (n S_b(i)),

d over all four numbers of all foreground rows; see :mod:`balanced_det.losses.gradient_density`.
The published code calls it once a pyramid level on one moving average and adds the results, as it
does with GHM-C (:mod:`balanced_det.losses.ghm`); that is ``per_level``.
"""

from torch import Tensor

from ...errors import InputError
from ..base import BOX_LOSSES, BoxLoss, add
from ..gradient_density import GradientDensity


@BOX_LOSSES.register
class GHMRegressionLoss(BoxLoss):
    """GHM-R; see the module's docstring.

    Args:
        mu: where ASL1 turns from quadratic to linear, > 0.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
        per_level: take each pyramid level as a batch of its own and add the losses, as the
            published code does; for dense detectors, whose rows have levels.
    """

    divides_by_own_count = True
    sums_over_workers = True

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        bias_correction: bool = True,
        per_level: bool = False,
    ):
        super().__init__()
        if not mu > 0:
            raise InputError(f"GHMRegressionLoss: mu must be above 0, not {mu}.")
        self.mu = mu
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)
        self.per_level = per_level

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the harmonized sum over all numbers."""
        losses, lengths = self._curve(pred, target)
        return (losses * self._weights(lengths)).sum()

    def level_sum(self, pred: Tensor, target: Tensor, levels: Tensor) -> Tensor:
        """Return the harmonized sums of all levels, added; each is counted for itself."""
        losses, lengths = self._curve(pred, target)
        return add(
            (losses * self._weights(lengths, level)).where(level, 0.0).sum()
            for level in levels.unsqueeze(-1).expand(-1, -1, 4)  # (N, 4)
        )

    def _curve(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ASL1 and the gradient length of each number, (N, 4) both."""
        error = pred - target  # (N, 4)
        root = (error**2 + self.mu**2).sqrt()
        # Equals root - mu, without the cancellation that small errors would suffer.
        losses = error**2 / (root + self.mu)
        return losses, (error.abs() / root).detach()

    def _weights(self, lengths: Tensor, valid: Tensor | None = None) -> Tensor:
        """Take the valid numbers into the statistics and return the weight of each, (N, 4)."""
        counts = self.gradient_density.histogram(lengths, valid)
        weights = self.gradient_density.weights(counts, num_foreground=counts.sum())
        return weights.to(lengths.dtype)[self.gradient_density.bin_index(lengths)]
