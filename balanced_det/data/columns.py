"""Columns of plain numbers from lists of dictionaries.

Values are looked at a column at a time, where a check of each takes microseconds. A column that
holds anything but plain numbers is refused without a word of what is wrong: whoever reads then
looks at one dictionary after the other, and names the first that breaks a rule. So the quick way
accepts less than the slow one and says nothing, and both give the same columns.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter

import numpy as np

# Dictionaries at a time. Every column of theirs comes out of the processor's cache but the first.
PART = 4096

# What the conversions below raise where values are not plain.
NOT_PLAIN = (KeyError, TypeError, ValueError, OverflowError, IndexError, AttributeError)


def parts(rows: Sequence) -> Iterator[Sequence]:
    """Yield dictionaries a part at a time; none at all are one empty part."""
    for start in range(0, max(len(rows), 1), PART):
        part = rows[start : start + PART]
        _check(part, dict)
        yield part


def field(rows: Sequence[Mapping], key: str) -> list:
    """Return what each dictionary has at ``key``, which must be there."""
    return list(map(itemgetter(key), rows))


def integers(values: list) -> np.ndarray:
    """Return (n,) int64 of integers; 1.0, true and what needs more than 64 bits are none."""
    _check(values, int)
    return np.fromiter(values, np.int64, len(values))


def flags(values: list) -> np.ndarray:
    """Return (n,) bool of the integers 0 and 1."""
    found = integers(values)
    if not np.isin(found, (0, 1)).all():
        raise ValueError
    return found.astype(bool)


def numbers(values: list) -> np.ndarray:
    """Return (n,) float64 of integers and floats, NaN and infinity too; true is none."""
    _check(values, int, float)
    return np.fromiter(values, np.float64, len(values))


def boxes(values: list) -> np.ndarray:
    """Return (n, 4) float64 of lists of four integers and floats, NaN and infinity too."""
    _check(values, list)
    if not {4}.issuperset(map(len, values)):
        raise ValueError
    return numbers(list(chain.from_iterable(values))).reshape(-1, 4)


def index(ids: Iterable[int]) -> dict[int, int]:
    """Return where each id stands."""
    return {own: position for position, own in enumerate(ids)}


def positions(values: list, known: Mapping[int, int]) -> np.ndarray:
    """Return (n,) int64: where each integer stands by an :func:`index`, which must have it."""
    _check(values, int)
    return np.fromiter(map(known.__getitem__, values), np.int64, len(values))


def joined(columns: list[tuple]) -> list[np.ndarray]:
    """Return each column of the parts in one."""
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def _check(values, *types):
    if not set(types).issuperset(map(type, values)):
        raise TypeError
