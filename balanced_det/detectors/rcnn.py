"""The region heads of Faster and Mask R-CNN with any loss and sampler of ``BALANCE``."""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads

from .roi_heads import BatchedROIHeads, balanced_predictor


@ROI_HEADS_REGISTRY.register()
class BalancedROIHeads(BatchedROIHeads, StandardROIHeads):
    """``StandardROIHeads`` (Faster and Mask R-CNN) with the losses and sampler of ``BALANCE``.

    Args:
        kwargs: the arguments of :class:`BatchedROIHeads`, and Detectron2's own.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = balanced_predictor(cfg, ret["box_head"], ret["box_predictor"])
        return ret
