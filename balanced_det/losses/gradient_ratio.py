"""How much gradient each class has had as positive and as negative, over all steps and workers."""

import torch
from torch import Tensor, nn

from ..distributed import sum_over_workers


class GradientRatio(nn.Module):
    """Running sums of |gradient| of each class, and the ratio of positive to negative.

    Args:
        num_classes: K.
        initial: the ratio of a class before any gradient.

    Attributes:
        sums: (2, K) float64 buffer, of y = 1 and of y = 0, saved with the model.
    """

    sums: Tensor

    def __init__(self, num_classes: int, initial: float):
        super().__init__()
        self.initial = initial
        self.register_buffer("sums", torch.zeros(2, num_classes, dtype=torch.float64))

    def value(self) -> Tensor:
        """Return pos / (neg + 1e-10) of each class, (K,) float64; the initial one before a step."""
        positive, negative = self.sums
        ratio = positive / (negative + 1e-10)
        return torch.where(self.sums.sum(dim=0) > 0, ratio, self.initial)

    def add(self, sums: Tensor) -> None:
        """Add the (2, K) sums of a step; every worker must call this.

        Args:
            sums: of this worker; changed in place to those of all.
        """
        self.sums += sum_over_workers(sums.to(self.sums.dtype).contiguous())
