"""Where a config file becomes objects: parts of ``BALANCE`` are read, what cannot work refused."""

import functools
import inspect
import logging
import operator

from detectron2.config import CfgNode

from .criterion import Criterion
from .data.registration import training_statistics
from .errors import InputError
from .losses import BOX_LOSSES, CLASSIFICATION_LOSSES
from .samplers import SAMPLERS

logger = logging.getLogger(__name__)


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
