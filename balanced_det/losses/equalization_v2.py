"""Equalization loss v2 (EQLv2; arXiv 2012.08548): each class's gradients brought into balance.

K + 1 independent sigmoids, the last of which says background and is 1 on background rows. With the
gradients that class j has had so far, summed over rows, steps and workers,

    g_j = pos_j / (neg_j + 1e-10), 100 at the start                                      (Eq. 4)
    f(g) = 1 / (1 + exp(-gamma (g - mu)))                                                (Eq. 6)
    negative weight f(g_j), positive weight 1 + alpha (1 - f(g_j))                       (Eq. 5)

and weight 1 for the background channel. L is the weighted binary cross entropy summed over rows and
channels and divided by the number of rows, the normalizer that a region head passes. After a step,

    pos_j += sum_r y |y - p| positive weight,  neg_j += sum_r (1 - y) |y - p| negative weight.

A class scores p_j (1 - p_background).

The official code (tztztztztz/eqlv2) asks for several workers where it sums, and dies on one; a
well-known port keeps each worker's own sums. Ours are of all workers and right on one. They are
float64, since a float32 sum of 1e8 no longer grows by 1, and are saved with the model. The
gradients come out of the same read of the logits as the loss.
"""

import torch
from torch import Tensor

from ..errors import InputError
from .base import CLASSIFICATION_LOSSES
from .gradient_ratio import GradientRatio
from .sigmoid import SigmoidWithBackgroundLoss


@CLASSIFICATION_LOSSES.register
class EqualizationLossV2(SigmoidWithBackgroundLoss):
    """EQLv2 over K + 1 sigmoids; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
        gamma: steepness of the map from gradient ratios to weights, > 0.
        mu: the ratio that is weighed by one half.
        alpha: how much positives gain at most, >= 0.
    """

    sums_over_workers = True
    refused_on = {
        "DENSE": "it collapses on the many rows of a dense head, say its authors; "
        "use EqualizedFocalLoss, the form for dense heads",
        "RPN": "it has a channel for background; RPN predicts one logit an anchor",
    }
    neutral = {}  # at the start

    def __init__(self, num_classes: int, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0):
        super().__init__(num_classes)
        if not gamma > 0:
            raise InputError(f"EqualizationLossV2: gamma must be above 0, not {gamma}.")
        if not alpha >= 0:
            raise InputError(f"EqualizationLossV2: alpha must be at least 0, not {alpha}.")
        self.gamma = gamma
        self.mu = mu
        self.alpha = alpha
        self.gradient_ratio = GradientRatio(num_classes, initial=100.0)

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return both weights, 1 for background, and ask for the gradient sums."""
        share = torch.sigmoid(self.gamma * (self.gradient_ratio.value() - self.mu))  # f, (K,)
        negative = torch.nn.functional.pad(share, (0, 1), value=1.0)  # (K + 1,)
        # For the pass, background is a class: no row is background, and none needs another table.
        return {
            "positive_weight": 1 + self.alpha * (1 - negative),
            "negative_weight": negative,
            "gradient_sums": True,
        }

    def after_pass(self, gradient_sums: Tensor, scale: float | Tensor) -> None:
        """Add the step's gradients, before the normalizer as published."""
        self.gradient_ratio.add(gradient_sums[:, : self.num_classes])
