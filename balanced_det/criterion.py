"""What a detector asks for its losses: classification + box losses + guided scale."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .calibration import ScoreCalibration
from .errors import InputError
from .losses import BoxLoss, ClassificationLoss, guided_scale
from .losses.base import add


class BoxTransform(Protocol):
    """What a criterion asks of Detectron2's ``Box2BoxTransform`` and its like."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the (F, 4) deltas that bring the first boxes to the second."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the (F, 4) boxes that deltas make of boxes."""


class Criterion(nn.Module):
    """A classification loss and one or more box losses over the same rows.

    Args:
        classification_loss: a :class:`~balanced_det.losses.ClassificationLoss`.
        box_loss: a :class:`~balanced_det.losses.BoxLoss`, or a list of them, which are added.
        classification_weight: constant that multiplies the classification loss.
        box_weight: constant that multiplies the box losses, or a list of one for each.
        guided: scale the classification loss to the size of the box loss (arXiv 1909.04868,
            section 3.3); the box loss then leads the training and the two need no balancing.
        guided_factor: multiplies the classification loss after it is scaled.
        calibration: a :class:`~balanced_det.calibration.ScoreCalibration` of the scores; None
            leaves them as they are.

    Attributes:
        monitored: scalars of the last step that the losses do not show, as detached tensors; the
            trainer logs them now and then, so that no step waits for the device.
        rows_are_counted: whether priors and thresholds that are counted in the training set are
            those of a data set; see :func:`balanced_det.build.build_criterion`.

    Raises:
        InputError: when weights and box losses are not equally many, or the scores of the loss
            cannot be calibrated so.
    """

    def __init__(
        self,
        classification_loss: ClassificationLoss,
        box_loss: BoxLoss | Sequence[BoxLoss],
        *,
        classification_weight: float = 1.0,
        box_weight: float | Sequence[float] = 1.0,
        guided: bool = False,
        guided_factor: float = 1.0,
        calibration: ScoreCalibration | None = None,
    ):
        super().__init__()
        box_losses = [box_loss] if isinstance(box_loss, BoxLoss) else list(box_loss)
        if isinstance(box_weight, (int, float)):
            box_weight = [box_weight] * len(box_losses)
        if not box_losses or len(box_weight) != len(box_losses):
            raise InputError(f"{len(box_losses)} box losses got {len(box_weight)} weights.")
        if calibration is not None:
            calibration.check(classification_loss)
        self.classification_loss = classification_loss
        self.box_losses = nn.ModuleList(box_losses)
        self.classification_weight = classification_weight
        self.box_weights = list(box_weight)
        self._spaces = [loss.space for loss in box_losses]
        self.guided = guided
        self.guided_factor = guided_factor
        self.calibration = calibration
        self.monitored: dict[str, Tensor] = {}
        self.rows_are_counted = False

    @property
    def num_classes(self) -> int:
        """Number of object classes, K."""
        return self.classification_loss.num_classes

    @property
    def num_logits(self) -> int:
        """Logits a row needs: what the classification loss declares."""
        return self.classification_loss.num_logits

    @property
    def boxes_have_levels(self) -> bool:
        """Whether a box loss asks which pyramid level each foreground row is of."""
        return any(loss.per_level for loss in self.box_losses)

    @property
    def scores_rise_with_logits(self) -> bool:
        """Whether :meth:`scores` orders any two logits as they are, see ``ClassificationLoss``."""
        return self.classification_loss.scores_rise_with_logits and self.calibration is None

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        boxes: dict[str, tuple[Tensor, Tensor]],
        normalizer: float | Tensor,
        box_levels: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Return ``{"loss_cls": scalar, "loss_box_reg": scalar}``.

        Args:
            logits, labels: rows as the classification loss takes them: (*, num_logits) and (*),
                or a list of them, one a pyramid level.
            boxes: what :meth:`box_pairs` makes of the foreground rows.
            normalizer: what all sums are divided by, a number or a 0-dim tensor.
            box_levels: (L, F) bool, which foreground rows are of each pyramid level; needed where
                :attr:`boxes_have_levels`.
            options: passed on to the classification loss.
        """
        loss_cls = self.classification_loss(logits, labels, normalizer, **options)
        loss_cls = loss_cls * self.classification_weight
        losses_box = [
            loss(*boxes[space], normalizer, box_levels) * weight
            for loss, space, weight in zip(
                self.box_losses, self._spaces, self.box_weights, strict=True
            )
        ]
        loss_box = add(losses_box)
        self.monitored = {}
        if len(losses_box) > 1:
            for loss, value in zip(self.box_losses, losses_box, strict=True):
                self.monitored[f"loss_box_{type(loss).__name__}"] = value.detach()
        if self.guided:
            scale = guided_scale(loss_cls, loss_box)
            self.monitored.update(loss_cls_unscaled=loss_cls.detach(), guided_scale=scale)
            loss_cls = loss_cls * (scale * self.guided_factor)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box}

    def scores(self, logits: Tensor) -> Tensor:
        """Return the (*, K) probabilities for inference: those trained for, calibrated if asked."""
        scores = self.classification_loss.scores(logits)
        return scores if self.calibration is None else self.calibration(scores)

    def box_pairs(
        self, transform: BoxTransform, sources: Tensor, pred_deltas: Tensor, gt_boxes: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Bring predictions and ground truth into the spaces that the box losses compare them in.

        Args:
            transform: Detectron2's ``Box2BoxTransform`` of the detector.
            sources: (F, 4) anchors or proposals of the foreground rows.
            pred_deltas: (F, 4) what the detector predicts for them.
            gt_boxes: (F, 4) the boxes they are matched to.

        Returns:
            {"deltas" and "boxes", as far as a loss asks: (pred, target), (F, 4) float32 each}.
        """
        pred_deltas = pred_deltas.float()
        pairs = {}
        if "deltas" in self._spaces:
            pairs["deltas"] = pred_deltas, transform.get_deltas(sources, gt_boxes)
        if "boxes" in self._spaces:
            pairs["boxes"] = transform.apply_deltas(pred_deltas, sources), gt_boxes
        return pairs


def criteria(model: nn.Module) -> Iterator[tuple[str, Criterion]]:
    """Yield (name, criterion) of every criterion of a model.

    The name is that of the module that has it, such as "roi_heads.box_predictor.0"; "dense" where
    the criterion is the model's own.
    """
    for name, module in model.named_modules():
        if isinstance(module, Criterion):
            yield name.removeprefix("module.").rpartition(".")[0] or "dense", module
