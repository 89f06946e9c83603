"""Score thresholds counted from the training set (arXiv 1909.04868, section 3.4)."""

import torch

from ..data.registration import training_statistics
from ..distributed import sum_over_workers
from ..errors import InputError
from ..priors import class_adaptive_thresholds


class ScoreThreshold(torch.nn.Module):
    """The score threshold of every class at inference.

    Args:
        kind: "fixed", "foreground" (N_f / N for every class, the official code of arXiv 1909.04868)
            or "class_adaptive" (theta_j = N_f / N n_j / sum_k n_k, section 3.4 there).
        fixed: the threshold of "fixed", and of the others while no row is counted.
        num_classes: K.
        class_counts: (K,) training boxes of each class, for "class_adaptive"; None when a
            checkpoint brings them.
        floor: the least value of a counted threshold, since one near zero floods NMS.
        key: the config key of ``kind``, for messages.

    Attributes:
        row_counts: (2,) buffer, N_f and N.
        class_share: (K,) buffer, what a class's threshold is of N_f / N.

    The buffers are saved with the model, so that evaluation needs no training set.
    """

    KINDS = ("fixed", "foreground", "class_adaptive")

    def __init__(self, kind, *, fixed, num_classes, class_counts=None, floor=0.0, key="kind"):
        super().__init__()
        if kind not in self.KINDS:
            raise InputError(f"{key}: unknown kind '{kind}'; known are: {', '.join(self.KINDS)}.")
        self.kind = kind
        self.fixed = fixed
        self.floor = floor
        if kind != "fixed":
            share = torch.ones(num_classes)
            if kind == "class_adaptive" and class_counts is not None:
                share = class_adaptive_thresholds(1, 1, class_counts)
            self.register_buffer("row_counts", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("class_share", share)

    @property
    def value(self):
        """The threshold: a number, or (K,)."""
        if self.kind == "fixed":
            return self.fixed
        num_foreground, num_rows = self.row_counts.unbind()
        counted = (num_foreground / num_rows * self.class_share).clamp(min=self.floor)
        return torch.where(num_rows > 0, counted, self.fixed).float()

    def set_row_counts(self, num_foreground, num_rows):
        """Set N_f and N, where this kind counts."""
        if self.kind != "fixed":
            self.row_counts.copy_(torch.tensor([num_foreground, num_rows]))

    @torch.no_grad()
    def observe(self, is_foreground, takes_part):
        """Add the rows of a training step, of all workers, to N_f and N.

        Args:
            is_foreground, takes_part: (R,) bool, of this worker.
        """
        if self.kind != "fixed":
            counts = torch.stack([is_foreground.sum(), takes_part.sum()])
            self.row_counts += sum_over_workers(counts)


class CountedScoreThreshold:
    """Gives Detectron2, which reads ``test_score_thresh``, the value of ``score_threshold``.

    For a module with an attribute ``score_threshold`` to inherit before Detectron2's class.
    """

    @property
    def test_score_thresh(self):
        """The threshold: a number, or (K,); Detectron2 compares (R, K) scores with it."""
        return self.score_threshold.value

    @test_score_thresh.setter
    def test_score_thresh(self, value):
        """Ignore what Detectron2's constructor sets: ``score_threshold`` has it."""


def build_score_threshold(cfg, part, num_classes, fixed):
    """Build the threshold that ``cfg.BALANCE[part]`` asks for; ``fixed`` is Detectron2's own."""
    keys = cfg.BALANCE[part]
    counted = keys.SCORE_THRESHOLD == "class_adaptive" and cfg.BALANCE.COUNT
    return ScoreThreshold(
        keys.SCORE_THRESHOLD,
        fixed=fixed,
        num_classes=num_classes,
        class_counts=training_statistics(cfg).instance_count if counted else None,
        floor=keys.SCORE_THRESHOLD_FLOOR,
        key=f"BALANCE.{part}.SCORE_THRESHOLD",
    )
