"""Region heads of Faster, Mask and Cascade R-CNN with any loss and sampler of ``BALANCE``.

One adapter serves all three: Detectron2 builds its heads, and the box predictor of each stage is
exchanged for :class:`BalancedFastRCNNOutputLayers`. With cross entropy, smooth L1 and random
sampling the losses are Detectron2's own.
"""

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from torch import nn
from torch.nn import functional as F

from ..build import build_criterion, build_sampler, initial_prior, refuse_overridden_keys
from ..rows import foreground, ignore_others
from ..samplers import AllSampler
from .inference import region_detections
from .matching import IoUKeepingMatcher
from .normalizers import foreground_normalizer
from .thresholds import CountedScoreThreshold, build_score_threshold

_REPLACED_KEYS = {
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (0.0, "BALANCE.SmoothL1Loss.BETA"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1", "BALANCE.ROI_HEADS.BOX_LOSS"),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False, "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False, "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"),
}


class BalancedFastRCNNOutputLayers(CountedScoreThreshold, FastRCNNOutputLayers):
    """Detectron2's box predictor, with its losses, layer size and scores taken from a criterion.

    Args:
        input_shape: shape of a region's features.
        criterion: the :class:`~balanced_det.criterion.Criterion`.
        score_threshold: the :class:`~balanced_det.detectors.thresholds.ScoreThreshold`.
        prior_prob: the probability that every class starts with; None leaves the bias at zero.
        all_rows: all proposals take part, and the losses are per foreground row; otherwise they
            are per sampled row, as Detectron2's.
        hard_sampler: picks rows by their loss (OHEM) out of all that are given; None keeps all.
        batch_size_per_image, positive_fraction: how many rows ``hard_sampler`` picks.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        criterion,
        score_threshold,
        prior_prob=None,
        all_rows=False,
        hard_sampler=None,
        batch_size_per_image=512,
        positive_fraction=0.25,
        **kwargs,
    ):
        super().__init__(input_shape, **kwargs)
        if criterion.num_logits != self.cls_score.out_features:
            self.cls_score = nn.Linear(self.cls_score.in_features, criterion.num_logits)
            nn.init.normal_(self.cls_score.weight, std=0.01)
        with torch.no_grad():
            self.cls_score.bias.copy_(criterion.classification_loss.initial_bias(prior_prob))
        self.criterion = criterion
        self.score_threshold = score_threshold
        self.all_rows = all_rows
        self.hard_sampler = hard_sampler
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Translate the config, see :class:`BalancedFastRCNNOutputLayers`."""
        ret = super().from_config(cfg, input_shape)
        sampler = build_sampler(cfg, "ROI_HEADS")
        ret.update(
            criterion=build_criterion(
                cfg,
                "ROI_HEADS",
                ret["num_classes"],
                box_weight=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT,
            ),
            score_threshold=build_score_threshold(
                cfg, "ROI_HEADS", ret["num_classes"], ret["test_score_thresh"]
            ),
            prior_prob=initial_prior(cfg, "ROI_HEADS"),
            all_rows=isinstance(sampler, AllSampler),
            hard_sampler=sampler if sampler.needs_losses else None,
            batch_size_per_image=cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
            positive_fraction=cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
        )
        return ret

    def losses(self, predictions, proposals):
        """Return ``{"loss_cls", "loss_box_reg"}``, both per row that takes part.

        Args:
            predictions: logits (R, num_logits) and deltas (R, 4) or (R, 4 K), see ``forward``.
            proposals: one ``Instances`` an image with ``proposal_boxes``, ``gt_classes`` and, where
                the image holds objects, ``gt_boxes``.
        """
        logits, deltas = predictions
        if self.hard_sampler is not None:
            self._ignore_easy_rows(logits, proposals)
        labels = cat([p.gt_classes for p in proposals])  # (R,)
        # A row of K sigmoids says background when no class reaches one half.
        with_background = logits.detach()
        if self.criterion.num_logits == self.num_classes:
            with_background = F.pad(with_background, (0, 1))
        _log_classification_stats(with_background, labels)

        sources = cat([p.proposal_boxes.tensor for p in proposals])  # (R, 4)
        # An image without objects has no gt_boxes and no foreground row that would need them.
        targets = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        is_foreground = foreground(labels, self.num_classes)
        takes_part = labels >= 0
        self.score_threshold.observe(is_foreground, takes_part)
        rows = is_foreground.nonzero().squeeze(1)  # (F,)
        if deltas.shape[1] != 4:
            deltas = deltas.unflatten(1, (-1, 4))[rows, labels[rows]]
        else:
            deltas = deltas[rows]
        boxes = self.criterion.box_pairs(
            self.box2box_transform, sources[rows], deltas, targets[rows]
        )
        normalizer = takes_part.sum()  # on the device: no step waits for it
        if self.all_rows:
            normalizer = foreground_normalizer(is_foreground, takes_part)
        return self.criterion(logits, labels, boxes, normalizer)

    def predict_probs(self, predictions, proposals):
        """Return one (Ri, K + 1) tensor an image, of which Detectron2 drops the last column."""
        scores = F.pad(self.criterion.scores(predictions[0]), (0, 1))
        return scores.split([len(p) for p in proposals])

    def inference(self, predictions, proposals):
        """Return (detections, rows), see :func:`.inference.region_detections`."""
        logits, deltas = predictions
        return self.detections(self.criterion.scores(logits), deltas, proposals)

    def detections(self, scores, deltas, proposals):
        """Return (detections, rows) of given scores (R, K) and deltas (R, 4) or (R, 4 K)."""
        return region_detections(
            scores,
            deltas,
            proposals,
            self.box2box_transform,
            score_threshold=self.test_score_thresh,
            nms_threshold=self.test_nms_thresh,
            detections_per_image=self.test_topk_per_image,
        )

    @torch.no_grad()
    def _ignore_easy_rows(self, logits, proposals):
        losses = self.criterion.classification_loss.row_losses(
            logits, cat([p.gt_classes for p in proposals])
        )
        losses = losses.split([len(p) for p in proposals])
        for p, losses_of_image in zip(proposals, losses, strict=True):
            kept = self.hard_sampler(
                p.gt_classes,
                None,
                self.batch_size_per_image,
                self.positive_fraction,
                self.num_classes,
                losses=losses_of_image,
            )
            p.gt_classes = ignore_others(p.gt_classes, torch.cat(kept))


class _BalancedSampling:
    """Sampling of proposals by any sampler, for Detectron2's ``ROIHeads`` to inherit first."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Translate the config, see the class."""
        # Before Detectron2 builds its own predictor, which would refuse some of them its way.
        refuse_overridden_keys(cfg, "ROI_HEADS", _REPLACED_KEYS)
        return {**super().from_config(cfg, input_shape), "sampler": _proposal_sampler(cfg)}

    def label_and_sample_proposals(self, proposals, targets):
        """Match and sample, as Detectron2 does; see ``ROIHeads.label_and_sample_proposals``."""
        self.proposal_matcher.start(self.sampler)
        return super().label_and_sample_proposals(proposals, targets)

    def _sample_proposals(self, matched_idxs, matched_labels, gt_classes):
        if len(gt_classes):
            labels = gt_classes[matched_idxs]
            labels[matched_labels == 0] = self.num_classes
            labels[matched_labels == -1] = -1
        else:
            labels = torch.full_like(matched_idxs, self.num_classes)
        sampled = self._sample(labels, self.proposal_matcher.ious[-1], matched_idxs)
        return sampled, labels[sampled]

    def _sample(self, labels, ious, matched_idxs):
        """Return the indices of the sampled rows of one image, positives first."""
        chosen = self.sampler(
            labels,
            ious,
            self.batch_size_per_image,
            self.positive_fraction,
            self.num_classes,
            matched_idxs=matched_idxs,
        )
        return torch.cat(chosen)


@ROI_HEADS_REGISTRY.register()
class BalancedROIHeads(_BalancedSampling, StandardROIHeads):
    """``StandardROIHeads`` (Faster and Mask R-CNN) with the losses and sampler of ``BALANCE``.

    Args:
        sampler: which proposals take part, see :mod:`balanced_det.samplers`.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(self, *, sampler, proposal_matcher, **kwargs):
        super().__init__(proposal_matcher=IoUKeepingMatcher(proposal_matcher), **kwargs)
        self.sampler = sampler

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = _balanced(cfg, ret["box_head"], ret["box_predictor"])
        return ret


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(_BalancedSampling, CascadeROIHeads):
    """``CascadeROIHeads`` with the losses and sampler of ``BALANCE`` in every stage.

    Args:
        sampler: which proposals take part, see :mod:`balanced_det.samplers`.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(self, *, sampler, proposal_matchers, **kwargs):
        super().__init__(
            proposal_matchers=[IoUKeepingMatcher(m) for m in proposal_matchers], **kwargs
        )
        self.sampler = sampler

    def _forward_box(self, features, proposals, targets=None):
        """Run all stages; see ``CascadeROIHeads``. Scores are the mean over the stages."""
        if self.training:
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

    def _match_and_label_boxes(self, proposals, stage, targets):
        # A later stage gets the boxes of the one before. Detectron2 trains on all of them; a
        # sampler that looks at IoUs chooses anew, since the boxes have moved.
        matcher = self.proposal_matchers[stage]
        matcher.start(self.sampler)
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        if self.sampler.needs_ious:
            for p, ious, matched_idxs in zip(
                proposals, matcher.ious, matcher.matched_idxs, strict=True
            ):
                kept = self._sample(p.gt_classes, ious, matched_idxs)
                p.gt_classes = ignore_others(p.gt_classes, kept)
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


def _proposal_sampler(cfg):
    sampler = build_sampler(cfg, "ROI_HEADS")
    # A sampler by loss sees all proposals, and picks when their losses are known.
    return AllSampler() if sampler.needs_losses else sampler
