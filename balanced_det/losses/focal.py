"""Focal loss (arXiv 1708.02002, Eq. 5).

    L = sum over rows and classes of alpha_t (1 - p_t)^gamma (-log p_t)

with p_t = p, alpha_t = alpha where y = 1 and p_t = 1 - p, alpha_t = 1 - alpha elsewhere. The
published code (Detectron's and fvcore's) computes this formula; so does this one.
"""

from torch import Tensor

from ..errors import InputError
from .base import CLASSIFICATION_LOSSES
from .sigmoid import SigmoidLoss


@CLASSIFICATION_LOSSES.register
class FocalLoss(SigmoidLoss):
    """Focal loss; see the module's docstring.

    Args:
        num_classes: K.
        alpha: weight of y = 1, in [0, 1]; None leaves both at 1.
        gamma: exponent of the modulating factor, >= 0; 0 leaves cross entropy weighted by alpha.
    """

    neutral = {"alpha": None, "gamma": 0.0}

    def __init__(self, num_classes: int, alpha: float | None = 0.25, gamma: float = 2.0):
        super().__init__(num_classes)
        if alpha is not None and not 0 <= alpha <= 1:
            raise InputError(f"FocalLoss: alpha must be None or in [0, 1], not {alpha}.")
        if not gamma >= 0:
            raise InputError(f"FocalLoss: gamma must be at least 0, not {gamma}.")
        self.alpha = alpha
        self.gamma = gamma

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return alpha and gamma."""
        return {"alpha": self.alpha, "gamma": self.gamma}
