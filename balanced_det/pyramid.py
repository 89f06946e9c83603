"""Balanced feature pyramid: every level gets what all levels know (arXiv 1904.02701, section 3.2).

The levels of an FPN are brought to one size, averaged, refined, brought back and added
to each level. No level of resolution then weighs more than another in what is shared.

A new pyramid's refinement is the identity here, as section 3.3 of the non-local networks (arXiv
1711.07971) has it. Libra R-CNN's code first does the same and then draws the weights of all layers
by Xavier's rule (Glorot and Bengio, 2010), with biases of zero, so that its training starts from a
random mixture of positions that is added to every level: ``initialization="xavier"``.

Letters: N images, C channels, H x W pixels of a level, Hi x Wi those of level i.
"""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from .errors import InputError


class BalancedFeaturePyramid(Backbone):
    """Put a balanced feature pyramid around a backbone that gives several levels.

    Output names, channels and strides are those of the backbone. As in the paper's code, larger
    levels are reduced by adaptive max pooling and smaller ones enlarged by nearest neighbours, and
    every level L becomes ``L + resized(refined(average))``.

    Args:
        backbone: a Detectron2 ``Backbone``; all of its levels have the same number of channels.
        refine_level: index of the level whose size the average has, 0 being the finest.
        refine_type: "non_local" (:class:`NonLocal`), "conv" (:class:`ResidualConv`) or "none".
        initialization: "identity": the last layer of the refinement starts at zero, so that the
            plain average is added at first; or "xavier": all of its layers as the published code
            has them.
    """

    def __init__(
        self,
        backbone: Backbone,
        refine_level: int = 2,
        refine_type: str | None = "non_local",
        initialization: str = "identity",
    ):
        super().__init__()
        shapes = backbone.output_shape()
        channels = {name: shape.channels for name, shape in shapes.items()}
        if len(set(channels.values())) != 1:
            raise InputError(
                "A balanced feature pyramid needs levels of equal channels; the backbone "
                f"{type(backbone).__name__} gives {channels}."
            )
        if not 0 <= refine_level < len(shapes):
            raise InputError(
                f"BALANCE.PYRAMID.REFINE_LEVEL is {refine_level}; the backbone "
                f"{type(backbone).__name__} has levels 0 to {len(shapes) - 1}."
            )
        if refine_type not in _REFINEMENTS:
            raise InputError(
                f"BALANCE.PYRAMID.REFINE_TYPE is '{refine_type}'; known are: "
                f"{', '.join(sorted(_REFINEMENTS))}."
            )
        if initialization not in _INITIALIZATIONS:
            raise InputError(
                f"BALANCE.PYRAMID.INITIALIZATION is '{initialization}'; known are: "
                f"{', '.join(_INITIALIZATIONS)}."
            )
        self.backbone = backbone
        self.refine_name = sorted(shapes, key=lambda name: shapes[name].stride)[refine_level]
        self.refine = _REFINEMENTS[refine_type](channels[self.refine_name])
        if initialization == "xavier":
            self.refine.apply(_start_by_xavier)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image batch (N, 3, H, W) to {level name: (N, C, Hi, Wi)}, as the backbone does."""
        levels = self.backbone(x)
        size = levels[self.refine_name].shape[-2:]
        average = sum(_resized(level, size) for level in levels.values()) / len(levels)
        balanced = self.refine(average)
        return {
            name: level + _resized(balanced, level.shape[-2:]) for name, level in levels.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the backbone's own: {level name: ShapeSpec}."""
        return self.backbone.output_shape()

    @property
    def size_divisibility(self) -> int:
        """The backbone's own."""
        return self.backbone.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The backbone's own."""
        return self.backbone.padding_constraints


class NonLocal(nn.Module):
    """Non-local block with the embedded Gaussian (Wang et al., arXiv 1711.07971, equations 3, 6).

    For positions i, j of a map: ``x_i + out(sum_j softmax_j(theta(x_i) . phi(x_j)) g(x_j))`` with
    1 x 1 convolutions theta, phi, g and out of as many channels as the map, and without dividing
    the products by the square root of that number, as Libra R-CNN's code has it. Out starts at
    zero, which makes the new block the identity (section 3.3 there).

    The attention kernel of torch never holds the HW x HW matrix of all pairs where it supports the
    device and the type.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels, 1)
        self.phi = nn.Conv2d(channels, channels, 1)
        self.g = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for layer in (self.theta, self.phi, self.g, self.out):
            _start_at_zero(layer)
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        found = F.scaled_dot_product_attention(
            _positions(self.theta(x)), _positions(self.phi(x)), _positions(self.g(x)), scale=1.0
        )  # (N, 1, HW, C)
        return x + self.out(found.squeeze(1).transpose(1, 2).reshape(x.shape))


class ResidualConv(nn.Module):
    """``x + conv(x)``, the convolution 3 x 3 and starting at zero.

    Libra R-CNN's code has ``relu(conv(x))`` here; with the residual it starts as the identity, as
    the non-local block does.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        _start_at_zero(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x + self.conv(x)


_INITIALIZATIONS = ("identity", "xavier")
_REFINEMENTS = {
    "non_local": NonLocal,
    "conv": ResidualConv,
    "none": nn.Identity,
}


@BACKBONE_REGISTRY.register()
def build_balanced_pyramid_backbone(
    cfg: CfgNode, input_shape: ShapeSpec | None
) -> BalancedFeaturePyramid:
    """Build the backbone that ``BALANCE.PYRAMID.BACKBONE`` names, with a balanced pyramid around.

    ``BALANCE.PYRAMID.REFINE_LEVEL``, ``REFINE_TYPE`` and ``INITIALIZATION`` are the arguments of
    :class:`BalancedFeaturePyramid`.
    """
    name = cfg.BALANCE.PYRAMID.BACKBONE
    if name not in BACKBONE_REGISTRY or name == build_balanced_pyramid_backbone.__name__:
        raise InputError(f"BALANCE.PYRAMID.BACKBONE: '{name}' is no backbone to put a pyramid on.")
    return BalancedFeaturePyramid(
        BACKBONE_REGISTRY.get(name)(cfg, input_shape),
        cfg.BALANCE.PYRAMID.REFINE_LEVEL,
        cfg.BALANCE.PYRAMID.REFINE_TYPE,
        cfg.BALANCE.PYRAMID.INITIALIZATION,
    )


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size)."""
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    if height >= size[0] and width >= size[1]:
        return F.adaptive_max_pool2d(x, size)
    return F.interpolate(x, size=size, mode="nearest")


def _positions(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1 head, HW, C), contiguous, without which there is no fused kernel."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def _start_at_zero(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _start_by_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
