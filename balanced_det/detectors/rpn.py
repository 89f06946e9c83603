"""A region proposal network with any loss and sampler of ``BALANCE``.

With binary cross entropy, smooth L1 and random sampling the losses are Detectron2's own, and so are
the proposals, in order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..build import build_criterion, build_selection, initial_prior, refuse_overridden_keys
from ..criterion import Criterion
from ..errors import InputError
from ..rows import nonzero
from ..selection import PerQuota, Rows, Selection
from . import replaced
from .encoding import WaitlessTransform
from .matching import Objects, match
from .proposals import top_proposals
from .replaced import refuse_replaced, without


@PROPOSAL_GENERATOR_REGISTRY.register()
class BalancedRPN(RPN):
    """Detectron2's ``RPN``, with its losses and sampler taken from ``BALANCE.RPN``.

    Its rows are labelled as those of one class, 0, with background 1.

    Args:
        criterion: the :class:`~balanced_det.criterion.Criterion`, of one class.
        selection: the :class:`~balanced_det.selection.Selection`, which anchors take part.
        prior_prob: the objectness that every anchor starts with.
        kwargs: Detectron2's own arguments.
    """

    num_classes = 1

    @configurable
    def __init__(
        self,
        *,
        criterion: Criterion,
        selection: Selection,
        prior_prob: float | None = 0.5,
        **kwargs: Any,
    ):
        refuse_replaced(kwargs, {**replaced.REGRESSION, "loss_weight": 1.0})
        super().__init__(**kwargs)
        self.criterion = criterion
        self.selection = selection
        self.set_prior(prior_prob)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Translate the config, see :class:`BalancedRPN`."""
        refuse_overridden_keys(cfg, "RPN", replaced.RPN_KEYS)
        ret = without(super().from_config(cfg, input_shape), replaced.REGRESSION)
        weights = ret.pop("loss_weight")
        weights = {
            "classification_weight": weights["loss_rpn_cls"],
            "box_weight": weights["loss_rpn_loc"],
        }
        quota = {
            "rows_per_image": ret["batch_size_per_image"],
            "positive_fraction": ret["positive_fraction"],
        }
        return {
            **ret,
            "criterion": build_criterion(cfg, "RPN", num_classes=1, **weights),
            "selection": build_selection(cfg, "RPN", sampled=PerQuota(), **quota),
            "prior_prob": initial_prior(cfg, "RPN"),
        }

    @property
    def row_features(self) -> Sequence[str]:
        """The names of the feature maps that have rows, fine to coarse."""
        return self.in_features

    def label_rows(self, features: Sequence[Tensor], instances: Sequence[Instances]) -> Tensor:
        """Return the labels (N, R) of a batch's anchors, after sampling where that needs no losses.

        Of ``features``, one tensor a level, only the last two sizes matter.
        """
        rows, _ = self.label_and_sample_anchors(self.anchor_generator(features), instances)
        return (rows if self.selection.sampler.needs_losses else self.selection(rows)).labels

    def set_prior(self, prior_prob: float | None) -> None:
        """Start every anchor with the given objectness: set the bias of the last layer."""
        layer: Any = getattr(self.rpn_head, "objectness_logits", None)
        if layer is None:
            raise InputError(
                f"MODEL.RPN.HEAD_NAME: {type(self.rpn_head).__name__} has no layer "
                "'objectness_logits' whose bias BALANCE.RPN.PRIOR_PROB could set."
            )
        bias = self.criterion.classification_loss.initial_bias(prior_prob)
        nn.init.constant_(layer.bias, bias.item())

    def label_and_sample_anchors(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> tuple[Rows, Objects]:
        """Label the anchors of a batch; which of them take part is chosen in :meth:`losses`.

        Arguments as in Detectron2. Returns (:class:`~balanced_det.selection.Rows`, (N, R); the
        batch's :class:`~balanced_det.detectors.matching.Objects`).
        """
        objects = Objects.of(gt_instances)
        boxes = Boxes.cat(anchors)
        rows = match(objects, boxes.tensor, self.anchor_matcher).objectness_rows()
        if self.anchor_boundary_thresh >= 0:
            sizes = [x.image_size for x in gt_instances]
            inside = [boxes.inside_box(size, self.anchor_boundary_thresh) for size in sizes]
            rows = rows.keep(torch.stack(inside))
        return rows, objects

    def losses(
        self,
        anchors: Sequence[Boxes],
        pred_objectness_logits: Sequence[Tensor],
        rows: Rows,
        pred_anchor_deltas: Sequence[Tensor],
        objects: Objects,
    ) -> dict[str, Tensor]:
        """Return ``{"loss_rpn_cls", "loss_rpn_loc"}``.

        Args:
            anchors, pred_objectness_logits, pred_anchor_deltas: as in Detectron2, per level: boxes,
                (N, Hi Wi A) logits and (N, Hi Wi A, 4) deltas.
            rows, objects: what :meth:`label_and_sample_anchors` returns.
        """
        logits = cat(pred_objectness_logits, dim=1).unsqueeze(-1)  # (N, R, 1)
        loss = self.criterion.classification_loss
        rows = self.selection(rows, lambda: loss.row_losses(logits, rows.labels))
        counts = torch.stack([rows.foreground.sum(), rows.background.sum()])
        num_foreground, num_background = counts.tolist()  # one copy to the host
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_foreground / len(logits))
        storage.put_scalar("rpn/num_neg_anchors", num_background / len(logits))

        image, anchor = nonzero(rows.foreground, num_foreground)  # (F,)
        boxes = self.criterion.box_pairs(
            WaitlessTransform(self.box2box_transform),
            Boxes.cat(anchors).tensor[anchor],
            cat(pred_anchor_deltas, dim=1)[image, anchor],
            objects.boxes[image, rows.known("matched")[image, anchor]],
        )
        losses = self.criterion(logits, rows.labels, boxes, self.selection.normalizer(rows))
        return {"loss_rpn_cls": losses["loss_cls"], "loss_rpn_loc": losses["loss_box_reg"]}

    def predict_proposals(
        self,
        anchors: Sequence[Boxes],
        pred_objectness_logits: Sequence[Tensor],
        pred_anchor_deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Return one ``Instances`` an image; arguments as in Detectron2."""
        arguments = (anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            # A trace may see other images than it was made of; ours knows their number.
            return super().predict_proposals(*arguments)
        return top_proposals(
            *arguments,
            transform=self.box2box_transform,
            nms_threshold=self.nms_thresh,
            before_nms=self.pre_nms_topk[self.training],
            after_nms=self.post_nms_topk[self.training],
            min_size=self.min_box_size,
            refuse_infinite=self.training,
        )
