"""Balanced L1 (Libra R-CNN, arXiv 1904.02701, Eq. 8-10) is defined by its gradient in the error
x = pred - target,

    dL/d|x| = alpha ln(b |x| + 1) for |x| < 1, gamma beyond,  with alpha ln(b + 1) = gamma,

which raises the gradient of accurate samples over smooth L1's. Its integral is

    L_1(x) = (alpha / b) (b |x| + 1) ln(b |x| + 1) - alpha |x|    for |x| < 1,
             gamma |x| + gamma / b - alpha                        beyond.

beta is to be the point where the curve becomes linear. The published code divides by it inside the
logarithm only, (alpha / b) (b |x| + 1) ln(b |x| / beta + 1) - alpha |x|. For beta != 1 that has
another gradient: alpha (1 / beta - 1) at zero error, 4.05 at beta = 0.11, and a jump at beta. That
is ``as_published``. By default we scale the argument and the value,

    L_beta(x) = beta L_1(x / beta),    so    dL_beta/d|x| = L_1'(|x| / beta),

which is alpha ln(b |x| / beta + 1) below beta and gamma beyond: for every beta > 0 it is
continuous, 0 at 0 and never above gamma, and at beta = 1 it is the paper's. Written out,

    L_beta(x) = beta ((alpha / b) (b c + 1) ln(b c + 1) - alpha c)    for c = |x| / beta < 1,
                gamma |x| + beta (gamma / b - alpha)                  beyond.
"""

import math

import torch
from torch import Tensor

from ...errors import InputError
from ..base import BOX_LOSSES, BoxLoss


def balanced_l1_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    reduction: str = "sum",
    as_published: bool = False,
) -> Tensor:
    """Return the balanced L1 loss; derived, for every beta, in the module's docstring.

    Args:
        pred: any shape.
        target: shaped like ``pred``.
        alpha: slope of the gradient for small errors, > 0.
        gamma: bound of the gradient, > 0.
        beta: error where the curve becomes linear, > 0, in units of ``pred``.
        reduction: "sum", "mean" (0 for no element) or "none".
        as_published: divide by beta inside the logarithm only.

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
    if as_published:
        near = alpha / b * (b * beta * c + 1) * torch.log1p(b * c) - alpha * beta * c
        far = gamma * error + gamma / b - alpha * beta
    else:
        near = beta * (alpha / b * (b * c + 1) * torch.log1p(b * c) - alpha * c)
        far = gamma * error + beta * (gamma / b - alpha)
    loss = torch.where(scaled < 1, near, far)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    raise InputError(f"Unknown reduction '{reduction}'; known are: mean, none, sum.")


def _check_balanced_l1(alpha: float, gamma: float, beta: float) -> None:
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
        as_published: divide by beta inside the logarithm only, as the published code does.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        gamma: float = 1.5,
        beta: float = 1.0,
        as_published: bool = False,
    ):
        super().__init__()
        _check_balanced_l1(alpha, gamma, beta)
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.as_published = as_published

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the sum over all numbers."""
        return balanced_l1_loss(
            pred, target, self.alpha, self.gamma, self.beta, as_published=self.as_published
        )
