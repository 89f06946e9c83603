"""GHM-C, the gradient-harmonized classification loss (arXiv 1811.05181), over sigmoids.

    g = |p - y|,  p = sigmoid(x), for each (row, class)                                    (Eq. 3)
    L = sum_i BCE_i / (n S_b(i)),  b(i) the bin of g_i                           (from Eq. 4 to 9)

Bins, smoothing and how they deviate from the paper and from the published code are told in
:mod:`balanced_det.losses.gradient_density`.

It divides by its own count, so ``normalizer`` is ignored. The weights carry no gradient. All
pyramid levels share one histogram. Ignored rows are neither counted nor summed. A batch without
any foreground row, over all workers, gives a zero loss and leaves the statistics alone.
"""

import torch
from torch import Tensor

from ..ops import gradient_histogram
from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, add, row_labels
from .gradient_density import SAMPLED_ROWS_WARNING, GradientDensity
from .sigmoid import SigmoidLoss


@CLASSIFICATION_LOSSES.register
class GHMClassificationLoss(SigmoidLoss):
    """GHM-C over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
    """

    divides_by_own_count = True
    sums_over_workers = True
    sampled_rows_warning = SAMPLED_ROWS_WARNING
    neutral = {"bins": 1}

    def __init__(
        self,
        num_classes: int,
        bins: int = 30,
        momentum: float = 0.75,
        bias_correction: bool = True,
    ):
        super().__init__(num_classes)
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the weight of each bin after taking the batch into the statistics."""
        counts = add(gradient_histogram(x, y, self.gradient_density.bins) for x, y in levels)
        num_foreground = foreground(row_labels(levels), self.num_classes).sum()
        weights = self.gradient_density.weights(counts, num_foreground)
        # In the type of the arithmetic, or every level would convert them.
        dtype = torch.promote_types(levels[0][0].dtype, torch.float32)
        return {"bin_weight": weights.to(dtype)}  # (B,)
