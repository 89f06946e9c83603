r"""RoIAlign of all levels and images as one Triton kernel forward and one backward.

A bin averages samples on a grid, and a sample interpolates linearly along each axis. So the weight
of a pixel in a bin is a product of one number of its row and one of its column:

.. math::
    w(p) = \sum_{i:\, -1 \le y_i \le H} \max(0,\ 1 - |\min(\max(y_i, 0), H - 1) - p|)

for the samples y_i of the bin along the axis and the H pixels there. Neighbouring samples share
pixels: a bin of 3 x 3 samples has 36 corners on some 14 pixels, and a box of 7 x 7 such bins 1,764
corners on some 350. Forward reads each pixel once a bin, backward adds to each pixel once a box;
these additions, which must be atomic since boxes overlap, are what the backward pass costs.

Channels lie side by side in memory (N, H, W, C), so that all reads and additions are contiguous.
The positions of samples are torchvision's to the last bit, since a sample that leaves the image by
one rounding step counts no more. Its CPU code rounds every operation. Its CUDA code is compiled to
fused multiplications and additions for box * scale - offset and bin * size + start, and to single
operations for the rest (read from the sm_90 machine code of torchvision 0.29.1); the kernels ask
for the same (FUSED).

Letters: T boxes, P pixels, G samples, C channels; a bin is (i, j) of BINS_Y x BINS_X.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..errors import InputError
from .triton_kernels import _current_device

_PIXELS = 8  # Pixels of a bin that the forward kernel reads at a time.
_COLUMNS = 8  # Pixels of a row that the backward kernel adds to at a time.
_PARTS = 8  # Programs that share the pixel rows of a box in the backward kernel.
_MAX_CHANNELS = 256  # Channels of a program.
_WARPS = 1  # So no thread waits for another.
_MAX_MAP = (1 << 31) - 1  # Elements of an image's level, which are counted in 32 bits.


@triton.jit
def _level(features, heights, widths, scales, level):
    """Return pointer, height, width and scale of a level; of an unknown one, a height of 0."""
    pointer = features[0]
    height, width, scale = 0.0, 0.0, scales[0]
    for known in tl.static_range(len(features)):
        if level == known:
            pointer = features[known]
            height, width, scale = heights[known], widths[known], scales[known]
    return pointer, tl.cast(height, tl.int32), tl.cast(width, tl.int32), scale


@triton.jit
def _multiply_add(a, b, c, FUSED: tl.constexpr):
    return tl.fma(a, b, c) if FUSED else a * b + c


@triton.jit
def _axis(
    low,
    high,
    scale,
    extent,
    BINS: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Return where a box begins along an axis, the size of a bin, and the samples of a bin."""
    offset: tl.constexpr = -0.5 if ALIGNED else 0.0
    start = _multiply_add(low, scale, offset, FUSED)
    length = _multiply_add(high, scale, offset, FUSED) - start
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    size = tl.div_rn(length, BINS * 1.0)
    samples = RATIO if RATIO > 0 else tl.ceil(size).to(tl.int32)
    return start, size, tl.where(extent > 0, samples, 0)


@triton.jit
def _position(start, size, samples, of_bin, sample, FUSED: tl.constexpr):
    """Return where a sample of a bin lies along an axis; integers and shapes as they broadcast."""
    within = tl.div_rn((sample + 0.5) * size, samples * 1.0)
    return _multiply_add(of_bin * 1.0, size, start, FUSED) + within


@triton.jit
def _pixels(start, size, samples, extent, first_bin, last_bin, FUSED: tl.constexpr):
    """Return the first pixel that the samples of some bins touch along an axis, and how many."""
    a = _position(start, size, samples, first_bin, first_bin * 0, FUSED)
    b = _position(start, size, samples, last_bin, samples - 1, FUSED)
    end = (extent - 1) * 1.0
    first = tl.floor(tl.minimum(tl.maximum(tl.minimum(a, b), 0.0), end)).to(tl.int32)
    last = tl.ceil(tl.minimum(tl.maximum(tl.maximum(a, b), 0.0), end)).to(tl.int32)
    return first, tl.where(samples > 0, last - first + 1, 0)


@triton.jit
def _weight(
    pixel, of_bin, start, size, samples, extent, FUSED: tl.constexpr, SAMPLES: tl.constexpr
):
    """Return the weight (P,) of each pixel in its bin along an axis, see the module's equation."""
    weight = tl.zeros(pixel.shape, tl.float32)
    for begin in range(0, samples, SAMPLES):
        sample = begin + tl.arange(0, SAMPLES)[:, None]  # (G, 1)
        at = _position(start, size, samples, of_bin[None, :], sample, FUSED)  # (G, P)
        counts = (sample < samples) & (at >= -1.0) & (at <= extent)
        at = tl.minimum(tl.maximum(at, 0.0), (extent - 1) * 1.0)
        share = tl.maximum(1.0 - tl.abs(at - pixel[None, :]), 0.0)
        weight += tl.sum(tl.where(counts, share, 0.0), axis=0)
    return weight


@triton.jit
def _touching(first, count, begin, end, BINS: tl.constexpr, LANES: tl.constexpr):
    """Return the range of the bins, each with its ``count`` pixels, that touch [begin, end)."""
    lane = tl.arange(0, LANES)
    touches = (lane < BINS) & (first < end) & (first + count > begin)
    return tl.min(tl.where(touches, lane, BINS), axis=0), tl.max(tl.where(touches, lane + 1, 0), 0)


@triton.jit
def _region(
    features, heights, widths, scales, boxes_ptr, image_ptr, level_ptr, channels, box,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Return the pointer to a box's feature map, the map's size, and the box along both axes."""
    level = tl.load(level_ptr + box)
    pointer, height, width, scale = _level(features, heights, widths, scales, level)
    pointer += tl.load(image_ptr + box) * height * width * channels
    x1 = tl.load(boxes_ptr + box * 4)
    y1 = tl.load(boxes_ptr + box * 4 + 1)
    x2 = tl.load(boxes_ptr + box * 4 + 2)
    y2 = tl.load(boxes_ptr + box * 4 + 3)
    y, bin_y, samples_y = _axis(y1, y2, scale, height, BINS_Y, RATIO, ALIGNED, FUSED)
    x, bin_x, samples_x = _axis(x1, x2, scale, width, BINS_X, RATIO, ALIGNED, FUSED)
    return pointer, height, width, y, bin_y, samples_y, x, bin_x, samples_x


@triton.jit
def _forward_kernel(
    features,  # A tuple of (N, H, W, C), one a level, and their sizes and scales.
    heights, widths, scales,
    boxes_ptr,  # (T, 4) float32
    image_ptr, level_ptr,  # (T,) int64
    out_ptr,  # (T, BINS_Y, BINS_X, C)
    channels,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program makes a row of bins of one box."""
    box, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    pointer, height, width, y, bin_y, samples_y, x, bin_x, samples_x = _region(
        features, heights, widths, scales, boxes_ptr, image_ptr, level_ptr, channels, box,
        BINS_Y, BINS_X, RATIO, ALIGNED, FUSED,
    )  # fmt: skip
    count = tl.maximum(samples_y * samples_x, 1).to(tl.float32)
    first_row, rows = _pixels(y, bin_y, samples_y, height, i, i, FUSED)
    lane = tl.arange(0, PIXELS)
    for j in range(BINS_X):
        first_column, columns = _pixels(x, bin_x, samples_x, width, j, j, FUSED)
        total = tl.zeros((CHANNELS,), tl.float32)
        for begin in range(0, rows * columns, PIXELS):
            row = first_row + (begin + lane) // columns  # (P,)
            column = first_column + (begin + lane) % columns
            of_row = _weight(row, i + lane * 0, y, bin_y, samples_y, height, FUSED, SAMPLES)
            weight = _weight(column, j + lane * 0, x, bin_x, samples_x, width, FUSED, SAMPLES)
            weight *= tl.where(begin + lane < rows * columns, of_row, 0.0)
            at = ((row * width + column) * channels)[:, None] + channel[None, :]  # (P, C)
            mask = (weight > 0.0)[:, None] & exists[None, :]
            value = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * value, axis=0)
        out = out_ptr + ((box * BINS_Y + i) * BINS_X + j) * channels + channel
        tl.store(out, total / count, mask=exists)


@triton.jit
def _backward_kernel(
    gradients,  # A tuple of (N, H, W, C) float32, one a level, to be added to.
    heights, widths, scales,
    boxes_ptr,  # (T, 4) float32
    image_ptr, level_ptr,  # (T,) int64
    of_out_ptr,  # (T, BINS_Y, BINS_X, C), the gradient that comes in.
    channels,
    BINS_Y: tl.constexpr, BINS_X: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, LANES_Y: tl.constexpr, LANES_X: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program adds to every PARTS-th of the pixel rows that a box touches."""
    box, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    pointer, height, width, y, bin_y, samples_y, x, bin_x, samples_x = _region(
        gradients, heights, widths, scales, boxes_ptr, image_ptr, level_ptr, channels, box,
        BINS_Y, BINS_X, RATIO, ALIGNED, FUSED,
    )  # fmt: skip
    count = tl.maximum(samples_y * samples_x, 1).to(tl.float32)
    first_row, rows = _pixels(y, bin_y, samples_y, height, part * 0, part * 0 + BINS_Y - 1, FUSED)
    first_column, columns = _pixels(
        x, bin_x, samples_x, width, part * 0, part * 0 + BINS_X - 1, FUSED
    )
    i_lane, j_lane = tl.arange(0, LANES_Y), tl.arange(0, LANES_X)  # (B,), all bins
    top, high = _pixels(y, bin_y, samples_y, height, i_lane, i_lane, FUSED)
    left, wide = _pixels(x, bin_x, samples_x, width, j_lane, j_lane, FUSED)
    lane = tl.arange(0, COLUMNS)
    of_out_ptr += box * BINS_Y * BINS_X * channels
    for row in range(first_row + part, first_row + rows, tl.num_programs(1)):
        # What each row of bins gives to this row of pixels; of two of them, usually, not zero.
        of_row = _weight(
            row + i_lane * 0, i_lane, y, bin_y, samples_y, height, FUSED, SAMPLES
        )  # (B,)
        first_i, end_i = _touching(top, high, row, row + 1, BINS_Y, LANES_Y)
        for begin in range(first_column, first_column + columns, COLUMNS):
            column = begin + lane  # (P,)
            first_j, end_j = _touching(left, wide, begin, begin + COLUMNS, BINS_X, LANES_X)
            touched = lane < 0
            total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
            for i in range(first_i, end_i):
                share = tl.sum(tl.where(i_lane == i, of_row, 0.0), axis=0) / count
                for j in range(first_j, end_j):
                    weight = share * _weight(
                        column, j + lane * 0, x, bin_x, samples_x, width, FUSED, SAMPLES
                    )
                    touched |= weight > 0.0
                    at = (i * BINS_X + j) * channels + channel
                    value = tl.load(of_out_ptr + at, mask=exists, other=0.0).to(tl.float32)  # (C,)
                    total = tl.fma(
                        tl.broadcast_to(weight[:, None], total.shape),
                        tl.broadcast_to(value[None, :], total.shape),
                        total,
                    )
            at = ((row * width + column) * channels)[:, None] + channel[None, :]  # (P, C)
            mask = touched[:, None] & exists[None, :]
            tl.atomic_add(pointer + at, total, mask=mask, sem="relaxed")


def forward(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    bins: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Return the regions (T, C, *bins) in the type of the features, channels last.

    Args:
        features: (N, C, Hl, Wl) a level, channels last.
        boxes: (T, 4) float32, contiguous.
        image, level: (T,) int64, contiguous.
        scales: a number a level.
        bins: (rows, columns).
        sampling_ratio, aligned: see :func:`.roi_align.roi_align`.
    """
    channels = features[0].shape[1]
    if any(x.shape[1:].numel() > _MAX_MAP for x in features):
        raise InputError("A feature map is beyond the Triton implementation of roi_align.")
    out = features[0].new_empty(len(boxes), *bins, channels)
    if out.numel():
        block, options = _options(features, bins, sampling_ratio, aligned)
        with _current_device(out):
            _forward_kernel[(len(boxes), bins[0], triton.cdiv(channels, block))](
                *_maps(features, scales),
                boxes,
                image,
                level,
                out,
                channels,
                **options,
                PIXELS=_PIXELS,
            )
    return out.permute(0, 3, 1, 2)


def backward(
    gradients: Sequence[Tensor],
    of_out: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Add the gradients of :func:`forward`'s features to ``gradients``.

    Args:
        gradients: (N, C, Hl, Wl) float32 a level, channels last.
        of_out: (T, C, rows, columns), channels last.
        boxes, image, level, scales, sampling_ratio, aligned: those of :func:`forward`.
    """
    channels, rows, columns = of_out.shape[1:]
    if of_out.numel():
        block, options = _options(gradients, (rows, columns), sampling_ratio, aligned)
        with _current_device(of_out):
            _backward_kernel[(len(boxes), _PARTS, triton.cdiv(channels, block))](
                *_maps(gradients, scales),
                boxes,
                image,
                level,
                of_out,
                channels,
                **options,
                LANES_Y=triton.next_power_of_2(rows),
                LANES_X=triton.next_power_of_2(columns),
                COLUMNS=_COLUMNS,
            )


def _maps(features: Sequence[Tensor], scales: Sequence[float]) -> tuple[tuple[Any, ...], ...]:
    """Return the kernels' arguments that tell of the levels."""
    # Sizes change with every batch. Of integers in a tuple it is compiled in whether they are 1 or
    # divide by 16, so the kernels would be compiled anew; of floating-point numbers nothing is.
    heights, widths = zip(*((float(x.shape[2]), float(x.shape[3])) for x in features))
    return tuple(features), heights, widths, tuple(float(scale) for scale in scales)


def _options(
    features: Sequence[Tensor], bins: tuple[int, int], sampling_ratio: int, aligned: bool
) -> tuple[int, dict[str, Any]]:
    """Return the channels of a program, and the constants of both kernels."""
    block = min(triton.next_power_of_2(features[0].shape[1]), _MAX_CHANNELS)
    return block, dict(
        BINS_Y=bins[0],
        BINS_X=bins[1],
        RATIO=max(sampling_ratio, 0),
        ALIGNED=aligned,
        FUSED=features[0].is_cuda,
        CHANNELS=block,
        SAMPLES=4,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
