"""Generalized IoU (arXiv 1902.09630, Algorithm 1), FCOS's own box loss."""

import torch
from torch import Tensor

from ..base import BOX_LOSSES, BoxLoss


@BOX_LOSSES.register
class GIoULoss(BoxLoss):
    """1 - GIoU of boxes given by their corners (arXiv 1902.09630, Algorithm 1)."""

    space = "boxes"

    # Keeps the quotients of empty boxes finite; the value of fvcore's giou_loss.
    _EPS = 1e-7

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum over rows of 1 - IoU + (hull - union) / hull."""
        top_left = torch.maximum(pred[:, :2], target[:, :2])
        bottom_right = torch.minimum(pred[:, 2:], target[:, 2:])
        # Clamping sides, where other code indexes by a mask, needs no host synchronisation.
        intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)  # (N,)
        pred_area = (pred[:, 2:] - pred[:, :2]).prod(dim=1)
        target_area = (target[:, 2:] - target[:, :2]).prod(dim=1)
        union = pred_area + target_area - intersection
        hull_top_left = torch.minimum(pred[:, :2], target[:, :2])
        hull_bottom_right = torch.maximum(pred[:, 2:], target[:, 2:])
        hull = (hull_bottom_right - hull_top_left).prod(dim=1)
        iou = intersection / (union + self._EPS)
        return (1 - iou + (hull - union) / (hull + self._EPS)).sum()
