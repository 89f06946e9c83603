"""Softmax cross entropy over K + 1 channels, the baseline of region heads (Fast R-CNN, Eq. 1).

L = sum over rows of -log softmax(z)_y, background being channel K.
"""

from .base import CLASSIFICATION_LOSSES
from .softmax import SoftmaxLoss


@CLASSIFICATION_LOSSES.register
class CrossEntropyLoss(SoftmaxLoss):
    """Softmax cross entropy; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
    """
