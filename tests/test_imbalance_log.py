"""A training says which classes are tail and which are repeated, in a line each."""

import logging
import math

import pytest
from models import CASCADE, FASTER, NUM_CLASSES, config
from records import make_records, register

from balanced_det.build import build_model
from balanced_det.data.statistics import dataset_statistics
from balanced_det.engine.imbalance import _listed, log_remedies

LOGGER = "balanced_det.engine.imbalance"


@pytest.fixture(scope="module")
def data():
    """Return keys of 40 images in which class 0 is in nearly all and class 4 in one."""
    records = make_records(40)
    for index, record in enumerate(records):
        for annotation in record["annotations"]:
            rare = annotation["category_id"] == 4 and index
            annotation["category_id"] = 0 if rare else annotation["category_id"]
    records[0]["annotations"][-1]["category_id"] = 4
    return {"DATASETS.TRAIN": (register(records),)}, dataset_statistics(records, NUM_CLASSES)


def lines(data, caplog, *choices):
    cfg = config(*choices, data[0])
    with caplog.at_level(logging.INFO, logger=LOGGER):
        log_remedies(cfg, build_model(cfg))
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("keys", [FASTER, CASCADE], ids=["faster", "cascade"])
def test_tail_classes_are_named_rarest_first_once_a_loss(data, caplog, keys):
    choice = {
        "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "EqualizationLoss",
        "BALANCE.EqualizationLoss.TAIL_SHARE": 0.4,
    }
    (line,) = lines(data, caplog, keys, choice)
    count = data[1].image_count.tolist()
    second = min(range(4), key=lambda i: count[i])
    assert line == (
        "EqualizationLoss: tail_share 0.4 makes 2 of the 5 classes that occur tail classes, with "
        f"so many training images each: class 4 (1), class {second} ({count[second]})."
    )


@pytest.mark.parametrize("sqrt", [True, False])
@pytest.mark.parametrize("irfs", [False, True])
def test_repeat_factors_of_the_classes_are_told(data, caplog, irfs, sqrt):
    name = f"{'InstanceAware' if irfs else ''}RepeatFactorTrainingSampler"
    choice = {
        "DATALOADER.SAMPLER_TRAIN": name,
        "DATALOADER.REPEAT_THRESHOLD": 0.1,
        "DATALOADER.REPEAT_SQRT": sqrt,
    }
    (line,) = lines(data, caplog, FASTER, choice)
    frequency = 1 / 40
    if irfs:
        frequency = math.sqrt(frequency * data[1].instance_count[4] / data[1].instance_count.sum())
    factor = math.sqrt(0.1 / frequency) if sqrt else 0.1 / frequency
    assert line == (
        f"{name}: DATALOADER.REPEAT_THRESHOLD 0.1 repeats images of 1 of the 5 classes that "
        f"occur: class 4 ({factor:.1f} times)."
    )


def test_nothing_is_said_of_what_is_not_there(data, caplog):
    assert lines(data, caplog, FASTER) == []


def test_a_long_list_ends_with_how_many_more_there_are():
    assert _listed([]) == "none"
    assert _listed([str(i) for i in range(53)]).endswith("48, 49 and 3 more")
