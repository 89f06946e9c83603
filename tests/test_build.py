"""What the criterion of a part is built of: counted statistics, class weights, calibration."""

import pytest
import torch
from models import FASTER, NUM_CLASSES, config
from records import make_records, register
from test_detectors import assert_one_sentence

from balanced_det.build import build_criterion
from balanced_det.data.statistics import dataset_statistics
from balanced_det.errors import InputError
from balanced_det.losses import CLASSIFICATION_LOSSES
from balanced_det.priors import class_weights

REMEDIES = [name for name, loss in CLASSIFICATION_LOSSES if loss.needs]


@pytest.fixture(scope="module")
def counted():
    records = make_records(30)
    keys = {"DATASETS.TRAIN": (register(records),), "BALANCE.COUNT": True}
    return keys, dataset_statistics(records, NUM_CLASSES)


@pytest.mark.parametrize("name", REMEDIES)
def test_statistics_that_a_loss_needs_are_counted_in_the_data(name, counted):
    keys, statistics = counted
    cfg = config(FASTER, keys, {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": name})
    loss = build_criterion(cfg, "ROI_HEADS", NUM_CLASSES).classification_loss
    (need,) = loss.needs
    expected = {
        "class_frequency": statistics.frequency,
        "class_counts": statistics.image_count.float(),
    }
    torch.testing.assert_close(getattr(loss, need), expected[need])


@pytest.mark.parametrize(
    "method, strength", [("auto", 0.5), ("auto", 1.0), ("effective_number", 0.9)]
)
def test_class_weights_are_counted_in_the_data(method, strength, counted):
    keys, statistics = counted
    weights = {
        "BALANCE.ROI_HEADS.CLASS_WEIGHTS": method,
        "BALANCE.ROI_HEADS.CLASS_WEIGHT_STRENGTH": strength,
    }
    loss = build_criterion(config(FASTER, keys, weights), "ROI_HEADS", NUM_CLASSES)
    method = "inverse" if method == "auto" else method
    expected = class_weights(statistics.image_count, method, strength)
    assert torch.equal(loss.classification_loss.class_weight, expected)


def test_class_weights_may_be_given_or_left_to_the_checkpoint():
    key = "BALANCE.ROI_HEADS.CLASS_WEIGHTS"
    given = build_criterion(config(FASTER, {key: [1.0, 2.0, 3.0, 4.0, 5.0]}), "ROI_HEADS", 5)
    assert given.classification_loss.class_weight.tolist() == [1, 2, 3, 4, 5]
    unknown = build_criterion(config(FASTER, {key: "auto"}), "ROI_HEADS", 5)
    assert unknown.classification_loss.class_weights.values.isnan().all()
    with pytest.raises(InputError, match="class_weight is unknown"):
        unknown.classification_loss(torch.zeros(1, 6), torch.zeros(1).long(), 1)
    unknown.load_state_dict(given.state_dict())
    assert unknown.classification_loss.class_weight.tolist() == [1, 2, 3, 4, 5]
    plain = build_criterion(config(FASTER), "ROI_HEADS", 5)
    assert plain.classification_loss.class_weight is None


def test_calibration_counts_the_data(counted):
    keys, statistics = counted
    choice = {"BALANCE.ROI_HEADS.SCORE_CALIBRATION": "NorCal", "BALANCE.NorCal.GAMMA": 0.3}
    built = build_criterion(config(FASTER, keys, choice), "ROI_HEADS", NUM_CLASSES)
    assert built.calibration.gamma == 0.3
    assert torch.equal(built.calibration.class_counts, statistics.image_count.float())
    logits = torch.randn(7, NUM_CLASSES + 1)
    expected = built.calibration(built.classification_loss.scores(logits))
    assert torch.equal(built.scores(logits), expected)


@pytest.mark.parametrize("part", ["DENSE", "RPN", "ROI_HEADS"])
@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES.names())
def test_losses_are_refused_where_they_say_so_and_nowhere_else(name, part):
    cfg = config(FASTER, {f"BALANCE.{part}.CLASSIFICATION_LOSS": name})
    num_classes = 1 if part == "RPN" else NUM_CLASSES
    method = CLASSIFICATION_LOSSES.get(name)
    if part not in method.refused_on:
        loss = build_criterion(cfg, part, num_classes).classification_loss
        assert part != "RPN" or loss.num_logits == 1
        return
    with pytest.raises(InputError, match=f"BALANCE.{part}.*'{name}' is refused here") as refused:
        build_criterion(cfg, part, num_classes)
    assert_one_sentence(refused.value)


REFUSALS = {
    "weights of objectness": ("RPN", {"CLASS_WEIGHTS": "auto"}, "RPN.CLASS_WEIGHTS: objectness"),
    "unknown weights": ("DENSE", {"CLASS_WEIGHTS": "sqrt"}, "known are: effective_number"),
    "too few weights": ("DENSE", {"CLASS_WEIGHTS": [1.0]}, "DENSE.CLASS_WEIGHTS: .*5 classes"),
    "strength": (
        "DENSE",
        {"CLASS_WEIGHTS": "auto", "CLASS_WEIGHT_STRENGTH": -1.0},
        "CLASS_WEIGHTS: .*beta",
    ),
    "unknown calibration": ("DENSE", {"SCORE_CALIBRATION": "Platt"}, "known are: NorCal"),
    "NorCal of sigmoids": ("DENSE", {"SCORE_CALIBRATION": "NorCal"}, "use PriorCorrection"),
}


@pytest.mark.parametrize("part, keys, message", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused_in_one_sentence(part, keys, message):
    cfg = config(FASTER, {f"BALANCE.{part}.{key}": value for key, value in keys.items()})
    with pytest.raises(InputError, match=message) as refused:
        build_criterion(cfg, part, 1 if part == "RPN" else NUM_CLASSES)
    assert_one_sentence(refused.value)
