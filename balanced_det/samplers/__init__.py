"""Which rows take part in a loss: at random, balanced over IoU, the hardest, or all.

One method a file, each a :class:`~balanced_det.selection.Sampler` that works on all images of a
batch at once and never waits for the device, with a plain function of one image beside it that says
what it draws. Every file of this folder is imported here, and every sampler that registers itself
is a name of this package: a new file needs no other line to be found.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ..selection import SAMPLERS, Sampler

if TYPE_CHECKING:  # what registers itself, for type checkers, which run nothing
    from .all_rows import AllSampler
    from .hard_examples import OHEMSampler
    from .iou_balanced import IoUBalancedSampler
    from .random import RandomSampler

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
globals().update(SAMPLERS)

__all__ = [
    "SAMPLERS",
    "AllSampler",
    "IoUBalancedSampler",
    "OHEMSampler",
    "RandomSampler",
    "Sampler",
]
