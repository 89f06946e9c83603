"""Score thresholds at inference: Detectron2's own, or counted (arXiv 1909.04868, section 3.4).

A counted threshold is a share of the rows that are foreground: N_f / N for every class, as the
official code has it, or theta_j = (N_f / N) (n_j / sum_k n_k), as the paper has it. Dense detectors
count their rows before the training, region heads while they train; both keep what they counted in
buffers, so that evaluation needs no training set.

The official code has it for RetinaNet alone, without a floor and (K + 1) / K times as large: it
makes N_f / N of the prior N_f / (N K), and takes background for a class then. Its region head has
the fixed threshold 0.0001, and its RetinaNet an NMS of 0.55. The fragments
``sampling_free_published`` are that.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .distributed import sum_over_workers
from .errors import InputError
from .priors import class_adaptive_thresholds
from .registry import Registry

SCORE_THRESHOLDS = Registry("score threshold", given=("fixed", "num_classes"))


class ScoreThreshold(nn.Module):
    """Base class: the least score that a detection of each class must have.

    Args:
        fixed: Detectron2's own threshold.
        num_classes: K.

    Attributes:
        counts: whether the threshold depends on rows that are counted.
        needs: the constructor's arguments that are counted in the training set.
    """

    counts: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fixed: float, num_classes: int):
        super().__init__()
        self.fixed = fixed

    @property
    def value(self) -> float | torch.Tensor:
        """The threshold: a number, or (K,)."""
        return self.fixed

    def set_row_counts(self, num_foreground: float, num_rows: float) -> None:
        """Set N_f and N, where this threshold counts."""

    def observe(self, is_foreground: torch.Tensor, takes_part: torch.Tensor) -> None:
        """Add the rows of a training step, of all workers, to N_f and N, where it counts.

        Args:
            is_foreground, takes_part: (R,) bool, of this worker.
        """


@SCORE_THRESHOLDS.register
class FixedThreshold(ScoreThreshold):
    """Detectron2's ``SCORE_THRESH_TEST``."""


class CountedThreshold(ScoreThreshold):
    """Base class of thresholds that are a share of N_f / N.

    Args:
        fixed: serves while no row is counted.
        num_classes: K.
        floor: the least value, since a threshold near zero floods NMS.

    Attributes:
        row_counts: (2,) buffer, N_f and N.
        class_share: (K,) buffer, what a class's threshold is of N_f / N.
    """

    counts = True
    row_counts: torch.Tensor
    class_share: torch.Tensor

    def __init__(self, fixed: float, num_classes: int, floor: float = 0.001):
        super().__init__(fixed, num_classes)
        if not 0 <= floor <= 1:
            raise InputError(f"{type(self).__name__}: floor must be in [0, 1], not {floor}.")
        self.floor = floor
        self.register_buffer("row_counts", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("class_share", torch.ones(num_classes))

    @property
    def value(self) -> torch.Tensor:
        """The threshold, (K,)."""
        num_foreground, num_rows = self.row_counts.unbind()
        counted = (num_foreground / num_rows * self.class_share).clamp(min=self.floor)
        return torch.where(num_rows > 0, counted, self.fixed).float()

    def set_row_counts(self, num_foreground: float, num_rows: float) -> None:
        """Set N_f and N."""
        self.row_counts.copy_(torch.tensor([num_foreground, num_rows]))

    @torch.no_grad()
    def observe(self, is_foreground: torch.Tensor, takes_part: torch.Tensor) -> None:
        """Add the rows of a training step, of all workers; see the base."""
        counts = torch.stack([is_foreground.sum(), takes_part.sum()])
        self.row_counts += sum_over_workers(counts)


@SCORE_THRESHOLDS.register
class ForegroundThreshold(CountedThreshold):
    """N_f / N for every class: the official code of arXiv 1909.04868.

    Args:
        fixed, num_classes, floor: as in :class:`CountedThreshold`.
        counts_background: (K + 1) / K times as much, as the official code has it.
    """

    def __init__(
        self, fixed: float, num_classes: int, floor: float = 0.001, counts_background: bool = False
    ):
        super().__init__(fixed, num_classes, floor)
        if counts_background:
            self.class_share.fill_((num_classes + 1) / num_classes)


@SCORE_THRESHOLDS.register
class ClassAdaptiveThreshold(CountedThreshold):
    """theta_j = (N_f / N) (n_j / sum_k n_k) for class j (arXiv 1909.04868, section 3.4).

    Args:
        fixed, num_classes, floor: as in :class:`CountedThreshold`.
        instance_count: (K,) training boxes of each class; None when a checkpoint brings them.
    """

    needs = ("instance_count",)

    def __init__(
        self,
        fixed: float,
        num_classes: int,
        instance_count: Sequence[float] | torch.Tensor | None = None,
        floor: float = 0.001,
    ):
        super().__init__(fixed, num_classes, floor)
        if instance_count is not None:
            self.class_share.copy_(class_adaptive_thresholds(1, 1, instance_count))
