"""Equalized focal loss (EFL; arXiv 2201.02593): a focusing exponent for each class of a dense head.

K independent sigmoids. With the gradients that class j has had so far, summed over rows, levels,
steps and workers,

    g_j = pos_j / (neg_j + 1e-10), at most 1; 1 at the start
    gamma_j = gamma + scale (1 - g_j)                                                    (Eq. 5)
    L = sum over rows and classes of alpha_t (gamma_j / gamma) (1 - p_t)^gamma_j (-log p_t) (Eq. 7)

divided by the normalizer. gamma_j carries no gradient. pos and neg add up |dL/dz| of this very
loss, so divided by the normalizer of its step.

The official code (ModelTC/United-Perception) gets the gradients by a hook on the last layer,
without which ports fall to a tenth of the AP; here they come out of the same read of the logits as
the loss. It returns inf under float16; here arithmetic is float32. Published settings beside it: a
prior of 0.001 and gradients clipped at a norm of 35.
"""

from torch import Tensor

from ..distributed import num_workers
from ..errors import InputError
from .base import CLASSIFICATION_LOSSES
from .gradient_ratio import GradientRatio
from .sigmoid import SigmoidLoss


@CLASSIFICATION_LOSSES.register
class EqualizedFocalLoss(SigmoidLoss):
    """EFL over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        alpha: weight of y = 1, in [0, 1]; None leaves both at 1.
        gamma: exponent of a class in balance, > 0 (gamma_b in the paper).
        scale: how much the exponent grows at most, >= 0 (s in the paper).
    """

    sums_over_workers = True
    neutral = None  # a focal loss at least

    def __init__(
        self,
        num_classes: int,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        scale: float = 8.0,
    ):
        super().__init__(num_classes)
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"EqualizedFocalLoss: alpha must be None or in [0, 1], not {alpha}.")
        if not gamma > 0:
            raise InputError(f"EqualizedFocalLoss: gamma must be above 0, not {gamma}.")
        if not scale >= 0:
            raise InputError(f"EqualizedFocalLoss: scale must be at least 0, not {scale}.")
        self.alpha = alpha
        self.gamma = gamma
        self.scale = scale
        self.gradient_ratio = GradientRatio(num_classes, initial=1.0)

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the exponent and the weight of each class, and ask for the gradient sums."""
        ratio = self.gradient_ratio.value().clamp(max=1)
        gamma = self.gamma + self.scale * (1 - ratio)  # (K,)
        return {
            "alpha": self.alpha,
            "gamma": gamma,
            "weight": gamma / self.gamma,
            "gradient_sums": True,
        }

    def after_pass(self, gradient_sums: Tensor, scale: float | Tensor) -> None:
        """Add the step's gradients: those of one process that had the rows of all workers.

        A worker's normalizer is that of its part of the batch, so its gradients are as many times
        larger as there are workers, which averaging makes good.
        """
        self.gradient_ratio.add(gradient_sums * scale / num_workers())
