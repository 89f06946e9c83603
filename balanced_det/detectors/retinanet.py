"""RetinaNet with any loss and sampler of ``BALANCE``.

With focal loss and smooth L1 the losses are Detectron2's own.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ..build import refuse_overridden_keys
from ..criterion import Criterion
from ..selection import Rows
from . import replaced
from .dense import BalancedDenseDetector, balance_arguments
from .last_layer import replace_classifier
from .matching import Objects, match
from .replaced import refuse_replaced, without

_REPLACED_KEYS = {
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": (0.25, "BALANCE.FocalLoss.ALPHA"),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": (2.0, "BALANCE.FocalLoss.GAMMA"),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": (0.1, "BALANCE.SmoothL1Loss.BETA"),
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": ("smooth_l1", "BALANCE.DENSE.BOX_LOSS"),
    "MODEL.RETINANET.PRIOR_PROB": (0.01, "BALANCE.DENSE.PRIOR_PROB"),
}


@META_ARCH_REGISTRY.register()
class BalancedRetinaNet(BalancedDenseDetector, RetinaNet):
    """Detectron2's ``RetinaNet``, with its losses and sampler taken from ``BALANCE.DENSE``.

    Args:
        head: Detectron2's ``RetinaNetHead``; its last layer is exchanged for one of as many logits
            as the criterion has.
        kwargs: the arguments of :class:`BalancedDenseDetector`, and Detectron2's own.
    """

    @configurable
    def __init__(self, *, criterion: Criterion, head: Any, anchor_generator: Any, **kwargs: Any):
        refuse_replaced(kwargs, {**replaced.DENSE, **replaced.REGRESSION})
        replace_classifier(head, anchor_generator.num_anchors[0] * criterion.num_logits)
        super().__init__(
            criterion=criterion, head=head, anchor_generator=anchor_generator, **kwargs
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Translate the config, see :class:`BalancedRetinaNet`."""
        refuse_overridden_keys(cfg, "DENSE", _REPLACED_KEYS)
        ret = without(super().from_config(cfg), {**replaced.DENSE, **replaced.REGRESSION})
        ret.update(balance_arguments(cfg, ret["num_classes"], ret["test_score_thresh"], 100))
        return ret

    def label_anchors(self, anchors: Sequence[Boxes], objects: Objects) -> Rows:
        """Label the anchors of a batch by their IoU with objects; see the base class."""
        return match(objects, Boxes.cat(anchors).tensor, self.anchor_matcher).rows(
            objects, self.num_classes
        )

    def forward_training(
        self,
        images: ImageList,
        features: Sequence[Tensor],
        predictions: Sequence[Sequence[Tensor]],
        gt_instances: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return ``{"loss_cls", "loss_box_reg"}``; arguments as in Detectron2."""
        logits, deltas = predictions
        anchors = self.anchor_generator(features)
        return self._dense_losses(anchors, logits, deltas, gt_instances)[0]

    def forward_inference(
        self, images: ImageList, features: Sequence[Tensor], predictions: Sequence[Sequence[Tensor]]
    ) -> list[Instances]:
        """Return one ``Instances`` an image; arguments as in Detectron2."""
        logits, deltas = predictions
        return self._detections(self.anchor_generator(features), logits, deltas, images)
