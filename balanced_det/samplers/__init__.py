"""Which rows take part in a loss: at random, balanced over IoU, the hardest, or all.

One method a file, each a :class:`~balanced_det.selection.Sampler` that works on all images of a
batch at once and never waits for the device, with a plain function of one image beside it that says
what it draws.
"""

from ..selection import SAMPLERS, Sampler
from .all_rows import AllSampler
from .hard_examples import OHEMSampler
from .iou_balanced import IoUBalancedSampler
from .random import RandomSampler

__all__ = [
    "SAMPLERS",
    "AllSampler",
    "IoUBalancedSampler",
    "OHEMSampler",
    "RandomSampler",
    "Sampler",
]
