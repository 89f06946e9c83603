r"""The one pass over the logits that every sigmoid loss is made of.

A detector's logits are the largest tensor of a training step: RetinaNet with 1,203 classes has
6.5 GiB of them at a batch of eight. BCE, focal loss (arXiv 1708.02002, Eq. 5), EQL (arXiv
2003.05176, Eq. 3) and GHM-C (arXiv 1811.05181, Eq. 9) are the sum

.. math::
    L = s \sum_{r:\, label_r \ge 0} \sum_k
        w_{rk}\, \alpha_{rk}\, g_{rk}^{\gamma_k}\, \mathrm{BCE}(x_{rk}, y_{rk}), \qquad
    y_{rk} = [label_r = k], \qquad g_{rk} = |\sigma(x_{rk}) - y_{rk}|

with different small tables for w and gamma. It reads each logit once and writes each gradient once;
nothing else of the logits' size is allocated. EQLv2 (arXiv 2012.08548) and EFL (arXiv 2201.02593)
weigh classes by the gradient they have had; the same read sums it.

Two implementations share one meaning: plain torch (:mod:`.reference`) and Triton kernels
(:mod:`.triton_kernels`); :mod:`.choice` says which serves a call. :mod:`.nms` suppresses the
overlapping boxes of many groups at once, :mod:`.roi_align` pools the features of boxes.

Letters: R rows, K classes, B bins of the gradient length; a head leaves (N, A K, H, W), N images
with A anchors in each of H x W cells.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError
from . import reference
from .choice import implementation, uses_triton
from .layout import empty_gradient

__all__ = ["gradient_histogram", "implementation", "sigmoid_loss"]

_MAX_DIM = 5  # (N, H, W, A, K), what a dense head makes.


def sigmoid_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = None,
    gamma: float | Tensor = 0.0,
    weight: Tensor | None = None,
    positive_weight: Tensor | None = None,
    negative_weight: Tensor | None = None,
    background_weight: Tensor | None = None,
    bin_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    overwrite_logits: bool = False,
    gradient_sums: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum a weighted sigmoid cross entropy over all rows labelled >= 0 and all K classes.

    Args:
        logits: (*, K), floating point, up to four leading dimensions, any strides. The
            arithmetic is float32 whatever their type (float64 for float64 logits).
        labels: (*), integers: 0 .. K-1 a class, K background, negative ignored. A row that is
            ignored has exactly zero loss and gradient, whatever its logits.
        alpha: weight of the y = 1 terms, 1 - alpha being that of the y = 0 terms; None for neither.
        gamma: exponent of the focal modulation (1 - p_t)^gamma, a number or a (K,) tensor of one a
            class; its gradient is included.
        weight: (K,) weight of every term of a class, on top of the following.
        positive_weight: (K,) weight of the y = 1 term.
        negative_weight: (K,) weight of the y = 0 terms of foreground rows.
        background_weight: (K,) weight of the y = 0 terms of background rows.
        bin_weight: (B,) weight by the gradient length g: element b = min(int(g * B), B - 1).
        scale: a number or 0-dim tensor that multiplies the sum, such as loss weight / normalizer.
            Given here it costs nothing, and a gradient of a 16-bit type is rounded once, after it.
        overwrite_logits: write the gradient over the logits instead of into a new tensor, for a
            caller that owns them and knows that NOBODY reads them afterwards: not a metric, not a
            hook, not the operation that made them (a convolution does not read its output, a ReLU
            or sigmoid does). Autograd refuses a backward pass that needs the lost values.
        gradient_sums: return also the sum over rows of each class's |dL/dx|, for s = 1.

    Returns:
        A 0-dim float32 tensor (float64 for float64 logits). Its gradient is made here already, with
        the strides of ``logits`` (dense, in the same order, where these have gaps), and multiplied
        in place by what ``backward`` brings, which costs nothing on CUDA when that is 1. Tables and
        ``scale`` are constants: no gradient flows to them.

        With ``gradient_sums``, (that tensor, sums): (2, K) float64 without gradient, of the
        elements with y = 1 and of those with y = 0. Weights must then not be negative.

    Raises:
        InputError: a wrong shape, type, device or range. Label values and those of a (K,) gamma,
            which must not be negative, are not checked, since that would wait for the device; any
            label above K counts as background.
        RuntimeError: in backward, when the graph was used up or the overwritten logits changed.

    Nothing waits for the device. Sums are deterministic. The gradient of an infinite logit is that
    of a very large one.
    """
    _check_rows(logits, labels)
    num_classes = logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if alpha is not None and not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1] or be None, not {alpha}.")
    if isinstance(gamma, torch.Tensor):
        gamma = _table("gamma", gamma, num_classes, logits, dtype)
    elif not gamma >= 0:
        raise InputError(f"gamma must not be negative, not {gamma}.")
    if bin_weight is not None and len(bin_weight) == 0:
        raise InputError("bin_weight must have at least one bin.")
    if isinstance(scale, torch.Tensor):
        if scale.dim() != 0:
            raise InputError(f"scale must be a number or 0-dim, not of shape {tuple(scale.shape)}.")
        if scale.device.type != "cpu" and scale.device != logits.device:
            raise InputError(f"scale is on {scale.device}, the logits on {logits.device}.")
        scale = scale.item() if scale.device.type == "cpu" else scale.detach()
    tables = {
        "weight": (weight, num_classes),
        "positive_weight": (positive_weight, num_classes),
        "negative_weight": (negative_weight, num_classes),
        "background_weight": (background_weight, num_classes),
        "bin_weight": (bin_weight, None),  # of any length
    }
    options = dict(
        alpha=alpha,
        gamma=gamma if isinstance(gamma, Tensor) else float(gamma),
        scale=scale,
        **{
            name: None if table is None else _table(name, table, length, logits, dtype)
            for name, (table, length) in tables.items()
        },
    )
    backend = _backend(logits)
    sums = logits.new_zeros((2, num_classes), dtype=torch.float64) if gradient_sums else None
    if not (logits.requires_grad and torch.is_grad_enabled()):
        loss = backend.loss_and_gradient(logits, labels, None, sums, **options)
    else:
        if overwrite_logits:
            _check_overwritable(logits)
        loss = _SigmoidLoss.apply(logits, labels, backend, overwrite_logits, sums, options)
    return loss if sums is None else (loss, sums)


def gradient_histogram(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Count the gradient lengths g = |sigmoid(x) - y| of all rows labelled >= 0 and all classes.

    Args:
        logits: (*, K), as in :func:`sigmoid_loss`.
        labels: (*).
        bins: the number B of equal bins over [0, 1]; g counts in bin min(int(g * B), B - 1).

    Returns:
        (B,) int64 counts, exact at any size, on the device of ``logits``; nothing waits for it.
    """
    _check_rows(logits, labels)
    if bins < 1:
        raise InputError(f"bins must be at least 1, not {bins}.")
    with torch.no_grad():
        return _backend(logits).histogram(logits, labels, bins)


class _SigmoidLoss(torch.autograd.Function):
    """Makes the gradient together with the loss; backward hands it over."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        backend: ModuleType,
        overwrite: bool,
        sums: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        gradient = logits.detach() if overwrite else empty_gradient(logits)
        loss = backend.loss_and_gradient(logits.detach(), labels, gradient, sums, **options)
        ctx.version = None
        if overwrite:
            # Kernels write past autograd; tell it, so that whoever saved these values is refused.
            torch.autograd.graph.increment_version(gradient)
            ctx.version = gradient._version
        ctx.gradient, ctx.backend = gradient, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # An attribute, not save_for_backward: only the sole owner of a gradient may scale it in
        # place and hand it on without a copy.
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError(
                "sigmoid_loss handed its gradient to an earlier backward pass; to run backward "
                "again give retain_graph=True."
            )
        if ctx.version is not None and gradient._version != ctx.version:
            raise RuntimeError(
                "The logits given to sigmoid_loss with overwrite_logits=True hold its gradient and "
                "were modified before backward."
            )
        if _graph_is_retained():
            gradient = gradient.clone()
        else:
            ctx.gradient = None
        ctx.backend.scale_gradient_(gradient, grad_output)
        return gradient, None, None, None, None, None


def _graph_is_retained() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _check_rows(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise InputError(f"logits must be floating point, not {logits.dtype}.")
    if logits.dim() == 0 or logits.dim() > _MAX_DIM:
        raise InputError(f"logits must have 1 to {_MAX_DIM} dimensions, not {logits.dim()}.")
    if labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels must have the shape {tuple(logits.shape[:-1])} of the logits' rows, "
            f"not {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, not {labels.dtype}.")
    if labels.device != logits.device:
        raise InputError(f"labels are on {labels.device}, the logits on {logits.device}.")


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise InputError(
            "overwrite_logits needs logits that an operation made, not a leaf or a view of one."
        )
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride())):
        raise InputError("overwrite_logits needs logits of which no two share memory.")


def _table(
    name: str, table: Tensor, length: int | None, logits: Tensor, dtype: torch.dtype
) -> Tensor:
    if table.dim() != 1 or (length is not None and len(table) != length):
        wanted = "(B,)" if length is None else f"({length},)"
        raise InputError(f"{name} must have the shape {wanted}, not {tuple(table.shape)}.")
    if table.device != logits.device:
        raise InputError(f"{name} is on {table.device}, the logits on {logits.device}.")
    return table.detach().to(dtype).contiguous()


def _backend(logits: Tensor) -> ModuleType:
    return _triton_kernels() if uses_triton(logits) else reference


@functools.cache
def _triton_kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels
