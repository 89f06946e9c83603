r"""Grouped non-maximum suppression as two Triton kernels, all groups side by side.

Boxes come sorted by group and, within a group, by falling score. The sorted rows are cut into
blocks of 64, wherever groups begin.

1. :func:`_overlap_kernel` notes which rows overlap: bit j of the 64-bit word (c, i) says that row i
   suppresses row j of block c if it is kept itself. One program makes the 64 x 64 bits of two
   blocks; where no group reaches from one block to the other it ends at once.
2. :func:`_sweep_kernel` decides who is kept. One program has all groups that begin in its block:
   most of them end there, and the last one it follows through the blocks after it. A row is kept
   unless a kept row before it in the group suppresses it. For rows of earlier blocks that is one OR
   over their words; within the block it is the solution of

       kept[j] = candidate[j] and not any(kept[i] and bit[i, j] for i < j)

   found by repeating the right side from kept = candidate until nothing changes. As row j depends
   on rows before it alone, the first t rows are right after t rounds: the solution is unique, the
   rounds end, and in practice a handful does.

The intersection over union is torchvision's to the last bit. Its CPU code rounds every operation.
Its CUDA code compiles to one fused multiplication and addition, that of the worse box's area to the
better box's (read from the sm_90 machine code of torchvision 0.29.1); the kernel asks for the same
and forbids all others. The CPU compares with the threshold in float64, CUDA in float32.
"""

import math

import torch
import triton
import triton.language as tl

_BLOCK = 64
_PULL = 16  # Blocks whose words the sweep reads at a time: 8 KiB, 8 words a thread.
_WARPS = 4


@triton.jit
def _load_boxes(boxes_ptr, row, inside):
    x1 = tl.load(boxes_ptr + row * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes_ptr + row * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes_ptr + row * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(boxes_ptr + row * 4 + 3, mask=inside, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _word(words_ptr, block, row, depth, BLOCK: tl.constexpr):
    """Where the word of a row lies that tells whom it suppresses in a block, at or after its own.

    A block has words for ``depth`` blocks of rows: its own, the one before it, and so on.
    """
    return words_ptr + (block.to(tl.int64) * depth + block - row // BLOCK) * BLOCK + row % BLOCK


@triton.jit
def _overlap_kernel(
    boxes_ptr,
    groups_ptr,
    words_ptr,
    num_rows,
    threshold,
    depth,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row_block = block - tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    reaches = row_block == block
    if (row_block >= 0) & (row_block < block):
        last = tl.load(groups_ptr + row_block * BLOCK + BLOCK - 1)
        reaches = last == tl.load(groups_ptr + block * BLOCK)
    if reaches:
        i = row_block * BLOCK + lane
        j = block * BLOCK + lane
        ax1, ay1, ax2, ay2 = _load_boxes(boxes_ptr, i, i < num_rows)
        bx1, by1, bx2, by2 = _load_boxes(boxes_ptr, j, j < num_rows)
        area = ((ax2 - ax1) * (ay2 - ay1))[:, None]
        b_width, b_height = (bx2 - bx1)[None, :], (by2 - by1)[None, :]
        width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
        height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
        inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)  # (BLOCK, BLOCK)
        both = tl.fma(b_width, b_height, area) if FUSED else area + b_width * b_height
        overlap = tl.div_rn(inter, both - inter) > threshold

        a_group = tl.load(groups_ptr + i, mask=i < num_rows, other=0)
        b_group = tl.load(groups_ptr + j, mask=j < num_rows, other=0)
        overlap &= (a_group[:, None] == b_group[None, :]) & (i[:, None] < j[None, :])
        overlap &= (i < num_rows)[:, None] & (j < num_rows)[None, :]
        bit = tl.full((BLOCK,), 1, tl.int64) << lane.to(tl.int64)
        word = tl.sum(tl.where(overlap, bit[None, :], 0), axis=1)  # (BLOCK,) int64
        tl.store(_word(words_ptr, block, i, depth, BLOCK), word)


@triton.jit
def _resolve(candidate, word, lane):
    """Return which candidates of a block are kept, see the module's equation."""
    removed = tl.zeros((), tl.int64)
    kept = candidate
    changing = True
    while changing:
        kept = candidate & (((removed >> lane) & 1) == 0)
        now = tl.reduce(tl.where(kept, word, 0), 0, _or)
        changing = now != removed
        removed = now
    return kept


@triton.jit
def _sweep_kernel(
    groups_ptr,
    words_ptr,
    valid_ptr,
    kept_ptr,
    num_rows,
    depth,
    HAS_VALID: tl.constexpr,
    PULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lane64 = lane.to(tl.int64)
    row = first * BLOCK + lane
    inside = row < num_rows
    group = tl.load(groups_ptr + row, mask=inside, other=0)
    # The program of an earlier block has the rows of a group that began there.
    before = tl.load(groups_ptr + tl.maximum(first * BLOCK - 1, 0))
    mine = inside & ((group != before) | (first == 0))
    candidate = mine
    if HAS_VALID:
        candidate &= tl.load(valid_ptr + row, mask=inside, other=0) != 0
    word = tl.load(_word(words_ptr, first, row, depth, BLOCK))
    kept = _resolve(candidate, word, lane64)
    tl.store(kept_ptr + row, kept.to(tl.int8), mask=mine)

    # The last group, while it goes on.
    end = num_rows - 1
    tail = tl.load(groups_ptr + tl.minimum(first * BLOCK + BLOCK - 1, end))
    block = first + 1
    going = ((tail != before) | (first == 0)) & (block * BLOCK < num_rows)
    going = going & (tl.load(groups_ptr + tl.minimum(block * BLOCK, end)) == tail)
    part = tl.arange(0, PULL * BLOCK)
    while going:
        tl.debug_barrier()  # What other threads of this program stored is read below.
        removed = tl.zeros((), tl.int64)
        for start in range(first, block, PULL):
            earlier = start * BLOCK + part
            known = earlier < block * BLOCK
            # Rows of other groups have no bit in this block, kept or not.
            is_kept = tl.load(kept_ptr + earlier, mask=known, other=0) != 0
            words = tl.load(_word(words_ptr, block, earlier, depth, BLOCK), mask=known, other=0)
            removed |= tl.reduce(tl.where(is_kept, words, 0), 0, _or)
        row = block * BLOCK + lane
        inside = row < num_rows
        mine = inside & (tl.load(groups_ptr + row, mask=inside, other=0) == tail)
        candidate = mine & (((removed >> lane64) & 1) == 0)
        if HAS_VALID:
            candidate &= tl.load(valid_ptr + row, mask=inside, other=0) != 0
        word = tl.load(_word(words_ptr, block, row, depth, BLOCK))
        kept = _resolve(candidate, word, lane64)
        tl.store(kept_ptr + row, kept.to(tl.int8), mask=mine)
        block += 1
        going = block * BLOCK < num_rows
        going = going & (tl.load(groups_ptr + tl.minimum(block * BLOCK, end)) == tail)


def keep_sorted(
    boxes: torch.Tensor,
    groups: torch.Tensor,
    iou_threshold: float,
    valid: torch.Tensor | None,
    max_group_size: int,
) -> torch.Tensor:
    """Return the mask of the kept; arguments as in :func:`.nms.keep_sorted`, and one more.

    Args:
        max_group_size: no group has more rows.
    """
    num_rows, device = len(boxes), boxes.device
    blocks = triton.cdiv(num_rows, _BLOCK)
    # Blocks that a group can reach back to, when it begins in the last row of one.
    depth = min((max_group_size + _BLOCK - 2) // _BLOCK + 1, blocks)
    words = torch.empty(blocks * depth * _BLOCK, dtype=torch.int64, device=device)
    kept = torch.empty(num_rows, dtype=torch.int8, device=device)
    with torch.cuda.device_of(boxes):  # Triton launches on the current device
        _overlap_kernel[(blocks, depth)](
            boxes.contiguous(),
            groups,
            words,
            num_rows,
            _float32_threshold(iou_threshold, device),
            depth,
            FUSED=boxes.is_cuda,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        _sweep_kernel[(blocks,)](
            groups,
            words,
            kept if valid is None else valid.view(torch.int8),
            kept,
            num_rows,
            depth,
            HAS_VALID=valid is not None,
            PULL=_PULL,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return kept.view(torch.bool)


def _float32_threshold(iou_threshold: float, device: torch.device) -> float:
    """Return the float32 t for which (x > t) is what torchvision asks of each float32 x."""
    nearest = torch.tensor(iou_threshold, dtype=torch.float32)
    if device.type == "cpu" and nearest.item() > iou_threshold:
        nearest = nearest.nextafter(torch.tensor(-math.inf))
    return nearest.item()
