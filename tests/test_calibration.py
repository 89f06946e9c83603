"""Corrections of scores at test time, each against its formula in logits."""

import copy
import math

import pytest
import torch

from balanced_det.calibration import SCORE_CALIBRATIONS, NorCal, PriorCorrection
from balanced_det.criterion import Criterion
from balanced_det.errors import InputError
from balanced_det.losses import (
    CLASSIFICATION_LOSSES,
    CrossEntropyLoss,
    FocalLoss,
    SeesawLoss,
    SmoothL1Loss,
)

K = 4
COUNTS = torch.tensor([1000.0, 10.0, 0.0, 77.0])
STRENGTH = {"NorCal": "gamma", "PriorCorrection": "tau"}
each_calibration = pytest.mark.parametrize("name", SCORE_CALIBRATIONS.names())


def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(50, K + 1, dtype=torch.float64)


def test_norcal_divides_classes_but_not_background():
    z = logits()
    exponentials = z.exp()
    divided = exponentials[:, :K] / COUNTS.clamp(min=1).double() ** 0.6
    expected = divided / (divided.sum(dim=1, keepdim=True) + exponentials[:, K:])
    scores = NorCal(K, COUNTS, gamma=0.6)(CrossEntropyLoss(K).scores(z))
    # Background as 1 - sum loses digits where it is rare: 1e-16 of 1e-6 here.
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)


def test_prior_correction_moves_log_odds_by_the_log_counts():
    z = logits()[:, :K]
    shift = COUNTS.clamp(min=1).double().log()
    expected = (z - 0.7 * (shift - shift.mean())).sigmoid()
    scores = PriorCorrection(K, COUNTS, tau=0.7)(z.sigmoid())
    # Float64 rounding of 1 - p, relative to a p of down to 1e-4.
    torch.testing.assert_close(scores, expected, rtol=1e-11, atol=0)


@each_calibration
def test_strength_of_zero_and_equal_counts_of_one_change_nothing(name):
    scores = CrossEntropyLoss(K).scores(logits().float())
    calibration = SCORE_CALIBRATIONS.get(name)
    for neutral in (
        calibration(K, COUNTS, **{STRENGTH[name]: 0.0}),
        calibration(K, torch.ones(K)),
    ):
        # Float32 rounding of 1 - sum, relative to scores beside it.
        torch.testing.assert_close(neutral(scores), scores, rtol=1e-5, atol=1e-7)


@each_calibration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_certain_scores_stay_probabilities(name, dtype):
    scores = torch.eye(K + 1, dtype=dtype)[:, :K]  # the last row is background alone
    corrected = SCORE_CALIBRATIONS.get(name)(K, COUNTS)(scores)
    assert corrected.dtype == dtype
    torch.testing.assert_close(corrected, scores)


@each_calibration
def test_rare_classes_gain_on_frequent_ones(name):
    corrected = SCORE_CALIBRATIONS.get(name)(K, COUNTS)(torch.full((1, K), 0.2))[0]
    assert corrected.argsort(descending=True).tolist() == [2, 1, 3, 0]
    assert ((corrected > 0) & (corrected < 1)).all()


@each_calibration
def test_counts_come_with_the_checkpoint(name):
    calibration = SCORE_CALIBRATIONS.get(name)
    unknown = calibration(K, None)
    scores = torch.full((1, K), 0.2)
    with pytest.raises(InputError, match="class_counts"):
        unknown(scores)
    known = calibration(K, COUNTS)
    unknown.load_state_dict(copy.deepcopy(known.state_dict()))
    assert torch.equal(unknown(scores), known(scores))


@each_calibration
def test_impossible_strength_is_refused(name):
    for value in (-1.0, math.nan):
        with pytest.raises(InputError, match=STRENGTH[name]):
            SCORE_CALIBRATIONS.get(name)(K, COUNTS, **{STRENGTH[name]: value})


def test_norcal_asks_for_scores_of_one_distribution():
    for name, loss in CLASSIFICATION_LOSSES:
        statistics = dict.fromkeys(loss.needs)
        built = loss(K, **statistics)
        if built.scores_are_a_distribution:
            NorCal(K, COUNTS).check(built)
        else:
            with pytest.raises(InputError, match=f"NorCal needs .*{name}.*PriorCorrection"):
                Criterion(built, SmoothL1Loss(), calibration=NorCal(K, COUNTS))


@pytest.mark.parametrize("loss", [CrossEntropyLoss, SeesawLoss])
def test_criterion_scores_what_it_calibrates(loss):
    calibration = NorCal(K, COUNTS)
    criterion = Criterion(loss(K), SmoothL1Loss(), calibration=calibration)
    z = torch.randn(2, 3, criterion.num_logits)
    assert torch.equal(criterion.scores(z), calibration(criterion.classification_loss.scores(z)))
    plain = Criterion(FocalLoss(K), SmoothL1Loss())
    assert torch.equal(plain.scores(z[..., :K]), z[..., :K].sigmoid())
