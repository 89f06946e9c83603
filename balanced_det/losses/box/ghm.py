"""GHM-R (arXiv 1811.05181, section on GHM-R loss) harmonizes the authentic smooth L1

    ASL1(d) = sqrt(d^2 + mu^2) - mu,  g = |d| / sqrt(d^2 + mu^2),  L = sum_i ASL1_i / (n S_b(i)),

d over all four numbers of all foreground rows; see :mod:`balanced_det.losses.gradient_density`.
"""

from torch import Tensor

from ...errors import InputError
from ..base import BOX_LOSSES, BoxLoss
from ..gradient_density import GradientDensity


@BOX_LOSSES.register
class GHMRegressionLoss(BoxLoss):
    """GHM-R; see the module's docstring.

    Args:
        mu: where ASL1 turns from quadratic to linear, > 0.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
    """

    divides_by_own_count = True
    sums_over_workers = True

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        bias_correction: bool = True,
    ):
        super().__init__()
        if not mu > 0:
            raise InputError(f"GHMRegressionLoss: mu must be above 0, not {mu}.")
        self.mu = mu
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the harmonized sum over all numbers."""
        error = pred - target  # (N, 4)
        root = (error**2 + self.mu**2).sqrt()
        # Equals root - mu, without the cancellation that small errors would suffer.
        losses = error**2 / (root + self.mu)
        lengths = (error.abs() / root).detach()
        counts = self.gradient_density.histogram(lengths)
        weights = self.gradient_density.weights(counts, num_foreground=counts.sum())
        return (losses * weights.to(losses.dtype)[self.gradient_density.bin_index(lengths)]).sum()
