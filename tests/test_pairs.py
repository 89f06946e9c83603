"""Every two choices work together, or are refused in one sentence.

The rows of a pairwise cover hold every pair of choices that fit each other; each row is built,
counted, trained and asked for detections. The pairs that do not fit, by what the methods declare,
are refused each for itself.
"""

import contextlib
import functools
import itertools

import pytest
import torch
from detectron2.utils.events import EventStorage
from models import DETECTORS, NUM_CLASSES, batch, config
from records import make_records, register
from test_detectors import assert_one_sentence

from balanced_det.build import build_model
from balanced_det.calibration import SCORE_CALIBRATIONS
from balanced_det.data.loader import TrainLoader
from balanced_det.detectors.counting import fit_to_training_data
from balanced_det.engine.preflight import TRAIN_SAMPLERS
from balanced_det.errors import InputError
from balanced_det.losses import BOX_LOSSES, CLASSIFICATION_LOSSES
from balanced_det.samplers import SAMPLERS
from balanced_det.thresholds import SCORE_THRESHOLDS

MASKS = {key: DETECTORS["mask"][key] for key in DETECTORS["mask"] if key not in DETECTORS["faster"]}
AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
MODELS = {
    **DETECTORS,
    "faster, one box for all classes": {**DETECTORS["faster"], **AGNOSTIC},
    "mask, one box for all classes": {**DETECTORS["mask"], **AGNOSTIC},
    "cascade with masks": {**DETECTORS["cascade"], **MASKS},
}


def first(name, names):
    """Return names with one of them first: what fits all other choices."""
    return [name, *(other for other in names if other != name)]


FACTORS = {
    "detector": first("faster", MODELS),
    "loss": first("CrossEntropyLoss", CLASSIFICATION_LOSSES.names()),
    "box loss": first("SmoothL1Loss", [*BOX_LOSSES.names(), "SmoothL1Loss + 2.0 * GIoULoss"]),
    "sampler": first("RandomSampler", SAMPLERS.names()),
    "threshold": first("FixedThreshold", SCORE_THRESHOLDS.names()),
    "calibration": [None, *SCORE_CALIBRATIONS.names()],
    "class weights": [None, "auto", "effective_number", [1.0, 2.0, 0.5, 3.0, 0.0]],
    "prior": ["default", "given", "optimal"],
    "guided": [False, True],
    "classifier": [None, "CosineLinear"],
    "RPN loss": [None, "FocalLoss", "GHMClassificationLoss"],
    "RPN box loss": [None, "GHMRegressionLoss", "GIoULoss"],
    "RPN sampler": [None, *(name for name in SAMPLERS.names() if name != "RandomSampler")],
    "RPN guided": [False, True],
    "pyramid": [False, True],
    "images": TRAIN_SAMPLERS,
    "arithmetic": ["float32", "bfloat16"],
    "channels last": [False, True],
}
OF_REGIONS = ("classifier", "RPN loss", "RPN box loss", "RPN sampler", "RPN guided")
DEFAULT = {factor: values[0] for factor, values in FACTORS.items()}


def is_dense(detector):
    return detector in ("retinanet", "fcos")


def is_refused(pair):
    """Say whether two choices {factor: value} cannot go together, by what the methods declare."""
    row = {**DEFAULT, **pair}
    loss = CLASSIFICATION_LOSSES.get(row["loss"])
    if pair.keys() == {"detector", "loss"}:
        return ("DENSE" if is_dense(row["detector"]) else "ROI_HEADS") in loss.refused_on
    if pair.keys() == {"loss", "calibration"} and row["calibration"] is not None:
        calibration = SCORE_CALIBRATIONS.get(row["calibration"])
        return calibration.needs_distribution and not loss.scores_are_a_distribution
    if pair.keys() == {"detector", "sampler"} and row["detector"] == "fcos":
        return SAMPLERS.get(row["sampler"]).needs_ious  # points have no boxes
    (other,) = pair.keys() - {"detector"} if "detector" in pair else ("detector",)
    # A key of region heads or RPN would be ignored.
    return other in OF_REGIONS and bool(row[other]) and is_dense(row["detector"])


def pairs():
    """Yield all pairs of choices of two factors, as {factor: value}."""
    for (a, first_values), (b, second_values) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(first_values, second_values):
            yield {a: x, b: y}


def pairwise_cover():
    """Return rows {factor: value} that hold every pair which is not refused, and none that is.

    Greedy: a row begins with a pair that no row has yet, and takes for one factor after another the
    value with which it has the most such pairs.
    """
    refused = {frozen(pair) for pair in pairs() if is_refused(pair)}
    missing = dict.fromkeys(frozen(pair) for pair in pairs() if frozen(pair) not in refused)
    rows = []
    while missing:
        row = {factor: FACTORS[factor][index] for factor, index in next(iter(missing))}
        for factor in (factor for factor in FACTORS if factor not in row):

            def gain(value, row=row, factor=factor):
                with_row = [frozen({name: row[name], factor: value}) for name in row]
                if refused.intersection(with_row):
                    return -1
                return sum(pair in missing for pair in with_row)

            row[factor] = max(FACTORS[factor], key=gain)
            assert gain(row[factor]) >= 0
        for a, b in itertools.combinations(row, 2):
            missing.pop(frozen({a: row[a], b: row[b]}), None)
        rows.append({factor: row[factor] for factor in FACTORS})
    return rows


def frozen(pair):
    """Return what stands for a pair in a set; its values may be lists."""
    return tuple(sorted((factor, FACTORS[factor].index(value)) for factor, value in pair.items()))


def keys_of(row):
    """Return the config keys of a row."""
    dense = is_dense(row["detector"])
    part, counts = ("DENSE", "DENSE") if dense else ("ROI_HEADS", "RPN")
    slots = {
        "CLASSIFICATION_LOSS": row["loss"],
        "BOX_LOSS": row["box loss"],
        "SAMPLER": row["sampler"],
        "SCORE_THRESHOLD": row["threshold"],
        "SCORE_CALIBRATION": row["calibration"],
        "CLASS_WEIGHTS": row["class weights"],
        "GUIDED_LOSS": row["guided"],
    }
    keys = {f"BALANCE.{part}.{slot}": value for slot, value in slots.items()}
    if "class_frequency" in CLASSIFICATION_LOSSES.get(row["loss"]).needs:
        keys[f"BALANCE.{row['loss']}.TAIL_SHARE"] = 0.4
    if row["prior"] == "given":
        keys[f"BALANCE.{part}.PRIOR_PROB"] = 0.02
    if row["prior"] == "optimal":
        keys[f"BALANCE.{counts}.OPTIMAL_PRIOR"] = True
    regions = {
        "BALANCE.ROI_HEADS.CLASSIFIER": row["classifier"],
        "BALANCE.RPN.CLASSIFICATION_LOSS": row["RPN loss"],
        "BALANCE.RPN.BOX_LOSS": row["RPN box loss"],
        "BALANCE.RPN.SAMPLER": row["RPN sampler"],
        "BALANCE.RPN.GUIDED_LOSS": row["RPN guided"],
    }
    keys.update({key: value for key, value in regions.items() if value})
    if row["pyramid"]:
        keys["MODEL.BACKBONE.NAME"] = "build_balanced_pyramid_backbone"
        if dense:
            keys["BALANCE.PYRAMID.BACKBONE"] = "build_retinanet_resnet_fpn_backbone"
    keys["DATALOADER.SAMPLER_TRAIN"] = row["images"]
    keys["BALANCE.CHANNELS_LAST"] = row["channels last"]
    return keys


@pytest.fixture(scope="module")
def data():
    return {
        "DATASETS.TRAIN": (register(make_records(12)),),
        "INPUT.MIN_SIZE_TRAIN": (96,),
        "INPUT.MAX_SIZE_TRAIN": 160,
        # Features large enough that rows of every level are hard to the untrained network.
        "MODEL.PIXEL_STD": [2.0, 2.0, 2.0],
    }


def changes(row):
    """Return a row's name: what it has of its own."""
    return " ".join(str(value) for factor, value in row.items() if value != DEFAULT[factor])


ROWS = pairwise_cover()
REFUSED = [pair for pair in pairs() if is_refused(pair)]


def test_every_pair_is_in_a_row_or_refused():
    held = {
        frozen({a: row[a], b: row[b]}) for row in ROWS for a, b in itertools.combinations(row, 2)
    }
    everything = {frozen(pair) for pair in pairs()}
    refused = {frozen(pair) for pair in REFUSED}
    assert held | refused == everything and not held & refused
    assert refused and len(ROWS) < 2 * len(MODELS) * len(FACTORS["loss"])


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " ".join(map(str, pair.values())))
def test_a_pair_that_cannot_be_is_refused_in_one_sentence(pair, data):
    row = {**DEFAULT, **pair}
    with pytest.raises(InputError) as refused:
        build_model(config(MODELS[row["detector"]], data, keys_of(row)))
    assert_one_sentence(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=changes)
def test_a_row_is_built_counted_trained_and_detects(row, data):
    torch.manual_seed(0)
    cfg = config(MODELS[row["detector"]], data, keys_of(row))
    model = build_model(cfg).train()
    fit_to_training_data(model, cfg)
    batches = list(itertools.islice(TrainLoader(cfg).stream(), 4))  # which images; none is there
    assert all(len(images) == cfg.SOLVER.IMS_PER_BATCH for images in batches)
    precision = contextlib.nullcontext
    if row["arithmetic"] == "bfloat16":
        precision = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    train(model, precision)
    with torch.no_grad(), precision():
        outputs = model.eval()(batch((2, 0)))
    for output in outputs:
        found = output["instances"]
        assert ((found.scores >= 0) & (found.scores <= 1)).all()
        assert found.pred_boxes.tensor.isfinite().all()
        assert ((found.pred_classes >= 0) & (found.pred_classes < NUM_CLASSES)).all()
        assert found.has("pred_masks") == ("mask" in row["detector"])


def train(model, precision):
    """Train four steps, each with an image without objects, and check all that is trained."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # A sampler may leave out the few rows of the coarsest level.
    untrained = {name for name in parameters if not name.startswith("backbone.top_block.p7")}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    with EventStorage() as storage:
        for step in range(4):
            with precision():
                losses = model(batch((2, 0, 3)[step % 2 :], seed=step))
            assert all(loss.isfinite() and loss >= 0 for loss in losses.values()), losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            gradients = {name: p.grad for name, p in parameters.items()}
            broken = [name for name, g in gradients.items() if g is None or not is_finite(g)]
            assert not broken
            untrained -= {name for name, g in gradients.items() if g.any()}
            torch.nn.utils.clip_grad_norm_(parameters.values(), 35.0)
            optimizer.step()
            storage.step()
    assert all(is_finite(p) for p in parameters.values())
    assert not untrained


def is_finite(tensor):
    return bool(tensor.isfinite().all())
