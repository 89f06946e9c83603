"""The mask head's share of a batch: its foreground rows, their masks, and its loss.

Detectron2 chooses foreground rows, crops masks and waits for the device image by image, and
predicts the masks of all K classes to train one. Here there is one copy to the host a batch, and
:class:`BalancedMaskHead` predicts the mask of a row's own class alone; with 1,203 classes the rest
would take 3.8 MB a row. Loss, gradients and predictions are Detectron2's to rounding.

Letters: N images, T proposals of a batch, F foreground ones, S the side of a mask, C channels.
"""

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import get_event_storage
from torch.nn import functional as F

from ..rows import foreground, on_device


class MatchedMasks:
    """The mask of the object that each row is matched to, without a copy of it for every row.

    It stands in ``Instances.gt_masks``, whose rows it has, and can be cropped like Detectron2's.

    Args:
        masks: the ``BitMasks`` or ``PolygonMasks`` of an image's objects.
        matched: (R,) long, the object of each row.
        boxes: (R, 4) on the host, the boxes to crop to if they are known there already.
    """

    def __init__(self, masks, matched, boxes=None):
        self.masks = masks
        self.matched = matched
        self._boxes = boxes

    def __len__(self):
        return len(self.matched)

    def __getitem__(self, rows):
        """Return those of some rows: a slice, or a tensor of indices or bool."""
        return MatchedMasks(self.masks, self.matched[rows])

    def crop_and_resize(self, boxes, side):
        """Return the (R, S, S) bool masks inside of ``boxes`` (R, 4); see Detectron2's masks."""
        if not isinstance(self.masks, BitMasks):
            boxes = boxes if self._boxes is None else self._boxes
            return self.masks[self.matched].crop_and_resize(boxes, side)
        # Detectron2 copies a whole mask for each row; a row may as well point to its object's.
        bits = self.masks.tensor.unsqueeze(1).float()  # (M, 1, H, W)
        regions = torch.cat([self.matched.unsqueeze(1).to(boxes), boxes], dim=1)  # (R, 5)
        return ROIAlign((side, side), 1.0, 0, aligned=True)(bits, regions).squeeze(1) >= 0.5


@torch.no_grad()
def foreground_proposals(proposals, num_classes):
    """Return the foreground rows of a batch's ``Instances``, as Detectron2's function of that name.

    Polygons are cropped on the host, so the boxes that this needs come with the one copy that says
    which rows are foreground.
    """
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])  # (T, 4)
    classes = torch.cat([p.gt_classes for p in proposals])
    matched = torch.cat(
        [p.gt_masks.matched if p.has("gt_masks") else p.gt_classes for p in proposals]
    )
    columns = torch.stack([foreground(classes, num_classes), matched], dim=1)
    table = torch.cat([boxes.double(), columns], dim=1).cpu()  # (T, 6), of which a double holds all
    found = []
    for p, of_image in zip(proposals, table.split([len(p) for p in proposals]), strict=True):
        row = of_image[:, 4].nonzero().squeeze(1)  # (Fi,)
        rows = p[on_device(row.tolist(), classes)]
        if rows.has("gt_masks") and isinstance(rows.gt_masks.masks, PolygonMasks):
            boxes, matched = of_image[row, :4].float(), of_image[row, 5].long()
            rows.gt_masks = MatchedMasks(rows.gt_masks.masks, matched, boxes)
        found.append(rows)
    return found


@ROI_MASK_HEAD_REGISTRY.register()
class BalancedMaskHead(MaskRCNNConvUpsampleHead):
    """Detectron2's ``MaskRCNNConvUpsampleHead``, of the classes that are asked for alone.

    Its weights have the same names and shapes.
    """

    def forward(self, x, instances):
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

    def _logits(self, x, classes):
        """Return the mask logits (F, S, S) of each row's class."""
        *layers, predictor = self
        for layer in layers:
            x = layer(x)
        if predictor.out_channels == 1:  # MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK
            return predictor(x).squeeze(1)
        weight = predictor.weight.flatten(1)[classes].unsqueeze(1)  # (F, 1, C)
        logits = torch.bmm(weight.to(x.dtype), x.flatten(2)).squeeze(1)  # (F, S * S)
        return (logits + predictor.bias[classes].unsqueeze(1)).unflatten(1, x.shape[2:])


def mask_loss(logits, instances, vis_period=0):
    """Return the mean binary cross entropy of masks (Mask R-CNN, arXiv 1703.06870, section 3).

    Args:
        logits: (F, S, S).
        instances: one ``Instances`` an image, F rows in all, with ``proposal_boxes`` and
            ``gt_masks`` that can be cropped.
        vis_period: every so many iterations the masks are put into the event storage; 0 never.
    """
    targets = [
        p.gt_masks.crop_and_resize(p.proposal_boxes.tensor, logits.shape[-1])
        for p in instances
        if len(p)
    ]
    if not targets:
        return logits.sum() * 0
    targets = _to(torch.cat(targets), logits.device)
    _log(logits.detach(), targets, vis_period)
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def _to(tensor, device):
    """Move a tensor, which may be on the host, to a device without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _log(logits, targets, vis_period):
    is_wrong = (logits > 0) != targets
    counts = [is_wrong, targets, is_wrong & ~targets, is_wrong & targets]
    wrong, positive, extra, missed = torch.stack(counts).flatten(1).sum(dim=1).tolist()
    storage = get_event_storage()
    storage.put_scalar("mask_rcnn/accuracy", 1 - wrong / targets.numel())
    storage.put_scalar("mask_rcnn/false_positive", extra / max(targets.numel() - positive, 1))
    storage.put_scalar("mask_rcnn/false_negative", missed / max(positive, 1))
    if vis_period > 0 and storage.iter % vis_period == 0:
        for index, pair in enumerate(zip(logits.sigmoid(), targets.float(), strict=True)):
            image = torch.cat(pair, dim=1).expand(3, -1, -1)
            storage.put_image(f"Left: mask prediction;   Right: mask GT ({index})", image)
