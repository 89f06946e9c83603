"""The foreground rows of a batch and their masks, for a mask head to be trained on.

Detectron2 chooses foreground rows, copies masks and waits for the device image by image; here there
is one copy to the host a batch.

Letters: T proposals of a batch, F foreground ones, R rows, S the side of a mask.
"""

import torch
from detectron2.layers import ROIAlign
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor

from ..rows import foreground, on_device


class MatchedMasks:
    """The mask of the object that each row is matched to, without a copy of it for every row.

    It stands in ``Instances.gt_masks``, whose rows it has, and can be cropped like Detectron2's.

    Args:
        masks: the ``BitMasks`` or ``PolygonMasks`` of an image's objects.
        matched: (R,) long, the object of each row.
        boxes: (R, 4) on the host, the boxes to crop to if they are known there already.
    """

    def __init__(
        self, masks: BitMasks | PolygonMasks, matched: Tensor, boxes: Tensor | None = None
    ):
        self.masks = masks
        self.matched = matched
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.matched)

    def __getitem__(self, rows: slice | Tensor) -> "MatchedMasks":
        """Return those of some rows: a slice, or a tensor of indices or bool."""
        return MatchedMasks(self.masks, self.matched[rows])

    def crop_and_resize(self, boxes: Tensor, side: int) -> Tensor:
        """Return the (R, S, S) bool masks inside of ``boxes`` (R, 4); see Detectron2's masks."""
        if not isinstance(self.masks, BitMasks):
            boxes = boxes if self._boxes is None else self._boxes
            return self.masks[self.matched].crop_and_resize(boxes, side)
        # Detectron2 copies a whole mask for each row; a row may as well point to its object's.
        bits = self.masks.tensor.unsqueeze(1).float()  # (M, 1, H, W)
        regions = torch.cat([self.matched.unsqueeze(1).to(boxes), boxes], dim=1)  # (R, 5)
        return ROIAlign((side, side), 1.0, 0, aligned=True)(bits, regions).squeeze(1) >= 0.5


@torch.no_grad()
def foreground_proposals(proposals: list[Instances], num_classes: int) -> list[Instances]:
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
