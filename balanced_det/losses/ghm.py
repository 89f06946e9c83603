"""GHM-C, the gradient-harmonized classification loss (arXiv 1811.05181), over sigmoids.

    g = |p - y|,  p = sigmoid(x), for each (row, class)                                    (Eq. 3)
    L = sum_i BCE_i / (n S_b(i)),  b(i) the bin of g_i                           (from Eq. 4 to 9)

Bins, smoothing and how they deviate from the paper and from the published code are told in
:mod:`balanced_det.losses.gradient_density`.

It divides by its own count, so ``normalizer`` is ignored. The weights carry no gradient. Ignored
rows are neither counted nor summed. A batch without any foreground row, over all workers, gives a
zero loss and leaves the statistics alone.

The paper takes the examples of a batch together, and so do we: all pyramid levels share one
histogram. The published code calls its loss once a level, fine to coarse, on one moving average,
and adds the results. Every level then weighs like a whole batch, however few rows it has; and since
the average runs over levels, too, a coarse level's few elements are weighed by a density that the
fine ones left behind. With five levels the loss is several times larger. ``per_level`` is that;
with ``bias_correction`` off it is the published loss (``retinanet/ghmc_published.yaml``).
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
        per_level: take each pyramid level as a batch of its own and add the losses, as the
            published code does.
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
        per_level: bool = False,
    ):
        super().__init__(num_classes)
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)
        self.per_level = per_level

    def level_options(self, levels: list[tuple[Tensor, Tensor]]) -> list[dict]:
        """Return the weight of each bin after taking the batch into the statistics."""
        options = super().level_options(levels)
        return [
            {**of_level, "bin_weight": weights}
            for of_level, weights in zip(options, self._bin_weights(levels), strict=True)
        ]

    def _bin_weights(self, levels: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return the (B,) weights of the bins for each level."""
        counts = [gradient_histogram(x, y, self.gradient_density.bins) for x, y in levels]
        # Of the batch, not of a level: the coarse levels seldom have any.
        num_foreground = foreground(row_labels(levels), self.num_classes).sum()
        # In the type of the arithmetic, or every level would convert them.
        dtype = torch.promote_types(levels[0][0].dtype, torch.float32)
        if self.per_level:
            return [self.gradient_density.weights(c, num_foreground).to(dtype) for c in counts]
        return [self.gradient_density.weights(add(counts), num_foreground).to(dtype)] * len(levels)
