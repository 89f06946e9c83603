"""What the one-stage detectors share: rows of all pyramid levels, read where the head left them.

Letters: N images, L levels of H x W cells with A anchors each, R anchors of an image, F foreground
ones of a batch, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..build import build_criterion, build_score_threshold, build_selection, initial_prior
from ..criterion import BoxTransform, Criterion
from ..errors import InputError
from ..rows import level_rows, rows_of_levels, split_levels
from ..selection import PerForegroundOnAverage, PerForegroundRow, Rows, Selection
from ..thresholds import ScoreThreshold
from .encoding import WaitlessTransform
from .inference import dense_detections, traced_dense_detections
from .matching import Objects
from .thresholds import CountedScoreThreshold


class BalancedDenseDetector(CountedScoreThreshold):
    """Losses, sampling and scores of ``BALANCE.DENSE``, to inherit before Detectron2's detector.

    Args:
        criterion: the :class:`~balanced_det.criterion.Criterion`.
        selection: the :class:`~balanced_det.selection.Selection`, which rows take part.
        score_threshold: the :class:`~balanced_det.thresholds.ScoreThreshold`.
        prior_prob: the probability that every class starts with.
        kwargs: Detectron2's own arguments.
    """

    # Of Detectron2's detector.
    head: Any
    head_in_features: Sequence[str]
    anchor_generator: Any
    box2box_transform: BoxTransform
    test_topk_candidates: int
    test_nms_thresh: float
    max_detections_per_image: int

    def __init__(
        self,
        *,
        criterion: Criterion,
        selection: Selection,
        score_threshold: ScoreThreshold,
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.criterion = criterion
        self.selection = selection
        self.score_threshold = score_threshold
        self.set_prior(prior_prob)

    def set_prior(self, prior_prob: float | None) -> None:
        """Start every class at the given probability: set the bias of the last layer."""
        layer = self.head.cls_score
        bias = self.criterion.classification_loss.initial_bias(prior_prob)  # (num_logits,)
        with torch.no_grad():
            layer.bias.copy_(bias.repeat(len(layer.bias) // len(bias)))

    @property
    def row_features(self) -> Sequence[str]:
        """The names of the feature maps that have rows, fine to coarse."""
        return self.head_in_features

    def label_anchors(self, anchors: Sequence[Boxes], objects: Objects) -> Rows:
        """Label the rows of a batch, before any are chosen.

        Args:
            anchors: Detectron2's ``Boxes`` of each level, Ri rows.
            objects: the batch's :class:`~balanced_det.detectors.matching.Objects`.

        Returns:
            :class:`~balanced_det.selection.Rows`, (N, R).
        """
        raise NotImplementedError

    def label_rows(self, features: Sequence[Tensor], instances: Sequence[Instances]) -> Tensor:
        """Return the labels (N, R) of a batch's rows, after sampling where that needs no losses.

        Args:
            features: one tensor a level, of which only the last two sizes matter.
            instances: one ``Instances`` an image, with ``gt_boxes`` and ``gt_classes``.
        """
        rows = self.label_anchors(self.anchor_generator(features), Objects.of(instances))
        return (rows if self.selection.sampler.needs_losses else self.selection(rows)).labels

    def _dense_losses(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        gt_instances: Sequence[Instances],
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...], float | Tensor]:
        """Return the losses of a batch.

        Args:
            anchors: Detectron2's ``Boxes`` of each level, R in all.
            logits, deltas: the head's output, (N, A num_logits, H, W) and (N, A 4, H, W) a level.
            gt_instances: one ``Instances`` an image.

        Returns:
            (losses, foreground, normalizer): the criterion's losses; the foreground rows that they
            were computed on, as (image, anchor, their anchors (F, 4), their objects' boxes (F, 4));
            and what the losses were divided by.
        """
        objects = Objects.of(gt_instances)
        levels = [level_rows(x, self.criterion.num_logits) for x in logits]
        rows = self.label_anchors(anchors, objects)
        rows = self.selection(rows, lambda: self._row_losses(levels, rows.labels))
        image, anchor = rows.foreground.nonzero(as_tuple=True)  # (F,), one copy to the host
        get_event_storage().put_scalar("num_pos_anchors", len(image) / len(gt_instances))

        sources = Boxes.cat(anchors).tensor[anchor]
        targets = objects.boxes[image, rows.known("matched")[image, anchor]]
        boxes = self.criterion.box_pairs(
            WaitlessTransform(self.box2box_transform),
            sources,
            torch.cat([level_rows(x, 4).flatten(1, 3) for x in deltas], dim=1)[image, anchor],
            targets,
        )
        normalizer = self.selection.normalizer(rows)
        losses = self.criterion(
            levels,
            split_levels(rows.labels, levels),
            boxes,
            normalizer,
            box_levels=self._levels_of(anchor, anchors),
            # Nobody reads the logits after their loss: the gradient may take their place.
            overwrite_logits=True,
        )
        return losses, (image, anchor, sources, targets), normalizer

    def _levels_of(self, anchor: Tensor, anchors: Sequence[Boxes]) -> Tensor | None:
        """Return which foreground rows are of each level, (L, F), where a box loss asks for it."""
        if not self.criterion.boxes_have_levels:
            return None
        return rows_of_levels(anchor, [len(level) for level in anchors])

    def _detections(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        images: ImageList,
        centerness: Sequence[Tensor] | None = None,
    ) -> list[Instances]:
        """Return one ``Instances`` an image; see :func:`.inference.dense_detections`."""
        if torch.jit.is_tracing():
            levels = (anchors, logits, deltas, centerness)
            return traced_dense_detections(self, *levels, images.image_sizes)
        return dense_detections(
            anchors,
            logits,
            deltas,
            images.image_sizes,
            self.criterion,
            self.box2box_transform,
            score_threshold=self.test_score_thresh,
            topk_per_level=self.test_topk_candidates,
            nms_threshold=self.test_nms_thresh,
            detections_per_image=self.max_detections_per_image,
            centerness=centerness,
        )

    def _row_losses(self, levels: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Return the loss (N, R) of every row."""
        row_losses = self.criterion.classification_loss.row_losses
        parts = zip(levels, split_levels(labels, levels), strict=True)
        return torch.cat([row_losses(x, y).flatten(1) for x, y in parts], dim=1)


def balance_arguments(
    cfg: CfgNode, num_classes: int, fixed_threshold: float, initial_normalizer: float
) -> dict[str, Any]:
    """Translate ``cfg.BALANCE.DENSE`` into the arguments of :class:`BalancedDenseDetector`.

    Args:
        cfg: the whole config.
        num_classes: K.
        fixed_threshold: Detectron2's own score threshold.
        initial_normalizer: foreground rows of a batch while none was seen, as Detectron2 has it.
    """
    normalizers = {
        "average": PerForegroundOnAverage(initial_normalizer),
        "batch": PerForegroundRow(),
    }
    name = cfg.BALANCE.DENSE.NORMALIZER
    if name not in normalizers:
        raise InputError(
            f"BALANCE.DENSE.NORMALIZER is {name!r}; known are: {', '.join(normalizers)}."
        )
    return {
        "criterion": build_criterion(cfg, "DENSE", num_classes),
        "selection": build_selection(cfg, "DENSE", always=normalizers[name]),
        "score_threshold": build_score_threshold(cfg, "DENSE", num_classes, fixed_threshold),
        "prior_prob": initial_prior(cfg, "DENSE"),
    }
