"""Softmax equalization loss (SEQL; arXiv 2003.05176), the form of EQL for one softmax.

    L = -log(exp(z_y) / sum_k w_k exp(z_k))                                              (Eq. 6, 7)
    w_k = 1 - beta T(f_k) (1 - y_k),  beta ~ Bernoulli(drop_probability)                 (Eq. 8)

The paper does not say what beta is drawn for; its authors' reference (issue 9 of
tztztztztz/eql.detectron2) draws one for every (row, class), and so do we. It sets dropped logits to
-1e7, we to -inf; the true class is never dropped, so the sum is never empty. The paper has no
background class; ours is channel K, which is never tail. Background rows drop tail classes like any
other row, because SEQL has no E(r).

A class is tail where f < lambda, as the paper has it; the reference counts a class of lambda images
as tail, too, which is ``tail_includes_threshold``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import CLASSIFICATION_LOSSES
from .softmax import SoftmaxLoss
from .tail import TailClasses


@CLASSIFICATION_LOSSES.register
class SoftmaxEqualizationLoss(SoftmaxLoss):
    """SEQL over K + 1 channels; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
        class_frequency: as in :class:`~balanced_det.losses.EqualizationLoss`.
        tail_threshold: classes with a smaller frequency are the tail.
        drop_probability: P(beta = 1), the chance to drop a tail class from a row's softmax, which
            keeps the row from suppressing it (gamma in the paper); 0 is cross entropy.
        tail_share: replaces ``tail_threshold``: the rarest round(tail_share K) classes are tail.
        tail_includes_threshold: a class whose frequency is the threshold is tail, as in the
            reference.

    Raises:
        InputError: as there, and for a probability outside [0, 1].
    """

    needs = ("class_frequency",)
    neutral = {"drop_probability": 0.0}
    example = {"drop_probability": 1.0}  # draws nothing

    def __init__(
        self,
        num_classes: int,
        class_frequency: Sequence[float] | Tensor | None,
        tail_threshold: float = 0.00177,
        drop_probability: float = 0.9,
        tail_share: float | None = None,
        tail_includes_threshold: bool = False,
    ):
        super().__init__(num_classes)
        if not 0 <= drop_probability <= 1:
            raise InputError(f"drop_probability must be in [0, 1], not {drop_probability}.")
        self.tail = TailClasses(
            num_classes,
            class_frequency,
            tail_threshold,
            tail_share,
            tail_includes_threshold=tail_includes_threshold,
            loss=type(self).__name__,
        )
        self.drop_probability = drop_probability

    @property
    def class_frequency(self) -> Tensor:
        """The (K,) class frequencies, NaN while unknown."""
        return self.tail.class_frequency

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return every row's cross entropy over the channels that were not dropped, (R,)."""
        channel = torch.arange(self.num_logits, device=logits.device)
        tail = nn.functional.pad(self.tail.mask(), (0, 1))  # (K + 1,), background is never tail
        beta = torch.rand(logits.shape, device=logits.device) < self.drop_probability
        dropped = beta & tail & (channel != labels.unsqueeze(-1))  # (*, K + 1)
        return super().cross_entropy(logits.masked_fill(dropped, -torch.inf), labels)
