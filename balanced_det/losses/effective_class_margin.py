"""Effective class margin loss (ECM; arXiv 2301.09724): margins that the class counts call for.

K + 1 independent sigmoids, the last of which says background and is 1 on background rows. For class
j with n+ = n_j training images that hold it and n- those of all other classes, background being one
class of 6.3313 sum_k n_k,

    a = log((n+^1/4 + n-^1/4) / n-^1/4),  b = log((n+^1/4 + n-^1/4) / n+^1/4)
    p = exp(z + a) / (exp(z + a) + exp(-z + b)) = sigmoid(2 z + a - b)
    L = sum over rows and channels of w_j BCE(p, y),  w_j = r log((1 + r) / r),  r = n- / n+

divided by the number of rows. a - b is log(n+^1/4 / n-^1/4). A class scores
sigmoid(z_j) (1 - sigmoid(z_background)), without the margins. The official code
(janghyuncho/ECM-Loss) writes out the exponentials, which overflow; we write the sigmoid. It is used
with a cosine classifier of scale 20. A class in no image counts as one image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import CLASSIFICATION_LOSSES, upcast
from .sigmoid import SigmoidWithBackgroundLoss
from .softmax import finite
from .statistic import ClassStatistic

# Background regions an object, as the official code counts them on LVIS.
BACKGROUND_RATIO = 6.3313


class EffectiveMargins(ClassStatistic):
    """The shift of the logits and the weight of each channel.

    Args:
        num_classes: K.
        class_counts: (K,), or None for a model that is built to load a checkpoint.

    Attributes:
        shift, weight: (K + 1,) buffers, a - b and w of the module's docstring.
    """

    class_counts: Tensor
    shift: Tensor
    weight: Tensor

    def __init__(self, num_classes: int, class_counts: Sequence[float] | Tensor | None):
        super().__init__(num_classes, class_counts)
        self.register_buffer("shift", torch.zeros(num_classes + 1), persistent=False)
        self.register_buffer("weight", torch.ones(num_classes + 1), persistent=False)
        self.derive_if_known()

    def derive(self) -> None:
        """Fill shift and weight."""
        counts = self.class_counts.double().clamp(min=1)
        counts = torch.cat([counts, BACKGROUND_RATIO * counts.sum().unsqueeze(0)])  # (K + 1,)
        ratio = (counts.sum() - counts) / counts
        self.shift.copy_(-ratio.log() / 4)
        self.weight.copy_(ratio * torch.log1p(1 / ratio))


@CLASSIFICATION_LOSSES.register
class EffectiveClassMarginLoss(SigmoidWithBackgroundLoss):
    """ECM over K + 1 sigmoids; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
        class_counts: (K,) training images that hold each class, or None for a model that is built
            to load a checkpoint.
    """

    needs = ("class_counts",)
    refused_on = {
        "DENSE": "its margins count background as a region head samples it",
        "RPN": "it has a channel for background; RPN predicts one logit an anchor",
    }
    neutral = None

    def __init__(self, num_classes: int, class_counts: Sequence[float] | Tensor | None):
        super().__init__(num_classes)
        self.margins = EffectiveMargins(num_classes, class_counts)

    @property
    def class_counts(self) -> Tensor:
        """The (K,) class counts, NaN while unknown."""
        return self.margins.class_counts

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the weight of each channel."""
        self.margins.check_known()
        return {"weight": self.margins.weight}  # (K + 1,)

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times the loss summed over rows and channels."""
        shifted = [(2 * finite(upcast(x)) + self.margins.shift, y) for x, y in levels]
        return super().scaled_sum(shifted, scale, overwrite_logits=True)
