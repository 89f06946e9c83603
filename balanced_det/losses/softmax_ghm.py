"""GHM-C over one softmax: each row's cross entropy, harmonized by the row's gradient length.

    g = 1 - p_y,  p = softmax(z), for each row
    L = sum_r CE_r / (n S_b(r)),  b(r) the bin of g_r

The paper (arXiv 1811.05181) has no such form; what it shares with GHM-C over sigmoids is told in
:mod:`balanced_det.losses.ghm`, bins and smoothing in :mod:`balanced_det.losses.gradient_density`.
"""

import torch
from torch import Tensor

from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, row_labels
from .gradient_density import SAMPLED_ROWS_WARNING, GradientDensity
from .softmax import SoftmaxLoss


@CLASSIFICATION_LOSSES.register
class SoftmaxGHMLoss(SoftmaxLoss):
    """GHM-C over one softmax of K + 1 channels; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
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

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return the harmonized sum over rows; ``scale`` is 1."""
        losses = torch.cat([self.cross_entropy(x, y) for x, y in levels])  # (R,)
        labels = row_labels(levels)
        lengths = -torch.expm1(-losses.detach())  # 1 - p_y, since a row's loss is -log p_y
        counts = self.gradient_density.histogram(lengths, labels >= 0)
        num_foreground = foreground(labels, self.num_classes).sum()
        weights = self.gradient_density.weights(counts, num_foreground)
        weight = weights.to(losses.dtype)[self.gradient_density.bin_index(lengths)]  # (R,)
        if self.class_weight is not None:
            weight = weight * self.row_weight(labels)
        # An ignored row's loss is 0 and has no gradient, whatever its weight.
        return (losses * weight).sum()
