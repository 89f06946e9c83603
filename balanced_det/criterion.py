"""What a detector asks for its losses: classification + box + guided scale."""

from torch import nn

from .losses import guided_scale


class Criterion(nn.Module):
    """A classification loss and a box loss over the same rows.

    Args:
        classification_loss: a :class:`~balanced_det.losses.ClassificationLoss`.
        box_loss: a :class:`~balanced_det.losses.BoxLoss`.
        classification_weight, box_weight: constants that multiply the two losses.
        guided: scale the classification loss to the size of the box loss (arXiv 1909.04868,
            section 3.3); the box loss then leads the training and the two need no balancing.
        guided_factor: multiplies the classification loss after it is scaled.
    """

    def __init__(
        self,
        classification_loss,
        box_loss,
        *,
        classification_weight=1.0,
        box_weight=1.0,
        guided=False,
        guided_factor=1.0,
    ):
        super().__init__()
        self.classification_loss = classification_loss
        self.box_loss = box_loss
        self.classification_weight = classification_weight
        self.box_weight = box_weight
        self.guided = guided
        self.guided_factor = guided_factor
        # Scalars of the last step that the losses do not show, as detached tensors; the trainer
        # logs them now and then, so that no step waits for the device.
        self.monitored = {}

    @property
    def num_classes(self):
        """Number of object classes, K."""
        return self.classification_loss.num_classes

    @property
    def num_logits(self):
        """Logits a row needs: K, or K + 1 for a softmax loss."""
        return self.classification_loss.num_logits

    @property
    def scores_rise_with_logits(self):
        """Whether :meth:`scores` orders any two logits as they are, see ``ClassificationLoss``."""
        return self.classification_loss.scores_rise_with_logits

    def forward(self, logits, labels, boxes, normalizer, **options):
        """Return ``{"loss_cls": scalar, "loss_box_reg": scalar}``.

        Args:
            logits, labels: rows as the classification loss takes them: (..., num_logits) and (...),
                or a list of them, one a pyramid level.
            boxes: (pred, target), (F, 4) each, of the foreground rows, see :meth:`box_pairs`.
            normalizer: what both sums are divided by, a number or a 0-dim tensor.
            options: passed on to the classification loss.
        """
        loss_cls = self.classification_loss(logits, labels, normalizer, **options)
        loss_cls = loss_cls * self.classification_weight
        loss_box = self.box_loss(*boxes, normalizer) * self.box_weight
        if self.guided:
            scale = guided_scale(loss_cls, loss_box)
            self.monitored = {"loss_cls_unscaled": loss_cls.detach(), "guided_scale": scale}
            loss_cls = loss_cls * (scale * self.guided_factor)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box}

    def scores(self, logits):
        """Return the (..., K) probabilities that the classification loss trains for."""
        return self.classification_loss.scores(logits)

    def box_pairs(self, transform, sources, pred_deltas, gt_boxes):
        """Bring predictions and ground truth into the space that the box loss compares them in.

        Args:
            transform: Detectron2's ``Box2BoxTransform`` of the detector.
            sources: (F, 4) anchors or proposals of the foreground rows.
            pred_deltas: (F, 4) what the detector predicts for them.
            gt_boxes: (F, 4) the boxes they are matched to.

        Returns:
            (pred, target), (F, 4) float32 each: deltas or boxes.
        """
        pred_deltas = pred_deltas.float()
        if self.box_loss.space == "deltas":
            return pred_deltas, transform.get_deltas(sources, gt_boxes)
        return transform.apply_deltas(pred_deltas, sources), gt_boxes
