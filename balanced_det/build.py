"""Where a config becomes objects: ``BALANCE`` is read here, and what has no effect is refused."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2 import modeling
from detectron2.config import CfgNode, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from .calibration import ScoreCalibration
from .config.keys import SLOTS, method_names, method_weights
from .config.lazy import lazy_config
from .config.reads import recorded, value_of
from .config.unused import refuse_unused
from .config.values import check_pairs, check_values
from .criterion import Criterion
from .data.registration import check_num_classes, training_statistics
from .errors import InputError
from .losses import GradientDensity
from .losses.base import BoxLoss, ClassificationLoss
from .parts import PARTS, Part
from .priors import class_weights
from .selection import Sampler, Selection
from .thresholds import ScoreThreshold

logger = logging.getLogger(__name__)

# What a method may need of the training set, as the argument of its constructor is called.
_STATISTICS = {
    "class_frequency": lambda statistics: statistics.frequency,  # (K,) share of images
    "class_counts": lambda statistics: statistics.image_count,  # (K,) images
    "instance_count": lambda statistics: statistics.instance_count,  # (K,) boxes
}
_counts = contextvars.ContextVar("counts", default=True)
_run = contextvars.ContextVar("run", default=None)  # the config whose lazy model is being built


def build_model(cfg: CfgNode, count: bool = True) -> nn.Module:
    """Build the model of a config, as Detectron2 does, and refuse a config that it does not use up.

    Args:
        cfg: a config with this project's keys.
        count: take what losses and thresholds need from ``DATASETS.TRAIN``. False leaves it to the
            checkpoint that the model is going to load, and needs no training set.

    Raises:
        InputError: a value cannot be used, or a key that was set has no effect on this model.
    """
    from . import detectors  # registers them; they import this module

    check_values(cfg)
    check_pairs(cfg)
    with counting(count):
        if lazy_config(cfg) is None:
            model = _build_from_keys(cfg)
        else:
            model = _build_lazily(cfg, cfg.DATASETS.TRAIN if count else cfg.DATASETS.TEST)
    detectors.fold_frozen_norms(model)
    return model.to(memory_format=torch.channels_last) if cfg.BALANCE.CHANNELS_LAST else model


def _build_from_keys(cfg: CfgNode) -> nn.Module:
    recording, reads = recorded(cfg)
    model = modeling.build_model(recording)
    if any(isinstance(module, GradientDensity) for module in model.modules()):
        reads.add("BALANCE.GRADIENT_FIGURE_PERIOD")  # there is something to draw
    refuse_unused(cfg, reads)
    return model


def _build_lazily(cfg: CfgNode, names: Sequence[str]) -> nn.Module:
    """Construct the model of a Python config for the data sets called ``names``."""
    model = lazy_config(cfg).model
    for key in ("roi_heads.num_classes", "num_classes"):
        num_classes = OmegaConf.select(model, key)
        if num_classes is not None:
            check_num_classes(cfg, num_classes, f"model.{key}", names)
    token = _run.set(cfg)
    try:
        return instantiate(model).to(cfg.MODEL.DEVICE)
    except (TypeError, ImportError) as error:  # an argument that is wrong, missing or too much
        raise InputError(f"The model cannot be built: {error}.") from error
    finally:
        _run.reset(token)


def counted(name: str) -> Tensor | None:
    """Return a statistic of the training set to a Python config whose model is being built.

    ``L(counted)(name="class_frequency")`` is an argument of a loss; see :func:`counted_statistic`.
    """
    if _run.get() is None:
        raise InputError("'counted' has a meaning only while the model of a config is built.")
    return counted_statistic(_run.get(), name)


@contextlib.contextmanager
def counting(count: bool) -> Iterator[None]:
    """Build models inside with (True) or without (False) what is counted in the training set."""
    token = _counts.set(count)
    try:
        yield
    finally:
        _counts.reset(token)


def counted_statistic(cfg: CfgNode, name: str) -> Tensor | None:
    """Return a statistic of the training set, (K,), or None for a checkpoint to bring it.

    Args:
        cfg: the whole config. Without ``DATASETS.TRAIN`` there is nothing to count in.
        name: "class_frequency", "class_counts" or "instance_count".
    """
    if not _counts.get() or not cfg.DATASETS.TRAIN:
        return None
    return _STATISTICS[name](training_statistics(cfg))


def build_criterion(
    cfg: CfgNode,
    part: Part | str,
    num_classes: int,
    *,
    classification_weight: float = 1.0,
    box_weight: float = 1.0,
) -> Criterion:
    """Build the criterion of one part of a detector.

    Args:
        cfg: the whole config.
        part: a :class:`~balanced_det.parts.Part` or its name: which slots to read.
        num_classes: K; 1 for objectness.
        classification_weight, box_weight: weights of Detectron2's own keys, multiplied with ours.
    """
    part = _part(part)
    node = cfg.BALANCE[part.name]
    loss = _build_classification_loss(cfg, part, num_classes)
    try:
        loss.initial_bias(initial_prior(cfg, part))
    except InputError as error:
        raise InputError(f"BALANCE.{part.name}.PRIOR_PROB: {error}") from None
    box_losses, box_weights = _build_box_losses(cfg, part)
    options: dict[str, Any] = {
        "box_weight": [node.BOX_WEIGHT * box_weight * weight for weight in box_weights]
    }
    if node.GUIDED_LOSS:
        # The scaled loss has the size of the box loss, whatever its weight was.
        options.update(guided=True, guided_factor=node.GUIDED_FACTOR)
    else:
        options["classification_weight"] = node.CLASSIFICATION_WEIGHT * classification_weight
    calibration = _build_calibration(cfg, part, loss)
    criterion = Criterion(loss, box_losses, calibration=calibration, **options)
    if part.counts_rows and _counts.get():
        _warn_unless_counted(criterion, part, node)
    return criterion


def _warn_unless_counted(criterion: Criterion, part: Part, node: CfgNode) -> None:
    """Let the first training step say so when nobody counted the rows that ``node`` asks for.

    This project's trainer calls :func:`balanced_det.detectors.counting.fit_to_training_data`, which
    sets ``rows_are_counted``; another project's may not know of it.
    """
    keys = [f"BALANCE.{part.name}.OPTIMAL_PRIOR"] if node.OPTIMAL_PRIOR else []
    if node.get("SCORE_THRESHOLD", "FixedThreshold") != "FixedThreshold":
        keys.append(f"BALANCE.{part.name}.SCORE_THRESHOLD")
    criterion.rows_are_counted = False
    if keys:
        criterion.register_forward_pre_hook(functools.partial(_warn_once, keys))


def _warn_once(keys: list[str], criterion: Criterion, _inputs: Any) -> None:
    if criterion.training and not criterion.rows_are_counted:
        logger.warning(
            "%s: the rows of the training set were not counted for this training, so this has no "
            "effect unless the weights that were loaded bring it: call "
            "balanced_det.detectors.counting.fit_to_training_data(model, cfg) before it.",
            " and ".join(keys),
        )
        criterion.rows_are_counted = True


def initial_prior(cfg: CfgNode, part: Part | str) -> float | None:
    """Return the probability that a part's classes start with; None leaves its bias at zero.

    Where the prior is counted, it is only what serves until then.
    """
    part = _part(part)
    node = cfg.BALANCE[part.name]
    if part.counts_rows and node.OPTIMAL_PRIOR:
        _ = cfg.BALANCE.COUNT_IMAGES  # for balanced_det.detectors.counting
        return part.prior_prob
    return node.PRIOR_PROB


def build_sampler(cfg: CfgNode, part: Part | str) -> Sampler:
    """Build the sampler of one part of a detector, see :mod:`balanced_det.samplers`."""
    return _build_method(cfg, _part(part), "SAMPLER")


def build_selection(
    cfg: CfgNode,
    part: Part | str,
    *,
    always: nn.Module | None = None,
    sampled: nn.Module | None = None,
    **quota: Any,
) -> Selection:
    """Build what chooses the rows of one part of a detector and says what divides their losses.

    Args:
        cfg: the whole config.
        part: a :class:`~balanced_det.parts.Part` or its name.
        always: the normalizer, whatever the sampler is.
        sampled: the normalizer where the sampler does not take all rows; for both, None is the
            default of :class:`~balanced_det.selection.Selection`.
        quota: ``rows_per_image`` and ``positive_fraction`` of a part that has Detectron2's keys for
            them.
    """
    part = _part(part)
    sampler = build_sampler(cfg, part)
    if part.has_quota and not sampler.takes_all:
        node = cfg.BALANCE[part.name]
        quota = {"rows_per_image": node.ROWS_PER_IMAGE, "positive_fraction": node.POSITIVE_FRACTION}
    if always is None and not sampler.takes_all:
        always = sampled
    return Selection(sampler, always, **quota)


def build_classifier(
    cfg: CfgNode, part: Part | str, in_features: int, num_logits: int
) -> nn.Module | None:
    """Build the last layer that a part's slot asks for; None is Detectron2's linear one."""
    part = _part(part)
    if cfg.BALANCE[part.name].CLASSIFIER is None:
        return None
    return _build_method(cfg, part, "CLASSIFIER", in_features=in_features, out_features=num_logits)


def build_score_threshold(
    cfg: CfgNode, part: Part | str, num_classes: int, fixed: float
) -> ScoreThreshold:
    """Build the threshold that a part's slot asks for; ``fixed`` is Detectron2's own."""
    part = _part(part)
    threshold = _build_method(cfg, part, "SCORE_THRESHOLD", fixed=fixed, num_classes=num_classes)
    if threshold.counts and part.counts_rows:
        _ = cfg.BALANCE.COUNT_IMAGES  # for balanced_det.detectors.counting
    return threshold


def refuse_overridden_keys(
    cfg: CfgNode, part: Part | str, keys: Mapping[str, tuple[Any, str]]
) -> None:
    """Refuse Detectron2 keys that this project's slots replace, so that none is ignored silently.

    Args:
        keys: {Detectron2 key: (its default, the key to use instead)}.
    """
    for key, (default, instead) in keys.items():
        value = value_of(cfg, key)
        if value not in (default, value_of(cfg, instead)):
            raise InputError(
                f"{key} is {value!r}, but BALANCE.{_part(part).name} decides the losses here: set "
                f"{instead}."
            )


def _part(part: Part | str) -> Part:
    return part if isinstance(part, Part) else PARTS[part]


def _build_classification_loss(cfg: CfgNode, part: Part, num_classes: int) -> ClassificationLoss:
    key = f"BALANCE.{part.name}.CLASSIFICATION_LOSS"
    name = cfg.BALANCE[part.name].CLASSIFICATION_LOSS
    method = SLOTS["CLASSIFICATION_LOSS"].get(name, key)
    if part.name in method.refused_on:
        raise InputError(f"{key}: '{name}' is refused here: {method.refused_on[part.name]}.")
    if method.needs and not part.has_classes:
        raise InputError(f"{key}: '{name}' weighs classes by frequency; objectness has none.")
    loss = _build_method(cfg, part, "CLASSIFICATION_LOSS", num_classes=num_classes)
    _refuse_levels(part, loss)
    if not part.has_classes and loss.num_logits != 1:
        raise InputError(
            f"{key}: '{name}' has {loss.num_logits} logits; RPN predicts one logit an anchor."
        )
    if part.has_classes:
        _weigh_classes(cfg, part, loss)
    sampler = cfg.BALANCE[part.name].SAMPLER
    takes_all = SLOTS["SAMPLER"].get(sampler, f"BALANCE.{part.name}.SAMPLER").takes_all
    if part.name == "ROI_HEADS" and loss.sampled_rows_warning and not takes_all:
        logger.warning(
            "%s: '%s' %s. Use it in BALANCE.RPN or BALANCE.DENSE, or set "
            "BALANCE.ROI_HEADS.SAMPLER, which is '%s', to 'AllSampler'.",
            key,
            name,
            loss.sampled_rows_warning,
            sampler,
        )
    return loss


def _refuse_levels(part: Part, loss: ClassificationLoss | BoxLoss) -> None:
    if loss.per_level and not part.has_levels:
        name = type(loss).__name__
        raise InputError(
            f"BALANCE.{name}.PER_LEVEL: the losses of {part.name} are not told the pyramid level "
            f"of a row, those of DENSE are; give DENSE its own, BALANCE.DENSE.{name}.PER_LEVEL."
        )


def _build_box_losses(cfg: CfgNode, part: Part) -> tuple[list[BoxLoss], list[float]]:
    """Return the box losses that a part's slot names, and the weight of each."""
    key, value = f"BALANCE.{part.name}.BOX_LOSS", cfg.BALANCE[part.name].BOX_LOSS
    names = method_names(value)
    if len({*names}) < len(names):
        raise InputError(f"{key} is {value!r}; give each loss once, with its weight.")
    losses = [_build_method(cfg, part, "BOX_LOSS", name) for name in names]
    for loss in losses:
        _refuse_levels(part, loss)
    return losses, method_weights(value, key)


def _weigh_classes(cfg: CfgNode, part: Part, loss: ClassificationLoss) -> None:
    keys = cfg.BALANCE[part.name]
    weights = keys.CLASS_WEIGHTS
    if weights is None:
        return
    try:
        if isinstance(weights, str):
            method = "inverse" if weights == "auto" else weights
            counts = counted_statistic(cfg, "class_counts")
            # Also without counts, so that a wrong name is found.
            weights = class_weights(
                [1] if counts is None else counts, method, keys.CLASS_WEIGHT_STRENGTH
            )
            weights = None if counts is None else weights
        loss.weigh_classes(weights)
    except (InputError, TypeError, ValueError) as error:  # texts among the weights
        reason = str(error).rstrip(".")
        raise InputError(f"BALANCE.{part.name}.CLASS_WEIGHTS: {reason}.") from None


def _build_calibration(
    cfg: CfgNode, part: Part, loss: ClassificationLoss
) -> ScoreCalibration | None:
    if not part.has_classes or cfg.BALANCE[part.name].SCORE_CALIBRATION is None:
        return None
    calibration = _build_method(cfg, part, "SCORE_CALIBRATION", num_classes=loss.num_classes)
    try:
        calibration.check(loss)
    except InputError as error:
        raise InputError(f"BALANCE.{part.name}.SCORE_CALIBRATION: {error}") from None
    return calibration


def _build_method(
    cfg: CfgNode, part: Part, slot: str, name: str | None = None, **given: Any
) -> Any:
    """Construct the method that a part's slot names, with its parameters and statistics.

    Args:
        name: the method, where the slot names several.
    """
    registry, key = SLOTS[slot], f"BALANCE.{part.name}.{slot}"
    name = cfg.BALANCE[part.name][slot] if name is None else name
    method = registry.get(name, key)
    given.update({need: counted_statistic(cfg, need) for need in getattr(method, "needs", ())})
    parameters = {
        parameter: _parameter(cfg, part, name, parameter.upper(), default)
        for parameter, default in registry.parameters(name).items()
    }
    try:
        return method(**given, **parameters)
    except InputError as error:
        raise InputError(f"BALANCE.{name}: {error}") from None
    except (TypeError, ValueError) as error:  # a text where a number is wanted
        values = ", ".join(f"{key.upper()} {value!r}" for key, value in parameters.items())
        raise InputError(f"BALANCE.{name} cannot have {values}: {error}.") from None


def _parameter(cfg: CfgNode, part: Part, method: str, key: str, default: Any) -> Any:
    """Return a method's parameter: the part's own value, or else the one that all parts share."""
    node = cfg.BALANCE[part.name]
    value = node[method][key] if method in node else None
    if value is None:
        return cfg.BALANCE[method][key]
    fitting = (int, float) if isinstance(default, float) else type(default)
    if default is not None and not isinstance(value, fitting):
        raise InputError(
            f"BALANCE.{part.name}.{method}.{key} is {value!r}; it must be a "
            f"{type(default).__name__}, as {default!r} is."
        )
    return value
