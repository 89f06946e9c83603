"""EfficientNet-Lite0 and Lite2: small backbones whose ImageNet weights install as packages.

The network is EfficientNet (Tan and Le, arXiv 1905.11946, table 1, scaled by section 3.3) in its
"Lite" form, as TensorFlow's authors publish it: no squeeze-and-excitation, ReLU6 for swish, a stem
and a head that are not scaled, first and last stages that are not repeated. What the published
weights expect, and other networks do not have:

* TensorFlow's "SAME" padding, which at stride 2 pads one pixel more at the right and bottom;
* batch normalization with an epsilon of 0.001 and a momentum of 0.01;
* RGB images, less 127, divided by 128.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ..errors import InputError

PIXEL_FORMAT, PIXEL_MEAN, PIXEL_STD = "RGB", (127.0,) * 3, (128.0,) * 3
NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What scales the network of arXiv 1905.11946, table 1.

    Attributes:
        width: multiplies the channels of every stage, which are then multiples of 8.
        depth: multiplies the repeats of every stage but the first and last.
        image_size: side in pixels of the images that the classifier was trained on.
    """

    width: float
    depth: float
    image_size: int


SCALINGS = {
    "efficientnet_lite0": Scaling(width=1.0, depth=1.0, image_size=224),
    "efficientnet_lite2": Scaling(width=1.1, depth=1.2, image_size=260),
}

_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280
# Kernel, repeats, stride of the first repeat, expansion, channels: arXiv 1905.11946, table 1.
_STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 2, 6, 24),
    (5, 2, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (5, 3, 1, 6, 112),
    (5, 4, 2, 6, 192),
    (3, 1, 1, 6, 320),
)


class EfficientNetLite(Backbone):
    """The network as a Detectron2 backbone; with ``num_classes`` also as a classifier.

    Detectron2's names of feature maps mean the same strides as those of a ResNet: ``res2`` has
    stride 4, ``res5`` stride 32. Each is the output of the last block of its stride.

    Args:
        name: a key of ``SCALINGS``.
        norm: one of ``NORMS``, Detectron2's names of batch normalization.
        out_features: the feature maps that :meth:`forward` gives.
        num_classes: adds the classifier, for :meth:`logits`; None leaves it out.

    Raises:
        InputError: for an unknown name, normalization or feature map.
    """

    def __init__(
        self,
        name: str,
        norm: str = "BN",
        out_features: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
        num_classes: int | None = None,
    ):
        super().__init__()
        _check("name", name, tuple(SCALINGS))
        _check("norm", norm, NORMS)
        self.stem = ConvNormReLU6(3, _STEM_CHANNELS, kernel=3, stride=2, norm=norm)
        self.blocks = nn.ModuleList()
        # By name of a feature map: the index of its block, and its shape.
        self._taps: dict[str, tuple[int, ShapeSpec]] = {}
        channels, stride = _STEM_CHANNELS, 2
        for block in _block_plan(SCALINGS[name]):
            self.blocks.append(InvertedResidual(channels, norm=norm, **block))
            channels, stride = block["out_channels"], stride * block["stride"]
            if stride >= 4:
                index = len(self.blocks) - 1
                # A later block of the same stride replaces an earlier one.
                self._taps[f"res{int(math.log2(stride))}"] = (
                    index,
                    ShapeSpec(channels=channels, stride=stride),
                )
        for feature in out_features:
            _check("out_features", feature, tuple(self._taps))
        self._out_features = tuple(out_features)
        if num_classes is not None:
            self.head = ConvNormReLU6(channels, _HEAD_CHANNELS, kernel=1, norm=norm)
            self.classifier = nn.Linear(_HEAD_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (N, 3, H, W) to {feature map: (N, C, ceil(H / stride), ceil(W / stride))}."""
        names = {self._taps[name][0]: name for name in self._out_features}
        features = {}
        x = self.stem(x)
        for index, block in enumerate(self.blocks[: max(names) + 1]):
            x = block(x)
            if index in names:
                features[names[index]] = x
        return features

    def logits(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the classifier's logits (N, num_classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.head(x).mean(dim=(2, 3)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return {feature map: channels and stride}."""
        return {name: self._taps[name][1] for name in self._out_features}

    def freeze(self, freeze_at: int) -> "EfficientNetLite":
        """Freeze the first stages, batch statistics included, as Detectron2's ResNet does.

        Args:
            freeze_at: 0 freezes nothing, 1 all of stride 2, 2 also the blocks of ``res2``, and so
                on to 5.

        Returns:
            itself.
        """
        frozen_blocks = 0
        if freeze_at == 1:
            frozen_blocks = 1  # the one block of stride 2
        elif freeze_at > 1:
            frozen_blocks = self._taps[f"res{min(freeze_at, 5)}"][0] + 1
        if freeze_at >= 1:
            self.stem = _frozen(self.stem)
        for index in range(frozen_blocks):
            self.blocks[index] = _frozen(self.blocks[index])
        return self


class InvertedResidual(nn.Module):
    """A block: expand by a 1 x 1 convolution, filter each channel, project, and add the input.

    The input is added where shapes allow it. The projection has no activation (arXiv 1801.04381).

    Args:
        in_channels, out_channels: of the block.
        kernel, stride: of the convolution of each channel.
        expansion: times ``in_channels`` are filtered; 1 leaves the first convolution out.
        norm: Detectron2's name of a batch normalization.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expansion: int,
        norm: str,
    ):
        super().__init__()
        channels = in_channels * expansion
        self.expand = (
            ConvNormReLU6(in_channels, channels, kernel=1, norm=norm)
            if expansion != 1
            else nn.Identity()
        )
        self.depthwise = ConvNormReLU6(
            channels, channels, kernel, stride=stride, groups=channels, norm=norm
        )
        self.project = nn.Sequential()
        self.project.add_module("conv", nn.Conv2d(channels, out_channels, 1, bias=False))
        self.project.add_module("norm", _batch_norm(norm, out_channels))
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


class ConvNormReLU6(nn.Module):
    """A convolution with "SAME" padding, batch normalization, and ReLU6."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        norm: str,
    ):
        super().__init__()
        # At stride 1 the same number of pixels is padded at all sides, which the convolution does.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm = _batch_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        if stride > 1:
            x = pad_same(x, kernel, stride)
        return F.relu6(self.norm(self.conv(x)), inplace=True)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad (N, C, H, W) with zeros as TensorFlow's "SAME" does.

    A convolution without padding then gives ceil(H / stride) x ceil(W / stride) outputs. Where the
    number of pixels to pad is odd, right and bottom get one more.
    """
    (top, bottom), (left, right) = (
        _same_padding(size, kernel, stride) for size in (x.shape[-2], x.shape[-1])
    )
    return F.pad(x, (left, right, top, bottom))


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the pixels to pad before and after ``size`` pixels."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _block_plan(scaling: Scaling) -> Iterator[dict[str, int]]:
    """Yield the arguments of each block, of all stages in order."""
    last = len(_STAGES) - 1
    for stage, (kernel, repeats, stride, expansion, channels) in enumerate(_STAGES):
        if stage not in (0, last):
            repeats = math.ceil(repeats * scaling.depth)
        for repeat in range(repeats):
            yield {
                "kernel": kernel,
                "stride": stride if repeat == 0 else 1,
                "expansion": expansion,
                "out_channels": _multiple_of_8(channels * scaling.width),
            }


def _multiple_of_8(channels: float) -> int:
    """Round to the nearest multiple of 8 that is not more than 10% less."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def _batch_norm(norm: str, channels: int) -> nn.Module:
    layer = get_norm(norm, channels)
    layer.eps = 1e-3
    layer.momentum = 0.01  # of new statistics; TensorFlow writes 0.99, of the old ones
    return layer


def _frozen(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def _check(argument: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(
            f"EfficientNetLite: {argument} is {value!r}; known are: {', '.join(known)}."
        )
