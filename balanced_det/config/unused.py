"""What is configured is what trains: a key that was set and that no built object reads is refused.

The objects of a model are built from the config while its reads are recorded
(:func:`balanced_det.config.reads.recorded`), and each reads no key that has no effect on it. A
key whose value is not its default and that nothing read would be ignored, so it is refused. One
thing is allowed: a parameter of a method that had an effect where it was set, when a file on top of
that, or the command line, has exchanged the method in its slot.
"""

import logging

from detectron2.config import CfgNode

from ..errors import InputError
from ..parts import PARTS
from .keys import PYRAMID_BUILDER, default_values, method_names
from .reads import leaves

logger = logging.getLogger(__name__)

# Keys of the run, which the trainer reads; all others directly in BALANCE are the model's.
_MODEL_KEYS = {
    "BALANCE.COUNT_IMAGES": "nothing is counted on images, without OPTIMAL_PRIOR and a counted "
    "SCORE_THRESHOLD of BALANCE.DENSE",
    "BALANCE.GRADIENT_FIGURE_PERIOD": "no loss of the model is a GHM loss",
}
# When a key of a part has an effect.
_EFFECT = {
    "CLASSIFICATION_WEIGHT": "it has an effect without GUIDED_LOSS only, which gives the loss the "
    "size of the box loss whatever its weight is",
    "GUIDED_FACTOR": "it has an effect with GUIDED_LOSS only",
    "PRIOR_PROB": "it has an effect without OPTIMAL_PRIOR only, which counts the prior",
    "CLASS_WEIGHT_STRENGTH": "it has an effect with CLASS_WEIGHTS by name only, such as 'auto'",
    "ROWS_PER_IMAGE": "it has an effect with a SAMPLER that does not take all rows",
    "POSITIVE_FRACTION": "it has an effect with a SAMPLER that does not take all rows",
}


def refuse_unused(cfg: CfgNode, reads: set) -> None:
    """Refuse a config with keys that differ from their defaults and that building did not read.

    Args:
        cfg: the whole config.
        reads: full names of the keys that were read.

    Raises:
        InputError: naming each such key, and why it has no effect.
    """
    defaults = default_values()
    values = {**leaves(cfg.BALANCE, "BALANCE"), **leaves(cfg.MODEL.FCOS, "MODEL.FCOS")}
    unused = [
        key
        for key, value in values.items()
        # None is the default of what a part may have of its own.
        if key not in reads and value != defaults.get(key) and not _is_of_the_run(key)
    ]
    refused = [key for key in unused if not _exchanged(cfg, key, reads)]
    for key in set(unused) - set(refused):
        logger.info("%s has no effect: its method was exchanged later.", key)
    if refused:
        key, *others = refused
        origin = _origins(cfg).get(key)
        by = f", set by {origin.source}" if origin else ""
        more = f" The same is true of {', '.join(others)}." if others else ""
        raise InputError(
            f"{key} is {values[key]!r}{by}, but nothing in this model reads it: "
            f"{_reason(cfg, key, reads)}.{more}"
        )


def _is_of_the_run(key):
    return key.count(".") == 1 and key.startswith("BALANCE.") and key not in _MODEL_KEYS


def _origins(cfg):
    return cfg.BALANCE.__dict__.get("origins", {})


def _reason(cfg, key, reads):
    if key in _MODEL_KEYS:
        return _MODEL_KEYS[key]
    if key.startswith("MODEL.FCOS."):
        return "it is for MODEL.META_ARCHITECTURE BalancedFCOS"
    _, name, *rest = key.split(".")
    if name == "PYRAMID":
        return f"the balanced pyramid needs MODEL.BACKBONE.NAME '{PYRAMID_BUILDER}'"
    if name not in PARTS:
        return f"no slot of the model names '{name}', or each part has its own value"
    if not any(read.startswith(f"BALANCE.{name}.") for read in reads):
        return f"BALANCE.{name} is for {PARTS[name].serves}"
    if len(rest) == 2:
        return f"no slot of BALANCE.{name} names '{rest[0]}'"
    return _EFFECT.get(rest[0], "it has no effect together with the other keys")


def _exchanged(cfg, key, reads):
    """Say whether a method's parameter had an effect where it was set, before another replaced it.

    Slots that the model does not read do not count, neither before nor after.
    """
    method = key.split(".")[-2]
    origin = _origins(cfg).get(key)
    if origin is None or method in PARTS:
        return False
    before = _named(origin.slots, reads)
    now = _named({slot: _slot(cfg, slot) for slot in origin.slots}, reads)
    return method in before and method not in now


def _named(slots, reads):
    named = {
        method
        for slot, names in slots.items()
        if slot in reads and names is not None
        for method in method_names(names)
    }
    if slots["MODEL.BACKBONE.NAME"] == PYRAMID_BUILDER:
        named.add("PYRAMID")
    return named


def _slot(cfg, slot):
    node = cfg
    for key in slot.split("."):
        node = dict.__getitem__(node, key)
    return node
