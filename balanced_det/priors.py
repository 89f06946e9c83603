"""Numbers counted from the training set that replace sampling heuristics (arXiv 1909.04868).

A detector that sees every anchor has N rows and C classes, and N_f of the rows are foreground. When
every (row, class) element starts at probability p, the summed binary cross entropy is

    L(p) = -N_f log(p) - (N C - N_f) log(1 - p)

``optimal_prior`` is the p that minimises L, ``prior_bias`` the bias of the last layer that gives
it, and ``class_adaptive_thresholds`` the score thresholds of the same paper. ``class_weights`` are
the weights by inverse frequency that every loss can take. All are pure functions of counts;
counting them over a data set is the detector's business.
"""

import math
from collections.abc import Sequence

import torch

from .errors import InputError


def optimal_prior(num_foreground: float, num_samples: float, num_classes: int) -> float:
    """Return p* = N_f / (N C), the minimum of the initial classification loss.

    Args:
        num_foreground: N_f, foreground rows over the data set (or a sample of it).
        num_samples: N, foreground and background rows of the same images, without ignored ones.
        num_classes: C, 1 for a region proposal network.

    Returns:
        A float; RetinaNet on COCO (C = 80) has 1.113e-5.

    Raises:
        InputError: for counts that no data set can have.

    Source: arXiv 1909.04868, section on optimal bias initialization; dL/dp = 0 where
    N_f (1 - p) = (N C - N_f) p.
    """
    if num_classes < 1:
        raise InputError(f"An optimal prior needs at least one class, not {num_classes}.")
    _check_counts(num_foreground, num_samples)
    return num_foreground / (num_samples * num_classes)


def prior_bias(prior: float) -> float:
    """Return b = -log((1 - p) / p), so that sigmoid(b) = p.

    Args:
        prior: p, inside (0, 1).

    Raises:
        InputError: when p is not inside (0, 1), where the bias would be infinite.

    Source: arXiv 1909.04868, section on optimal bias initialization; the same form with a fixed p
    is in RetinaNet (arXiv 1708.02002, section 4.1).
    """
    if not 0 < prior < 1:
        raise InputError(f"A prior probability lies between 0 and 1, exclusive; {prior} does not.")
    return math.log(prior) - math.log1p(-prior)


def class_adaptive_thresholds(
    num_foreground: float, num_samples: float, class_counts: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Return theta_j = (N_f / N) (n_j / sum_k n_k), a score threshold for every class.

    Args:
        num_foreground: N_f, foreground rows over the data set (or a sample of it).
        num_samples: N, foreground and background rows of the same images.
        class_counts: n_j, training boxes of each class, (K,).

    Returns:
        (K,) float32 tensor; it sums to N_f / N, and a class without a box has threshold 0.

    Raises:
        InputError: for counts that no data set can have.

    Source: arXiv 1909.04868, section on class-adaptive thresholding. The official code uses the one
    number N_f / N for every class instead.
    """
    _check_counts(num_foreground, num_samples)
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 1 or not (counts >= 0).all() or not counts.sum() > 0:
        raise InputError(
            "Class-adaptive thresholds need a list of box counts, none negative and not all zero."
        )
    return (num_foreground / num_samples * (counts / counts.sum())).float()


def class_weights(
    class_counts: Sequence[float] | torch.Tensor, method: str = "inverse", strength: float = 0.5
) -> torch.Tensor:
    """Return a weight for every class, larger for rarer ones, of mean 1 over the classes.

    Args:
        class_counts: n_j, training images (or boxes) of each class, (K,); 0 counts as 1.
        method: "inverse", w_j ~ n_j^-beta, or "effective_number", w_j ~ (1 - b) / (1 - b^n_j).
        strength: beta, of which 0.5 and 1 are usual and 0 weighs all alike; or b in [0, 1), usually
            0.9 to 0.9999, 0 weighing all alike.

    Returns:
        (K,) float32 tensor.

    Raises:
        InputError: for counts or a strength that cannot be, or an unknown method.

    Source: the effective number of samples is Eq. 4 of arXiv 1901.05555, which also normalizes so
    that the weights sum to K.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 1 or len(counts) == 0 or not (counts.isfinite() & (counts >= 0)).all():
        raise InputError("Class weights need a list of class counts, none negative.")
    counts = counts.clamp(min=1)
    if method == "inverse":
        if not 0 <= strength < math.inf:
            raise InputError(f"Class weights by n^-beta need a beta of at least 0, not {strength}.")
        weights = counts**-strength
    elif method == "effective_number":
        if not 0 <= strength < 1:
            raise InputError(f"The effective number of samples needs b in [0, 1), not {strength}.")
        weights = (1 - strength) / (1 - strength**counts)
    else:
        raise InputError(f"Unknown class weights '{method}'; known are: effective_number, inverse.")
    return (weights / weights.mean()).float()


def _check_counts(num_foreground: float, num_samples: float) -> None:
    if not 0 <= num_foreground <= num_samples or num_samples == 0:
        raise InputError(
            f"{num_foreground} foreground rows of {num_samples} rows is no possible count."
        )
