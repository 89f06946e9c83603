"""The last layer of a dense detector with many classes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

_NAMES = ("same", "valid")


class WideConv2d(nn.Conv2d):
    """``nn.Conv2d`` that takes the weight gradient of very many output channels another way.

    The 1,203 classes of LVIS make RetinaNet's last layer one of 256 to 10,827 channels, whose
    weight gradient takes cuDNN a fifth of a training step. At a 1x1 convolution cuDNN is twice as
    fast (``benchmarks/bench_convolution.py``). So the weight gradient of a k x k convolution is
    taken as that of a 1x1 convolution of the unfolded input, whose channels are the k x k
    neighbours of a position; the sums are the same. That input lives within the backward pass only,
    and only where it is smaller than the output, k * k * in_channels < out_channels. All else, and
    all of inference, is ``nn.Conv2d``'s own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (N, in_channels, H, W)."""
        k_h, k_w = self.kernel_size
        wide = k_h * k_w * self.in_channels < self.out_channels
        plain = self.groups == 1 and self.padding_mode == "zeros" and self.padding not in _NAMES
        if not (wide and plain and torch.is_grad_enabled()):
            return super().forward(x)
        return _WideConvolution.apply(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation
        )


def replace_classifier(head: Any, num_anchors_times_logits: int) -> None:
    """Give a dense head a last layer of as many logits as the classification loss needs."""
    old = head.cls_score
    head.cls_score = WideConv2d(
        old.in_channels, num_anchors_times_logits, old.kernel_size, old.stride, old.padding
    )
    if old.out_channels == num_anchors_times_logits:
        head.cls_score.load_state_dict(old.state_dict())
    else:
        nn.init.normal_(head.cls_score.weight, std=0.01)


class _WideConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        return F.conv2d(x, weight, bias, **ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Under autocast the gradient is of the type that the convolution was computed in.
        x, weight = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, **ctx.geometry)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, weight.shape, gradient, **ctx.geometry)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=(0, 2, 3))
        return of_x, of_weight, of_bias, None, None, None


def weight_gradient(x: Tensor, shape: tuple[int, ...], gradient: Tensor, **geometry: Any) -> Tensor:
    """Return the gradient of a convolution's weight, see :class:`WideConv2d`.

    Args:
        x: the input (N, in_channels, H, W).
        shape: (out_channels, in_channels, k, k), the weight's.
        gradient: of the output, (N, out_channels, H', W'), of the type of ``x``.
        geometry: stride, padding and dilation.
    """
    n, channels, height, width = gradient.shape
    if height * width * gradient.element_size() % 16:
        # The fast kernels load 16 bytes at a time; without them unfolding gains nothing.
        return conv2d_weight(x, shape, gradient, **geometry)
    neighbours = F.unfold(x, shape[2:], **geometry).view(n, -1, height, width)
    return conv2d_weight(neighbours, (channels, neighbours.shape[1], 1, 1), gradient).view(shape)
