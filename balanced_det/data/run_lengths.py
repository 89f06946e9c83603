"""Masks in run lengths, checked before anything compiled reads them.

pycocotools believes what it is given: a size that is not the image's ends the process, and counts
that do not add up leave pixels of uninitialised memory. So run lengths of a file pass here first.

A mask of height h and width w is the lengths of its runs in column-major order, background first:
``{"size": [h, w], "counts": ...}``. Counts are a list (uncompressed) or a text (compressed): from
the fourth number on the difference to the number two before, each written in groups of five bits
from the lowest up, a sixth bit saying that more follow, plus 48 as a character.
"""

from typing import Any

import numpy as np


def counts_of(counts: Any) -> np.ndarray:
    """Return the run lengths (n,) int64 of a list, a text or bytes.

    Raises:
        ValueError: they are no run lengths; the message says why.
    """
    if isinstance(counts, str):
        counts = counts.encode("latin-1", "replace")
    runs = _decoded(counts) if isinstance(counts, bytes) else _listed(counts)
    if runs.size and runs.min() < 0:
        raise ValueError("a run is negative")
    return runs


def check_run_lengths(rle: dict, height: int, width: int) -> None:
    """Check that ``rle`` is a mask of ``height`` x ``width`` pixels, neither more nor less.

    Raises:
        ValueError: it is not; the message says why.
    """
    if "size" not in rle or "counts" not in rle:
        raise ValueError("run lengths need 'size' and 'counts'")
    try:
        size = [int(length) for length in rle["size"]]
    except (TypeError, ValueError, OverflowError):
        size = None
    if size != [height, width]:
        raise ValueError(f"its size is not the image's, [{height}, {width}]")
    total = int(counts_of(rle["counts"]).sum())
    if total != height * width:
        raise ValueError(f"its runs add up to {total} pixels instead of {height * width}")


# A run of at most 2^32 pixels, or the difference of two, needs seven groups of five bits.
_MAX_GROUPS = 7


def _decoded(text: bytes) -> np.ndarray:
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if groups.size == 0:
        return groups
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("its counts hold a character that run lengths do not use")
    ends = np.flatnonzero(groups & 32 == 0)
    if ends.size == 0 or ends[-1] != groups.size - 1:
        raise ValueError("its counts are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1  # groups of each number
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("a run is too long")
    shifts = 5 * (np.arange(groups.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((groups & 31) << shifts, starts)
    numbers -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)  # the highest bit is the sign
    # Numbers 3, 5, 7, ... add to number 1, and 4, 6, 8, ... to number 2.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _listed(counts) -> np.ndarray:
    if isinstance(counts, np.ndarray):
        counts = counts.tolist()
    if not isinstance(counts, (list, tuple)) or not all(type(run) is int for run in counts):
        raise ValueError("its counts are neither text nor a list of integers")
    if any(not -(2**40) < run < 2**40 for run in counts):
        raise ValueError("a run is too long")
    return np.array(counts, dtype=np.int64)
