"""With the stock choice in every slot, each detector's losses and detections are Detectron2's."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch import fcos
from detectron2.utils.events import EventStorage
from models import CASCADE, FASTER, FCOS, MASK, NUM_CLASSES, RETINANET, batch, config

# Both sides compute in float32, but sum in another order.
TOLERANCE = dict(rtol=3e-6, atol=1e-6)

# Every row is sampled, so that both sides train on the same rows whatever they draw.
ALL_SAMPLED = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100_000,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 10_000,
}
STOCK = {
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
}


def stock_fcos(cfg):
    backbone = build_backbone(cfg)
    head = fcos.FCOSHead(
        input_shape=[backbone.output_shape()[f] for f in cfg.MODEL.FCOS.IN_FEATURES],
        conv_dims=[cfg.MODEL.FPN.OUT_CHANNELS] * cfg.MODEL.FCOS.NUM_CONVS,
        num_classes=NUM_CLASSES,
    )
    return fcos.FCOS(
        backbone=backbone,
        head=head,
        num_classes=NUM_CLASSES,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


PAIRS = {
    "faster": (FASTER, STOCK),
    "mask": (MASK, STOCK),
    "cascade": (CASCADE, {**STOCK, "MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}),
    "retinanet": (RETINANET, {**STOCK, "MODEL.META_ARCHITECTURE": "RetinaNet"}),
    "fcos": (FCOS, None),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """Our detector and Detectron2's, with the same weights."""
    ours_keys, stock_keys = PAIRS[request.param]
    torch.manual_seed(0)
    ours = build_model(config(ours_keys, ALL_SAMPLED))
    cfg = config(ours_keys, ALL_SAMPLED, stock_keys or {})
    stock = build_model(cfg) if stock_keys else stock_fcos(cfg)
    # Ours has buffers of its own, but every weight of Detectron2's.
    missing, unexpected = stock.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert not set(unexpected) & set(dict(ours.named_parameters()))
    return ours, stock


def losses(model, inputs):
    torch.manual_seed(0)
    model.train()
    with EventStorage():
        return model(inputs)


def gradients(model, inputs):
    model.zero_grad()
    sum(losses(model, inputs).values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


BATCHES = {
    "two images": batch((2, 3)),
    "an image without objects": batch((0, 2)),
    "no object at all": batch((0, 0)),
    "one object": batch((1,)),
    "many objects and none": batch((60, 0)),
    "polygons": batch((2, 3, 0), polygons=True),
}


@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
def test_losses_and_gradients_are_detectron2s(pair, inputs):
    ours, stock = pair
    torch.testing.assert_close(losses(ours, inputs), losses(stock, inputs), **TOLERANCE)
    ours_grad, stock_grad = gradients(ours, inputs), gradients(stock, inputs)
    assert ours_grad.keys() == stock_grad.keys()
    for name, expected in stock_grad.items():
        # Rounding of the losses is amplified where large gradients cancel on their way back.
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours_grad[name],
            expected,
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def test_bias_starts_as_detectron2s():
    for keys, stock_keys in (PAIRS["faster"], PAIRS["retinanet"]):
        ours = build_model(config(keys))
        stock = build_model(config(keys, stock_keys))
        biases = {n: p for n, p in ours.named_parameters() if n.endswith("bias")}
        for name, parameter in stock.named_parameters():
            if name.endswith(("cls_score.bias", "objectness_logits.bias")):
                torch.testing.assert_close(biases[name], parameter)


@torch.no_grad()
def test_detections_are_detectron2s(pair):
    ours, stock = (model.eval() for model in pair)
    for module in (ours, stock):
        # An untrained network scores below the usual threshold; let boxes through.
        for part in module.modules():
            if hasattr(part, "test_score_thresh"):
                part.test_score_thresh = 0.001
            if hasattr(part, "score_threshold"):
                part.score_threshold.fixed = 0.001
    inputs = batch()
    for a, b in zip(ours(inputs), stock(inputs), strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, **TOLERANCE)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=1e-3)
