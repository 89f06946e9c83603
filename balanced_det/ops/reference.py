r"""The sigmoid losses in plain torch, one cache-sized piece of the logits at a time; any device.

With :math:`z = x` where the label names the class (y = 1) and :math:`z = -x` elsewhere (y = 0),

.. math::
    g = |\sigma(x) - y| = \sigma(-z), \qquad \mathrm{bce} = \log(1 + e^{-z}), \qquad
    \ell = w\, g^\gamma\, \mathrm{bce}, \qquad
    \frac{\partial \ell}{\partial z} = -w\, g^\gamma \left(g + \gamma (1 - g)\, \mathrm{bce}\right),

where w holds alpha and the table weights. By x the slope is negative where y = 1 and not elsewhere,
which is how the sums over rows tell the two apart. No target of shape (R, K) exists: every
element of a piece is computed as y = 0, then the one element of a foreground row that has y = 1 is
replaced.

The functions here share their signatures with :mod:`.triton_kernels`.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import memory_order

# Elements of a piece. On a CPU the handful of temporaries of a piece should stay in the cache; on
# other devices a piece should be large enough to hide the launches.
_CPU_PIECE = 1 << 17
_DEVICE_PIECE = 1 << 24


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    sums: Tensor | None,
    *,
    alpha: float | None,
    gamma: float | Tensor,
    weight: Tensor | None,
    positive_weight: Tensor | None,
    negative_weight: Tensor | None,
    background_weight: Tensor | None,
    bin_weight: Tensor | None,
    scale: float | Tensor,
) -> Tensor:
    """Return the 0-dim loss; write its gradient into ``gradient`` unless that is None.

    ``logits`` and ``gradient`` are (*, K), and may be one tensor; ``labels`` is (*).
    ``sums``, unless None, is (2, K) float64, to which |gradient| before ``scale`` is added, summed
    over the rows where y = 1, and where y = 0.
    """
    num_classes = logits.shape[-1]
    dtype = _arithmetic_dtype(logits)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    weights = weight, positive_weight, negative_weight, background_weight
    with_slope = gradient is not None or sums is not None
    for index, classes in _pieces(logits):
        x, label = _load(logits[index], labels[index[:-1]], dtype)
        exponent = gamma[classes] if isinstance(gamma, Tensor) else gamma
        every, positive, negative, background = (w if w is None else w[classes] for w in weights)

        # Every element as y = 0.
        factors = [every, None if alpha is None else 1 - alpha]
        if negative is not None or background is not None:
            one = x.new_ones(())
            is_foreground = (label < num_classes).unsqueeze(-1)
            factors.append(
                torch.where(
                    is_foreground,
                    one if negative is None else negative,
                    one if background is None else background,
                )
            )
        loss, slope = _weighted_bce(x, factors, exponent, bin_weight, with_slope)

        # Then the one element of each foreground row that has y = 1, by a scatter of one element a
        # row. A row without such an element in this piece puts back what it read there.
        is_positive = ((label >= classes.start) & (label < classes.stop)).unsqueeze(-1)
        position = (label.unsqueeze(-1) - classes.start).clamp_(0, x.shape[-1] - 1)  # (*, 1)
        factors = [alpha, *(w if w is None else w[position] for w in (every, positive))]
        if isinstance(exponent, Tensor):
            exponent = exponent[position]
        positive_loss, positive_slope = _weighted_bce(
            -x.gather(-1, position), factors, exponent, bin_weight, with_slope
        )
        old = loss.gather(-1, position)
        loss.scatter_(-1, position, torch.where(is_positive, positive_loss, old))
        total += loss.sum()
        if slope is None or positive_slope is None:
            continue
        old = slope.gather(-1, position)
        slope.scatter_(-1, position, torch.where(is_positive, -positive_slope, old))
        if sums is not None:
            rows = slope.reshape(-1, slope.shape[-1])
            # Within a piece in the arithmetic's precision, which numbers of one sign do not harm.
            sums[0, classes] -= rows.clamp(max=0).sum(0)
            sums[1, classes] += rows.clamp(min=0).sum(0)
        if gradient is not None:
            gradient[index] = slope if isinstance(scale, float) and scale == 1 else slope * scale
    return (total * scale).to(dtype)


def histogram(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return the (bins,) int64 counts of gradient lengths over rows labelled >= 0."""
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    dtype = _arithmetic_dtype(logits)
    for index, classes in _pieces(logits):
        x, label = _load(logits[index], labels[index[:-1]], dtype)
        position = (label.unsqueeze(-1) - classes.start).clamp_(0, x.shape[-1] - 1)
        is_positive = ((label >= classes.start) & (label < classes.stop)).unsqueeze(-1)
        value = x.gather(-1, position)
        x.scatter_(-1, position, torch.where(is_positive, -value, value))
        bin_of = bin_index(torch.sigmoid(x), bins)
        valid = (label >= 0).unsqueeze(-1).expand_as(bin_of)
        # Integer addition: the counts do not depend on the order, on any device.
        counts.scatter_add_(0, bin_of.flatten(), valid.to(torch.int64).flatten())
    return counts


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply ``gradient`` in place by the 0-dim ``factor``, in float32 or wider."""
    if factor.device.type == "cpu" and factor == 1:
        return
    dtype = _arithmetic_dtype(gradient)
    for index, _ in _pieces(gradient):
        piece = gradient[index]
        piece.copy_(piece.to(dtype) * factor)


def _arithmetic_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _pieces(logits: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Yield the index of each piece of ``logits`` and the classes (a slice) that it holds."""
    left = _CPU_PIECE if logits.device.type == "cpu" else _DEVICE_PIECE
    order = memory_order(logits.shape, logits.stride())
    step = {}
    for dim in reversed(order):  # Whole runs of the fastest dimensions first.
        step[dim] = max(1, min(logits.shape[dim], left))
        left //= step[dim]
    starts = (range(0, logits.shape[dim], step[dim]) for dim in order)
    for start in itertools.product(*starts):
        index = [slice(None)] * logits.dim()
        for dim, first in zip(order, start):
            index[dim] = slice(first, min(first + step[dim], logits.shape[dim]))
        yield tuple(index), index[-1]


def _load(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the piece in arithmetic precision, and its labels as int64.

    Ignored rows become -inf: as y = 0 their loss, gradient and gradient length are exactly 0.
    """
    ignored = (labels < 0).unsqueeze(-1)
    return logits.to(dtype).masked_fill(ignored, float("-inf")), labels.to(torch.int64)


def bin_index(length: Tensor, bins: int) -> Tensor:
    """Return the bin min(int(g B), B - 1) of each gradient length g in [0, 1], int64."""
    return (length * bins).to(torch.int64).clamp_(0, bins - 1)


def _weighted_bce(
    x: Tensor,
    factors: Iterable[float | Tensor | None],
    gamma: float | Tensor,
    bin_weight: Tensor | None,
    with_slope: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of y = 0 at ``x`` and its derivative, which is None unless asked for.

    ``gamma`` is a number or a tensor that broadcasts with ``x``, as are ``factors``, or None.
    """
    length = torch.sigmoid(x)
    # An infinite loss times a gradient length or weight of 0 would be nan.
    loss = _softplus(x).clamp_(max=torch.finfo(x.dtype).max)
    slope = length if with_slope else None
    factors = list(factors)
    if isinstance(gamma, Tensor) or gamma != 0:
        if slope is not None:
            slope = (1 - length).mul_(loss).mul_(gamma).add_(length)
        factors.append(length.square() if _is_number(gamma, 2) else length.pow(gamma))
    if bin_weight is not None:
        factors.append(bin_weight[bin_index(length, len(bin_weight))])
    for factor in factors:
        if factor is not None:
            loss.mul_(factor)
            if slope is not None:
                slope.mul_(factor)
    return loss, slope


def _is_number(value: float | Tensor, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), good to the rounding of the dtype also where it is nearly 0.

    torch's log1p takes longer on a CPU than all else here together. So in float32, with
    e = exp(-|x|), log(1 + e) is 2 atanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...) at
    s = e / (2 + e) <= 1/3; the first term left out is below 2e-8 of the sum.
    """
    if x.dtype == torch.float64:
        return F.softplus(x, threshold=40)  # exp(-40) < 2**-53
    e = x.abs().neg_().exp_()
    s = e / (e + 2)
    t = s * s
    series = t * (2 / 13)
    for n in (11, 9, 7, 5, 3):
        series.add_(2 / n).mul_(t)
    return series.add_(2).mul_(s).add_(x.clamp(min=0))
