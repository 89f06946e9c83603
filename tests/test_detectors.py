"""Every detector trains with every loss and sampler that fits it, and refuses the others."""

import contextlib

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from distributed import run_workers
from models import DETECTORS, FASTER, FCOS, NUM_CLASSES, RETINANET, batch, config
from torch.nn.parallel import DistributedDataParallel

from balanced_det.criterion import Criterion
from balanced_det.detectors import BalancedFCOS
from balanced_det.detectors.encoding import WaitlessTransform
from balanced_det.errors import InputError
from balanced_det.losses import CLASSIFICATION_LOSSES
from balanced_det.priors import prior_bias
from balanced_det.rows import foreground, level_rows
from balanced_det.samplers import SAMPLERS, AllSampler
from balanced_det.selection import PerForegroundRow, Quota, Rows, Sampler, Selection

PART = {name: "DENSE" if name in ("retinanet", "fcos") else "ROI_HEADS" for name in DETECTORS}
SAMPLING_FREE = {
    "BALANCE.DENSE.CLASSIFICATION_LOSS": "BinaryCrossEntropyLoss",
    "BALANCE.DENSE.GUIDED_LOSS": True,
    "BALANCE.RPN.SAMPLER": "AllSampler",
    "BALANCE.RPN.GUIDED_LOSS": True,
    "BALANCE.ROI_HEADS.SAMPLER": "AllSampler",
    "BALANCE.ROI_HEADS.GUIDED_LOSS": True,
    "BALANCE.ROI_HEADS.GUIDED_FACTOR": 2.0,
}
ONE_CLASS = {f"MODEL.{part}.NUM_CLASSES": 1 for part in ("RETINANET", "FCOS", "ROI_HEADS")}
# Batches that training meets: ordinary, with an image without objects, without any object.
BATCHES = [(2, 3), (0, 2), (0, 0)]

each_detector = pytest.mark.parametrize("name", DETECTORS)
each_loss = pytest.mark.parametrize("loss", CLASSIFICATION_LOSSES.names())
each_dense_loss = pytest.mark.parametrize(
    "loss", [name for name, loss in CLASSIFICATION_LOSSES if "DENSE" not in loss.refused_on]
)


def build(name, *choices):
    """Return a small detector in training mode, the class frequencies of which are known."""
    torch.manual_seed(0)
    model = build_model(config(DETECTORS[name], *choices))
    frequency = torch.tensor([0.9, 0.5, 0.3, 0.001, 0.0])
    counted = ("class_frequency", "class_counts")  # 900 images would do as well
    state = {k: frequency[: len(v)] for k, v in model.state_dict().items() if k.endswith(counted)}
    model.load_state_dict(state, strict=False)
    return model.train()


def train_step(model, inputs):
    """Return the losses of a step, with the gradients in the parameters."""
    torch.manual_seed(0)
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def assert_trains(model, inputs):
    losses = train_step(model, inputs)
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values()), losses
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, g in gradients.items() if g is None]
    assert not missing
    broken = [n for n, g in gradients.items() if not g.isfinite().all()]
    assert not broken
    return losses


def of_one_class(inputs):
    for record in inputs:
        record["instances"].gt_classes.zero_()
    return inputs


def criteria(model):
    return [module for module in model.modules() if isinstance(module, Criterion)]


@contextlib.contextmanager
def recorded_rows(criterion):
    """Yield a list that is given the (R, num_logits) logits and (R,) labels of each call."""
    calls = []

    def record(module, args):
        logits, labels = args[:2]
        if isinstance(logits, torch.Tensor):
            logits, labels = [logits], [labels]
        calls.append(
            (
                torch.cat([x.detach().reshape(-1, x.shape[-1]) for x in logits]),
                torch.cat([y.flatten() for y in labels]),
            )
        )

    handle = criterion.register_forward_pre_hook(record)
    yield calls
    handle.remove()


@each_loss
@each_detector
def test_every_classification_loss_trains_or_is_refused(name, loss):
    if PART[name] in CLASSIFICATION_LOSSES.get(loss).refused_on:
        with pytest.raises(InputError, match=f"'{loss}' is refused"):
            build(name, {f"BALANCE.{PART[name]}.CLASSIFICATION_LOSS": loss})
        return
    model = build(name, {f"BALANCE.{PART[name]}.CLASSIFICATION_LOSS": loss})
    for num_objects in BATCHES:
        assert_trains(model, batch(num_objects))


@pytest.mark.parametrize("loss", ["BinaryCrossEntropyLoss", "FocalLoss", "GHMClassificationLoss"])
def test_every_objectness_loss_trains(loss):
    model = build("faster", {"BALANCE.RPN.CLASSIFICATION_LOSS": loss})
    for num_objects in BATCHES:
        assert_trains(model, batch(num_objects))


@pytest.mark.parametrize(
    "name, sampler",
    [
        (name, sampler)
        for name in DETECTORS
        for sampler in SAMPLERS.names()
        if (name, sampler) != ("fcos", "IoUBalancedSampler")  # refused, see below
    ],
)
def test_every_sampler_trains_also_in_bfloat16(name, sampler):
    parts = {PART[name], "RPN"}
    model = build(name, {f"BALANCE.{part}.SAMPLER": sampler for part in parts})
    assert_trains(model, batch(BATCHES[0]))
    with torch.autocast("cpu", torch.bfloat16):
        for num_objects in BATCHES:
            assert_trains(model, batch(num_objects))


@pytest.mark.parametrize("num_classes", [1, NUM_CLASSES])
@each_detector
def test_sampling_free_training_is_finite(name, num_classes):
    model = build(name, SAMPLING_FREE, ONE_CLASS if num_classes == 1 else {})
    for num_objects in BATCHES:
        inputs = batch(num_objects)
        inputs = of_one_class(inputs) if num_classes == 1 else inputs
        assert_trains(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_trains(model, inputs)


@each_detector
def test_one_class_is_enough_for_softmax(name):
    keys = {f"BALANCE.{PART[name]}.CLASSIFICATION_LOSS": "CrossEntropyLoss"}
    assert_trains(build(name, ONE_CLASS, keys), of_one_class(batch()))


@pytest.mark.parametrize(
    "name, sampler",
    [("retinanet", "RandomSampler"), ("fcos", "OHEMSampler"), ("retinanet", "IoUBalancedSampler")],
)
def test_dense_detectors_train_on_the_sampled_rows_alone(name, sampler):
    model = build(name, {"BALANCE.DENSE.SAMPLER": sampler})
    model.selection.quota = Quota(20, 0.1)
    with recorded_rows(model.criterion) as calls:
        train_step(model, batch((2, 3)))
    ((_, labels),) = calls
    assert foreground(labels, NUM_CLASSES).sum() == 2 * 2
    assert (labels == NUM_CLASSES).sum() == 2 * 18


@pytest.mark.parametrize(
    "name, part",
    [
        ("retinanet", "DENSE"),
        ("fcos", "DENSE"),
        ("faster", "RPN"),
        ("faster", "ROI_HEADS"),
        ("cascade", "ROI_HEADS"),
    ],
)
def test_ohem_keeps_the_hardest_rows_of_each_kind(name, part):
    keys = {
        f"BALANCE.{part}.SAMPLER": "OHEMSampler",
        # No row is ignored but by the sampler.
        "MODEL.RETINANET.IOU_LABELS": [0, 0, 1],
        "MODEL.RPN.IOU_LABELS": [0, 0, 1],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 24,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 24,
    }
    model = build(name, keys)
    owner = {"RPN": "proposal_generator", "ROI_HEADS": "roi_heads.box_predictor"}.get(part, "")
    if name == "cascade":
        owner += ".1"  # a later stage, whose labels are its own
    owner = model.get_submodule(owner)
    with torch.no_grad():  # an untrained network finds all rows equally hard
        for parameter in owner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if part == "DENSE":
        owner.selection.quota = Quota(24, 0.25)

    with recorded_rows(owner.criterion) as calls:
        train_step(model, batch((3,)))
        owner.selection.sampler = AllSampler()
        train_step(model, batch((3,)))
    (logits, chosen), (_, labels) = calls
    losses = owner.criterion.classification_loss.row_losses(logits, labels)
    is_chosen = chosen >= 0
    assert (chosen[is_chosen] == labels[is_chosen]).all()
    assert 0 < is_chosen.sum() <= 24 < len(labels)
    for kind in (
        foreground(labels, owner.criterion.num_classes),
        labels == owner.criterion.num_classes,
    ):
        left_out = losses[kind & ~is_chosen]
        if len(left_out):
            assert losses[kind & is_chosen].min() >= left_out.max()


def test_float16_gradients_survive_the_normalizer_under_a_gradient_scaler():
    loss = CLASSIFICATION_LOSSES.get("BinaryCrossEntropyLoss")(4)
    labels = torch.full((100,), 4)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        # The optimal prior of RetinaNet on COCO, and the foreground rows of a batch.
        logits = torch.full((100, 4), prior_bias(1.113e-5)).to(dtype).requires_grad_()
        (loss(logits, labels, 1000.0) * 65536).backward()
        gradients.append(logits.grad.float())
    # 1e-5 / 1000 is no float16. Rounding moves the logit of -11.4 by 2^-8 at most, so its
    # gradient by as large a part, and that by 2^-11.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-7, atol=0)


PAIRS_OF_LOSSES = {
    "faster": [("loss_cls", "loss_box_reg", 2.0), ("loss_rpn_cls", "loss_rpn_loc", 1.0)],
    "mask": [("loss_cls", "loss_box_reg", 2.0), ("loss_rpn_cls", "loss_rpn_loc", 1.0)],
    "cascade": [(f"loss_cls_stage{i}", f"loss_box_reg_stage{i}", 2.0) for i in range(3)],
    "retinanet": [("loss_cls", "loss_box_reg", 1.0)],
    "fcos": [("loss_fcos_cls", "loss_fcos_loc", 1.0)],
}


@each_detector
def test_guided_classification_loss_is_the_weighted_box_loss_times_the_factor(name):
    weight = {f"BALANCE.{part}.BOX_WEIGHT": 0.3 for part in ("DENSE", "RPN", "ROI_HEADS")}
    losses = train_step(build(name, SAMPLING_FREE, weight), batch())
    for cls, box, factor in PAIRS_OF_LOSSES[name]:
        assert losses[box] > 0
        # Two float32 roundings, of r and of the product.
        torch.testing.assert_close(losses[cls], factor * losses[box], rtol=1e-6, atol=0)


@each_detector
def test_guided_scale_multiplies_the_gradient_and_has_none_itself(name):
    key = "BALANCE.{}.GUIDED_LOSS"
    unguided = {key.format(part): False for part in ("DENSE", "RPN", "ROI_HEADS")}
    gradients = []
    for keys in ({}, unguided):
        model = build(name, SAMPLING_FREE, keys)
        train_step(model, batch())
        layers = [n for n, _ in model.named_modules() if n.endswith(("cls_score", "ess_logits"))]
        gradients.append({n: model.get_submodule(n).weight.grad for n in layers})
        if not keys:
            scales = [(c.monitored["guided_scale"], c.guided_factor) for c in criteria(model)]
    assert len(layers) == len(scales)
    # The RPN is the first of both where there is one; heads are in the order of their stages.
    for layer, (scale, factor) in zip(layers, scales, strict=True):
        guided, plain = (g[layer] for g in gradients)
        # The order of additions differs, since gradients are scaled before they are summed.
        torch.testing.assert_close(
            guided, plain * scale * factor, rtol=1e-3, atol=1e-6 * guided.abs().max().item()
        )


@each_detector
def test_losses_that_are_exactly_zero_are_guided_finitely(name):
    no_box_loss = {f"BALANCE.{part}.BOX_WEIGHT": 0.0 for part in ("DENSE", "RPN", "ROI_HEADS")}
    losses = assert_trains(build(name, SAMPLING_FREE, no_box_loss), batch())
    for cls, box, _ in PAIRS_OF_LOSSES[name]:
        assert losses[box] == 0 < losses[cls]

    sigmoid = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "BinaryCrossEntropyLoss"}
    model = build(name, SAMPLING_FREE, sigmoid)
    with torch.no_grad():
        for layer, module in model.named_modules():
            if layer.endswith(("cls_score", "objectness_logits")):
                module.bias.fill_(-1000.0)  # exp(-1000) is 0: background is certain
    losses = assert_trains(model, batch((0, 0)))
    for cls, box, _ in PAIRS_OF_LOSSES[name]:
        assert losses[cls] == losses[box] == 0


@each_loss
def test_region_head_without_any_proposal_gives_zeros_that_backpropagate(loss):
    keys = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": loss}
    predictor = build("faster", SAMPLING_FREE, keys).roi_heads.box_predictor
    proposals = Instances((96, 128), proposal_boxes=Boxes(torch.zeros(0, 4)))
    proposals.gt_classes = torch.zeros(0, dtype=torch.long)
    with EventStorage():
        losses = predictor.losses(
            predictor(torch.zeros(0, predictor.cls_score.in_features)), [proposals]
        )
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())
    assert all((p.grad == 0).all() for p in predictor.parameters())


def test_normalizer_counts_foreground_or_else_all_rows():
    for labels, expected in (
        ([[0, 2, -1], [2, 1, 2]], 2),
        ([[2, 2, -1], [2, 2, 2]], 5),
        ([[-1, -1, -1]], 0),
    ):
        assert PerForegroundRow()(Rows(torch.tensor(labels), 2), None) == expected


class EveryRow(Sampler):
    """A sampler of one's own that takes all rows."""

    takes_all = True

    def __call__(self, rows, quota, generator=None):
        return rows.takes_part


@each_detector
def test_a_sampler_of_ones_own_that_takes_all_rows_trains_as_ours(name):
    losses = []
    for sampler in (AllSampler(), EveryRow()):
        model = build(name, {f"BALANCE.{part}.SAMPLER": "AllSampler" for part in ("DENSE", "RPN")})
        for module in model.modules():
            if isinstance(module, Selection):
                module.sampler = sampler
                if module is not getattr(model, "selection", None):
                    module.divisor = Selection(sampler).divisor
        losses.append(train_step(model, batch()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("sampler", ["OHEMSampler", "RandomSampler"])
def test_losses_leave_what_they_are_given_as_it_is(sampler):
    model = build("mask", {"BALANCE.ROI_HEADS.SAMPLER": sampler})
    heads = model.roi_heads
    heads.box_predictor.losses, losses = record_calls(heads.box_predictor.losses)
    train_step(model, batch())
    ((_, proposals), before) = losses[0]
    for p, labels in zip(proposals, before, strict=True):
        assert torch.equal(p.gt_classes, labels)


def record_calls(losses):
    calls = []

    def wrapped(predictions, proposals):
        calls.append(((predictions, proposals), [p.gt_classes.clone() for p in proposals]))
        return losses(predictions, proposals)

    return wrapped, calls


@each_dense_loss
@torch.no_grad()
def test_dense_detections_are_scored_by_the_loss(loss):
    keys = {"BALANCE.DENSE.CLASSIFICATION_LOSS": loss, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    model = build("retinanet", keys).eval()
    inputs = batch((1, 1))
    features = model.backbone(model.preprocess_image(inputs).tensor)
    logits, _ = model.head([features[name] for name in model.head_in_features])
    scores = [model.criterion.scores(level_rows(x, model.criterion.num_logits)) for x in logits]
    scores = torch.cat([x.flatten(1, -2) for x in scores], dim=1)  # (N, R, K)
    for output, of_image in zip(model(inputs), scores, strict=True):
        detections = output["instances"]
        assert len(detections) > 0
        assert detections.pred_classes.max() < NUM_CLASSES
        # Each detection has the score of its class in some row: the same float32 arithmetic on the
        # same numbers, batched otherwise.
        distance = (of_image[:, detections.pred_classes] / detections.scores - 1).abs()  # (R, D)
        assert distance.amin(dim=0).max() < 1e-5


@each_loss
@torch.no_grad()
def test_regions_are_scored_by_the_loss(loss):
    keys = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": loss}
    predictor = build("faster", keys).eval().roi_heads.box_predictor
    predictions = predictor(torch.randn(7, predictor.cls_score.in_features))
    proposals = [Instances((9, 9), proposal_boxes=Boxes(torch.zeros(n, 4))) for n in (3, 4)]
    probabilities = torch.cat(predictor.predict_probs(predictions, proposals))
    assert probabilities.shape == (7, NUM_CLASSES + 1)
    expected = predictor.criterion.classification_loss.scores(predictions[0])
    torch.testing.assert_close(probabilities[:, :NUM_CLASSES], expected, rtol=0, atol=0)


REFUSALS = {
    "softmax on objectness": (FASTER, "RPN.CLASSIFICATION_LOSS", "CrossEntropyLoss", "softmax"),
    "frequency on objectness": (
        FASTER,
        "RPN.CLASSIFICATION_LOSS",
        "EqualizationLoss",
        "objectness",
    ),
    "IoU of points": (FCOS, "DENSE.SAMPLER", "IoUBalancedSampler", "points of FCOS"),
    "unknown loss": (RETINANET, "DENSE.CLASSIFICATION_LOSS", "FocalLos", "FocalLoss, GHMClass"),
    "unknown box loss": (FASTER, "ROI_HEADS.BOX_LOSS", "L2", "SmoothL1Loss"),
    "unknown sampler": (FASTER, "RPN.SAMPLER", "random", "RandomSampler"),
    "unknown threshold": (RETINANET, "DENSE.SCORE_THRESHOLD", "adaptive", "ClassAdaptiveThreshold"),
    "impossible prior": (RETINANET, "DENSE.PRIOR_PROB", 1.0, "DENSE.PRIOR_PROB.*between 0 and 1"),
    "prior of no use": (RETINANET, "DENSE.PRIOR_PROB", 0.0, "DENSE.PRIOR_PROB.*between 0 and 1"),
    "prior of objectness": (FASTER, "RPN.PRIOR_PROB", 2.0, "RPN.PRIOR_PROB.*between 0 and 1"),
    "prior beyond 1 / K": (FASTER, "ROI_HEADS.PRIOR_PROB", 0.5, "ROI_HEADS.PRIOR_PROB.*and 0.2"),
}


@pytest.mark.parametrize("keys, key, value, names", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused_in_one_sentence(keys, key, value, names):
    with pytest.raises(InputError, match=names) as refused:
        build_model(config(keys, {f"BALANCE.{key}": value}))
    assert_one_sentence(refused.value)


@pytest.mark.parametrize(
    "keys, key, value",
    [
        (RETINANET, "MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.5),
        (RETINANET, "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.3),
        (RETINANET, "MODEL.RETINANET.PRIOR_PROB", 0.1),
        (FASTER, "MODEL.RPN.SMOOTH_L1_BETA", 0.3),
        (FASTER, "MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
        (FASTER, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
        (FASTER, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
    ],
)
def test_detectron2_keys_that_are_replaced_are_refused(keys, key, value):
    with pytest.raises(InputError, match=f"{key}.*set BALANCE") as refused:
        build_model(config(keys, {key: value}))
    assert_one_sentence(refused.value)


def assert_one_sentence(error):
    message = str(error)
    assert message.endswith(".") and ". " not in message and "\n" not in message


def train_worker(rank):
    return {name: train_ten_steps(rank, name) for name in ("retinanet", "faster")}


def train_ten_steps(rank, name):
    """Train on this worker's own images; return scales, foreground rows, weights, largest move."""
    model = build(name, SAMPLING_FREE)
    start = model.state_dict()["backbone.fpn_output3.weight"].clone()
    replica = DistributedDataParallel(model, broadcast_buffers=False)
    # The network is random and without normalization: a larger rate makes it diverge.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0001, momentum=0.9)
    scales, num_foreground = [], []
    for i in range(10):
        # One worker's images are nearly empty, and at one step hold nothing.
        inputs = batch([(i % 3, 0), (4, 3)][rank], seed=10 * rank + i)
        optimizer.zero_grad()
        with EventStorage(), recorded_rows(criteria(model)[0]) as calls:
            losses = replica(inputs)
        sum(losses.values()).backward()
        optimizer.step()
        scales.append([c.monitored["guided_scale"].item() for c in criteria(model)])
        labels = calls[0][1]
        num_foreground.append(foreground(labels, criteria(model)[0].num_classes).sum().item())
    moved = model.state_dict()["backbone.fpn_output3.weight"] - start
    return scales, num_foreground, model.state_dict(), moved.abs().max().item()


@pytest.fixture(scope="module")
def two_workers():
    return run_workers(train_worker)


@pytest.mark.parametrize("name", ["retinanet", "faster"])
def test_two_workers_share_the_guided_scale_and_end_with_equal_weights(name, two_workers):
    first, second = (results[name] for results in two_workers)
    scales, rows, weights, moved = first
    other_scales, other_rows, other_weights, _ = second
    assert all(a < b for a, b in zip(rows, other_rows, strict=True)) and 0 in rows
    assert scales == other_scales
    assert all(s != 1 for step in scales for s in step)
    assert moved > 0
    for key, weight in weights.items():
        assert torch.equal(weight, other_weights[key]), key


@each_detector
def test_evaluation_with_gradients_gives_detections_that_can_be_changed_in_place(name):
    model = build(name).eval()
    inputs = [dict(x, height=48, width=64) for x in batch()]  # which scales and clips boxes
    for output in model(inputs):
        assert output["instances"].image_size == (48, 64)


def box_gradients_of_points(model, inputs):
    """Return the box loss's gradient at the distances of the foreground points, (F, 4)."""
    kept = []
    hook = model.head.bbox_pred.register_forward_hook(lambda *call: kept.append(call[-1]))
    images = model.preprocess_image(inputs)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    instances = [x["instances"] for x in inputs]
    is_foreground = foreground(model.label_rows(features, instances), model.num_classes)
    with EventStorage():
        loss = model.forward_training(images, features, model.head(features), instances)
    hook.remove()
    gradients = torch.autograd.grad(loss["loss_fcos_loc"], kept)
    return torch.cat([level_rows(g, 4).flatten(1, 3) for g in gradients], dim=1)[is_foreground]


def test_points_that_start_with_a_distance_learn_every_side_of_their_boxes():
    inputs = batch((3, 3))
    # A distance below zero is cut off: at Detectron2's start, around zero, half of them are, and
    # of a box that is empty for that no side has a gradient.
    gradients = box_gradients_of_points(build("fcos"), inputs)
    assert len(gradients) > 10
    assert (gradients == 0).float().mean() > 0.5
    # A side beyond its target and one short of it are pulled alike; none stands still.
    gradients = box_gradients_of_points(build("fcos", {"MODEL.FCOS.INITIAL_DISTANCE": 2.0}), inputs)
    assert (gradients != 0).all()


def test_a_point_starts_with_a_box_of_the_distance_that_is_configured():
    model = build("fcos", {"MODEL.FCOS.INITIAL_DISTANCE": 2.0})
    channels = model.head.bbox_pred.in_channels
    # Without features only the bias is left.
    deltas = model.head.bbox_pred(torch.zeros(1, channels, 1, 1)).flatten(1)
    point = torch.tensor([[-4.0, -4.0, 4.0, 4.0]])  # of a level with a stride of 8
    boxes = model.box2box_transform.apply_deltas(deltas, point)
    assert boxes.tolist() == [[-16.0, -16.0, 16.0, 16.0]]


def test_a_point_cannot_start_with_a_distance_that_is_cut_off():
    arguments = BalancedFCOS.from_config(config(DETECTORS["fcos"]))
    with pytest.raises(InputError, match="initial_distance must be above 0, not -1"):
        BalancedFCOS(**{**arguments, "initial_distance": -1.0})


def test_objectness_needs_no_classes():
    model = build("faster")
    inputs = batch()
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    losses = []
    for with_classes in (True, False):
        instances = [x["instances"] for x in inputs]
        if not with_classes:
            instances = [Instances(x.image_size, gt_boxes=x.gt_boxes) for x in instances]
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model.proposal_generator(images, features, instances)[1])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["retinanet", "faster"])
def test_a_threshold_set_on_a_built_model_takes_effect_or_is_refused(name):
    part = "DENSE" if name == "retinanet" else "ROI_HEADS"
    model = build(name).eval()
    owner = model if name == "retinanet" else model.roi_heads.box_predictor
    for threshold in (0.0, 1.1):
        owner.test_score_thresh = threshold
        found = [len(x["instances"]) for x in model(batch())]
        assert (max(found) > 0) == (threshold == 0)
    counted = build(name, {f"BALANCE.{part}.SCORE_THRESHOLD": "ForegroundThreshold"})
    owner = counted if name == "retinanet" else counted.roi_heads.box_predictor
    with pytest.raises(InputError, match="ForegroundThreshold, which is counted"):
        owner.test_score_thresh = 0.5


def test_boxes_are_encoded_as_detectron2_encodes_them():
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(2, 50, 2, generator=generator)
    sources, targets = torch.cat(
        [corners, corners + 1 + 90 * torch.rand(2, 50, 2, generator=generator)], dim=2
    )
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    ours = WaitlessTransform(transform)
    assert torch.equal(ours.get_deltas(sources, targets), transform.get_deltas(sources, targets))
    assert ours.get_deltas(sources[:0], targets[:0]).shape == (0, 4)
