"""A mask head that predicts the mask of a row's own class alone.

Detectron2 predicts the masks of all K classes to train one; with 1,203 classes that takes 3.8 MB a
row. Loss, gradients and predictions are Detectron2's to rounding; with several workers, where
Detectron2 takes the mean over the rows of each, the loss is that over the rows of all.

Letters: N images, F rows, S the side of a mask, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ..distributed import mean_over_workers
from ..rows import without_waiting
from .event_log import log_masks


@ROI_MASK_HEAD_REGISTRY.register()
class BalancedMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's ``MaskRCNNConvUpsampleHead``, of the classes that are asked for alone.

    Its weights have the same names and shapes.
    """

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """Return ``{"loss_mask"}`` in training, else the instances with ``pred_masks``.

        Args:
            x: (F, C, H, W) features of the regions.
            instances: one ``Instances`` an image, F rows in all, foreground alone in training.
        """
        name = "gt_classes" if self.training else "pred_classes"
        classes = torch.cat([p.get(name) for p in instances])
        logits = self._logits(x, classes)
        if self.training:
            return {"loss_mask": mask_loss(logits, instances, self.vis_period) * self.loss_weight}
        # Not len(), which a trace would keep.
        sizes = [p.get(name).shape[0] for p in instances]
        masks = logits.sigmoid().unsqueeze(1).split(sizes)
        for p, of_image in zip(instances, masks, strict=True):
            p.pred_masks = of_image  # (Fi, 1, S, S)
        return instances

    def _logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the mask logits (F, S, S) of each row's class."""
        *layers, predictor = self
        for layer in layers:
            x = layer(x)
        if predictor.out_channels == 1:  # MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK
            return predictor(x).squeeze(1)
        weight = predictor.weight.flatten(1)[classes].unsqueeze(1)  # (F, 1, C)
        logits = torch.bmm(weight.to(x.dtype), x.flatten(2)).squeeze(1)  # (F, S * S)
        return (logits + predictor.bias[classes].unsqueeze(1)).unflatten(1, x.shape[2:])


def mask_loss(logits: Tensor, instances: Sequence[Instances], vis_period: int = 0) -> Tensor:
    """Return the mean binary cross entropy of masks (Mask R-CNN, arXiv 1703.06870, section 3).

    It is divided by the rows of a worker on average over the workers, so that each mask weighs the
    same, whichever worker it is on; every worker must call this.

    Args:
        logits: (F, S, S).
        instances: one ``Instances`` an image, F rows in all, with ``proposal_boxes`` and
            ``gt_masks`` that can be cropped.
        vis_period: every so many iterations the masks are put into the event storage; 0 never.
    """
    of_images = [
        p.gt_masks.crop_and_resize(p.proposal_boxes.tensor, logits.shape[-1])
        for p in instances
        if len(p)
    ]
    num_rows = mean_over_workers(logits.new_full((), len(logits), dtype=torch.float32))
    if not of_images:
        return logits.sum() * 0
    targets = without_waiting(torch.cat(of_images), logits.device)
    log_masks(logits.detach(), targets, vis_period)
    total = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")
    return total / (num_rows * logits.shape[-1] ** 2)
