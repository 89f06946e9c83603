"""What a detector asks for its losses: classification + box + guided scale.

This is also where a config file becomes objects: :func:`build_criterion` and
:func:`build_sampler` read a part of ``BALANCE`` and refuse what cannot work.
"""

import functools
import inspect
import logging
import operator

from detectron2.config import CfgNode
from torch import nn

from .data.registration import training_statistics
from .errors import InputError
from .losses import BOX_LOSSES, CLASSIFICATION_LOSSES, guided_scale
from .samplers import SAMPLERS

logger = logging.getLogger(__name__)


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


def build_criterion(cfg, part, num_classes, *, classification_weight=1.0, box_weight=1.0):
    """Build the criterion of one part of a detector.

    Args:
        cfg: the whole config.
        part: "DENSE", "RPN" or "ROI_HEADS": which slots of ``cfg.BALANCE`` to read.
        num_classes: K; 1 for objectness.
        classification_weight, box_weight: weights of Detectron2's own keys, multiplied with ours.
    """
    node = cfg.BALANCE[part]
    classification_loss = _build_classification_loss(cfg, part, num_classes)
    try:
        classification_loss.initial_bias(initial_prior(cfg, part))
    except InputError as error:
        raise InputError(f"BALANCE.{part}.PRIOR_PROB: {error}") from None
    return Criterion(
        classification_loss,
        _configured(cfg, BOX_LOSSES, f"BALANCE.{part}.BOX_LOSS", node.BOX_LOSS),
        classification_weight=node.CLASSIFICATION_WEIGHT * classification_weight,
        box_weight=node.BOX_WEIGHT * box_weight,
        guided=node.GUIDED_LOSS,
        guided_factor=node.GUIDED_FACTOR,
    )


def initial_prior(cfg, part):
    """Return the prior probability of one part of a detector; None leaves its bias at zero."""
    prior = cfg.BALANCE[part].PRIOR_PROB
    return None if part == "ROI_HEADS" and prior == 0 else prior


def build_sampler(cfg, part):
    """Build the sampler of one part of a detector, see :mod:`balanced_det.samplers`."""
    return _configured(cfg, SAMPLERS, f"BALANCE.{part}.SAMPLER", cfg.BALANCE[part].SAMPLER)


def refuse_overridden_keys(cfg, part, keys):
    """Refuse Detectron2 keys that this project's slots replace, so that none is ignored silently.

    Args:
        keys: {Detectron2 key: (its default, the key to use instead)}.
    """
    for key, (default, instead) in keys.items():
        value = _value(cfg, key)
        if value not in (default, _value(cfg, instead)):
            raise InputError(
                f"{key} is {value!r}, but BALANCE.{part} decides the losses here: set {instead}."
            )


def _value(cfg, key):
    return functools.reduce(operator.getitem, key.split("."), cfg)


def _build_classification_loss(cfg, part, num_classes):
    key, name = f"BALANCE.{part}.CLASSIFICATION_LOSS", cfg.BALANCE[part].CLASSIFICATION_LOSS
    extra = {"num_classes": num_classes}
    method = CLASSIFICATION_LOSSES.get(name, key)
    if "class_frequency" in inspect.signature(method).parameters:
        if part == "RPN":
            raise InputError(f"{key}: '{name}' weighs classes by frequency; objectness has none.")
        # None: the frequencies come with the checkpoint.
        extra["class_frequency"] = training_statistics(cfg).frequency if cfg.BALANCE.COUNT else None
    loss = _configured(cfg, CLASSIFICATION_LOSSES, key, name, **extra)
    if part == "RPN" and loss.num_logits != 1:
        raise InputError(f"{key}: '{name}' is a softmax loss; RPN predicts one logit an anchor.")
    sampler = cfg.BALANCE[part].SAMPLER
    if part == "ROI_HEADS" and hasattr(loss, "gradient_density") and sampler != "AllSampler":
        # https://github.com/libuyu/GHM_Detection/issues/15
        logger.warning(
            "%s: '%s' is known not to work on the sampled rows of a region head, say its authors: "
            "%s has already removed the imbalance that it harmonizes. Use it in BALANCE.RPN or "
            "BALANCE.DENSE, or set BALANCE.ROI_HEADS.SAMPLER to 'AllSampler'.",
            key,
            name,
            sampler,
        )
    return loss


def _configured(cfg, registry, key, name, **extra):
    """Construct the method called ``name`` with its node of ``cfg.BALANCE``."""
    method = registry.get(name, key)
    parameters = cfg.BALANCE.get(name, CfgNode())
    try:
        return method(**extra, **{k.lower(): v for k, v in parameters.items()})
    except InputError as error:
        raise InputError(f"BALANCE.{name}: {error}") from None
