"""The box predictor of a region head with any loss, sampler and score threshold of ``BALANCE``.

Letters: T sampled proposals of a batch, F foreground ones, N images, R proposals of an image, K
classes.
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..criterion import Criterion
from ..rows import nonzero
from ..selection import Rows, Selection
from ..thresholds import ScoreThreshold
from . import replaced
from .encoding import WaitlessTransform
from .event_log import log_regions
from .inference import region_detections
from .matching import pad
from .region_config import check_classifier, region_arguments
from .replaced import refuse_replaced, without
from .thresholds import CountedScoreThreshold


class BalancedFastRCNNOutputLayers(CountedScoreThreshold, FastRCNNOutputLayers):
    """Detectron2's box predictor, with its losses, layer size and scores taken from a criterion.

    Args:
        input_shape: shape of a region's features.
        criterion: the :class:`~balanced_det.criterion.Criterion`.
        selection: the :class:`~balanced_det.selection.Selection`: what the losses are divided by,
            and with a sampler by loss which of the given rows take part.
        score_threshold: the :class:`~balanced_det.thresholds.ScoreThreshold`.
        prior_prob: the probability that every class starts with; None leaves the bias at zero.
        classifier: the last layer, from a region's features to ``criterion.num_logits`` logits,
            with ``in_features``, ``out_features`` and ``bias`` of ``nn.Linear``; None is
            Detectron2's linear one.
        kwargs: Detectron2's own arguments.

    Raises:
        InputError: the classifier does not fit a region's features or the criterion's logits.
    """

    cls_score: Any

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        criterion: Criterion,
        selection: Selection,
        score_threshold: ScoreThreshold,
        prior_prob: float | None = None,
        classifier: Any = None,
        **kwargs: Any,
    ):
        refuse_replaced(kwargs, replaced.REGIONS)
        super().__init__(input_shape, **kwargs)
        if classifier is not None:
            check_classifier(classifier, self.cls_score.in_features, criterion)
            self.cls_score = classifier
        elif criterion.num_logits != self.cls_score.out_features:
            self.cls_score = nn.Linear(self.cls_score.in_features, criterion.num_logits)
            nn.init.normal_(self.cls_score.weight, std=0.01)
        with torch.no_grad():
            self.cls_score.bias.copy_(criterion.classification_loss.initial_bias(prior_prob))
        self.criterion = criterion
        self.selection = selection
        self.score_threshold = score_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Translate the config, see :class:`BalancedFastRCNNOutputLayers`."""
        ret = without(super().from_config(cfg, input_shape), replaced.REGIONS)
        ret.update(region_arguments(cfg, input_shape, ret["num_classes"], ret["test_score_thresh"]))
        return ret

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Return ``{"loss_cls", "loss_box_reg"}``; neither argument is changed.

        Args:
            predictions: logits (T, num_logits) and deltas (T, 4) or (T, 4 K), see ``forward``.
            proposals: one ``Instances`` an image, T rows in all, with ``proposal_boxes``,
                ``gt_classes`` and, where the image holds objects, ``gt_boxes``.
        """
        logits, deltas = predictions
        if not proposals:
            none = deltas[:0, :4]
            boxes = self.criterion.box_pairs(self.box2box_transform, none, none, none)
            return self.criterion(logits[:0], logits.new_zeros(0).long(), boxes, 1)
        labels = self._labels(logits, proposals)  # (T,)
        rows = Rows(labels, self.num_classes)
        self.score_threshold.observe(rows.foreground, rows.takes_part)
        predicted = self.criterion.classification_loss.predicted_class(logits.detach())
        num_foreground = log_regions(predicted, rows, len(proposals))

        row = nonzero(rows.foreground, num_foreground)[0]  # (F,)
        sources = cat([p.proposal_boxes.tensor for p in proposals])  # (T, 4)
        # An image without objects has no gt_boxes and no foreground row that would need them.
        targets = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        if deltas.shape[1] == 4:
            deltas = deltas[row]
        else:
            deltas = deltas.unflatten(1, (-1, 4))[row, labels[row]]
        boxes = self.criterion.box_pairs(
            WaitlessTransform(self.box2box_transform), sources[row], deltas, targets[row]
        )
        return self.criterion(logits, labels, boxes, self.selection.normalizer(rows))

    def _labels(self, logits: Tensor, proposals: list[Instances]) -> Tensor:
        """Return the labels (T,) of the rows, with those ignored that a sampler by loss leaves."""
        of_images = [p.gt_classes for p in proposals]
        labels = cat(of_images)
        if not self.selection.sampler.needs_losses:
            return labels
        sizes = [len(x) for x in of_images]
        losses = self.criterion.classification_loss.row_losses(logits, labels).split(sizes)
        padded = pad(of_images, -1)  # (N, R)
        rows = self.selection(Rows(padded, self.num_classes), lambda: pad(losses, 0.0))
        return torch.cat([x[:size] for x, size in zip(rows.labels, sizes, strict=True)])

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return (detections, rows), see :func:`.inference.region_detections`."""
        if torch.jit.is_tracing():
            # A trace may see other images than it was made of; ours asks how many survive.
            return super().inference(predictions, proposals)
        logits, deltas = predictions
        return self.detections(self.criterion.scores(logits), deltas, proposals)

    def detections(
        self, scores: Tensor, deltas: Tensor, proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
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

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        """Return one (Ri, K + 1) tensor an image, of which Detectron2 drops the last column."""
        scores = F.pad(self.criterion.scores(predictions[0]), (0, 1))
        # Not len(), which a trace would keep.
        return scores.split([p.proposal_boxes.tensor.shape[0] for p in proposals])
