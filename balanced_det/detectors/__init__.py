"""Detectors with any loss and sampler of ``BALANCE``; importing this registers them."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "balanced_det.detectors needs Detectron2: run 'make .venv' in a checkout of balanced_det, "
        "or install Detectron2 for your torch."
    ) from error

from .. import backbones, pyramid  # noqa: F401  (registers the backbones)
from .box_predictor import BalancedFastRCNNOutputLayers
from .cascade import BalancedCascadeROIHeads
from .fcos import BalancedFCOS
from .folding import fold_frozen_norms
from .mask_head import BalancedMaskHead
from .rcnn import BalancedROIHeads
from .retinanet import BalancedRetinaNet
from .rpn import BalancedRPN

__all__ = [
    "BalancedCascadeROIHeads",
    "BalancedFCOS",
    "BalancedFastRCNNOutputLayers",
    "BalancedMaskHead",
    "BalancedROIHeads",
    "BalancedRPN",
    "BalancedRetinaNet",
    "fold_frozen_norms",
]
