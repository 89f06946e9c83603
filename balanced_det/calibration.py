"""Scores corrected at test time for how often a class was trained on; torch alone.

Training on few images of a class leaves its scores too low beside those of frequent classes, and
detections of all classes compete for the same places. Both corrections here weigh class j by the
training images n_j that hold it and leave the model as it is. They take scores, not logits, so a
region head calls them on what its loss scores: ``scores = calibration(scores)``.

R rows, K object classes; ``(*)`` any leading dimensions.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .losses import ClassificationLoss
from .losses.statistic import ClassStatistic
from .registry import Registry

SCORE_CALIBRATIONS = Registry("score calibration")


def normalized_calibration(scores: Tensor, class_counts: Tensor, gamma: float) -> Tensor:
    """Return the scores of a softmax with every object class divided by n_j^gamma (NorCal).

        p_j' = (exp(z_j) / n_j^gamma) / (exp(z_background) + sum_k exp(z_k) / n_k^gamma)

    Background stays as it is, and all are normalized anew; dividing background too would harm, say
    the authors, since one threshold for objects hangs on it. In scores p_j of a softmax,
    exp(z_j) / exp(z_background) is p_j / p_background, so logits are not needed.

    Args:
        scores: (*, K) probabilities that sum to at most 1, background having the rest.
        class_counts: (K,) training images that hold each class; 0 counts as 1.
        gamma: strength, at least 0, which changes nothing; 0.6 on LVIS.

    Returns:
        (*, K), in the dtype of ``scores``.

    Source: arXiv 2107.02170, Eq. 4 and 5 with a_j = n_j^gamma and 1 for background.
    """
    background = (1 - scores.sum(dim=-1, keepdim=True)).clamp(min=0)
    divided = scores * class_counts.clamp(min=1).to(scores.dtype) ** -gamma
    total = background + divided.sum(dim=-1, keepdim=True)
    # All is 0 only where a score's every part underflows.
    return divided / total.clamp(min=torch.finfo(scores.dtype).tiny)


def prior_correction(scores: Tensor, class_counts: Tensor, tau: float) -> Tensor:
    """Return sigmoid scores with the log odds of class j moved by -tau log(n_j / n).

    n is the geometric mean of the n_j, so that a class of average size keeps its scores, a rare one
    gains and a frequent one loses; subtracting tau log(prior) from logits after training (arXiv
    2007.07314, Eq. 9) does the same but for one constant, which thresholds would notice. Written
    with odds it is exact at scores of 0 and 1:

        p_j' = p_j / (p_j + (1 - p_j) (n_j / n)^tau)

    Args:
        scores: (*, K) probabilities, each for itself.
        class_counts: (K,) training images that hold each class; 0 counts as 1.
        tau: strength, at least 0, which changes nothing; 1 assumes that training learned the prior.

    Returns:
        (*, K), in the dtype of ``scores``.
    """
    log_counts = class_counts.clamp(min=1).double().log()
    odds = ((log_counts - log_counts.mean()) * tau).exp().to(scores.dtype)  # (K,)
    return scores / (scores + (1 - scores) * odds)


class ScoreCalibration(nn.Module):
    """Base class: scores in, better scores out.

    Args:
        num_classes: K.
        class_counts: (K,) training images that hold each class, or None for a model that is built
            to load a checkpoint, which brings them.

    Class attributes:
        needs: the counted statistics that the constructor takes by name, as of a loss.
        needs_distribution: scores must be those of classes that exclude each other and background.
    """

    needs: ClassVar[tuple[str, ...]] = ("class_counts",)
    needs_distribution: ClassVar[bool] = False

    def __init__(self, num_classes: int, class_counts: Sequence[float] | Tensor | None):
        super().__init__()
        self.statistic = ClassStatistic(num_classes, class_counts)
        self.statistic.derive_if_known()

    @property
    def class_counts(self) -> Tensor:
        """The (K,) class counts, NaN while unknown."""
        return self.statistic.values

    def check(self, loss: ClassificationLoss) -> None:
        """Raise an InputError when the scores of ``loss`` cannot be calibrated so."""
        if self.needs_distribution and not loss.scores_are_a_distribution:
            raise InputError(
                f"{type(self).__name__} needs scores that sum to 1 with background's, which those "
                f"of {type(loss).__name__} do not; use PriorCorrection."
            )

    def forward(self, scores: Tensor) -> Tensor:
        """Return the corrected scores, (*, K) -> (*, K).

        Raises:
            InputError: while the class counts are unknown.
        """
        self.statistic.check_known()
        return self.corrected(scores)

    def corrected(self, scores: Tensor) -> Tensor:
        """Return the corrected scores, (*, K) -> (*, K)."""
        raise NotImplementedError


@SCORE_CALIBRATIONS.register
class NorCal(ScoreCalibration):
    """Normalized calibration of softmax scores; see :func:`normalized_calibration`.

    Args:
        num_classes: K.
        class_counts: as in :class:`ScoreCalibration`.
        gamma: strength, at least 0; the authors choose it on training images, 0.6 on LVIS.
    """

    needs_distribution = True

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[float] | Tensor | None,
        gamma: float = 0.6,
    ):
        super().__init__(num_classes, class_counts)
        if not gamma >= 0:
            raise InputError(f"NorCal: gamma must be at least 0, not {gamma}.")
        self.gamma = gamma

    def corrected(self, scores: Tensor) -> Tensor:
        """Return the corrected scores, (*, K) -> (*, K)."""
        return normalized_calibration(scores, self.class_counts, self.gamma)


@SCORE_CALIBRATIONS.register
class PriorCorrection(ScoreCalibration):
    """Sigmoid scores without the classes' training frequency; see :func:`prior_correction`.

    Args:
        num_classes: K.
        class_counts: as in :class:`ScoreCalibration`.
        tau: strength, at least 0.
    """

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[float] | Tensor | None,
        tau: float = 1.0,
    ):
        super().__init__(num_classes, class_counts)
        if not tau >= 0:
            raise InputError(f"PriorCorrection: tau must be at least 0, not {tau}.")
        self.tau = tau

    def corrected(self, scores: Tensor) -> Tensor:
        """Return the corrected scores, (*, K) -> (*, K)."""
        return prior_correction(scores, self.class_counts, self.tau)
