"""Guided loss scaling (arXiv 1909.04868, section on guided loss).

    L = w_reg L_reg + w_cls r L_cls,  r = (w_reg L_reg) / (w_cls L_cls) without gradient

The box loss is computed on foreground rows only and so stays in scale whatever the number of
background rows; it guides the classification loss, which does not. The official code divides the
losses of each process on its own; here r comes from losses summed over the workers, so that all of
them scale alike. The official code also doubles the region head's scaled classification loss;
that is left to the caller. A batch without foreground has no classification loss there; here it
keeps its own, with r = 1.
"""

import torch
from torch import Tensor

from ..distributed import sum_over_workers


@torch.no_grad()
def guided_scale(loss_cls: Tensor, loss_box: Tensor) -> Tensor:
    """Return r, the factor that gives the classification loss the size of the box loss.

    Args:
        loss_cls: 0-dim tensor, this worker's weighted classification loss.
        loss_box: 0-dim tensor, this worker's weighted box loss, 0 without a foreground row.

    Returns:
        0-dim float32 tensor without gradient, equal on all workers. It is 1 when the box loss is 0
        on every worker, which is so without foreground rows, and when there is no
        classification loss to scale. It is finite for all finite losses.
    """
    sums = torch.stack([loss_cls.detach().float(), loss_box.detach().float()])
    total_cls, total_box = sum_over_workers(sums).unbind()
    # A classification loss next to zero would overflow the quotient.
    ratio = (total_box / total_cls).clamp(max=torch.finfo(sums.dtype).max)
    return torch.where((total_cls > 0) & (total_box > 0), ratio, 1.0)
