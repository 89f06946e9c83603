"""FCOS, an anchor-free detector, with any loss and sampler of ``BALANCE``.

With focal loss and GIoU the losses are those of Detectron2's ``FCOS``, which has no config keys of
its own; those here are ``MODEL.FCOS``.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes
from torch.nn import functional as F

from ..errors import InputError
from ..losses.base import normalize
from .dense import BalancedDenseDetector, balance_arguments
from .thresholds import CountedScoreThreshold


@META_ARCH_REGISTRY.register()
class BalancedFCOS(BalancedDenseDetector, FCOS):
    """Detectron2's ``FCOS``, with its losses and sampler taken from ``BALANCE.DENSE``.

    Args:
        kwargs: the arguments of :class:`BalancedDenseDetector`, and Detectron2's own.
    """

    initial_normalizer = 300

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg):
        """Translate the config, see :class:`BalancedFCOS`."""
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in fcos.IN_FEATURES]
        balance = balance_arguments(cfg, fcos.NUM_CLASSES, fcos.SCORE_THRESH_TEST)
        if balance["sampler"].needs_ious:
            raise InputError(
                f"BALANCE.DENSE.SAMPLER: '{cfg.BALANCE.DENSE.SAMPLER}' chooses by IoU, "
                "which the points of FCOS do not have."
            )
        return {
            "backbone": backbone,
            "head": FCOSHead(
                input_shape=shapes,
                conv_dims=[shapes[0].channels] * fcos.NUM_CONVS,
                num_classes=balance["criterion"].num_logits,
                norm=fcos.NORM,
            ),
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **balance,
        }

    @CountedScoreThreshold.test_score_thresh.getter
    def test_score_thresh(self):
        """The threshold of the final score, which is a square root, see :meth:`forward_inference`.

        A counted threshold is one of probabilities, so its square root is taken as well.
        """
        threshold = self.score_threshold.value
        return threshold if self.score_threshold.kind == "fixed" else threshold.sqrt()

    def label_anchors(self, anchors, gt_instances):
        """Label and sample; see ``FCOS.label_anchors``. Rows not sampled are ignored."""
        gt_labels, gt_boxes = super().label_anchors(anchors, gt_instances)
        return [self.sample_rows(labels) for labels in gt_labels], gt_boxes

    def forward_training(self, images, features, predictions, gt_instances):
        """Return ``{"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}``, as Detectron2 does."""
        logits, deltas, centerness = predictions
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        losses, (image, anchor) = self._dense_losses(
            Boxes.cat(anchors).tensor,
            logits,
            deltas,
            torch.stack(gt_labels),
            torch.stack(gt_boxes),
        )
        targets = self.compute_ctrness_targets(anchors, gt_boxes)[image, anchor]  # (F,)
        centerness = torch.cat([x.flatten(1) for x in centerness], dim=1)[image, anchor]
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness.float(), targets, reduction="sum"
        )
        return {
            "loss_fcos_cls": losses["loss_cls"],
            "loss_fcos_loc": losses["loss_box_reg"],
            "loss_fcos_ctr": normalize(loss_centerness, self.loss_normalizer),
        }

    def forward_inference(self, images, features, predictions):
        """Return one ``Instances`` an image; arguments as in Detectron2."""
        logits, deltas, centerness = predictions
        anchors = self.anchor_generator(features)
        return self._detections(anchors, logits, deltas, images, centerness)
