"""Region features of a whole batch at once, in place of Detectron2's ``ROIPooler``.

Detectron2 pools one pyramid level after another: it waits for the device once a level to learn
which boxes are on it, launches some 60 kernels a call, and copies the features to float32 under
autocast. Here each box carries its level, and :func:`balanced_det.ops.roi_align.roi_align` pools
all of them. The regions are Detectron2's to float32 rounding.

One difference is meant: with 16-bit features Detectron2 rounds the boxes to their type, which in
bfloat16 moves a corner at pixel 1,000 by up to 2 pixels. Here boxes stay float32.

Letters: T boxes of a batch, N images, C channels, Hl x Wl pixels of level l, S x S bins of a box.
"""

import copy

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from detectron2.utils.tracing import is_fx_tracing
from torch import Tensor

from ..ops.roi_align import roi_align
from ..rows import on_device


class BatchedROIPooler(ROIPooler):
    """Detectron2's ``ROIPooler``: same arguments, same regions, without waiting for the device.

    Pooling of other kinds than RoIAlign, tracing and scripting are left to Detectron2's code.
    """

    @classmethod
    def of(cls, pooler: ROIPooler) -> ROIPooler:
        """Return the batched form of one of Detectron2's; itself, where that is no RoIAlign."""
        first = pooler.level_poolers[0]
        if not isinstance(first, ROIAlign):
            return pooler
        return cls(
            output_size=pooler.output_size,
            scales=[level.spatial_scale for level in pooler.level_poolers],
            sampling_ratio=first.sampling_ratio,
            pooler_type="ROIAlignV2" if first.aligned else "ROIAlign",
            canonical_box_size=pooler.canonical_box_size,
            canonical_level=pooler.canonical_level,
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Return the regions (T, C, S, S) of the boxes of all images, in their order.

        Args:
            x: (N, C, Hl, Wl) features of each level.
            box_lists: one ``Boxes`` an image, T boxes in all.
        """
        first = self.level_poolers[0]
        traced = torch.jit.is_tracing() or is_fx_tracing()
        if traced or not isinstance(first, ROIAlign) or len(box_lists) == 0:
            return super().forward(x, box_lists)
        boxes = torch.cat([b.tensor for b in box_lists])  # (T, 4)
        level = self._levels(boxes)
        # The list of counts is the one thing that is copied to the device.
        counts = on_device([len(b) for b in box_lists], level)  # (N,)
        return roi_align(
            x,
            boxes,
            torch.repeat_interleave(counts, output_size=len(boxes)),
            level,
            [pooler.spatial_scale for pooler in self.level_poolers],
            self.output_size,
            first.sampling_ratio,
            first.aligned,
        )

    def __prepare_scriptable__(self) -> ROIPooler:
        """Return what ``torch.jit.script`` compiles in place of this module."""
        pooler = copy.copy(self)
        pooler.__class__ = ROIPooler
        return pooler

    def _levels(self, boxes: Tensor) -> Tensor:
        """Return the level (T,) of each box as an index, by Detectron2's rule."""
        if len(self.level_poolers) == 1:
            return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return assign_boxes_to_levels(
            [Boxes(boxes)],
            self.min_level,
            self.max_level,
            self.canonical_box_size,
            self.canonical_level,
        )


def with_batched_poolers(arguments: dict) -> dict:
    """Return a head's arguments with Detectron2's own poolers in their batched form."""
    return {
        # A pooler of one's own, derived from Detectron2's, stays what it is.
        name: BatchedROIPooler.of(value) if type(value) is ROIPooler else value
        for name, value in arguments.items()
    }
