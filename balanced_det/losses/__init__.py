"""Classification and box losses over labelled rows; they need torch and nothing of Detectron2.

Every file of this folder and of ``box/`` is imported here, and every loss that registers itself is
a name of this package: a new file needs no other line to be found.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from .base import BOX_LOSSES, CLASSIFICATION_LOSSES, BoxLoss, ClassificationLoss
from .box.balanced_l1 import balanced_l1_loss
from .gradient_density import GradientDensity
from .guided import guided_scale
from .sigmoid import SigmoidLoss, SigmoidWithBackgroundLoss
from .softmax import SoftmaxLoss

if TYPE_CHECKING:  # what registers itself, for type checkers, which run nothing
    from .bce import BinaryCrossEntropyLoss as BinaryCrossEntropyLoss
    from .box.balanced_l1 import BalancedL1Loss as BalancedL1Loss
    from .box.ghm import GHMRegressionLoss as GHMRegressionLoss
    from .box.giou import GIoULoss as GIoULoss
    from .box.smooth_l1 import SmoothL1Loss as SmoothL1Loss
    from .cross_entropy import CrossEntropyLoss as CrossEntropyLoss
    from .drop import DropLoss as DropLoss
    from .effective_class_margin import EffectiveClassMarginLoss as EffectiveClassMarginLoss
    from .equalization import EqualizationLoss as EqualizationLoss
    from .equalization_v2 import EqualizationLossV2 as EqualizationLossV2
    from .equalized_focal import EqualizedFocalLoss as EqualizedFocalLoss
    from .federated import FederatedLoss as FederatedLoss
    from .focal import FocalLoss as FocalLoss
    from .ghm import GHMClassificationLoss as GHMClassificationLoss
    from .seesaw import SeesawLoss as SeesawLoss
    from .softmax_equalization import SoftmaxEqualizationLoss as SoftmaxEqualizationLoss
    from .softmax_ghm import SoftmaxGHMLoss as SoftmaxGHMLoss

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
