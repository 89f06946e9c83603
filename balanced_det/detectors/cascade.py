"""The region heads of Cascade R-CNN with any loss and sampler of ``BALANCE``.

Letters: N images, R boxes of an image at most, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .matching import Objects, pad
from .proposals import clip
from .roi_heads import BatchedROIHeads, balanced_predictor


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(BatchedROIHeads, CascadeROIHeads):
    """``CascadeROIHeads`` with the losses and sampler of ``BALANCE`` in every stage.

    Args:
        kwargs: the arguments of :class:`BatchedROIHeads`, and Detectron2's own.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> Any:
        """Run all stages; see ``CascadeROIHeads``. Scores are the mean over the stages."""
        # A trace may see other images than it was made of; ours asks how many candidates survive.
        if self.training or torch.jit.is_tracing():
            return super()._forward_box(features, proposals, targets)
        levels = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        scores: Any = 0
        boxes: Sequence[Tensor] = ()
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(levels, proposals, stage)
            scores = scores + predictor.criterion.scores(predictions[0])  # (R, K)
            boxes = predictor.predict_boxes(predictions, proposals)
        scores = scores * (1.0 / self.num_cascade_stages)
        return predictor.detections(scores, predictions[1], proposals)[0]

    def _create_proposals_from_boxes(
        self, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return the clipped boxes of a stage as ``Instances``; in training, none is dropped.

        Detectron2 drops empty boxes; here :meth:`_match_and_label_boxes` ignores them, which needs
        no copy to the host and gives the same losses.
        """
        if not self.training:
            return super()._create_proposals_from_boxes(boxes, image_sizes)
        sizes = [len(b) for b in boxes]
        clipped = clip(pad([b.detach() for b in boxes]), image_sizes)  # (N, R, 4)
        return [
            Instances(image_size, proposal_boxes=Boxes(of_image[:size]))
            for of_image, size, image_size in zip(clipped, sizes, image_sizes, strict=True)
        ]

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Label the boxes that the stage before gives this one; see Detectron2's.

        Detectron2 trains on all of them; a sampler by IoU chooses anew, since the boxes have moved.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        sizes = [len(b) for b in boxes]
        objects, padded = Objects.of(targets), pad(boxes)
        rows = self.label_boxes(padded, sizes, objects, self.proposal_matchers[stage])
        rows = rows.keep((padded[..., 2:] > padded[..., :2]).all(dim=2))
        if self.selection.sampler.needs_ious:
            rows = self.selection(rows)
        image = torch.arange(len(padded), device=padded.device).unsqueeze(1)
        of_rows = objects.boxes[image, rows.known("matched")]  # (N, R, 4)
        for index, (p, size) in enumerate(zip(proposals, sizes, strict=True)):
            p.gt_classes = rows.labels[index, :size]
            p.gt_boxes = Boxes(of_rows[index, :size])
        return proposals

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictors"] = [
            balanced_predictor(cfg, head, predictor)
            for head, predictor in zip(ret["box_heads"], ret["box_predictors"], strict=True)
        ]
        return ret
