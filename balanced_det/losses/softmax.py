"""The family of losses over one softmax of K + 1 channels, background last."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from ..errors import InputError
from .base import ClassificationLoss, add, upcast


class SoftmaxLoss(ClassificationLoss):
    """A loss of one softmax over K + 1 channels, background last."""

    refused_on: ClassVar[dict[str, str]] = {
        "RPN": "it is a softmax loss; RPN predicts one logit an anchor"
    }
    scores_are_a_distribution: ClassVar[bool] = True
    neutral: ClassVar[dict | None] = {}

    def __init__(self, num_classes: int):
        super().__init__(num_classes, num_logits=num_classes + 1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of every row, 0 where it is ignored.

        Args:
            logits: (*, K + 1).
            labels: (*), long.

        Returns:
            (R,) for the R rows of (*).
        """
        return softmax_cross_entropy(logits, labels)

    def weighted_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return :meth:`cross_entropy` times the class weight of each row, (R,)."""
        losses = self.cross_entropy(logits, labels)
        return losses if self.class_weight is None else losses * self.row_weight(labels)

    def row_weight(self, labels: Tensor) -> Tensor:
        """Return the class weight of each row's own class, 1 for background, (R,)."""
        if self.class_weight is None:
            return torch.ones(labels.numel(), device=labels.device)
        weight = F.pad(self.class_weight, (0, 1), value=1.0)  # (K + 1,)
        return weight[labels.flatten().clamp(0, self.num_classes).long()]

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times the loss summed over rows."""
        total = add(self.weighted_cross_entropy(x, y).sum() for x, y in levels)
        return (total * scale).to(total.dtype)

    @torch.no_grad()
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each row over all its channels; see the base."""
        # Not a subclass's cross_entropy, which may weigh channels or drop them at random.
        return softmax_cross_entropy(logits, labels).view(labels.shape)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax without its background channel, (*, K + 1) -> (*, K)."""
        return upcast(logits).softmax(dim=-1)[..., :-1]

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the channel of the highest logit; the last is background."""
        return logits.argmax(dim=-1)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K + 1,) bias whose softmax gives each class ``prior_prob``; zeros for None.

        Object classes get 0 and background log((1 - K p) / p), which is why p < 1 / K.
        """
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            bias[-1] = math.log(background_probability(self, prior_prob) / prior_prob)
        return bias


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of the last dimension's softmax, 0 where a row is ignored.

    Args:
        logits: (*, C), any floating dtype.
        labels: (*), a channel, or negative where ignored.

    Returns:
        (R,) float32 at least, for the R rows of (*).
    """
    # Overwriting ignored rows, rather than multiplying by zero, keeps an inf in them out of
    # the gradient. An inf elsewhere would be nan: the ends of float32 say the same.
    logits = finite(upcast(logits).masked_fill((labels < 0).unsqueeze(-1), 0.0))
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long().clamp(min=-1),
        ignore_index=-1,
        reduction="none",
    )


# Half of the largest float32, so that the difference of two is one too.
_LARGEST = torch.finfo(torch.float32).max / 2


class _Finite(torch.autograd.Function):
    """A clamp that lets gradients through, which are bounded anyway, without a mask to save."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor) -> Tensor:
        return logits.clamp(-_LARGEST, _LARGEST)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> Tensor:
        return grad_output


def finite(logits: Tensor) -> Tensor:
    """Return ``logits`` with what lies beyond +-1.7e38 moved there; nan stays."""
    return _Finite.apply(logits)


def background_probability(loss: ClassificationLoss, prior_prob: float) -> float:
    """Return 1 - K p, what K classes of probability p each leave to background.

    Raises:
        InputError: when nothing is left, or p is not positive.
    """
    background = 1 - loss.num_classes * prior_prob
    if prior_prob <= 0 or background <= 0:
        raise InputError(
            f"{type(loss).__name__} cannot start {loss.num_classes} classes at probability "
            f"{prior_prob} each: it must lie between 0 and {1 / loss.num_classes:.3g}."
        )
    return background
