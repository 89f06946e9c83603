"""GHM-C, the gradient-harmonized classification loss (arXiv 1811.05181), sigmoid and softmax.

    g = |p - y|,  p = sigmoid(x), for each (row, class)                                    (Eq. 3)
    L = sum_i BCE_i / (n S_b(i)),  b(i) the bin of g_i                           (from Eq. 4 to 9)

Bins, smoothing and how they deviate from the paper and from the published code are told in
:mod:`balanced_det.losses.harmonizer`. The softmax form has one gradient length a row, g = 1 - p_y,
and weighs each row's cross entropy likewise; the paper has no such form.

Both divide by their own count, so ``normalizer`` is ignored. The weights carry no gradient. All
pyramid levels share one histogram. Ignored rows are neither counted nor summed. A batch without
any foreground row, over all workers, gives a zero loss and leaves the statistics alone.
"""

import torch

from ..ops import gradient_histogram
from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, SigmoidLoss, SoftmaxLoss, add
from .harmonizer import GradientDensity


def _row_labels(levels):
    """Return the labels of all levels as one (R,) tensor, which takes fewer calls than a list."""
    return torch.cat([y.flatten() for _, y in levels])


class _Harmonized:
    """The statistics and the call of both losses, to inherit before the loss's family."""

    # https://github.com/libuyu/GHM_Detection/issues/15
    sampled_rows_warning = (
        "it is known not to work on the sampled rows of a region head, say its authors: the "
        "sampler has already removed the imbalance that it harmonizes; use it in BALANCE.RPN or "
        "BALANCE.DENSE, or set BALANCE.ROI_HEADS.SAMPLER to 'AllSampler'"
    )

    def __init__(self, num_classes, bins=30, momentum=0.75, bias_correction=True):
        super().__init__(num_classes)
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)

    def forward(self, logits, labels, normalizer=None, overwrite_logits=False):
        """Return the harmonized loss; ``normalizer`` is ignored, GHM divides by its own count."""
        return super().forward(logits, labels, 1, overwrite_logits)


@CLASSIFICATION_LOSSES.register
class GHMClassificationLoss(_Harmonized, SigmoidLoss):
    """GHM-C over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
    """

    def tables(self, levels):
        """Return the weight of each bin after taking the batch into the statistics."""
        counts = add(gradient_histogram(x, y, self.gradient_density.bins) for x, y in levels)
        num_foreground = foreground(_row_labels(levels), self.num_classes).sum()
        weights = self.gradient_density.weights(counts, num_foreground)
        # In the type of the arithmetic, or every level would convert them.
        dtype = torch.promote_types(levels[0][0].dtype, torch.float32)
        return {"bin_weight": weights.to(dtype)}  # (B,)


@CLASSIFICATION_LOSSES.register
class SoftmaxGHMLoss(_Harmonized, SoftmaxLoss):
    """GHM-C over one softmax of K + 1 channels; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
    """

    def scaled_sum(self, levels, scale, overwrite_logits):
        """Return the harmonized sum over rows; ``scale`` is 1."""
        losses = torch.cat([self.cross_entropy(x, y) for x, y in levels])  # (R,)
        labels = _row_labels(levels)
        lengths = -torch.expm1(-losses.detach())  # 1 - p_y, since a row's loss is -log p_y
        counts = self.gradient_density.histogram(lengths, labels >= 0)
        num_foreground = foreground(labels, self.num_classes).sum()
        weights = self.gradient_density.weights(counts, num_foreground)
        row_weight = weights.to(losses.dtype)[self.gradient_density.bin_index(lengths)]
        # An ignored row's loss is 0 and has no gradient, whatever its weight.
        return (losses * row_weight).sum()
