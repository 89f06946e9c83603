"""Region heads of Faster, Mask and Cascade R-CNN with any loss and sampler of ``BALANCE``.

Detectron2 builds its heads, and the box predictor of each stage is exchanged for
:class:`~balanced_det.detectors.box_predictor.BalancedFastRCNNOutputLayers`. Proposals are labelled,
sampled and given their targets for all images at once. With cross entropy, smooth L1 and random
sampling the losses are Detectron2's own.

Letters: N images, R proposals of an image at most, T proposals that take part in all.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances

from ..build import refuse_overridden_keys
from ..rows import nonzero, on_device
from .box_predictor import REPLACED_KEYS, BalancedFastRCNNOutputLayers, proposal_selection
from .mask_head import MatchedMasks, foreground_proposals
from .matching import Objects, match, pad
from .pooler import with_batched_poolers
from .proposals import clip


class _BatchedROIHeads:
    """What both heads do for all images at once, to inherit before Detectron2's ``ROIHeads``."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Translate the config, see the class."""
        # Before Detectron2 builds its own predictor, which would refuse some of them its way.
        refuse_overridden_keys(cfg, "ROI_HEADS", REPLACED_KEYS)
        return {**super().from_config(cfg, input_shape), "selection": proposal_selection(cfg)}

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals, targets):
        """Label the proposals of a batch and keep those that take part.

        A sampler by loss keeps them all here, and chooses when the box head knows their losses.

        Args:
            proposals: one ``Instances`` an image with ``proposal_boxes``.
            targets: one ``Instances`` an image with ``gt_boxes``, ``gt_classes`` and, if heads need
                them, more of Detectron2's ``gt_*``.

        Returns:
            One ``Instances`` an image with ``proposal_boxes``, ``gt_classes``, ``gt_boxes`` (of a
            background row, any) and, where the image has objects, the other ``gt_*``.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        if self.proposal_append_gt:
            boxes = [torch.cat([b, t.gt_boxes.tensor]) for b, t in zip(boxes, targets, strict=True)]
        objects = Objects.of(targets)
        padded = pad(boxes)  # (N, R, 4)
        rows = self._label(padded, [len(b) for b in boxes], objects, self.proposal_matcher)
        if not self.selection.sampler.needs_losses:
            rows = self.selection(rows)
        counts = rows.takes_part.sum(dim=1).tolist()  # the one copy to the host
        image, row = nonzero(rows.takes_part, sum(counts))  # (T,)
        matched = rows.matched[image, row]
        return _instances(
            [p.image_size for p in proposals],
            counts,
            targets,
            matched,
            proposal_boxes=Boxes(padded[image, row]),
            gt_classes=rows.labels[image, row],
            gt_boxes=Boxes(objects.boxes[image, matched]),
        )

    def _label(self, boxes, sizes, objects, matcher):
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

    def _forward_mask(self, features, instances):
        """Train the mask head on the foreground proposals of the batch; see Detectron2's."""
        if not (self.training and self.mask_on and self.mask_pooler is not None):
            return super()._forward_mask(features, instances)
        instances = foreground_proposals(instances, self.num_classes)
        features = [features[name] for name in self.mask_in_features]
        features = self.mask_pooler(features, [p.proposal_boxes for p in instances])
        return self.mask_head(features, instances)


def _instances(image_sizes, counts, targets, matched, **fields):
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


def _split(value, counts):
    if isinstance(value, Boxes):
        return [Boxes(part) for part in value.tensor.split(counts)]
    return value.split(counts)


@ROI_HEADS_REGISTRY.register()
class BalancedROIHeads(_BatchedROIHeads, StandardROIHeads):
    """``StandardROIHeads`` (Faster and Mask R-CNN) with the losses and sampler of ``BALANCE``.

    Args:
        selection: the :class:`~balanced_det.selection.Selection`, which proposals take part.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(self, *, selection, **kwargs):
        super().__init__(**with_batched_poolers(kwargs))
        self.selection = selection

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = _balanced(cfg, ret["box_head"], ret["box_predictor"])
        return ret


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(_BatchedROIHeads, CascadeROIHeads):
    """``CascadeROIHeads`` with the losses and sampler of ``BALANCE`` in every stage.

    Args:
        selection: the :class:`~balanced_det.selection.Selection`, which proposals take part.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(self, *, selection, **kwargs):
        super().__init__(**with_batched_poolers(kwargs))
        self.selection = selection

    def _forward_box(self, features, proposals, targets=None):
        """Run all stages; see ``CascadeROIHeads``. Scores are the mean over the stages."""
        # A trace may see other images than it was made of; ours asks how many candidates survive.
        if self.training or torch.jit.is_tracing():
            return super()._forward_box(features, proposals, targets)
        features = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        scores, boxes = 0, None
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(features, proposals, stage)
            scores = scores + predictor.criterion.scores(predictions[0])  # (R, K)
            boxes = predictor.predict_boxes(predictions, proposals)
        scores = scores * (1.0 / self.num_cascade_stages)
        return predictor.detections(scores, predictions[1], proposals)[0]

    def _create_proposals_from_boxes(self, boxes, image_sizes):
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
    def _match_and_label_boxes(self, proposals, stage, targets):
        """Label the boxes that the stage before gives this one; see Detectron2's.

        Detectron2 trains on all of them; a sampler by IoU chooses anew, since the boxes have moved.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        sizes = [len(b) for b in boxes]
        objects, padded = Objects.of(targets), pad(boxes)
        rows = self._label(padded, sizes, objects, self.proposal_matchers[stage])
        rows = rows.keep((padded[..., 2:] > padded[..., :2]).all(dim=2))
        if self.selection.sampler.needs_ious:
            rows = self.selection(rows)
        image = torch.arange(len(padded), device=padded.device).unsqueeze(1)
        of_rows = objects.boxes[image, rows.matched]  # (N, R, 4)
        for index, (p, size) in enumerate(zip(proposals, sizes, strict=True)):
            p.gt_classes = rows.labels[index, :size]
            p.gt_boxes = Boxes(of_rows[index, :size])
        return proposals

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictors"] = [
            _balanced(cfg, head, predictor)
            for head, predictor in zip(ret["box_heads"], ret["box_predictors"], strict=True)
        ]
        return ret


def _balanced(cfg, box_head, predictor):
    """Return the predictor that takes the place of Detectron2's in one stage."""
    return BalancedFastRCNNOutputLayers(
        cfg, box_head.output_shape, box2box_transform=predictor.box2box_transform
    )
