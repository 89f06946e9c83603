"""The sigmoid losses as Triton kernels: one read of each logit, one write of each gradient.

Every tensor is walked in its own memory order, as (outer, K, inner): the leading dimensions whose
strides are larger than the classes', the classes, and the leading dimensions whose strides are
smaller. Row-major logits are (R, K, 1), a convolution's output (N * A, K, H * W). Reads and writes
are so contiguous in every layout; the labels, laid out as (outer, inner), are compared in the
kernel. See :mod:`.reference` for the formula; the functions share its signatures.

Where the gradient of each class is summed too, a lane of a program sees one class only and keeps
its sums in registers, see :func:`_sums_kernel`; no two programs add to one number, so that sums do
not depend on who comes first.

No size is compiled in, so that images of changing size never compile anew. The kernels are bound by
arithmetic nearly as much as by memory, hence their care about divisions and 64-bit numbers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .layout import is_dense, memory_order

# Elements that a program handles at a time: 8 a thread, measured best on an H200 (16 need so many
# registers that too few programs run side by side).
_BLOCK = 1024
_WARPS = 4
_HISTOGRAM_WARPS = 8
# With the sums of its lanes a program needs more registers: 40 a thread with 4 elements each, which
# leaves room for 48 warps side by side; 79 and 24 warps with 8.
_SUMS_BLOCK = 512
_THREADS_PER_MULTIPROCESSOR = 2048  # The kernels that loop start as many programs as fill it.
# Up to here, 32-bit element numbers cannot overflow, also where a loop steps past the end by one
# block of every program that runs at a time (2,112 on an H200).
_NARROW = (1 << 31) - (1 << 24)
_MAX_EXTENT = 1 << 30  # Of K and of inner: 32-bit offsets within them suffice in either case.

# Hardware approximations, within two rounding steps, where there is the hardware: Triton's own exp
# and division spend a sixth of the kernel on denormal numbers, which cannot occur or do not matter.
_PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")

_LARGEST = tl.constexpr(3.4e38)  # Nearly the largest float32.

# Up to here a multiplication takes the device a few microseconds, less than it takes the host to
# launch the kernel that can leave it out.
_SMALL = 1 << 21

# How a tensor lies, see _layout. Named short since Triton wants every number as its own argument.
_LAYOUT = ["K", "k_mul", "k_shift", "inner", "i_mul", "i_shift"]
_LAYOUT += ["k_stride", "n1", "n2", "n3", "s0", "s1", "s2", "s3"]


@triton.jit
def _divide(n, multiplier, shift):
    """n // d for 0 <= n < 2**31, by the numbers that _reciprocal makes of d."""
    n = n.to(tl.uint32)
    high = tl.umulhi(n, multiplier.to(tl.uint32, bitcast=True))
    return ((high + n) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _exp(x):
    if _PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=r,r",
            [x * 1.4426950408889634],  # 1 / log(2)
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.exp(x)


@triton.jit
def _inverse(x):
    if _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _load(start, numel, logits_ptr, labels_ptr,
          K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
          LEAD: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Where BLOCK elements of (outer, K, inner) from start on lie; their logit, label and class."""
    # Divisions are of 32-bit numbers. A tensor of 2**31 elements and more (WIDE) has elements of
    # larger numbers: there row and class of the program's first element are found by 64-bit
    # division, and its others are numbered from that one. A smaller tensor is numbered from 0.
    element = start + tl.arange(0, BLOCK)
    first_row = 0
    first_k = 0
    if WIDE:
        first_plane = start // inner
        start -= first_plane * inner
        first_row = first_plane // K * inner
        first_k = (first_plane % K).to(tl.int32)
    row = start.to(tl.int32) + tl.arange(0, BLOCK)
    if ROW_MAJOR:
        k = first_k + row
        row = _divide(k, k_mul, k_shift)
        k -= row * K
    else:
        plane = _divide(row, i_mul, i_shift)
        row -= plane * inner
        k = first_k + plane
        outer = _divide(k, k_mul, k_shift)
        k -= outer * K
        row += outer * inner

    if LEAD == 0:
        at = element
    else:  # Gaps: count out the leading dimensions, fastest first.
        rest = first_row + row.to(tl.int64)
        at = k.to(tl.int64) * k_stride
        if LEAD > 3:
            at += (rest % n3) * s3
            rest = rest // n3
        if LEAD > 2:
            at += (rest % n2) * s2
            rest = rest // n2
        if LEAD > 1:
            at += (rest % n1) * s1
            rest = rest // n1
        at += rest * s0

    inside = element < numel
    x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + first_row + row, mask=inside, other=-1).to(tl.int32)
    return element, at, x, label, k


@triton.jit
def _margin(x, label, k):
    """z: x where y = 1, -x where y = 0, and +inf in ignored rows, whose every term is then 0."""
    return tl.where(label >= 0, tl.where(label == k, x, -x), float("inf"))


@triton.jit
def _logistic(z):
    """g = sigmoid(-z) and log(1 + exp(-|z|)), both good to float32 rounding however small.

    With e = exp(-|z|), the logarithm is 2 atanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...) at
    s = e / (2 + e) <= 1/3; the first term left out is below 2e-8 of the sum. Computed from 1 + e
    it would lose what that rounds away, which is all of the loss of easy examples.
    """
    e = _exp(-tl.abs(z))
    near = _inverse(1.0 + e)
    s = e * _inverse(2.0 + e)
    t = s * s
    series = t * (2.0 / 13) + 2.0 / 11
    series = series * t + 2.0 / 9
    series = series * t + 2.0 / 7
    series = series * t + 2.0 / 5
    series = series * t + 2.0 / 3
    return tl.where(z < 0, near, e * near), s * (series * t + 2.0)


@triton.jit
def _start(WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The program's first element, as the integer type that element numbers need."""
    program = tl.program_id(0)
    return (program.to(tl.int64) if WIDE else program) * BLOCK


@triton.jit
def _bin(length, bins):
    return tl.minimum((length * bins).to(tl.int32), bins - 1)


@triton.jit
def _power(length, log1p, z, gamma):
    """g^gamma of any gamma >= 0; log g is at z what -bce is at -z."""
    # A gamma of 0 times an infinite z would be nan.
    return _exp(-gamma * tl.minimum(log1p + tl.maximum(z, 0.0), _LARGEST))


@triton.jit
def _bce(log1p, z):
    """log(1 + exp(-z)), finite: an infinite loss times a weight of 0 would be nan."""
    bce = log1p + tl.maximum(-z, 0.0)
    return tl.where(bce > _LARGEST, _LARGEST, bce)  # which leaves nan as it is


@triton.jit(do_not_specialize=[*_LAYOUT, "scale", "bins"])
def _loss_kernel(
    logits_ptr, labels_ptr,
    gradient_ptr,  # None: no gradient.
    partial_ptr,  # A program's sum.
    gamma_ptr,  # None: GAMMA counts.
    weight_ptr, positive_ptr, negative_ptr, background_ptr, bin_ptr,  # Tables; None: all ones.
    scale_ptr,  # None: the number `scale` counts.
    scale, bins, numel,
    K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
    LEAD: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr, OVERWRITE: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, at, x, label, k = _load(
        _start(WIDE, BLOCK), numel, logits_ptr, labels_ptr,
        K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
        LEAD, ROW_MAJOR, WIDE, BLOCK,
    )  # fmt: skip
    z = _margin(x, label, k)
    length, log1p = _logistic(z)
    bce = _bce(log1p, z)

    positive = label == k
    weight = 1.0
    gamma = GAMMA
    if ALPHA is not None:
        weight = tl.where(positive, ALPHA, 1.0 - ALPHA)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + k, mask=element < numel, other=0.0)
        weight *= _power(length, log1p, z, gamma)
    elif GAMMA == 1.0:
        weight *= length
    elif GAMMA == 2.0:
        weight *= length * length
    elif GAMMA != 0.0:
        weight *= _power(length, log1p, z, GAMMA)
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + k, mask=element < numel, other=0.0)
    if positive_ptr is not None:
        weight *= tl.load(positive_ptr + k, mask=positive, other=1.0)
    if negative_ptr is not None:
        weight *= tl.load(negative_ptr + k, mask=(label < K) & (label != k), other=1.0)
    if background_ptr is not None:
        weight *= tl.load(background_ptr + k, mask=label >= K, other=1.0)
    if bin_ptr is not None:
        weight *= tl.load(bin_ptr + _bin(length, bins))

    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(weight * bce, axis=0) * scale)
    if gradient_ptr is not None:
        slope = length
        if GAMMA != 0.0:
            slope += gamma * (1.0 - length) * bce
        slope *= weight * tl.where(positive, -scale, scale)
        if not OVERWRITE:
            at = element
        tl.store(gradient_ptr + at, slope, mask=element < numel)


@triton.jit(do_not_specialize=[*_LAYOUT, "scale", "bins"])
def _sums_kernel(
    logits_ptr, labels_ptr,
    gradient_ptr,  # None: no gradient.
    partial_ptr,  # A program's sum.
    sums_ptr,  # (2, programs, BLOCK) if ROW_MAJOR, else (2, programs).
    gamma_ptr,  # None: GAMMA counts.
    weight_ptr, positive_ptr, negative_ptr, background_ptr, bin_ptr,  # Tables; None: all ones.
    scale_ptr,  # None: the number `scale` counts.
    scale, bins, numel,
    K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
    LEAD: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr, OVERWRITE: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_loss_kernel in a loop whose every lane stays with one class.

    1. Row-major logits: a step of the loop takes all programs BLOCK times their number of elements
       on, which is a multiple of K wherever there is a second step. A lane so stays with its class,
       and its row grows by a constant. What lane l of program p has summed is of class
       (p BLOCK + l) % K.
    2. Otherwise each program has one class k, and its lanes walk that class's rows.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    if WIDE:
        lane = lane.to(tl.int64)
    rows = numel // K
    if ROW_MAJOR:
        start = _start(WIDE, BLOCK)
        first = start + lane
        row = first // K if WIDE else _divide(first, k_mul, k_shift)
        k = (first - row * K).to(tl.int32)
        step = tl.cast(programs, lane.dtype) * BLOCK // K
    else:
        k = program % K
        row = (program // K) * BLOCK + lane
        step = tl.cast(programs // K, lane.dtype) * BLOCK

    gamma = GAMMA
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + k)
    if weight_ptr is not None:
        every = tl.load(weight_ptr + k)
    if positive_ptr is not None:
        positive_weight = tl.load(positive_ptr + k)
    if negative_ptr is not None:
        negative_weight = tl.load(negative_ptr + k)
    if background_ptr is not None:
        background_weight = tl.load(background_ptr + k)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)

    loss = tl.zeros((BLOCK,), tl.float32)
    positive_sum = tl.zeros((BLOCK,), tl.float32)
    negative_sum = tl.zeros((BLOCK,), tl.float32)
    # The last step may lie outside for some lanes.
    for _ in range(0, tl.cdiv(rows, step)):
        if ROW_MAJOR:
            # Counted without rows, so that the compiler sees one contiguous block.
            element = start + lane
            inside = element < numel
            start += programs * BLOCK
        else:
            inside = row < rows
            outer = row // inner if WIDE else _divide(row, i_mul, i_shift)
            element = row + (outer * (K - 1) + k) * inner
        at = element
        if LEAD > 0:  # Gaps: count out the leading dimensions, fastest first.
            rest = row.to(tl.int64)
            at = tl.zeros((BLOCK,), tl.int64) + k.to(tl.int64) * k_stride
            if LEAD > 3:
                at += (rest % n3) * s3
                rest = rest // n3
            if LEAD > 2:
                at += (rest % n2) * s2
                rest = rest // n2
            if LEAD > 1:
                at += (rest % n1) * s1
                rest = rest // n1
            at += rest * s0
        x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
        label = tl.load(labels_ptr + row, mask=inside, other=-1).to(tl.int32)

        z = _margin(x, label, k)
        length, log1p = _logistic(z)
        bce = _bce(log1p, z)
        positive = label == k
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if ALPHA is not None:
            weight = tl.where(positive, ALPHA, 1.0 - ALPHA)
        if gamma_ptr is not None:
            weight *= _power(length, log1p, z, gamma)
        elif GAMMA == 1.0:
            weight *= length
        elif GAMMA == 2.0:
            weight *= length * length
        elif GAMMA != 0.0:
            weight *= _power(length, log1p, z, GAMMA)
        if weight_ptr is not None:
            weight *= every
        if positive_ptr is not None:
            weight *= tl.where(positive, positive_weight, 1.0)
        if negative_ptr is not None:
            weight *= tl.where((label < K) & (label != k), negative_weight, 1.0)
        if background_ptr is not None:
            weight *= tl.where(label >= K, background_weight, 1.0)
        if bin_ptr is not None:
            weight *= tl.load(bin_ptr + _bin(length, bins))

        loss += weight * bce
        slope = length
        if GAMMA != 0.0:
            slope += gamma * (1.0 - length) * bce
        slope *= weight
        positive_sum += tl.where(positive, slope, 0.0)
        negative_sum += tl.where(positive, 0.0, slope)
        if gradient_ptr is not None:
            slope *= tl.where(positive, -scale, scale)
            if not OVERWRITE:
                at = element
            tl.store(gradient_ptr + at, slope, mask=inside)
        row += step

    tl.store(partial_ptr + program, tl.sum(loss, axis=0) * scale)
    if ROW_MAJOR:
        sums_ptr += tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(sums_ptr, positive_sum)
        tl.store(sums_ptr + tl.cast(programs, tl.int64) * BLOCK, negative_sum)
    else:
        tl.store(sums_ptr + program, tl.sum(positive_sum, axis=0))
        tl.store(sums_ptr + programs + program, tl.sum(negative_sum, axis=0))


@triton.jit(do_not_specialize=[*_LAYOUT, "bins"])
def _histogram_kernel(
    logits_ptr, labels_ptr,
    counts_ptr,  # (bins,) int64
    bins, numel,
    K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
    LEAD: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slots = tl.arange(0, SLOTS)
    counts = tl.zeros((SLOTS,), tl.int32)
    start = _start(WIDE, BLOCK)
    while start < numel:
        _, _, x, label, k = _load(
            start, numel, logits_ptr, labels_ptr,
            K, k_mul, k_shift, inner, i_mul, i_shift, k_stride, n1, n2, n3, s0, s1, s2, s3,
            LEAD, ROW_MAJOR, WIDE, BLOCK,
        )  # fmt: skip
        length, _ = _logistic(_margin(x, label, k))
        # Ignored elements count in a slot past the last bin.
        counts += tl.histogram(tl.where(label >= 0, _bin(length, bins), bins), SLOTS)
        start += tl.num_programs(0) * BLOCK
    tl.atomic_add(counts_ptr + slots, counts.to(tl.int64), mask=slots < bins)


@triton.jit
def _scale_kernel(gradient_ptr, factor_ptr, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = _start(WIDE, BLOCK)
        while start < numel:
            at = start + tl.arange(0, BLOCK)
            value = tl.load(gradient_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
            tl.store(gradient_ptr + at, value * factor, mask=at < numel)
            start += tl.num_programs(0) * BLOCK


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
    numel = logits.numel()
    if numel == 0:
        return logits.new_zeros((), dtype=torch.float32)
    labels, layout, options = _prepare(logits, labels)
    scale_tensor, scale = (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
    gamma_table, gamma = (gamma, -1.0) if isinstance(gamma, torch.Tensor) else (None, gamma)
    arguments = (
        gamma_table,
        weight,
        positive_weight,
        negative_weight,
        background_weight,
        bin_weight,
        scale_tensor,
        float(scale),
        0 if bin_weight is None else len(bin_weight),
        numel,
        *layout,
    )
    options = dict(
        options,
        OVERWRITE=gradient is not None and gradient.data_ptr() == logits.data_ptr(),
        ALPHA=alpha,
        GAMMA=gamma,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    if sums is not None:
        return _loss_and_sums(logits, labels, gradient, sums, arguments, options)
    programs = triton.cdiv(numel, _BLOCK)
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    with _current_device(logits):
        _loss_kernel[(programs,)](logits, labels, gradient, partial, *arguments, **options)
    return partial.sum()


def _loss_and_sums(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    sums: Tensor,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Tensor:
    numel, num_classes = logits.numel(), logits.shape[-1]
    wanted = 2 * _capacity(logits.device, _WARPS)  # Two rounds, so that no program waits long.
    if options["ROW_MAJOR"]:
        # So many programs, or a multiple, take a multiple of K elements in a step.
        unit = num_classes // math.gcd(num_classes, _SUMS_BLOCK)
        programs = min(triton.cdiv(numel, _SUMS_BLOCK), triton.cdiv(wanted, unit) * unit)
        lanes = programs * _SUMS_BLOCK
    else:
        chunks = triton.cdiv(numel // num_classes, _SUMS_BLOCK)
        lanes = programs = num_classes * min(chunks, triton.cdiv(wanted, num_classes))
    options = dict(options, BLOCK=_SUMS_BLOCK)
    # The last step counts elements beyond the end.
    options["WIDE"] |= numel + programs * _SUMS_BLOCK >= 1 << 31
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    partial_sums = torch.empty((2, lanes), dtype=torch.float32, device=logits.device)
    with _current_device(logits):
        _sums_kernel[(programs,)](
            logits, labels, gradient, partial, partial_sums, *arguments, **options
        )
    missing = -lanes % num_classes
    if missing:  # Few logits, which no second step followed.
        partial_sums = F.pad(partial_sums, (0, missing))
    sums += partial_sums.view(2, -1, num_classes).sum(dim=1, dtype=torch.float64)
    return partial.sum()


def histogram(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return the (bins,) int64 counts of gradient lengths over rows labelled >= 0."""
    numel = logits.numel()
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    if numel == 0:
        return counts
    labels, layout, options = _prepare(logits, labels)
    with _current_device(logits):
        _histogram_kernel[(_looping_programs(logits, _HISTOGRAM_WARPS),)](
            logits,
            labels,
            counts,
            bins,
            numel,
            *layout,
            **options,
            SLOTS=triton.next_power_of_2(bins + 1),
            BLOCK=_BLOCK,
            num_warps=_HISTOGRAM_WARPS,
        )
    return counts


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply ``gradient`` in place by the 0-dim ``factor``.

    A large gradient is not touched when the factor is 1, which the device finds out for itself.
    """
    if gradient.numel() == 0:
        return
    if gradient.dtype == torch.float32 and gradient.numel() <= _SMALL:
        gradient.mul_(factor)
        return
    dense = gradient.is_contiguous() or is_dense(gradient.shape, gradient.stride())
    if not dense:  # It overwrote logits with gaps.
        gradient.copy_(gradient.float() * factor)
        return
    with _current_device(gradient):
        _scale_kernel[(_looping_programs(gradient, _WARPS),)](
            gradient,
            factor,
            gradient.numel(),
            WIDE=_is_wide(gradient.numel()),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _prepare(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    """Return the labels in the logits' memory order, and the kernels' layout arguments."""
    lead, layout, options = _layout(logits.shape, logits.stride())
    labels = labels.permute(lead)
    if not labels.is_contiguous():
        labels = labels.to(torch.int32, memory_format=torch.contiguous_format)
    return labels, layout, options


@functools.lru_cache(maxsize=1024)
def _layout(
    shape: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], tuple[int, ...], dict[str, Any]]:
    """Return the leading dimensions in memory order, and the kernels' arguments of _LAYOUT."""
    order = memory_order(shape, strides)
    class_dim = len(shape) - 1
    lead = [dim for dim in order if dim != class_dim]
    inner = math.prod(shape[dim] for dim in order[order.index(class_dim) + 1 :])
    num_classes = shape[class_dim]
    if max(num_classes, inner) > _MAX_EXTENT:
        raise InputError(f"Logits of shape {tuple(shape)} are beyond the Triton implementation.")

    # (size, stride) of each leading dimension, those merged that can be.
    gaps: list[tuple[int, int]] = []
    if not is_dense(shape, strides):
        for dim in lead:
            size, stride = shape[dim], strides[dim]
            if gaps and gaps[-1][1] == size * stride:
                gaps[-1] = gaps[-1][0] * size, stride
            elif size > 1:
                gaps.append((size, stride))
        gaps = gaps or [(1, 0)]
    filled = gaps + [(1, 0)] * (4 - len(gaps))
    layout = (
        num_classes,
        *_reciprocal(num_classes),
        inner,
        *_reciprocal(inner),
        strides[class_dim],
        *(size for size, _ in filled[1:]),
        *(stride for _, stride in filled),
    )
    options = dict(LEAD=len(gaps), ROW_MAJOR=inner == 1, WIDE=_is_wide(math.prod(shape)))
    return lead, layout, options


def _is_wide(numel: int) -> bool:
    return numel > _NARROW


def _reciprocal(divisor: int) -> tuple[int, int]:
    """Return (multiplier, shift) with n // divisor == (n * multiplier // 2**32 + n) >> shift.

    For 0 <= n < 2**31; the multiplier is a 32-bit pattern, given as a signed number. (Granlund and
    Montgomery, Division by invariant integers using multiplication, PLDI 1994.)
    """
    shift = (divisor - 1).bit_length()
    multiplier = (((1 << shift) - divisor) << 32) // divisor + 1
    return multiplier - (1 << 32) if multiplier >= 1 << 31 else multiplier, shift


def _looping_programs(tensor: Tensor, warps: int) -> int:
    """Return the number of programs that fills the device, or fewer for a small tensor."""
    blocks = triton.cdiv(tensor.numel(), _BLOCK)
    return min(blocks, _capacity(tensor.device, warps))


@functools.cache
def _capacity(device: torch.device, warps: int) -> int:
    if device.type != "cuda":
        return 4  # The interpreter runs programs one by one; a few exercise the loops.
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * (_THREADS_PER_MULTIPROCESSOR // (32 * warps))


def _current_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Return the context in which Triton launches on the tensor's device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
