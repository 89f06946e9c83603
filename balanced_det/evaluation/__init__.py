"""LVIS evaluation: the numbers, one row a class, and the evaluator for Detectron2's loops.

:func:`evaluate_lvis` needs neither Detectron2 nor torch, nor does
``python -m balanced_det.evaluation``; what needs them is imported when it is asked for.
"""

from typing import Any

from .lvis import (
    ABSENT,
    IOU_TYPES,
    METRICS,
    ClassResult,
    LVISResult,
    Matcher,
    evaluate_lvis,
    fixed_result,
    lvis_result,
)

_OF_DETECTRON2 = ("BalancedLVISEvaluator", "build_evaluator")

__all__ = [
    "ABSENT",
    "IOU_TYPES",
    "METRICS",
    "ClassResult",
    "LVISResult",
    "Matcher",
    "evaluate_lvis",
    "fixed_result",
    "lvis_result",
    *_OF_DETECTRON2,
]


def __getattr__(name: str) -> Any:
    if name in _OF_DETECTRON2:
        from . import evaluator

        return getattr(evaluator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
