"""Priors counted from annotations alone are those of the detector's own label assignment."""

import logging
import math

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos, retinanet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from distributed import run_workers
from models import FASTER, FCOS, NUM_CLASSES, RETINANET, batch, config
from PIL import Image
from records import make_records, register

from balanced_det.detectors.counting import count_rows, fit_to_training_data
from balanced_det.errors import InputError
from balanced_det.priors import optimal_prior, prior_bias

# Several sizes to draw from, none of them a multiple of the backbone's 32.
INPUT = {"INPUT.MIN_SIZE_TRAIN": (90, 101, 130), "INPUT.MAX_SIZE_TRAIN": 170}
COUNTED = {
    **INPUT,
    "BALANCE.DENSE.CLASSIFICATION_LOSS": "BinaryCrossEntropyLoss",
    "BALANCE.DENSE.OPTIMAL_PRIOR": True,
    "BALANCE.RPN.OPTIMAL_PRIOR": True,
    "BALANCE.RPN.SAMPLER": "AllSampler",
}
DETECTORS = {"retinanet": RETINANET, "fcos": FCOS, "rpn": FASTER}
each_detector = pytest.mark.parametrize("name", DETECTORS)


def build(name, *choices):
    cfg = config(DETECTORS[name], COUNTED, *choices)
    torch.manual_seed(0)
    model = build_model(cfg)
    return cfg, model, model.proposal_generator if name == "rpn" else model


def bias_of(part):
    layer = part.rpn_head.objectness_logits if hasattr(part, "rpn_head") else part.head.cls_score
    return layer.bias.detach()


def brute_force(cfg, model, part, records, folder):
    """Load images as training does, run the network, and count as Detectron2 labels its anchors."""
    mapper = DatasetMapper(cfg, is_train=True)
    num_foreground = num_rows = 0
    for record in records:
        path = folder / f"{record['image_id']}.png"
        Image.fromarray(np.zeros((record["height"], record["width"], 3), np.uint8)).save(path)
        loaded = mapper({**record, "file_name": str(path)})
        features = model.backbone(model.preprocess_image([loaded]).tensor)
        anchors = part.anchor_generator([features[name] for name in part.row_features])
        if part is model:
            stock = fcos.FCOS if isinstance(model, fcos.FCOS) else retinanet.RetinaNet
            labels = stock.label_anchors(part, anchors, [loaded["instances"]])[0][0]
            is_foreground = [0 <= y < NUM_CLASSES for y in labels.tolist()]
        else:
            part.batch_size_per_image = 10**6  # all of them
            labels = RPN.label_and_sample_anchors(part, anchors, [loaded["instances"]])[0][0]
            is_foreground = [y == 1 for y in labels.tolist()]
        num_foreground += sum(is_foreground)
        num_rows += sum(y >= 0 for y in labels.tolist())
    return num_foreground, num_rows


@each_detector
def test_counts_are_those_of_the_detectors_own_labels(name, tmp_path):
    cfg, model, part = build(name)
    records = make_records(12)
    records[3]["annotations"] = []
    np.random.seed(7)  # the augmentations draw from numpy
    with torch.no_grad():
        expected = brute_force(cfg, model, part, records, tmp_path)
    np.random.seed(7)
    counts = count_rows(part, model.backbone, cfg, records)
    assert (counts.num_foreground, counts.num_rows) == expected
    assert counts.num_foreground > 0
    assert counts.num_images == 12


@each_detector
def test_prior_is_counted_over_the_training_set_and_logged(name, caplog):
    records = make_records(8)
    cfg, model, part = build(name, {"DATASETS.TRAIN": (register(records),)})
    state = np.random.get_state()[1].copy()
    with caplog.at_level(logging.INFO, "balanced_det.detectors.counting"):
        fit_to_training_data(model, cfg)
    assert (np.random.get_state()[1] == state).all()

    np.random.seed(0)  # images and their sizes are drawn from a fixed seed
    order = np.random.RandomState(0).permutation(8)
    counts = count_rows(part, model.backbone, cfg, [records[i] for i in order])
    prior = optimal_prior(counts.num_foreground, counts.num_rows, part.num_classes)
    # Float32 rounding of the bias.
    torch.testing.assert_close(
        bias_of(part), torch.full_like(bias_of(part), prior_bias(prior)), rtol=1e-6, atol=0
    )
    assert f"{counts.num_foreground} of {counts.num_rows} rows" in caplog.text
    assert f"{prior:.4g}" in caplog.text


def test_initial_loss_of_a_batch_is_least_at_its_counted_prior():
    record = make_records(1, seed=3)[0]
    cfg, model, _ = build("retinanet", {"INPUT.MIN_SIZE_TRAIN": (0,)})  # no resizing
    counts = count_rows(model, model.backbone, cfg, [record])
    best = optimal_prior(counts.num_foreground, counts.num_rows, NUM_CLASSES)

    torch.nn.init.zeros_(model.head.cls_score.weight)  # every logit is the bias
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances((record["height"], record["width"]))
    boxes = np.array([a["bbox"] for a in objects])
    instances.gt_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.gt_classes = torch.tensor([a["category_id"] for a in objects])
    image = torch.zeros(3, record["height"], record["width"])

    def initial_loss(prior):
        model.set_prior(prior)
        # Now the moving average stays what it is.
        model.selection.divisor.average.fill_(counts.num_foreground)
        with EventStorage():
            return model([{"image": image, "instances": instances}])["loss_cls"].item()

    least = initial_loss(best)
    num_negative = counts.num_rows * NUM_CLASSES - counts.num_foreground
    formula = -counts.num_foreground * math.log(best) - num_negative * math.log1p(-best)
    # Float32 sums of some ten thousand terms.
    assert least == pytest.approx(formula / counts.num_foreground, rel=1e-4)
    for factor in (0.01, 0.1, 0.5, 0.8, 1.25, 2, 10, 100):
        assert initial_loss(best * factor) > least


def test_standard_error_is_the_spread_over_random_subsets():
    cfg, model, _ = build("fcos", {"INPUT.MIN_SIZE_TRAIN": (0,)})
    records = make_records(240)
    everything = count_rows(model, model.backbone, cfg, records, records)
    assert everything.standard_error == 0
    truth = everything.num_foreground / everything.num_rows
    errors, reported = [], []
    for seed in range(60):
        chosen = np.random.RandomState(seed).permutation(len(records))[:40]
        counts = count_rows(model, model.backbone, cfg, [records[i] for i in chosen], records)
        errors.append(counts.num_foreground / counts.num_rows / truth - 1)
        reported.append(counts.standard_error)
    spread = np.sqrt(np.mean(np.square(errors)))
    # A spread of 60 draws is itself known to 1 / sqrt(120) = 9%; three times that.
    assert np.mean(reported) == pytest.approx(spread, rel=0.27)


def test_subset_of_the_images_can_be_counted(caplog):
    records = make_records(20)
    keys = {"DATASETS.TRAIN": (register(records),), "BALANCE.COUNT_IMAGES": 6}
    cfg, model, _ = build("fcos", keys)
    with caplog.at_level(logging.INFO, "balanced_det.detectors.counting"):
        fit_to_training_data(model, cfg)
    assert "(6 images, standard error" in caplog.text


def test_nothing_is_counted_where_nothing_asks_for_it():
    keys = {"DATASETS.TRAIN": ("no such data set",), "BALANCE.DENSE.OPTIMAL_PRIOR": False}
    cfg, model, _ = build("retinanet", keys)
    before = bias_of(model).clone()
    fit_to_training_data(model, cfg)
    assert torch.equal(bias_of(model), before)


def test_data_without_a_foreground_row_is_refused():
    records = make_records(2)
    for record in records:
        del record["annotations"][1:]  # the crowd is left, which is not trained on
    keys = {"DATASETS.TRAIN": (register(records),), "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}
    cfg, model, _ = build("retinanet", keys)
    with pytest.raises(InputError, match="No row of 2 images"):
        fit_to_training_data(model, cfg)


def test_detector_that_does_not_read_balance_is_refused():
    keys = {"MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}
    cfg, model, _ = build("rpn", keys)
    with pytest.raises(InputError, match="BALANCE.RPN.OPTIMAL_PRIOR.*BalancedRPN"):
        fit_to_training_data(model, cfg)


@each_detector
def test_counted_bias_is_saved_with_the_model(name, tmp_path):
    cfg, model, part = build(name, {"DATASETS.TRAIN": (register(make_records(4)),)})
    fit_to_training_data(model, cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("counted")
    _, restored, restored_part = build(name)
    assert not torch.equal(bias_of(restored_part), bias_of(part))
    DetectionCheckpointer(restored).load(str(tmp_path / "counted.pth"))
    assert torch.equal(bias_of(restored_part), bias_of(part))


def fit_worker(rank):
    def records():
        assert rank == 0, "a worker other than the first counts"
        return make_records(6)

    DatasetCatalog.register("shared", records)
    MetadataCatalog.get("shared").thing_classes = [f"class {i}" for i in range(NUM_CLASSES)]
    cfg, model, _ = build("fcos", {"DATASETS.TRAIN": ("shared",)})
    fit_to_training_data(model, cfg)
    return bias_of(model)


def test_one_worker_counts_for_all():
    first, second = run_workers(fit_worker)
    assert torch.equal(first, second)
    assert not torch.allclose(first, torch.tensor(prior_bias(0.01)))


@pytest.mark.parametrize("counted", [True, False])
@each_detector
def test_detector_that_nobody_counted_says_so_once(name, counted, caplog):
    cfg, model, _ = build(name, {"DATASETS.TRAIN": (register(make_records(3)),)})
    if counted:
        fit_to_training_data(model, cfg)
    with EventStorage(), caplog.at_level(logging.WARNING, "balanced_det.build"):
        for _ in range(2):
            model.train()(batch())
    said = [r.message for r in caplog.records if "were not counted" in r.message]
    assert len(said) == (not counted)
    assert all(f"BALANCE.{'RPN' if name == 'rpn' else 'DENSE'}.OPTIMAL_PRIOR" in m for m in said)
