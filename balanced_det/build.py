"""Where a config file becomes objects: parts of ``BALANCE`` are read, what cannot work refused."""

import functools
import logging
import operator

from detectron2.config import CfgNode

from .calibration import SCORE_CALIBRATIONS
from .criterion import Criterion
from .data.registration import training_statistics
from .errors import InputError
from .losses import BOX_LOSSES, CLASSIFICATION_LOSSES
from .priors import class_weights
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
    calibration = _build_calibration(cfg, part, num_classes)
    if calibration is not None:
        try:
            calibration.check(classification_loss)
        except InputError as error:
            raise InputError(f"BALANCE.{part}.SCORE_CALIBRATION: {error}") from None
    return Criterion(
        classification_loss,
        _configured(cfg, BOX_LOSSES, f"BALANCE.{part}.BOX_LOSS", node.BOX_LOSS),
        classification_weight=node.CLASSIFICATION_WEIGHT * classification_weight,
        box_weight=node.BOX_WEIGHT * box_weight,
        guided=node.GUIDED_LOSS,
        guided_factor=node.GUIDED_FACTOR,
        calibration=calibration,
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
    method = CLASSIFICATION_LOSSES.get(name, key)
    if part in method.refused_on:
        raise InputError(f"{key}: '{name}' is refused here: {method.refused_on[part]}.")
    extra = {"num_classes": num_classes, **_statistics(cfg, method.needs)}
    loss = _configured(cfg, CLASSIFICATION_LOSSES, key, name, **extra)
    if part == "RPN" and loss.num_logits != 1:
        raise InputError(
            f"{key}: '{name}' has {loss.num_logits} logits; RPN predicts one logit an anchor."
        )
    _weigh_classes(cfg, part, loss)
    sampler = cfg.BALANCE[part].SAMPLER
    if part == "ROI_HEADS" and loss.sampled_rows_warning and sampler != "AllSampler":
        logger.warning(
            "%s: '%s' %s. Use it in BALANCE.RPN or BALANCE.DENSE, or set "
            "BALANCE.ROI_HEADS.SAMPLER, which is '%s', to 'AllSampler'.",
            key,
            name,
            loss.sampled_rows_warning,
            sampler,
        )
    return loss


def _statistics(cfg, needs):
    """Return the counted statistics that a method needs, by name."""
    if not needs or not cfg.BALANCE.COUNT:
        return dict.fromkeys(needs)  # None: they come with the checkpoint.
    counted = training_statistics(cfg)
    known = {"class_frequency": counted.frequency, "class_counts": counted.image_count}
    return {name: known[name] for name in needs}


def _weigh_classes(cfg, part, loss):
    keys = cfg.BALANCE[part]
    if keys.CLASS_WEIGHTS is None:
        return
    weights = keys.CLASS_WEIGHTS
    try:
        if isinstance(weights, str):
            if part == "RPN":
                raise InputError("objectness has no classes to count.")
            method = "inverse" if weights == "auto" else weights
            counts = _statistics(cfg, ("class_counts",))["class_counts"]
            # Also without counts, so that a wrong name is found.
            weights = class_weights(
                [1] if counts is None else counts, method, keys.CLASS_WEIGHT_STRENGTH
            )
            weights = None if counts is None else weights
        loss.weigh_classes(weights)
    except InputError as error:
        raise InputError(f"BALANCE.{part}.CLASS_WEIGHTS: {error}") from None


def _build_calibration(cfg, part, num_classes):
    name = cfg.BALANCE[part].get("SCORE_CALIBRATION", "")
    if not name:
        return None
    key = f"BALANCE.{part}.SCORE_CALIBRATION"
    needs = SCORE_CALIBRATIONS.get(name, key).needs
    return _configured(
        cfg, SCORE_CALIBRATIONS, key, name, num_classes=num_classes, **_statistics(cfg, needs)
    )


def _configured(cfg, registry, key, name, **extra):
    """Construct the method called ``name`` with its node of ``cfg.BALANCE``."""
    method = registry.get(name, key)
    parameters = cfg.BALANCE.get(name, CfgNode())
    try:
        return method(**extra, **{k.lower(): v for k, v in parameters.items()})
    except InputError as error:
        raise InputError(f"BALANCE.{name}: {error}") from None
