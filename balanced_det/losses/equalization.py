"""Equalization loss (EQL; arXiv 2003.05176).

A tail class sees few positives, and every positive of another class is one more negative for it.
EQL drops those negatives, so that they cannot suppress the class:

    L = -sum_j w_j log(p_j'),  p_j' = p_j if y_j = 1 else 1 - p_j,  p = sigmoid(z)        (Eq. 3)
    w_j = 1 - E(r) T(f_j) (1 - y_j)                                                      (Eq. 4)

where E(r) is 1 on foreground rows and 0 on background rows, f_j is the fraction of training images
that hold class j, and T(f) is 1 where f < tail_threshold. The sum is divided by the number of
rows, which is the normalizer that a region head passes. The official code
(tztztztztz/eql.detectron2) is the same.
"""

from collections.abc import Sequence

from torch import Tensor

from .base import CLASSIFICATION_LOSSES
from .sigmoid import SigmoidLoss
from .tail import TailClasses


@CLASSIFICATION_LOSSES.register
class EqualizationLoss(SigmoidLoss):
    """EQL over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        class_frequency: (K,) fraction of training images that hold each class, or None for a model
            that is built to load a checkpoint.
        tail_threshold: classes with a smaller frequency are the tail (lambda in the paper; 0.00177
            for LVIS v0.5).
        tail_share: replaces ``tail_threshold``: the rarest round(tail_share K) classes are tail.

    Raises:
        InputError: for frequencies of another length than K or outside [0, 1]; in ``forward``
            while they are unknown. A tail of nearly no class, or nearly all, is a warning.
    """

    needs = ("class_frequency",)
    refused_on = {"RPN": "it weighs classes by frequency; objectness has none"}
    neutral = {"tail_threshold": 0.0}

    def __init__(
        self,
        num_classes: int,
        class_frequency: Sequence[float] | Tensor | None,
        tail_threshold: float = 0.00177,
        tail_share: float | None = None,
    ):
        super().__init__(num_classes)
        self.tail = TailClasses(
            num_classes, class_frequency, tail_threshold, tail_share, loss=type(self).__name__
        )

    @property
    def class_frequency(self) -> Tensor:
        """The (K,) class frequencies, NaN while unknown."""
        return self.tail.class_frequency

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the weight of y = 0 on foreground rows; everything else keeps weight 1."""
        return {"negative_weight": self.tail.negative_weight()}  # (K,)
