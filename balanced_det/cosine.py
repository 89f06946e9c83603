"""A classifier whose logits are cosines, the last layer of Seesaw loss and ECM; torch alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .registry import Registry

# Last layers of a region head, beside the linear one that Detectron2 has.
CLASSIFIERS = Registry("classifier", given=("in_features", "out_features"))


@CLASSIFIERS.register
class CosineLinear(nn.Linear):
    """A linear layer of the direction of features and weights: ``scale`` cos(w_k, x) + b_k.

    The length of a class's weights grows with how often the class is trained on, and so do its
    logits; here it does not count. ``nn.Linear`` otherwise, its parameters' names included. The
    bias is added as it is, so a prior starts every class at its probability here too: what the
    weights add to the logit is at first some ``scale`` / sqrt(in_features), 0.6 for 1,024.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        scale: tau, > 0: the largest logit but for the bias.

    Source: the normalized linear layer of arXiv 2008.10032, section 4.3, where tau is 20.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 20.0):
        super().__init__(in_features, out_features)
        if not scale > 0:
            raise InputError(f"CosineLinear: scale must be above 0, not {scale}.")
        self.scale = scale
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return (*, out_features) logits of (*, in_features); those of a zero vector are b."""
        # In float32 as all norms: the square of a float16 feature of 256 overflows.
        dtype = torch.promote_types(features.dtype, torch.float32)
        features = F.normalize(features.to(dtype), dim=-1) * self.scale
        return F.linear(features, F.normalize(self.weight.to(dtype), dim=-1), self.bias.to(dtype))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{super().extra_repr()}, scale={self.scale}"
