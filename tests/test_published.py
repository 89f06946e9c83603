"""What the fragments called ``..._published`` train, against the published algorithms written anew.

The formulations here loop over levels, bins and images with Detectron2's own matching, and share
nothing with the losses but the head's output.
"""

import math

import pytest
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from models import batch
from shipped_configs import FOLDER
from torch.nn import functional as F

import balanced_det.build
from balanced_det.build import build_model
from balanced_det.config import load_config
from balanced_det.errors import InputError
from balanced_det.selection import Quota, Rows

# Both sides compute in float32, but sum in another order.
NUM_CLASSES = 20  # of the base configs
TOLERANCE = dict(rtol=3e-6, atol=1e-7)


def build(base, *fragments, **keys):
    path = str(FOLDER / f"{base}.yaml")
    torch.manual_seed(0)
    cfg = load_config(path, fragments=fragments, MODEL__DEVICE="cpu", **keys)
    return build_model(cfg, count=False).train()


def losses_of(model, inputs):
    with EventStorage():
        return model(inputs)


def is_foreground(labels):
    return (labels >= 0) & (labels < NUM_CLASSES)


class DenseRows:
    """The rows of a RetinaNet's batch, by level, as Detectron2 labels them.

    Attributes:
        levels: one (logits (N, R, K), labels (N, R), deltas, target deltas (N, R, 4)) a level.
        anchors: Detectron2's ``Boxes`` of each level.
        num_foreground: of all levels.
    """

    def __init__(self, model, inputs):
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        anchors = model.anchor_generator(features)
        logits, deltas = model._transpose_dense_predictions(
            model.head(features), [model.num_classes, 4]
        )
        targets = [x["instances"] for x in inputs]
        labels, boxes = RetinaNet.label_anchors(model, anchors, targets)
        sources = Boxes.cat(anchors).tensor
        wanted = torch.stack([model.box2box_transform.get_deltas(sources, b) for b in boxes])
        sizes = [len(a) for a in anchors]
        labels = torch.stack(labels)
        self.levels = list(
            zip(logits, labels.split(sizes, 1), deltas, wanted.split(sizes, 1), strict=True)
        )
        self.anchors = anchors
        self.num_foreground = int(is_foreground(labels).sum())

    def of_images(self):
        """Return the logits and the deltas of all levels, (N, R, K) and (N, R, 4)."""
        logits, _, deltas, _ = zip(*self.levels, strict=True)
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


class PublishedGHM:
    """GHM's published loss: one moving average, updated by every call in the bins that it hits."""

    def __init__(self, bins, momentum):
        self.bins, self.momentum, self.average = bins, momentum, [0.0] * bins

    def __call__(self, lengths, losses):
        """Return the loss of one call, of the numbers that take part, flat."""
        place = (lengths * self.bins).long().clamp(max=self.bins - 1)
        total, occupied = 0.0, 0
        for index in range(self.bins):
            inside = place == index
            count = int(inside.sum())
            if count:
                occupied += 1
                kept = self.momentum * self.average[index]
                self.average[index] = kept + (1 - self.momentum) * count
                total = total + losses[inside].sum() / self.average[index]
        return total / max(occupied, 1)


def ghm_terms(x, labels, deltas, wanted):
    """Return (lengths, losses) of GHM-C and of GHM-R, of one level."""
    takes_part = labels >= 0
    target = F.one_hot(labels.clamp(min=0), x.shape[-1] + 1)[..., :-1].to(x)[takes_part]
    x = x[takes_part]
    classes = (
        (x.detach().sigmoid() - target).abs(),
        F.binary_cross_entropy_with_logits(x, target, reduction="none"),
    )
    error = (deltas - wanted)[is_foreground(labels)]
    root = (error**2 + 0.02**2).sqrt()
    return classes, ((error.abs() / root).detach(), root - 0.02)


def test_ghm_published_is_called_once_a_level():
    model = build("shapes/retinanet", "ghmc_ghmr_published")
    classification, regression = PublishedGHM(30, 0.75), PublishedGHM(10, 0.7)
    for seed in range(3):
        inputs = batch((2, 3), seed)
        expected = {"loss_cls": 0.0, "loss_box_reg": 0.0}
        for level in DenseRows(model, inputs).levels:
            classes, boxes = ghm_terms(*level)
            expected["loss_cls"] += classification(*classes)
            expected["loss_box_reg"] += 10 * regression(*boxes)
        for name, loss in losses_of(model, inputs).items():
            # GHM-R's root - mu loses three digits to cancellation in the formulation here.
            torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=0)


def test_ghmc_published_divides_the_box_loss_by_the_batch_s_own_foreground():
    model = build("shapes/retinanet", "ghmc_published")
    for seed in range(2):
        inputs = batch((2, 3), seed)
        rows = DenseRows(model, inputs)
        total = 0.0
        for _, labels, deltas, wanted in rows.levels:
            error = (deltas - wanted)[is_foreground(labels)].abs()
            total += torch.where(error < 0.11, error**2 / 0.22, error - 0.055).sum()
        expected = total / rows.num_foreground
        torch.testing.assert_close(losses_of(model, inputs)["loss_box_reg"], expected, **TOLERANCE)


def smooth_l1(error, beta):
    return torch.where(error < beta, error**2 / (2 * beta), error - beta / 2)


def test_sampling_free_retinanet_published_has_the_official_losses():
    model = build("shapes/retinanet", "sampling_free_published")
    for seed in range(2):
        inputs = batch((2, 3), seed)
        boxes = classes = 0.0
        num_between = num_foreground = 0
        rows = DenseRows(model, inputs)
        anchors, images = Boxes.cat(rows.anchors), zip(inputs, *rows.of_images(), strict=True)
        for record, x, deltas in images:
            objects = record["instances"]
            ious = pairwise_iou(objects.gt_boxes, anchors)  # (M, R)
            best, matched = ious.max(dim=0)
            positive = best >= 0.5
            positive |= (ious == ious.amax(dim=1, keepdim=True)).any(dim=0)
            num_between += int(((best >= 0.4) & ~positive).sum())
            num_foreground += int(positive.sum())
            wanted = encoded(anchors.tensor[positive], objects.gt_boxes.tensor[matched[positive]])
            boxes += smooth_l1((deltas[positive] - wanted).abs(), 0.11).sum()
            target = torch.zeros_like(x)
            target[positive, objects.gt_classes[matched[positive]]] = 1
            # All rows: those between the thresholds are negatives of every class.
            classes += F.binary_cross_entropy_with_logits(x, target, reduction="sum")
        assert num_between and num_foreground
        boxes = boxes / (4 * num_foreground)
        classes = classes / (num_foreground + 2)  # by images, too; the guide takes it out again
        expected = {"loss_box_reg": boxes, "loss_cls": classes * (boxes / classes).detach()}
        losses = losses_of(model, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value, **TOLERANCE)
        assert_equal_gradients(model, losses, expected)


def encoded(sources, boxes, weights=(10.0, 10.0, 5.0, 5.0)):
    """Return the deltas (F, 4) from sources to boxes, as R-CNN defines them (1311.2524)."""
    size, wanted = (x[:, 2:] - x[:, :2] for x in (sources, boxes))
    shift = (boxes[:, :2] + boxes[:, 2:] - sources[:, :2] - sources[:, 2:]) / (2 * size)
    return torch.cat([shift, (wanted / size).log()], dim=1) * torch.tensor(weights)


def assert_equal_gradients(model, losses, expected):
    found, wanted = (
        torch.autograd.grad(sum(x.values()), list(model.head.parameters()), retain_graph=True)
        for x in (losses, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        # Float32 rounding of sums over all rows, relative to the largest number of a parameter.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_sampling_free_retinanet_published_detects_as_the_official_code():
    model = build("shapes/retinanet", "sampling_free_published")
    assert model.test_nms_thresh == 0.55
    model.score_threshold.set_row_counts(3, 10_000)
    # The prior N_f / (N K), times the classes with background; below the floor of our threshold.
    assert model.test_score_thresh.tolist() == pytest.approx([3e-4 / 20 * 21] * 20, rel=1e-6)


def test_sampling_free_rpn_published_has_the_official_losses():
    model = build("shapes/faster_rcnn", "sampling_free_published")
    assert model.roi_heads.box_predictor.test_score_thresh == 0.0001
    rpn, inputs = model.proposal_generator, batch((2, 3))
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    objects = [x["instances"] for x in inputs]
    with EventStorage():
        losses = rpn(images, features, objects)[1]

    features = [features[name] for name in rpn.in_features]
    anchors = Boxes.cat(rpn.anchor_generator(features))
    logits, deltas = rpn.rpn_head(features)
    logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits], dim=1)  # (N, R)
    deltas = torch.cat(
        [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas], dim=1
    )
    inside = ((anchors.tensor >= 0) & (anchors.tensor < torch.tensor([128, 96, 128, 96]))).all(
        dim=1
    )
    labels, found, wanted = [], [], []
    for x, of_image in zip(objects, deltas, strict=True):
        matched, kind = rpn.anchor_matcher(pairwise_iou(x.gt_boxes, anchors))
        kind = kind.where(inside, -1)
        labels.append(kind)
        positive = kind == 1
        boxes = x.gt_boxes.tensor[matched[positive]]
        found.append(of_image[positive])
        wanted.append(encoded(anchors.tensor[positive], boxes, (1.0,) * 4))
    labels = torch.stack(labels)
    assert ((labels == -1) & ~inside).any() and (labels == 1).any()
    boxes = 0.5 * smooth_l1((torch.cat(found) - torch.cat(wanted)).abs(), 1 / 9).mean()
    torch.testing.assert_close(losses["loss_rpn_loc"], boxes, **TOLERANCE)
    valid = labels >= 0
    classes = F.binary_cross_entropy_with_logits(logits[valid], labels[valid].float())
    torch.testing.assert_close(losses["loss_rpn_cls"], boxes, **TOLERANCE)  # guided to its size
    gradient = torch.autograd.grad(losses["loss_rpn_cls"], logits_layer(rpn), retain_graph=True)
    expected = torch.autograd.grad(classes * (boxes / classes).detach(), logits_layer(rpn))
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def logits_layer(rpn):
    return list(rpn.rpn_head.objectness_logits.parameters())


def test_sampling_free_region_head_published_has_the_official_losses():
    predictor = build("shapes/faster_rcnn", "sampling_free_published").roi_heads.box_predictor
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 21, generator=generator).requires_grad_()
    deltas = torch.randn(9, 80, generator=generator).requires_grad_()
    labels = torch.tensor([20, 3, 20, 7, 20, 20, 3, 20, 19])
    corner = 60 * torch.rand(9, 2, generator=generator)
    size = 16 + 30 * torch.rand(9, 2, generator=generator)
    sources = torch.cat([corner, corner + size], dim=1)
    targets = sources + torch.randn(9, 4, generator=generator)
    proposals = Instances(
        (96, 128), proposal_boxes=Boxes(sources), gt_classes=labels, gt_boxes=Boxes(targets)
    )
    with EventStorage():
        losses = predictor.losses((logits, deltas), [proposals])
    rows = [1, 3, 6, 8]
    own = deltas.view(9, 20, 4)[rows, labels[rows]]
    boxes = smooth_l1((own - encoded(sources[rows], targets[rows])).abs(), 1.0).mean()
    torch.testing.assert_close(losses["loss_box_reg"], boxes, **TOLERANCE)
    torch.testing.assert_close(losses["loss_cls"], 2 * boxes, **TOLERANCE)
    classes = F.cross_entropy(logits, labels)
    expected = torch.autograd.grad(2 * classes * (boxes / classes).detach(), logits)[0]
    found = torch.autograd.grad(losses["loss_cls"], logits)[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("part", ["RPN", "ROI_HEADS"])
@pytest.mark.parametrize(
    "slot, loss",
    [("CLASSIFICATION_LOSS", "GHMClassificationLoss"), ("BOX_LOSS", "GHMRegressionLoss")],
)
def test_levels_one_by_one_are_refused_where_rows_have_none(part, slot, loss):
    keys = {f"BALANCE__{part}__{slot}": loss, f"BALANCE__{loss}__PER_LEVEL": True}
    with pytest.raises(InputError, match=f"BALANCE.{loss}.PER_LEVEL: the losses of {part}"):
        build("shapes/faster_rcnn", **keys)


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(InputError, match="NORMALIZER is 'sum'; known are: average, batch"):
        build("shapes/retinanet", BALANCE__DENSE__NORMALIZER="sum")


def test_libra_retinanet_published_has_the_official_losses():
    model = build("shapes/retinanet", "libra_published")
    # Uniform within sqrt(6 / (64 + 64)); of 4,096 draws some come near the bound.
    assert 0.21 < model.backbone.refine.out.weight.abs().max() <= (6 / 128) ** 0.5
    inputs = batch((2, 3))
    rows = DenseRows(model, inputs)
    boxes = classes = 0.0
    b = math.exp(1.5 / 0.5) - 1
    for x, labels, deltas, wanted in rows.levels:
        error = (deltas - wanted)[is_foreground(labels)].abs()
        near = 0.5 / b * (b * error + 1) * torch.log(b * error / 0.11 + 1) - 0.5 * error
        boxes += torch.where(error < 0.11, near, 1.5 * error + 1.5 / b - 0.5 * 0.11).sum()
        takes_part = labels >= 0
        target = F.one_hot(labels.clamp(min=0), NUM_CLASSES + 1)[..., :-1].to(x)[takes_part]
        classes += focal(x[takes_part], target)
    losses = losses_of(model, inputs)
    torch.testing.assert_close(losses["loss_box_reg"], boxes / rows.num_foreground, **TOLERANCE)
    torch.testing.assert_close(losses["loss_cls"], classes / rows.num_foreground, **TOLERANCE)


def focal(x, target):
    """Return the focal loss of gamma 2 and alpha 1/4 (1708.02002, Eq. 5), summed."""
    p = torch.where(target == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha = torch.where(target == 1, 0.25, 0.75)
    return -(alpha * (1 - p) ** 2 * p.log()).sum()


def test_libra_r_cnn_published_starts_its_pyramid_by_xavier_s_rule():
    model = build("shapes/faster_rcnn", "libra_published")
    for layer in (getattr(model.backbone.refine, name) for name in ("theta", "phi", "g", "out")):
        assert 0.21 < layer.weight.abs().max() <= (6 / 128) ** 0.5 and not layer.bias.any()
    assert model.roi_heads.box_predictor.criterion.box_losses[0].beta == 1


def test_libra_r_cnn_published_takes_background_from_ranges_that_reach_to_one():
    sampler = build("shapes/faster_rcnn", "libra_published").roi_heads.selection.sampler
    # An object itself, of IoU 1, and 200 rows of background each of IoU 0, 0.2 and 0.4.
    labels = torch.tensor([[3] + [NUM_CLASSES] * 600])
    ious = torch.tensor([[1.0] + [0.0] * 200 + [0.2] * 200 + [0.4] * 200])
    rows = Rows(labels, NUM_CLASSES, ious, torch.zeros_like(labels))
    taken, repeats = torch.zeros(601), 100
    for _ in range(repeats):
        taken += sampler(rows, Quota(91, 0.25))[0]
    none, low, high = (taken[ious[0] == iou].sum().item() / repeats for iou in (0.0, 0.2, 0.4))
    # Of 90 rows 30 from [0, 1/3), 30 from [1/3, 2/3), none from the last third, where only the
    # object is; the other 30 at random from the 340 left, 15 of either range, with a standard
    # deviation of 2.6 a draw: five of them for the mean of 100 draws are 1.3.
    assert none == 0 and low + high == 90 and low == pytest.approx(45, abs=1.3)
    assert taken[0] == repeats


def test_softmax_eql_published_drops_classes_at_the_threshold(monkeypatch):
    # 3 of 10 images hold classes 1 and 2: at a threshold of 0.3 they are tail in the reference.
    frequency = [0.9, 0.3, 0.3, 0.2] + [0.5] * 16
    monkeypatch.setattr(balanced_det.build, "counted_statistic", lambda cfg, name: frequency)
    model = build(
        "shapes/faster_rcnn",
        "softmax_eql_published",
        BALANCE__SoftmaxEqualizationLoss__TAIL_THRESHOLD=0.3,
        BALANCE__SoftmaxEqualizationLoss__DROP_PROBABILITY=1.0,
    )
    loss = model.roi_heads.box_predictor.criterion.classification_loss
    logits = torch.randn(6, 21, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 10, 20])
    expected = 0.0
    for x, label in zip(logits.tolist(), labels.tolist(), strict=True):
        # The reference's weight is 1 for a count above lambda, and for a row's own class.
        kept = [k for k in range(21) if k == 20 or frequency[k] > 0.3 or k == label]
        assert len(kept) == 21 - 3 + (label in (1, 2, 3))
        expected += math.log(sum(math.exp(x[k]) for k in kept)) - x[label]
    torch.testing.assert_close(loss(logits, labels, 1), torch.tensor(expected), **TOLERANCE)
