"""Classification and box losses over labelled rows; they need torch and nothing of Detectron2."""

from .base import (
    BOX_LOSSES,
    CLASSIFICATION_LOSSES,
    BoxLoss,
    ClassificationLoss,
    SigmoidLoss,
    SoftmaxLoss,
)
from .bce import BinaryCrossEntropyLoss
from .box import BalancedL1Loss, GHMRegressionLoss, GIoULoss, SmoothL1Loss, balanced_l1_loss
from .cross_entropy import CrossEntropyLoss
from .equalization import EqualizationLoss, SoftmaxEqualizationLoss
from .focal import FocalLoss
from .ghm import GHMClassificationLoss, SoftmaxGHMLoss
from .guided import guided_scale
from .harmonizer import GradientDensity

__all__ = [
    "BOX_LOSSES",
    "CLASSIFICATION_LOSSES",
    "BalancedL1Loss",
    "BinaryCrossEntropyLoss",
    "BoxLoss",
    "ClassificationLoss",
    "CrossEntropyLoss",
    "EqualizationLoss",
    "FocalLoss",
    "GHMClassificationLoss",
    "GHMRegressionLoss",
    "GIoULoss",
    "GradientDensity",
    "SigmoidLoss",
    "SmoothL1Loss",
    "SoftmaxEqualizationLoss",
    "SoftmaxGHMLoss",
    "SoftmaxLoss",
    "balanced_l1_loss",
    "guided_scale",
]
