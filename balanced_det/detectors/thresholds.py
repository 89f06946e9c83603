"""The seam at which Detectron2 reads score thresholds, see :mod:`balanced_det.thresholds`."""

from torch import Tensor

from ..errors import InputError
from ..thresholds import ScoreThreshold


class CountedScoreThreshold:
    """Gives Detectron2, which reads ``test_score_thresh``, the value of ``score_threshold``.

    For a module with an attribute ``score_threshold`` to inherit before Detectron2's class.
    """

    score_threshold: ScoreThreshold

    def least_score(self) -> float | Tensor:
        """Return what the final scores are compared with; a detector may make them of others."""
        return self.score_threshold.value

    @property
    def test_score_thresh(self) -> float | Tensor:
        """The threshold: a number, or (K,); Detectron2 compares (R, K) scores with it."""
        return self.least_score()

    @test_score_thresh.setter
    def test_score_thresh(self, value: float) -> None:
        """Set a fixed threshold of a model that is built; refuse it where the threshold is counted.

        What Detectron2's constructor sets is what ``score_threshold`` is made of.
        """
        threshold = getattr(self, "score_threshold", None)
        if threshold is None:
            return
        if threshold.counts:
            raise InputError(
                f"The score threshold is a {type(threshold).__name__}, which is counted: put "
                "another into the model's 'score_threshold' to set a number."
            )
        threshold.fixed = value
