"""Detections against Detectron2's own inference code. Every equality is exact.

Two choices that Detectron2 leaves to chance are made for it. Its batched_nms adds offsets to boxes
where they are few, which rounds coordinates; here it suppresses one group at a time
(``detectron2_exactly``). Its dense heads take candidates by ``topk``, which may return any order of
equal scores; here the smaller index comes first. Where neither matters it runs as it is.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import fcos, retinanet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, fast_rcnn
from detectron2.structures import Boxes, Instances
from models import CASCADE, FASTER, FCOS, RETINANET, batch, config
from test_nms import one_group_at_a_time

from balanced_det.detectors import inference
from balanced_det.detectors.inference import dense_detections, region_detections, stable_topk
from balanced_det.losses import CLASSIFICATION_LOSSES

TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
NUM_CLASSES = 9
THRESHOLDS = {
    "0": 0.0,
    "1e-4": 1e-4,
    "0.3": 0.3,
    "by class": torch.logspace(-5, -0.3, NUM_CLASSES)[torch.randperm(NUM_CLASSES)],
}
LOGITS = ["random", "trained", "equal"]


@pytest.fixture
def detectron2_exactly(monkeypatch):
    for module in (fast_rcnn, retinanet, fcos):
        monkeypatch.setattr(module, "batched_nms", one_group_at_a_time)

    def topk(tensor, k):
        order = tensor.sort(descending=True, stable=True)
        return order.values[:k], order.indices[:k]

    return lambda: monkeypatch.setattr(torch.Tensor, "topk", topk)


@pytest.fixture
def one_sigmoid(monkeypatch):
    """A sigmoid that depends on its argument alone.

    On a CPU torch computes most of a tensor by vector instructions and the last few numbers one by
    one, which differs in the last bit: the same logit has two scores in tensors of two lengths.
    Rounded from float64, where the bit is far below those that are kept, it has one.
    """
    plain = torch.Tensor.sigmoid

    def sigmoid(tensor):
        return plain(tensor.double()).to(tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "sigmoid", sigmoid)
    monkeypatch.setattr(torch.Tensor, "sigmoid_", lambda tensor: tensor.copy_(sigmoid(tensor)))


def make_logits(kind, *shape):
    logits = 3 * torch.randn(shape) - 2
    if kind == "trained":  # nearly all of them sure that there is nothing
        logits = torch.where(torch.rand(shape) < 0.02, logits + 3, logits - 8)
    if kind == "equal":  # few values, and sigmoids of exactly 1 and 0
        logits = (logits / 2).round() * 2
        logits = torch.where(logits.abs() > 6, 40 * logits, logits)
    return logits


def make_proposals(counts):
    proposals = []
    for i, count in enumerate(counts):
        size = (90 + 10 * i, 120)
        corner, extent = 80 * torch.rand(count, 2), 4 + 40 * torch.rand(count, 2)
        boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        proposals.append(Instances(size, proposal_boxes=boxes))
    return proposals


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.image_size == b.image_size
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def detectron2_region(scores, deltas, proposals, threshold, nms_threshold, limit):
    sizes = [len(p) for p in proposals]
    sources = torch.cat([p.proposal_boxes.tensor for p in proposals])
    return fast_rcnn.fast_rcnn_inference(
        TRANSFORM.apply_deltas(deltas, sources).split(sizes),
        torch.nn.functional.pad(scores, (0, 1)).split(sizes),
        [p.image_size for p in proposals],
        threshold,
        nms_threshold,
        limit,
    )


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("limit", [7, 300, -1])
def test_region_detections_are_detectron2s(detectron2_exactly, kind, threshold, agnostic, limit):
    torch.manual_seed(0)
    proposals = make_proposals((40, 0, 25))
    scores = make_logits(kind, 65, NUM_CLASSES).sigmoid()
    deltas = torch.randn(65, 4 if agnostic else 4 * NUM_CLASSES)
    threshold = THRESHOLDS[threshold]
    expected = detectron2_region(scores, deltas, proposals, threshold, 0.4, limit)
    for num_candidates in (1, 20, 5000):
        detections, rows = region_detections(
            scores,
            deltas,
            proposals,
            TRANSFORM,
            score_threshold=threshold,
            nms_threshold=0.4,
            detections_per_image=limit,
            num_candidates=num_candidates,
        )
        assert_same(detections, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(rows, expected[1], strict=True))


def test_region_detections_are_detectron2s_as_it_is():
    # Whole coordinates, that offsets between classes leave exact, and no equal scores.
    torch.manual_seed(0)
    proposals = make_proposals((80,))
    proposals[0].proposal_boxes.tensor.round_()
    scores, deltas = torch.rand(80, NUM_CLASSES), torch.zeros(80, 4 * NUM_CLASSES)
    expected, _ = detectron2_region(scores, deltas, proposals, 0.1, 0.5, 50)
    detections, _ = region_detections(
        scores,
        deltas,
        proposals,
        TRANSFORM,
        score_threshold=0.1,
        nms_threshold=0.5,
        detections_per_image=50,
    )
    assert_same(detections, expected)


@pytest.mark.parametrize("agnostic", [False, True])
def test_proposals_with_a_number_that_is_not_finite_have_no_detections(
    detectron2_exactly, agnostic
):
    torch.manual_seed(0)
    proposals = make_proposals((30, 30))
    scores = make_logits("random", 60, NUM_CLASSES).sigmoid()
    deltas = torch.randn(60, 4 if agnostic else 4 * NUM_CLASSES)
    scores[3, 2], scores[31, 0] = torch.nan, torch.inf
    # The last one is clamped to a finite size, as Detectron2 does.
    for row, column, value in [(5, 0, "nan"), (6, 1, "inf"), (35, 3, "nan"), (40, 1, "3e38")]:
        deltas[row, column - 4] = float(value)
    deltas[41, 2], deltas[42, 3] = torch.inf, -torch.inf
    proposals[1].proposal_boxes.tensor[20, 1] = torch.nan
    expected, _ = detectron2_region(scores, deltas, proposals, 0.01, 0.5, 1000)
    detections, rows = region_detections(
        scores,
        deltas,
        proposals,
        TRANSFORM,
        score_threshold=0.01,
        nms_threshold=0.5,
        detections_per_image=1000,
    )
    assert_same(detections, expected)
    assert not set(rows[0].tolist()) & {3, 5, 6} and not set(rows[1].tolist()) & {1, 5, 20}


def test_no_proposals_at_all():
    detections, rows = region_detections(
        torch.zeros(0, NUM_CLASSES),
        torch.zeros(0, 4 * NUM_CLASSES),
        make_proposals((0, 0)),
        TRANSFORM,
        score_threshold=0.0,
        nms_threshold=0.5,
        detections_per_image=100,
    )
    assert [len(d) for d in detections] == [len(r) for r in rows] == [0, 0]


def untrained(choice, **keys):
    # torch's sigmoid may differ in the last bit by where a number stands in its tensor, and ours
    # takes all images at once: of these weights' detections none does.
    torch.manual_seed(2)
    return build_model(config(choice, keys)).eval()


@pytest.mark.parametrize("loss", ["BinaryCrossEntropyLoss", "CrossEntropyLoss"])
@torch.no_grad()
def test_a_box_predictor_infers_as_its_parent_does(detectron2_exactly, loss):
    model = untrained(FASTER, **{"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": loss})
    predictor = model.roi_heads.box_predictor
    predictor.score_threshold.fixed = 1e-4
    proposals = make_proposals((50, 30))
    logits = make_logits("equal", 80, predictor.criterion.num_logits)
    predictions = (logits, torch.randn(80, 4 * predictor.num_classes))
    ours, our_rows = predictor.inference(predictions, proposals)
    theirs, their_rows = FastRCNNOutputLayers.inference(predictor, predictions, proposals)
    assert_same(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(our_rows, their_rows, strict=True))


@torch.no_grad()
def test_a_cascade_infers_as_its_parent_does(detectron2_exactly):
    model = untrained(CASCADE)
    heads = model.roi_heads
    for predictor in heads.box_predictor:
        predictor.score_threshold.fixed = 1e-4
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.2)
    images = model.preprocess_image(batch())
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features)
    ours = heads._forward_box(features, proposals)
    assert all(len(d) for d in ours)
    assert_same(ours, CascadeROIHeads._forward_box(heads, features, proposals))


def make_dense(kind, num_logits, num_anchors, num_images=2):
    """The heads' outputs on two levels of 9 x 12 and 5 x 6 locations, and their anchors."""
    shapes = [(9, 12), (5, 6)]
    anchors = []
    for stride, (h, w) in zip((8, 16), shapes, strict=True):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        center = stride * (torch.stack([x, y], dim=-1).reshape(-1, 1, 2) + 0.5)
        size = stride * (1.5 + torch.arange(num_anchors)).view(1, -1, 1)
        boxes = torch.cat([center - size, center + size], dim=-1).reshape(-1, 4)
        anchors.append(Boxes(boxes))
    logits = [make_logits(kind, num_images, num_anchors * num_logits, *s) for s in shapes]
    deltas = [torch.randn(num_images, num_anchors * 4, *s) for s in shapes]
    centerness = [2 * torch.randn(num_images, num_anchors, *s) for s in shapes]
    if kind == "equal":
        centerness = [c.round() for c in centerness]
    return anchors, logits, deltas, centerness


def detectron2_dense(model, anchors, logits, deltas, centerness, sizes):
    rows = [permute_to_N_HWA_K(x, model.criterion.num_logits) for x in logits]
    scores = [model.criterion.scores(x) for x in rows]
    if centerness is not None:
        centers = [permute_to_N_HWA_K(x, 1).sigmoid() for x in centerness]
        scores = [(x * c).sqrt() for x, c in zip(scores, centers, strict=True)]
    deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]
    parent = retinanet.RetinaNet if centerness is None else fcos.FCOS
    return [
        parent.inference_single_image(
            model, anchors, [x[i] for x in scores], [x[i] for x in deltas], size
        )
        for i, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def dense_models():
    softmax = {"BALANCE.DENSE.CLASSIFICATION_LOSS": "CrossEntropyLoss"}
    classes = {"MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES, "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES}
    return {
        "retinanet": untrained(RETINANET, **classes),
        "retinanet, softmax": untrained(RETINANET, **classes, **softmax),
        "fcos": untrained(FCOS, **classes),
    }


def infer(model, anchors, logits, deltas, centerness, sizes):
    return dense_detections(
        anchors,
        logits,
        deltas,
        sizes,
        model.criterion,
        model.box2box_transform,
        score_threshold=model.test_score_thresh,
        topk_per_level=model.test_topk_candidates,
        nms_threshold=model.test_nms_thresh,
        detections_per_image=model.max_detections_per_image,
        centerness=centerness,
    )


@pytest.mark.parametrize("name", ["retinanet", "retinanet, softmax", "fcos"])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("topk", [13, 1000])
@torch.no_grad()
def test_dense_detections_are_detectron2s(
    detectron2_exactly, one_sigmoid, monkeypatch, dense_models, name, kind, threshold, topk
):
    torch.manual_seed(0)
    model = dense_models[name]
    monkeypatch.setattr(type(model), "test_score_thresh", THRESHOLDS[threshold])
    model.test_topk_candidates, model.max_detections_per_image = topk, 60
    num_anchors = 1 if name == "fcos" else 3
    *head, centerness = make_dense(kind, model.criterion.num_logits, num_anchors)
    centerness = centerness if name == "fcos" else None
    sizes = [(72, 96), (70, 90)]
    ours = infer(model, *head, centerness, sizes)
    detectron2_exactly()  # Its topk keeps the order of equal scores from here on.
    assert_same(ours, detectron2_dense(model, *head, centerness, sizes))
    if threshold == "1e-4":
        assert all(len(d) for d in ours)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@torch.no_grad()
def test_dense_scores_that_are_not_numbers_are_no_detections(
    detectron2_exactly, one_sigmoid, dense_models, name
):
    torch.manual_seed(0)
    model = dense_models[name]
    model.test_topk_candidates, model.max_detections_per_image = 5, 60
    *head, centerness = make_dense("random", NUM_CLASSES, 1 if name == "fcos" else 3)
    head[1][0][0, 4] = torch.nan  # One class of all locations of a level.
    head[1][1][1, :, 2] = torch.inf
    centerness = centerness if name == "fcos" else None
    sizes = [(72, 96), (70, 90)]
    ours = infer(model, *head, centerness, sizes)
    detectron2_exactly()
    assert_same(ours, detectron2_dense(model, *head, centerness, sizes))


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
@torch.no_grad()
def test_a_dense_detector_infers_as_its_parent_does(
    detectron2_exactly, one_sigmoid, monkeypatch, dense_models, name
):
    model = dense_models[name]
    parent = {"retinanet": retinanet.RetinaNet, "fcos": fcos.FCOS}[name]
    monkeypatch.setattr(type(model), "test_score_thresh", 1e-3)
    images = model.preprocess_image(batch())
    features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
    predictions = [list(x) for x in model.head(features)]
    ours = model.forward_inference(images, features, predictions)
    detectron2_exactly()
    assert_same(ours, parent.forward_inference(model, images, features, predictions))
    assert all(len(d) for d in ours)


def test_best_k_are_those_of_a_stable_sort():
    torch.manual_seed(0)
    scores = torch.randint(-1, 8, (3, 500)).float() / 7
    scores[scores < 0] = inference.ABSENT
    scores[0, :9] = torch.tensor([1.0, 1 - 2**-24, 2**-149, 0.0, 2**-126, 1.0, 0.0, -1.0, 1e-30])
    expected = scores.sort(dim=1, descending=True, stable=True)
    for k in (0, 1, 17, 400):
        best, index = stable_topk(scores, k)
        # The order of those that are absent is nobody's.
        index = index.where(best >= 0, 0)
        assert torch.equal(best, expected.values[:, :k])
        assert torch.equal(index, expected.indices[:, :k].where(best >= 0, 0))


@pytest.mark.parametrize("name", sorted(CLASSIFICATION_LOSSES.names()))
def test_what_a_loss_says_of_the_order_of_its_scores_is_true(name):
    loss_class = CLASSIFICATION_LOSSES.get(name)  # scores() needs nothing of an instance
    if not loss_class.scores_rise_with_logits:
        pytest.skip("ranks by scores")
    torch.manual_seed(0)
    loss = loss_class.__new__(loss_class)
    logits = 20 * torch.randn(50, 6)
    scores = loss.scores(logits)
    order = logits.flatten().argsort()
    assert (scores.flatten()[order].diff() >= 0).all()
    # One and the same function: of a column alone too. (Where a tensor has gaps, torch's sigmoid on
    # the CPU takes another way, which may differ in the last bit. What is scored has none.)
    assert torch.equal(loss.scores(logits[:, 3:4].contiguous()), scores[:, 3:4])


@torch.no_grad()
@pytest.mark.parametrize(
    "keys", [RETINANET, FCOS, FASTER, CASCADE], ids=["retinanet", "fcos", "faster", "cascade"]
)
def test_models_of_float64_detect_as_those_of_float32(keys):
    torch.manual_seed(0)
    model = build_model(config(keys)).eval()
    found = model(batch((2, 3)))
    for ours, exact in zip(found, model.double()(batch((2, 3))), strict=True):
        # Rounding of 1e-7 in each of some 60 layers; equal scores may swap their boxes.
        scores, expected = ours["instances"].scores, exact["instances"].scores
        torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=0)
