"""Frozen batch normalization, folded into the convolution before it.

Frozen normalization multiplies a channel by a constant and adds another, and so does a convolution:
``(W x) s + b = (s W) x + b``. Detectron2's layer does it to the activations, in seven launches and
two passes over them forward and one backward, for each of the 53 convolutions of a ResNet-50;
folded it costs one pass over the weights, and nothing where no gradients are taken: there the
folded weights are kept. Results and gradients are the same to rounding.
"""

from collections.abc import Iterable
from typing import Self

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a ``FrozenBatchNorm2d`` that is part of the convolution.

    Parameters and buffers keep their names, so checkpoints fit both ways. The normalization itself
    is not called any more, nor are hooks on it.

    Args:
        conv: the layer whose place this one takes; it shares all of its parameters and buffers.
    """

    def __init__(self, conv: Conv2d):
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)
        # The state of the sources below, and what to multiply and add.
        self._constants: tuple[list, Tensor, Tensor] | None = None
        self._sources: tuple[Tensor, ...] = ()
        # Without gradients: the state of weight and scale, these, the folded weight, what to add.
        self._kept: tuple[tuple, tuple[Tensor, Tensor], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalize x (N, in_channels, H, W)."""
        weight, shift = self._weight_and_shift(x.device.type)
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as any module; weights may have changed in a way that leaves no trace."""
        self._kept = None
        return super().train(mode)

    def _weight_and_shift(self, device_type: str) -> tuple[Tensor, Tensor]:
        """Return the folded weight (out, in, k, k) and what is added, (out,)."""
        scale, shift = self._scale_and_shift()
        weight = self.weight
        if (torch.is_grad_enabled() and weight.requires_grad) or torch.jit.is_tracing():
            self._kept = None
            return weight * scale.view(-1, 1, 1, 1), shift
        dtype = weight.dtype
        # Of a type without autocast, such as "meta", nobody may ask whether it is enabled.
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        state = _state([weight, scale]), dtype
        kept = self._kept
        if kept is None or kept[0] != state:
            with torch.inference_mode(False):
                detached = weight.detach()
                folded = detached * scale.view(-1, 1, 1, 1)
                # With what they are made of, so that no other memory takes its place and has its
                # state: a module that is moved exchanges the memory of its parameters alone.
                kept = state, (detached, scale), folded.to(dtype), shift.to(dtype)
                self._kept = kept
        return kept[2], kept[3]

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what the normalization multiplies and adds, (out_channels,) each."""
        norm = self.norm
        sources = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        # They change when a checkpoint is loaded or the model is moved, and hardly ever else.
        state = _state(sources)
        if self._constants is None or self._constants[0] != state:
            # Kept alive, so that no other tensor takes the place of one that state is of.
            self._sources = sources
            with torch.inference_mode(False):  # what is made now may be trained with later
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                self._constants = state, scale, norm.bias - norm.running_mean * scale
        return self._constants[1], self._constants[2]


def _state(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """What changes when a tensor is written to or exchanged for another."""
    return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """Fold every frozen batch normalization of ``module`` into its convolution, in place.

    A convolution with a bias of its own, or with another normalization, stays as it is.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if (
                type(child) is Conv2d
                and type(child.norm) is FrozenBatchNorm2d
                and child.bias is None
                and child.padding_mode == "zeros"
            ):
                setattr(parent, name, FoldedConv2d(child))
    return module
