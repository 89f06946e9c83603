"""Explicit arguments alone build every detector, the same as a config does."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.utils.events import EventStorage
from models import CASCADE, FASTER, FCOS, MASK, NUM_CLASSES, RETINANET, batch, config

from balanced_det.criterion import Criterion
from balanced_det.detectors import (
    BalancedCascadeROIHeads,
    BalancedFastRCNNOutputLayers,
    BalancedFCOS,
    BalancedMaskHead,
    BalancedRetinaNet,
    BalancedROIHeads,
    BalancedRPN,
)
from balanced_det.errors import InputError
from balanced_det.losses import (
    BinaryCrossEntropyLoss,
    CrossEntropyLoss,
    FocalLoss,
    GIoULoss,
    SmoothL1Loss,
)
from balanced_det.samplers import AllSampler, RandomSampler
from balanced_det.selection import PerForegroundOnAverage, PerQuota, Selection
from balanced_det.thresholds import FixedThreshold

CHANNELS = 32  # of the pyramid in tests/models.py
PIXELS = {"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [58.0, 57.0, 57.0]}


def backbone(keys) -> Backbone:
    return build_backbone(config(keys))


def dense_arguments(loss, box_loss, initial):
    return {
        "criterion": Criterion(loss, box_loss),
        "selection": Selection(AllSampler(), PerForegroundOnAverage(initial)),
        "score_threshold": FixedThreshold(0.05, NUM_CLASSES),
        "prior_prob": 0.01,
        "num_classes": NUM_CLASSES,
        **PIXELS,
    }


def retinanet(loss=None, **more):
    features = ["p3", "p4", "p5", "p6", "p7"]
    body = backbone(RETINANET)
    anchors = DefaultAnchorGenerator(
        sizes=[[s, s * 1.26, s * 1.59] for s in (16, 24, 32, 48, 64)],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        offset=0.0,
        strides=[body.output_shape()[name].stride for name in features],
    )
    head = RetinaNetHead(
        input_shape=[body.output_shape()[name] for name in features],
        num_classes=NUM_CLASSES,
        num_anchors=9,
        conv_dims=[CHANNELS],
    )
    return BalancedRetinaNet(
        backbone=body,
        head=head,
        head_in_features=features,
        anchor_generator=anchors,
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        **dense_arguments(loss or FocalLoss(NUM_CLASSES), SmoothL1Loss(), 100),
        **more,
    )


def fcos(loss=None, **more):
    features = ["p3", "p4", "p5", "p6", "p7"]
    body = backbone(FCOS)
    head = FCOSHead(
        input_shape=[body.output_shape()[name] for name in features],
        num_classes=NUM_CLASSES,
        conv_dims=[CHANNELS],
    )
    return BalancedFCOS(
        backbone=body,
        head=head,
        head_in_features=features,
        **dense_arguments(loss or FocalLoss(NUM_CLASSES), GIoULoss(), 300),
        **more,
    )


def rpn(body, **more):
    features = ["p2", "p3", "p4", "p5", "p6"]
    return BalancedRPN(
        in_features=features,
        head=StandardRPNHead(in_channels=CHANNELS, num_anchors=3),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[16], [24], [32], [48], [64]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            offset=0.0,
            strides=[body.output_shape()[name].stride for name in features],
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(12000, 6000),
        post_nms_topk=(100, 1000),
        criterion=Criterion(BinaryCrossEntropyLoss(1), SmoothL1Loss()),
        selection=Selection(RandomSampler(), PerQuota(), 256, 0.5),
        **more,
    )


def predictor(shape, loss, weights, class_agnostic=False, **more):
    return BalancedFastRCNNOutputLayers(
        shape,
        box2box_transform=Box2BoxTransform(weights),
        num_classes=NUM_CLASSES,
        cls_agnostic_bbox_reg=class_agnostic,
        criterion=Criterion(loss, SmoothL1Loss()),
        selection=Selection(RandomSampler()),
        score_threshold=FixedThreshold(0.05, NUM_CLASSES),
        **more,
    )


def pooler(side):
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    return ROIPooler(side, scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def heads(kind, loss):
    shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
    shared = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 512,
        "positive_fraction": 0.25,
        "selection": Selection(RandomSampler()),
        "box_in_features": ["p2", "p3", "p4", "p5"],
        "box_pooler": pooler(7),
    }
    if kind == "cascade":
        weights = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
        box_heads = [FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[32]) for _ in weights]
        return BalancedCascadeROIHeads(
            box_heads=box_heads,
            box_predictors=[
                predictor(head.output_shape, loss(), w, class_agnostic=True)
                for head, w in zip(box_heads, weights)
            ],
            proposal_matchers=[Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)],
            **shared,
        )
    if kind == "mask":
        shared["mask_in_features"] = ["p2", "p3", "p4", "p5"]
        shared["mask_pooler"] = pooler(14)
        shared["mask_head"] = BalancedMaskHead(
            ShapeSpec(channels=CHANNELS, height=14, width=14),
            num_classes=NUM_CLASSES,
            conv_dims=[16, 16],
        )
    box_head = FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[32])
    return BalancedROIHeads(
        box_head=box_head,
        box_predictor=predictor(box_head.output_shape, loss(), (10.0, 10.0, 5.0, 5.0)),
        proposal_matcher=Matcher([0.5], [0, 1]),
        **shared,
    )


def rcnn(kind, loss=lambda: CrossEntropyLoss(NUM_CLASSES)):
    body = backbone(FASTER)
    return GeneralizedRCNN(
        backbone=body,
        proposal_generator=rpn(body),
        roi_heads=heads(kind, loss),
        pixel_mean=PIXELS["pixel_mean"],
        pixel_std=PIXELS["pixel_std"],
    )


BUILT = {
    "faster": (FASTER, lambda: rcnn("faster")),
    "mask": ({**MASK, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14}, lambda: rcnn("mask")),
    "cascade": (CASCADE, lambda: rcnn("cascade")),
    "retinanet": (RETINANET, retinanet),
    "fcos": ({**FCOS, "MODEL.FCOS.SCORE_THRESH_TEST": 0.05}, fcos),
}


def step(model):
    """Return the losses of a step, and the detections after it."""
    torch.manual_seed(0)
    with EventStorage():
        losses = model.train()(batch())
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch())]
    return losses, [x.pred_boxes.tensor for x in found]


@pytest.mark.parametrize("name", BUILT)
def test_constructors_build_what_the_config_builds(name):
    keys, build = BUILT[name]
    torch.manual_seed(1)
    of_config, of_arguments = build_model(config(keys)), build()
    of_arguments.load_state_dict(of_config.state_dict())  # the same names and shapes
    expected, ours = step(of_config), step(of_arguments)
    # The same arithmetic on the same numbers.
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("build", [retinanet, fcos])
def test_a_dense_detector_is_sized_by_its_loss(build):
    model = build(CrossEntropyLoss(NUM_CLASSES))
    anchors = model.anchor_generator.num_anchors[0]
    assert model.head.cls_score.out_channels == anchors * (NUM_CLASSES + 1)
    losses, _ = step(model)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "build, argument",
    [
        (lambda: retinanet(focal_loss_gamma=1.5), "focal_loss_gamma is 1.5"),
        (lambda: retinanet(smooth_l1_beta=0.1), "smooth_l1_beta is 0.1"),
        (lambda: fcos(focal_loss_alpha=0.5), "focal_loss_alpha is 0.5"),
        (lambda: rpn(backbone(FASTER), loss_weight=2.0), "loss_weight is 2.0"),
        (lambda: region_predictor(use_sigmoid_ce=True), "use_sigmoid_ce is True"),
    ],
)
def test_an_argument_that_the_criterion_takes_the_place_of_is_refused(build, argument):
    with pytest.raises(InputError, match=f"{argument}, but the criterion decides"):
        build()


def region_predictor(**more):
    shape = ShapeSpec(channels=32)
    return predictor(shape, CrossEntropyLoss(NUM_CLASSES), (10.0, 10.0, 5.0, 5.0), **more)


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_one_selection_serves_the_heads_and_their_predictors(name):
    heads_ = rcnn(name).roi_heads
    predictors = heads_.box_predictor if name == "cascade" else [heads_.box_predictor]
    assert all(p.selection is heads_.selection for p in predictors)
