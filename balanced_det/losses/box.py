"""Losses of box regression: smooth L1, GIoU, balanced L1 and GHM-R.

Balanced L1 (Libra R-CNN, arXiv 1904.02701, Eq. 8-10) is defined by its gradient in the error
x = pred - target,

    dL/d|x| = alpha ln(b |x| + 1) for |x| < 1, gamma beyond,  with alpha ln(b + 1) = gamma,

which raises the gradient of accurate samples over smooth L1's. Its integral is

    L_1(x) = (alpha / b) (b |x| + 1) ln(b |x| + 1) - alpha |x|    for |x| < 1,
             gamma |x| + gamma / b - alpha                        beyond.

beta is to be the point where the curve becomes linear. The published code divides by it inside the
logarithm only, (alpha / b) (b |x| + 1) ln(b |x| / beta + 1) - alpha |x|. For beta != 1 that has
another gradient: alpha (1 / beta - 1) at zero error, 4.05 at beta = 0.11, and a jump at beta. We
scale the argument and the value,

    L_beta(x) = beta L_1(x / beta),    so    dL_beta/d|x| = L_1'(|x| / beta),

which is alpha ln(b |x| / beta + 1) below beta and gamma beyond: for every beta > 0 it is
continuous, 0 at 0 and never above gamma, and at beta = 1 it is the paper's. Written out,

    L_beta(x) = beta ((alpha / b) (b c + 1) ln(b c + 1) - alpha c)    for c = |x| / beta < 1,
                gamma |x| + beta (gamma / b - alpha)                  beyond.

GHM-R (arXiv 1811.05181, section on GHM-R loss) harmonizes the authentic smooth L1

    ASL1(d) = sqrt(d^2 + mu^2) - mu,  g = |d| / sqrt(d^2 + mu^2),  L = sum_i ASL1_i / (n S_b(i)),

d over all four numbers of all foreground rows; see :mod:`balanced_det.losses.harmonizer`.
"""

import math

import torch
from torch.nn import functional as F

from ..errors import InputError
from .base import BOX_LOSSES, BoxLoss
from .harmonizer import GradientDensity


@BOX_LOSSES.register
class SmoothL1Loss(BoxLoss):
    """0.5 x^2 / beta where |x| < beta, |x| - 0.5 beta elsewhere (Fast R-CNN, Eq. 3).

    Args:
        beta: where the curve becomes linear, >= 0; 0 is L1. Detectron2's default is 0.
    """

    def __init__(self, beta=0.0):
        super().__init__()
        if not beta >= 0:
            raise InputError(f"SmoothL1Loss: beta must be at least 0, not {beta}.")
        self.beta = beta

    def loss_sum(self, pred, target):
        """Return the sum over all numbers."""
        return F.smooth_l1_loss(pred, target, beta=self.beta, reduction="sum")


@BOX_LOSSES.register
class GIoULoss(BoxLoss):
    """1 - GIoU of boxes given by their corners (arXiv 1902.09630, Algorithm 1)."""

    space = "boxes"

    # Keeps the quotients of empty boxes finite; the value of fvcore's giou_loss.
    _EPS = 1e-7

    def loss_sum(self, pred, target):
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


def balanced_l1_loss(pred, target, alpha=0.5, gamma=1.5, beta=1.0, reduction="sum"):
    """Return the balanced L1 loss; derived, for every beta, in the module's docstring.

    Args:
        pred: any shape.
        target: shaped like ``pred``.
        alpha: slope of the gradient for small errors, > 0.
        gamma: bound of the gradient, > 0.
        beta: error where the curve becomes linear, > 0, in units of ``pred``.
        reduction: "sum", "mean" (0 for no element) or "none".

    Returns:
        A 0-dim tensor, or with "none" one shaped like ``pred``.

    Raises:
        InputError: for a parameter out of its range.

    Source: arXiv 1904.02701, Eq. 8-10.
    """
    _check_balanced_l1(alpha, gamma, beta)
    b = math.expm1(gamma / alpha)
    error = (pred - target).abs()
    scaled = error / beta
    c = scaled.clamp(max=1)  # keeps the part that is not selected finite
    curve = alpha / b * (b * c + 1) * torch.log1p(b * c) - alpha * c
    loss = torch.where(scaled < 1, beta * curve, gamma * error + beta * (gamma / b - alpha))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    raise InputError(f"Unknown reduction '{reduction}'; known are: mean, none, sum.")


def _check_balanced_l1(alpha, gamma, beta):
    if not (alpha > 0 and gamma > 0 and beta > 0):
        raise InputError(
            f"Balanced L1 needs alpha, gamma and beta above 0, not {alpha}, {gamma} and {beta}."
        )
    # b = exp(gamma / alpha) - 1 has to stay a float32; the paper's ratio is 3.
    if gamma / alpha > 80:
        raise InputError(f"Balanced L1 needs gamma / alpha of at most 80, not {gamma / alpha:.4g}.")


@BOX_LOSSES.register
class BalancedL1Loss(BoxLoss):
    """Balanced L1; see :func:`balanced_l1_loss` and the module's docstring.

    Args:
        alpha: slope of the gradient for small errors.
        gamma: bound of the gradient.
        beta: error where the curve becomes linear.
    """

    def __init__(self, alpha=0.5, gamma=1.5, beta=1.0):
        super().__init__()
        _check_balanced_l1(alpha, gamma, beta)
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta

    def loss_sum(self, pred, target):
        """Return the sum over all numbers."""
        return balanced_l1_loss(pred, target, self.alpha, self.gamma, self.beta)


@BOX_LOSSES.register
class GHMRegressionLoss(BoxLoss):
    """GHM-R; see the module's docstring.

    Args:
        mu: where ASL1 turns from quadratic to linear, > 0.
        bins: number of equal bins of the gradient length.
        momentum: of the moving average of the bin counts.
        bias_correction: False starts the average at zero, as the published code does.
    """

    def __init__(self, mu=0.02, bins=10, momentum=0.7, bias_correction=True):
        super().__init__()
        if not mu > 0:
            raise InputError(f"GHMRegressionLoss: mu must be above 0, not {mu}.")
        self.mu = mu
        self.gradient_density = GradientDensity(bins, momentum, bias_correction)

    def forward(self, pred, target, normalizer=None):
        """Return the harmonized loss; ``normalizer`` is ignored, GHM divides by its own count."""
        return super().forward(pred, target, 1)

    def loss_sum(self, pred, target):
        """Return the harmonized sum over all numbers."""
        error = pred - target  # (N, 4)
        root = (error**2 + self.mu**2).sqrt()
        # Equals root - mu, without the cancellation that small errors would suffer.
        losses = error**2 / (root + self.mu)
        lengths = (error.abs() / root).detach()
        counts = self.gradient_density.histogram(lengths)
        weights = self.gradient_density.weights(counts, num_foreground=counts.sum())
        return (losses * weights.to(losses.dtype)[self.gradient_density.bin_index(lengths)]).sum()
