"""FCOS, an anchor-free detector, with any loss and sampler of ``BALANCE``.

With focal loss and GIoU the losses are those of Detectron2's ``FCOS``, which has no config keys of
its own; those here are ``MODEL.FCOS``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..criterion import Criterion
from ..errors import InputError
from ..losses.base import normalize
from ..selection import Rows, Selection
from . import replaced
from .dense import BalancedDenseDetector, balance_arguments
from .last_layer import replace_classifier
from .matching import Objects, match_points
from .replaced import refuse_replaced


@META_ARCH_REGISTRY.register()
class BalancedFCOS(BalancedDenseDetector, FCOS):
    """Detectron2's ``FCOS``, with its losses and sampler taken from ``BALANCE.DENSE``.

    Args:
        selection: as in :class:`BalancedDenseDetector`; points have no IoU to choose by.
        initial_distance: how far from a point each side of its box is at the start, in strides.
            Detectron2's boxes start nearly empty, where GIoU has hardly a gradient, and a distance
            below zero is cut off and has none; None leaves them so.
        kwargs: the other arguments of that, and Detectron2's own.

    Raises:
        InputError: a sampler that chooses by IoU, or a distance that is not above 0.
    """

    @configurable
    def __init__(
        self,
        *,
        criterion: Criterion,
        selection: Selection,
        head: FCOSHead,
        initial_distance: float | None = None,
        **kwargs: Any,
    ):
        if selection.sampler.needs_ious:
            raise InputError(
                f"BALANCE.DENSE.SAMPLER: '{type(selection.sampler).__name__}' chooses by IoU, "
                "which the points of FCOS do not have."
            )
        refuse_replaced(kwargs, replaced.DENSE)
        replace_classifier(head, criterion.num_logits)
        if initial_distance is not None:
            if not initial_distance > 0:
                raise InputError(f"initial_distance must be above 0, not {initial_distance}.")
            nn.init.constant_(head.bbox_pred.bias, initial_distance)
        super().__init__(criterion=criterion, selection=selection, head=head, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Translate the config, see :class:`BalancedFCOS`."""
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in fcos.IN_FEATURES]
        balance = balance_arguments(cfg, fcos.NUM_CLASSES, fcos.SCORE_THRESH_TEST, 300)
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
            "initial_distance": fcos.INITIAL_DISTANCE,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            **balance,
        }

    def least_score(self) -> float | Tensor:
        """Return the threshold of the final score, a square root, see :meth:`forward_inference`.

        A counted threshold is one of probabilities, so its square root is taken as well.
        """
        threshold = super().least_score()
        return threshold.sqrt() if isinstance(threshold, Tensor) else threshold

    def label_anchors(self, anchors: Sequence[Boxes], objects: Objects) -> Rows:
        """Label the points of a batch by FCOS's rule; see the base class."""
        levels = [level.tensor for level in anchors]
        return match_points(objects, levels, self.center_sampling_radius).rows(
            objects, self.num_classes
        )

    def forward_training(
        self,
        images: ImageList,
        features: Sequence[Tensor],
        predictions: Sequence[Sequence[Tensor]],
        gt_instances: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return ``{"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}``, as Detectron2 does."""
        logits, deltas, centerness = predictions
        losses, (image, anchor, sources, targets), normalizer = self._dense_losses(
            self.anchor_generator(features), logits, deltas, gt_instances
        )
        # Of the foreground rows alone, as if they were those of one image.
        target = self.compute_ctrness_targets([Boxes(sources)], [targets])[0]  # (F,)
        of_rows = torch.cat([x.flatten(1) for x in centerness], dim=1)[image, anchor]
        loss_centerness = F.binary_cross_entropy_with_logits(
            of_rows.float(), target, reduction="sum"
        )
        return {
            "loss_fcos_cls": losses["loss_cls"],
            "loss_fcos_loc": losses["loss_box_reg"],
            "loss_fcos_ctr": normalize(loss_centerness, normalizer),
        }

    def forward_inference(
        self, images: ImageList, features: Sequence[Tensor], predictions: Sequence[Sequence[Tensor]]
    ) -> list[Instances]:
        """Return one ``Instances`` an image; arguments as in Detectron2."""
        logits, deltas, centerness = predictions
        anchors = self.anchor_generator(features)
        return self._detections(anchors, logits, deltas, images, centerness)
