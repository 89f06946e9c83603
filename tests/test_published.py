"""What the fragments called ``..._published`` train, against the published algorithms written anew.

The formulations here loop over levels, bins and images with Detectron2's own matching, and share
nothing with the losses but the head's output.
"""

import pytest
import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from models import batch
from test_configs import FOLDER
from torch.nn import functional as F

from balanced_det.build import build_model
from balanced_det.config import load_config
from balanced_det.errors import InputError

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
        self.num_foreground = int(is_foreground(labels).sum())


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
    model = build("Base-shapes-RetinaNet", "ghmc_ghmr_published")
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
    model = build("Base-shapes-RetinaNet", "ghmc_published")
    for seed in range(2):
        inputs = batch((2, 3), seed)
        rows = DenseRows(model, inputs)
        total = 0.0
        for _, labels, deltas, wanted in rows.levels:
            error = (deltas - wanted)[is_foreground(labels)].abs()
            total += torch.where(error < 0.11, error**2 / 0.22, error - 0.055).sum()
        expected = total / rows.num_foreground
        torch.testing.assert_close(losses_of(model, inputs)["loss_box_reg"], expected, **TOLERANCE)


@pytest.mark.parametrize("part", ["RPN", "ROI_HEADS"])
@pytest.mark.parametrize(
    "slot, loss",
    [("CLASSIFICATION_LOSS", "GHMClassificationLoss"), ("BOX_LOSS", "GHMRegressionLoss")],
)
def test_levels_one_by_one_are_refused_where_rows_have_none(part, slot, loss):
    keys = {f"BALANCE__{part}__{slot}": loss, f"BALANCE__{loss}__PER_LEVEL": True}
    with pytest.raises(InputError, match=f"BALANCE.{loss}.PER_LEVEL: the losses of {part}"):
        build("Base-shapes-RCNN", **keys)


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(InputError, match="NORMALIZER is 'sum'; known are: average, batch"):
        build("Base-shapes-RetinaNet", BALANCE__DENSE__NORMALIZER="sum")
