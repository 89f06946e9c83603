"""What a criterion adds to its losses."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from balanced_det.criterion import Criterion
from balanced_det.errors import InputError
from balanced_det.losses import CrossEntropyLoss, GIoULoss, SmoothL1Loss
from balanced_det.rows import rows_of_levels


def make_rows():
    torch.manual_seed(0)
    corners = 50 * torch.rand(6, 2)
    sources = torch.cat([corners, corners + 20], dim=1)
    targets = sources + 3 * torch.randn(6, 4)
    deltas = (0.1 * torch.randn(6, 4)).requires_grad_()
    return torch.randn(9, 4), torch.arange(9) % 4, sources, targets, deltas


def test_several_box_losses_are_added_each_with_its_weight():
    logits, labels, sources, targets, deltas = make_rows()
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    single = []
    for loss in (SmoothL1Loss(), GIoULoss()):
        criterion = Criterion(CrossEntropyLoss(3), loss)
        boxes = criterion.box_pairs(transform, sources, deltas, targets)
        assert list(boxes) == [loss.space]
        single.append(criterion(logits, labels, boxes, 9)["loss_box_reg"])
        assert criterion.monitored == {}
    both = Criterion(CrossEntropyLoss(3), [SmoothL1Loss(), GIoULoss()], box_weight=[5.0, 2.0])
    boxes = both.box_pairs(transform, sources, deltas, targets)
    losses = both(logits, labels, boxes, 9)
    torch.testing.assert_close(losses["loss_box_reg"], 5 * single[0] + 2 * single[1])
    assert both.monitored["loss_box_GIoULoss"] == 2 * single[1]
    losses["loss_box_reg"].backward()
    assert deltas.grad.isfinite().all() and (deltas.grad != 0).all()
    # One weight counts for all.
    shared = Criterion(CrossEntropyLoss(3), [SmoothL1Loss(), GIoULoss()], box_weight=3.0)
    value = shared(logits, labels, boxes, 9)["loss_box_reg"]
    torch.testing.assert_close(value, 3 * (single[0] + single[1]))


def test_guided_scale_follows_all_box_losses():
    logits, labels, sources, targets, deltas = make_rows()
    criterion = Criterion(CrossEntropyLoss(3), [SmoothL1Loss(), GIoULoss()], guided=True)
    boxes = criterion.box_pairs(Box2BoxTransform((1.0,) * 4), sources, deltas, targets)
    losses = criterion(logits, labels, boxes, 9)
    # One float32 quotient and product.
    torch.testing.assert_close(losses["loss_cls"], losses["loss_box_reg"], rtol=1e-6, atol=0)
    assert {"guided_scale", "loss_box_GIoULoss"} <= criterion.monitored.keys()


@pytest.mark.parametrize("box_loss, weight", [([], 1.0), ([SmoothL1Loss()], [1.0, 2.0])])
def test_weights_and_box_losses_must_be_equally_many(box_loss, weight):
    with pytest.raises(InputError, match="box losses got"):
        Criterion(CrossEntropyLoss(3), box_loss, box_weight=weight)


def test_box_losses_are_told_the_level_of_each_foreground_row():
    row = torch.tensor([0, 5, 6, 9, 2, 6])  # places among 6 + 3 + 2 rows
    masks = rows_of_levels(row, [6, 3, 2])
    assert masks.tolist() == [
        [True, True, False, False, True, False],
        [False, False, True, False, False, True],
        [False, False, False, True, False, False],
    ]
    assert rows_of_levels(row[:0], [6, 3]).shape == (2, 0)
