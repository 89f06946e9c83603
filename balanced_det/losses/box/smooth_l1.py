"""Smooth L1 (Fast R-CNN, Eq. 3), Detectron2's own box loss."""

from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..base import BOX_LOSSES, BoxLoss


@BOX_LOSSES.register
class SmoothL1Loss(BoxLoss):
    """0.5 x^2 / beta where |x| < beta, |x| - 0.5 beta elsewhere (Fast R-CNN, Eq. 3).

    Args:
        beta: where the curve becomes linear, >= 0; 0 is L1. Detectron2's default is 0.
    """

    def __init__(self, beta: float = 0.0):
        super().__init__()
        if not beta >= 0:
            raise InputError(f"SmoothL1Loss: beta must be at least 0, not {beta}.")
        self.beta = beta

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum over all numbers."""
        return F.smooth_l1_loss(pred, target, beta=self.beta, reduction="sum")
