"""DropLoss (arXiv 2104.06402): EQL that also spares tail classes on background rows, by chance.

    L = -sum_j w_j log(p_j'),  p_j' = p_j if y_j = 1 else 1 - p_j,  p = sigmoid(z)

On foreground rows w_j = 1 - T(f_j) (1 - y_j), as in EQL (:mod:`balanced_det.losses.equalization`).
On background rows w_j = 1 - T(f_j) (1 - b_j), where b_j is 1 with a probability equal to the tail's
share of the batch's foreground rows: the fewer tail objects a batch has, the less its background
holds tail classes down. The sum is divided by the number of rows.

The official code (timy90022/DropLoss) draws for every (row, class), on each GPU for itself and with
its own share. We draw one number a class and step, so that the weights stay a small table, and one
for all workers; the expected gradient is the same. A batch without foreground rows has share 0
here; there its share is nan, which drops nothing. The published runs start with a prior of 0.001.
"""

import torch
from torch import Tensor

from ..distributed import shared_uniform, sum_over_workers
from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, row_labels
from .equalization import EqualizationLoss


@CLASSIFICATION_LOSSES.register
class DropLoss(EqualizationLoss):
    """DropLoss over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        class_frequency: (K,) fraction of training images that hold each class, or None for a model
            that is built to load a checkpoint.
        tail_threshold: classes with a smaller frequency are the tail.
        tail_share: replaces ``tail_threshold``: the rarest round(tail_share K) classes are tail.
    """

    sums_over_workers = True

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the weights of y = 0 on foreground and on background rows."""
        options = super().pass_options(levels)
        keeps = options["negative_weight"]  # (K,), 0 for the tail
        kept = self.kept(row_labels(levels))
        return {**options, "background_weight": keeps + (1 - keeps) * kept}

    @torch.no_grad()
    def kept(self, labels: Tensor) -> Tensor:
        """Return b_j of every class, (K,) 0 or 1, drawn for (R,) labels."""
        is_foreground = foreground(labels, self.num_classes)
        is_tail = self.tail.mask()[labels.clamp(0, self.num_classes - 1).long()] & is_foreground
        counts = torch.stack([is_tail.sum(), is_foreground.sum()]).double()
        if self.training:
            sum_over_workers(counts)
        share = counts[0] / counts[1].clamp(min=1)
        return (shared_uniform(self.num_classes, labels.device, self.training) < share).float()
