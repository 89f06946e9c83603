"""From what was measured on validation data to the score from which a detection is believed.

The curves are those of the evaluation, at IoU 0.50: the best precision that each class can have at
recall 0.00, 0.01, ... 1.00, and the score at which it reaches that recall. They are kept with the
model, so that a threshold can be chosen when the model is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """Precision and score of K classes at 101 recalls, of boxes or masks at IoU 0.50.

    Attributes:
        task: "bbox" or "segm".
        data: the data set that they were measured on.
        precision: (101, K) fractions, falling with recall; -1 for a class without an object.
        scores: (101, K); 0 where a recall is not reached.
    """

    task: str
    data: str
    precision: np.ndarray
    scores: np.ndarray

    @property
    def num_classes(self) -> int:
        """K."""
        return self.precision.shape[1]

    def of_best_f1(self) -> np.ndarray:
        """Return the (K,) scores that give each class its best F1; NaN where none is measured."""
        precision, recall = self.precision.clip(min=0), RECALLS[:, None]
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)  # (101, K)
        return self._scores_at(f1.argmax(axis=0), f1.max(axis=0) > 0)

    def of_precision(self, wanted: float) -> np.ndarray:
        """Return the (K,) lowest scores at which each class has a precision.

        Recall is read in steps of 0.01, so a class of more than 100 objects may miss it by what its
        precision falls within a step.

        Args:
            wanted: in (0, 1].

        Returns:
            NaN for a class that never has it, or that nothing is measured of.
        """
        if not 0 < wanted <= 1:
            raise InputError(f"A precision is a number above 0 and up to 1, not {wanted}.")
        # Only from recall 0.01 on: at 0 there is a precision, but nothing is found.
        has_it = (self.precision >= wanted)[1:] & (self.scores > 0)[1:]  # (100, K)
        last = len(has_it) - has_it[::-1].argmax(axis=0)
        return self._scores_at(last, np.asarray(has_it.any(axis=0)))

    def _scores_at(self, index: np.ndarray, is_known: np.ndarray) -> np.ndarray:
        scores = np.take_along_axis(self.scores, index[None], axis=0)[0]
        return np.where(is_known, scores, np.nan)

    def to_json(self) -> dict:
        """Return lists, a class a line of ``precision`` and ``scores``."""
        return {
            "task": self.task,
            "data": self.data,
            "precision": self.precision.T.round(6).tolist(),
            "scores": self.scores.T.round(9).tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping, source: str) -> "OperatingPoints":
        """Return what :meth:`to_json` wrote.

        Args:
            content: a dictionary.
            source: what messages call it.

        Raises:
            InputError: it is something else.
        """
        try:
            precision, scores = (
                np.asarray(content[key], dtype=np.float64).T for key in ("precision", "scores")
            )
            if precision.shape != scores.shape or precision.shape[0] != len(RECALLS):
                raise ValueError
            return cls(str(content["task"]), str(content["data"]), precision, scores)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{source} holds no precision and scores of classes at {len(RECALLS)} recalls."
            ) from None


def with_fallback(thresholds: np.ndarray, fallback: float | None = None) -> np.ndarray:
    """Return thresholds without NaN: unknown ones are the median of the known, or ``fallback``.

    Args:
        thresholds: (K,).
        fallback: for unknown classes; None for the median, or 0.5 where no class is known.
    """
    known = thresholds[~np.isnan(thresholds)]
    if fallback is None:
        fallback = float(np.median(known)) if known.size else 0.5
    return np.where(np.isnan(thresholds), fallback, thresholds)
