"""Counted score thresholds: their values, their floor, and that a checkpoint brings them."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from distributed import run_workers
from models import CASCADE, FASTER, FCOS, NUM_CLASSES, RETINANET, batch, config
from records import make_records, register

from balanced_det.build import counting
from balanced_det.data.statistics import dataset_statistics
from balanced_det.detectors.counting import count_rows, fit_to_training_data
from balanced_det.thresholds import SCORE_THRESHOLDS

CLASS_COUNTS = [60, 0, 30, 10, 100]
KINDS = ("ForegroundThreshold", "ClassAdaptiveThreshold")


def threshold(kind="ClassAdaptiveThreshold", **options):
    options = {"fixed": 0.05, "num_classes": 5, **options}
    if kind == "ClassAdaptiveThreshold":
        options["instance_count"] = CLASS_COUNTS
    return SCORE_THRESHOLDS.get(kind)(**options)


def value(kind, **options):
    counted = threshold(kind, **options)
    counted.set_row_counts(40, 1000)
    return torch.as_tensor(counted.value).expand(5).tolist()


def test_values_follow_the_formulas():
    # theta_j = N_f / N n_j / sum n; float32 rounding.
    assert value("ClassAdaptiveThreshold", floor=0.0) == pytest.approx(
        [0.012, 0, 0.006, 0.002, 0.02], rel=1e-6
    )
    assert value("ForegroundThreshold") == pytest.approx([0.04] * 5, rel=1e-6)
    assert value("FixedThreshold") == pytest.approx([0.05] * 5, rel=1e-6)


def test_the_official_code_counts_background_among_the_classes():
    published = value("ForegroundThreshold", floor=0.0, counts_background=True)
    assert published == pytest.approx([40 / 1000 * 6 / 5] * 5, rel=1e-6)  # float32 rounding


def test_floor_is_the_least_value():
    expected = [0.012, 0.005, 0.006, 0.005, 0.02]
    assert value("ClassAdaptiveThreshold", floor=0.005) == pytest.approx(expected, rel=1e-6)
    assert value("ForegroundThreshold", floor=0.1) == pytest.approx([0.1] * 5, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_threshold_serves_until_rows_are_counted(kind):
    assert threshold(kind).value.expand(5).tolist() == pytest.approx([0.05] * 5)


def observe_worker(rank):
    observed = threshold()
    labels = torch.tensor([[0, 5, 5, -1], [5, 5, 5, 5]][rank])
    for _ in range(2):
        observed.observe((labels >= 0) & (labels < 5), labels >= 0)
    return observed.row_counts


def test_observed_rows_are_summed_over_steps_and_workers():
    for counts in run_workers(observe_worker):
        assert counts.tolist() == [2, 14]


def training_keys(records, kind):
    return {
        "INPUT.RANDOM_FLIP": "none",  # so that counting again gives the same
        "DATASETS.TRAIN": (register(records),),
        "BALANCE.DENSE.SCORE_THRESHOLD": kind,
        "BALANCE.ROI_HEADS.SCORE_THRESHOLD": kind,
        f"BALANCE.{kind}.FLOOR": 0.0,
    }


def restored(model, keys, folder):
    """Save a model and load it as --eval-only does: without a training set."""
    DetectionCheckpointer(model, str(folder)).save("model")
    with counting(False):
        evaluated = build_model(config(*keys, {"DATASETS.TRAIN": ("no such data set",)}))
    DetectionCheckpointer(evaluated).load(str(folder / "model.pth"))
    return evaluated.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detector", [RETINANET, FCOS])
def test_dense_detectors_count_their_threshold_and_save_it(detector, kind, tmp_path):
    records = make_records(10)
    keys = training_keys(records, kind)
    cfg = config(detector, keys)
    model = build_model(cfg)
    fit_to_training_data(model, cfg)
    counts = count_rows(model, model.backbone, cfg, records)
    expected = torch.full((NUM_CLASSES,), counts.num_foreground / counts.num_rows)
    if kind == "ClassAdaptiveThreshold":
        boxes = dataset_statistics(records, NUM_CLASSES).instance_count
        expected = expected * boxes / boxes.sum()
    if detector is FCOS:  # the scores of which are square roots
        expected = expected.sqrt()
    # Float32 rounding.
    torch.testing.assert_close(
        model.test_score_thresh.expand(NUM_CLASSES), expected, rtol=1e-6, atol=0
    )
    evaluated = restored(model, (detector, keys), tmp_path)
    assert torch.equal(evaluated.test_score_thresh, model.test_score_thresh)


@pytest.mark.parametrize("detector", [RETINANET, FCOS, FASTER, CASCADE])
@torch.no_grad()
def test_inference_keeps_what_exceeds_the_threshold_of_its_class(detector):
    names = ("RETINANET.SCORE_THRESH_TEST", "FCOS.SCORE_THRESH_TEST", "ROI_HEADS.SCORE_THRESH_TEST")
    keys = {f"MODEL.{name}": 0.0 for name in names}
    keys.update(
        {f"BALANCE.{p}.SCORE_THRESHOLD": "ForegroundThreshold" for p in ("DENSE", "ROI_HEADS")}
    )
    keys["TEST.DETECTIONS_PER_IMAGE"] = 100_000
    torch.manual_seed(0)
    model = build_model(config(detector, keys)).eval()
    owner = model if hasattr(model, "score_threshold") else model.roi_heads.box_predictor
    owner = owner[-1] if detector is CASCADE else owner

    everything = model(batch((0,)))[0]["instances"]
    limits = torch.stack(
        [everything.scores[everything.pred_classes == k].median() for k in range(NUM_CLASSES)]
    )
    limits[1] = 1.0
    owner.score_threshold.class_share.copy_(limits**2 if detector is FCOS else limits)
    owner.score_threshold.set_row_counts(1, 1)
    kept = model(batch((0,)))[0]["instances"]
    assert set(kept.pred_classes.tolist()) == {0, 2, 3, 4}
    # FCOS takes the square root in float32, which may be less than the limit by its rounding.
    assert (kept.scores > limits[kept.pred_classes] * (1 - 1e-6)).all()
    # The best of a class is above its median and no other box can suppress it.
    for k in (0, 2, 3, 4):
        best = everything.scores[everything.pred_classes == k].max()
        assert kept.scores[kept.pred_classes == k].max() == best


@pytest.mark.parametrize("detector", [FASTER, CASCADE])
def test_region_heads_count_while_they_train_and_save_it(detector, tmp_path):
    records = make_records(10)
    keys = training_keys(records, "ClassAdaptiveThreshold")
    # The boxes of an untrained head's last stage are its weights': these leave foreground in all.
    torch.manual_seed(0)
    model = build_model(config(detector, keys))
    heads = model.roi_heads.box_predictor
    heads = heads if detector is CASCADE else [heads]
    with EventStorage() as storage:
        for _ in range(2):
            model(batch((2, 3)))
            storage.step()
    boxes = dataset_statistics(records, NUM_CLASSES).instance_count
    for head in heads:
        num_foreground, num_rows = head.score_threshold.row_counts
        assert 0 < num_foreground < num_rows
        expected = (num_foreground / num_rows * boxes / boxes.sum()).float()
        # Float32 rounding.
        torch.testing.assert_close(head.test_score_thresh, expected, rtol=1e-6, atol=0)
    evaluated = restored(model, (detector, keys), tmp_path).roi_heads.box_predictor
    evaluated = evaluated if detector is CASCADE else [evaluated]
    for head, other in zip(heads, evaluated, strict=True):
        assert torch.equal(head.test_score_thresh, other.test_score_thresh)
