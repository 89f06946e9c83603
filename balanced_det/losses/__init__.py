"""Classification and box losses over labelled rows; they need torch and nothing of Detectron2.

Every file of this folder and of ``box/`` is imported here, and every loss that registers itself is
a name of this package: a new file needs no other line.
"""

import importlib
import pkgutil

from .base import BOX_LOSSES, CLASSIFICATION_LOSSES, BoxLoss, ClassificationLoss
from .box.balanced_l1 import balanced_l1_loss
from .gradient_density import GradientDensity
from .guided import guided_scale
from .sigmoid import SigmoidLoss, SigmoidWithBackgroundLoss
from .softmax import SoftmaxLoss

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
_registered = {**dict(CLASSIFICATION_LOSSES), **dict(BOX_LOSSES)}
globals().update(_registered)

__all__ = [
    "BOX_LOSSES",
    "CLASSIFICATION_LOSSES",
    "BoxLoss",
    "ClassificationLoss",
    "GradientDensity",
    "SigmoidLoss",
    "SigmoidWithBackgroundLoss",
    "SoftmaxLoss",
    "balanced_l1_loss",
    "guided_scale",
    *_registered,
]
