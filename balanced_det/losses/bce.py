"""Binary cross entropy over K sigmoids, the unweighted baseline.

    L = sum over rows and classes of -y log(p) - (1 - y) log(1 - p),  p = sigmoid(x)

With the optimal bias and the guided scale it is the classification loss of arXiv 1909.04868.
"""

from .base import CLASSIFICATION_LOSSES
from .sigmoid import SigmoidLoss


@CLASSIFICATION_LOSSES.register
class BinaryCrossEntropyLoss(SigmoidLoss):
    """Binary cross entropy; see the module's docstring.

    Args:
        num_classes: K.
    """
