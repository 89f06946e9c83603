"""What the region heads of Faster, Mask and Cascade R-CNN share: all images of a batch at once.

Detectron2 builds its heads, and the box predictor of each stage is exchanged for
:class:`~balanced_det.detectors.box_predictor.BalancedFastRCNNOutputLayers`. Proposals are labelled,
sampled and given their targets for the batch. With cross entropy, smooth L1 and random sampling the
losses are Detectron2's own.

Letters: N images, R proposals of an image at most, T proposals that take part in all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..build import refuse_overridden_keys
from ..rows import nonzero, on_device
from ..selection import Rows, Selection
from .box_predictor import BalancedFastRCNNOutputLayers
from .mask_targets import MatchedMasks, foreground_proposals
from .matching import Objects, match, pad
from .pooler import with_batched_poolers
from .region_config import REPLACED_KEYS, proposal_selection


class BatchedROIHeads:
    """What all region heads do for a batch, to inherit before Detectron2's ``ROIHeads``.

    Args:
        selection: the :class:`~balanced_det.selection.Selection`, which proposals take part. It
            takes the place of the box predictors' own.
        kwargs: Detectron2's own arguments.
    """

    # Of Detectron2's heads.
    training: bool
    num_classes: int
    box_predictor: Any
    proposal_append_gt: bool
    proposal_matcher: Matcher
    mask_on: bool
    mask_pooler: Any
    mask_in_features: Sequence[str]
    mask_head: Any

    def __init__(self, *, selection: Selection, **kwargs: Any):
        super().__init__(**with_batched_poolers(kwargs))
        self.selection = selection
        stages = isinstance(self.box_predictor, nn.ModuleList)
        for predictor in self.box_predictor if stages else [self.box_predictor]:
            predictor.selection = selection  # one says which rows count, and what divides them

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate the config, see the class."""
        # Detectron2 builds its own predictor first, and fails on some values of these keys with an
        # assertion; refused before that, they are named in a sentence.
        refuse_overridden_keys(cfg, "ROI_HEADS", REPLACED_KEYS)
        arguments = super().from_config(cfg, input_shape)  # type: ignore[misc]  # Detectron2's
        return {**arguments, "selection": proposal_selection(cfg)}

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Label the proposals of a batch and keep those that take part.

        A sampler by loss keeps them all here, and chooses when the box head knows their losses.

        Args:
            proposals: one ``Instances`` an image with ``proposal_boxes``.
            targets: one ``Instances`` an image with ``gt_boxes``, ``gt_classes`` and, if heads need
                them, more of Detectron2's ``gt_*``.

        Returns:
            One ``Instances`` an image with ``proposal_boxes``, ``gt_classes``, ``gt_boxes`` (of a
            background row, any) and, where the image has objects, the other ``gt_*``; what else a
            proposal carries, such as its objectness, is left behind.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        if self.proposal_append_gt:
            boxes = [torch.cat([b, t.gt_boxes.tensor]) for b, t in zip(boxes, targets, strict=True)]
        objects = Objects.of(targets)
        padded = pad(boxes)  # (N, R, 4)
        rows = self.label_boxes(padded, [len(b) for b in boxes], objects, self.proposal_matcher)
        if not self.selection.sampler.needs_losses:
            rows = self.selection(rows)
        counts = rows.takes_part.sum(dim=1).tolist()  # the one copy to the host
        image, row = nonzero(rows.takes_part, sum(counts))  # (T,)
        matched = rows.known("matched")[image, row]
        return _instances(
            [p.image_size for p in proposals],
            counts,
            targets,
            matched,
            proposal_boxes=Boxes(padded[image, row]),
            gt_classes=rows.labels[image, row],
            gt_boxes=Boxes(objects.boxes[image, matched]),
        )

    def label_boxes(
        self, boxes: Tensor, sizes: Sequence[int], objects: Objects, matcher: Matcher
    ) -> Rows:
        """Return the :class:`~balanced_det.selection.Rows` of padded boxes (N, R, 4).

        Args:
            boxes: those of image i end at ``sizes[i]``.
            sizes: N numbers.
            objects: the batch's :class:`~balanced_det.detectors.matching.Objects`.
            matcher: Detectron2's ``Matcher``.
        """
        place = torch.arange(boxes.shape[1], device=boxes.device)
        exist = place < on_device(sizes, place).unsqueeze(1)  # (N, R)
        return match(objects, boxes, matcher).rows(objects, self.num_classes).keep(exist)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        """Train the mask head on the foreground proposals of the batch; see Detectron2's."""
        if not (self.training and self.mask_on and self.mask_pooler is not None):
            return super()._forward_mask(features, instances)  # type: ignore[misc]  # Detectron2's
        instances = foreground_proposals(instances, self.num_classes)
        pooled = self.mask_pooler(
            [features[name] for name in self.mask_in_features],
            [p.proposal_boxes for p in instances],
        )
        return self.mask_head(pooled, instances)


def _instances(
    image_sizes: Sequence[tuple[int, int]],
    counts: list[int],
    targets: Sequence[Instances],
    matched: Tensor,
    **fields: Boxes | Tensor,
) -> list[Instances]:
    """Split the T rows of a batch into one ``Instances`` an image, of ``counts`` rows each."""
    fields = {name: _split(value, counts) for name, value in fields.items()}
    batch = []
    for index, (size, of_image) in enumerate(zip(image_sizes, matched.split(counts), strict=True)):
        instances = Instances(size, **{name: value[index] for name, value in fields.items()})
        objects = targets[index]
        for name, value in objects.get_fields().items():
            if name == "gt_masks" and len(objects):
                instances.gt_masks = MatchedMasks(value, of_image)
            elif name.startswith("gt_") and not instances.has(name) and len(objects):
                instances.set(name, value[of_image])
        batch.append(instances)
    return batch


def _split(value: Boxes | Tensor, counts: list[int]) -> Sequence[Boxes | Tensor]:
    if isinstance(value, Boxes):
        return [Boxes(part) for part in value.tensor.split(counts)]
    return value.split(counts)


def balanced_predictor(
    cfg: CfgNode, box_head: nn.Module, predictor: FastRCNNOutputLayers
) -> BalancedFastRCNNOutputLayers:
    """Return the predictor that takes the place of Detectron2's in one stage."""
    return BalancedFastRCNNOutputLayers(
        cfg, box_head.output_shape, box2box_transform=predictor.box2box_transform
    )
