"""Region proposals, and region heads with the equalization loss, as trees of constructors.

Whatever has the name of a slot in ``BALANCE`` is an argument here: exchange a loss, a sampler or a
threshold by assigning another ``L(...)``.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead

from balanced_det.build import counted
from balanced_det.criterion import Criterion
from balanced_det.detectors import BalancedFastRCNNOutputLayers, BalancedROIHeads, BalancedRPN
from balanced_det.losses import BinaryCrossEntropyLoss, EqualizationLoss, SmoothL1Loss
from balanced_det.samplers import RandomSampler
from balanced_det.selection import PerQuota, PerRow, Selection
from balanced_det.thresholds import FixedThreshold

proposal_generator = L(BalancedRPN)(
    in_features=["p2", "p3", "p4", "p5", "p6"],
    head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[32], [64], [128], [256], [512]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[4, 8, 16, 32, 64],
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(
        thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=(2000, 1000),
    post_nms_topk=(1000, 1000),
    criterion=L(Criterion)(
        classification_loss=L(BinaryCrossEntropyLoss)(num_classes=1),
        box_loss=L(SmoothL1Loss)(beta=0.0),
    ),
    selection=L(Selection)(
        sampler=L(RandomSampler)(),
        normalizer=L(PerQuota)(),
        rows_per_image="${..batch_size_per_image}",
        positive_fraction="${..positive_fraction}",
    ),
)


def pooler(size):
    """Return the pooling of regions to ``size`` x ``size`` from the levels p2 to p5."""
    return L(ROIPooler)(
        output_size=size,
        scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


def selection():
    """Return which proposals take part: at random, and the losses are per row."""
    return L(Selection)(
        sampler=L(RandomSampler)(),
        normalizer=L(PerRow)(),
        rows_per_image="${..batch_size_per_image}",
        positive_fraction="${..positive_fraction}",
    )


roi_heads = L(BalancedROIHeads)(
    num_classes=1203,
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    selection=selection(),
    box_in_features=["p2", "p3", "p4", "p5"],
    box_pooler=pooler(7),
    box_head=L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
        conv_dims=[],
        fc_dims=[1024, 1024],
    ),
    box_predictor=L(BalancedFastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=1024),
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes="${..num_classes}",
        test_topk_per_image=300,
        criterion=L(Criterion)(
            classification_loss=L(EqualizationLoss)(
                num_classes="${....num_classes}",
                class_frequency=L(counted)(name="class_frequency"),
                tail_threshold=0.00177,
            ),
            box_loss=L(SmoothL1Loss)(beta=0.0),
        ),
        selection=L(Selection)(sampler=L(RandomSampler)()),  # the heads' own takes its place
        score_threshold=L(FixedThreshold)(fixed=0.0001, num_classes="${...num_classes}"),
        prior_prob=0.001,
    ),
    mask_in_features="${.box_in_features}",
    mask_pooler=pooler(14),
    mask_head=L(MaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels=256, width=14, height=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256, 256],
    ),
)
