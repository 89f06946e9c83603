"""A region proposal network with any loss and sampler of ``BALANCE``.

With binary cross entropy, smooth L1 and random sampling the losses are Detectron2's own.
"""

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import nn

from ..build import build_criterion, build_sampler, initial_prior, refuse_overridden_keys
from ..errors import InputError
from ..rows import ignore_others, objectness_labels
from ..samplers import AllSampler
from .matching import IoUKeepingMatcher
from .normalizers import foreground_normalizer

_REPLACED_KEYS = {
    "MODEL.RPN.SMOOTH_L1_BETA": (0.0, "BALANCE.SmoothL1Loss.BETA"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1", "BALANCE.RPN.BOX_LOSS"),
}


@PROPOSAL_GENERATOR_REGISTRY.register()
class BalancedRPN(RPN):
    """Detectron2's ``RPN``, with its losses and sampler taken from ``BALANCE.RPN``.

    Args:
        criterion: the :class:`~balanced_det.criterion.Criterion`, of one class.
        sampler: which anchors take part, see :mod:`balanced_det.samplers`.
        prior_prob: the objectness that every anchor starts with.
        kwargs: Detectron2's own arguments.
    """

    @configurable
    def __init__(self, *, criterion, sampler, prior_prob=0.5, anchor_matcher, **kwargs):
        super().__init__(anchor_matcher=IoUKeepingMatcher(anchor_matcher), **kwargs)
        self.criterion = criterion
        self.sampler = sampler
        self.set_prior(prior_prob)

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Translate the config, see :class:`BalancedRPN`."""
        refuse_overridden_keys(cfg, "RPN", _REPLACED_KEYS)
        ret = super().from_config(cfg, input_shape)
        weights = ret["loss_weight"]
        ret.update(
            criterion=build_criterion(
                cfg,
                "RPN",
                num_classes=1,
                classification_weight=weights["loss_rpn_cls"],
                box_weight=weights["loss_rpn_loc"],
            ),
            sampler=build_sampler(cfg, "RPN"),
            prior_prob=initial_prior(cfg, "RPN"),
        )
        return ret

    num_classes = 1

    @property
    def row_features(self):
        """The names of the feature maps that have rows, fine to coarse."""
        return self.in_features

    def label_rows(self, features, instances):
        """Return the labels (R,) of one image's anchors, after sampling: 0 object, 1 background.

        Args:
            features: one tensor a level, of which only the last two sizes matter.
            instances: ``Instances`` with ``gt_boxes``.
        """
        labels, _ = self.label_and_sample_anchors(self.anchor_generator(features), [instances])
        return objectness_labels(labels[0])

    def set_prior(self, prior_prob):
        """Start every anchor with the given objectness: set the bias of the last layer."""
        layer = getattr(self.rpn_head, "objectness_logits", None)
        if not isinstance(layer, nn.Module):
            raise InputError(
                f"MODEL.RPN.HEAD_NAME: {type(self.rpn_head).__name__} has no layer "
                "'objectness_logits' whose bias BALANCE.RPN.PRIOR_PROB could set."
            )
        bias = self.criterion.classification_loss.initial_bias(prior_prob)
        nn.init.constant_(layer.bias, bias.item())

    def _subsample_labels(self, label):
        if self.sampler.needs_losses:  # chosen in losses(), when the losses are known
            return label
        # Where memory is short, Detectron2 matches on the host.
        ious, matched_idxs = self.anchor_matcher.ious[-1], self.anchor_matcher.matched_idxs[-1]
        return self._kept(
            label,
            None if ious is None else ious.to(label.device),
            matched_idxs=matched_idxs.to(label.device),
        )

    def _kept(self, labels, ious=None, **options):
        """Return a copy of one image's labels (R,) in which the rows not sampled are ignored."""
        kept = self.sampler(
            labels, ious, self.batch_size_per_image, self.positive_fraction, 0, **options
        )
        return ignore_others(labels, torch.cat(kept))

    def label_and_sample_anchors(self, anchors, gt_instances):
        """Label and sample, as Detectron2 does; see ``RPN.label_and_sample_anchors``."""
        self.anchor_matcher.start(self.sampler)
        return super().label_and_sample_anchors(anchors, gt_instances)

    def losses(self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """Return ``{"loss_rpn_cls", "loss_rpn_loc"}``.

        Arguments as in Detectron2: per level (N, Hi Wi A) logits and (N, Hi Wi A, 4) deltas, per
        image (R,) labels (1 object, 0 background, -1 ignored) and (R, 4) boxes.
        """
        logits = cat(pred_objectness_logits, dim=1)  # (N, R)
        labels = torch.stack(gt_labels)  # (N, R)
        if self.sampler.needs_losses:
            labels = self._hard_anchors(logits, labels)
        image, anchor = (labels == 1).nonzero(as_tuple=True)
        num_negative = (labels == 0).sum()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", len(image) / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", num_negative.item() / len(labels))

        boxes = self.criterion.box_pairs(
            self.box2box_transform,
            Boxes.cat(anchors).tensor[anchor],
            cat(pred_anchor_deltas, dim=1)[image, anchor],
            torch.stack(gt_boxes)[image, anchor],
        )
        losses = self.criterion(
            logits.unsqueeze(-1), objectness_labels(labels), boxes, self._normalizer(labels)
        )
        return {"loss_rpn_cls": losses["loss_cls"], "loss_rpn_loc": losses["loss_box_reg"]}

    def _normalizer(self, labels):
        if isinstance(self.sampler, AllSampler):
            return foreground_normalizer(labels == 1, labels >= 0)
        return self.batch_size_per_image * len(labels)

    @torch.no_grad()
    def _hard_anchors(self, logits, labels):
        losses = self.criterion.classification_loss.row_losses(
            logits.unsqueeze(-1), objectness_labels(labels)
        )
        images = zip(labels, losses, strict=True)
        return torch.stack([self._kept(y, losses=losses_of_image) for y, losses_of_image in images])
