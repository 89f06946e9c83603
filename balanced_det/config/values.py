"""Values of keys that cannot train, whatever the data are: told by name, before anything is built.

Numbers have their intervals in :mod:`balanced_det.config.ranges`; here are the choices of a text,
the form of a list, and the values that must fit each other.
"""

import functools
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, get_cfg

from ..errors import InputError
from ..parts import PARTS
from .keys import PYRAMID_BUILDER, add_balanced_det_config
from .lazy import lazy_config
from .ranges import RANGES, check_ranges, flat, is_number
from .reads import all_values, value_of

_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_NORM_KEYS = tuple(
    f"MODEL.{node}.NORM"
    for node in (
        "FPN",
        "RESNETS",
        "BOTTOM_UP",
        "ROI_BOX_HEAD",
        "ROI_MASK_HEAD",
        "RETINANET",
        "FCOS",
    )
)
_POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool")
CHOICES = {
    **dict.fromkeys(_NORM_KEYS, _NORMS),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute_range", "absolute"),
    "INPUT.FORMAT": ("BGR", "RGB", "L"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "BALANCE.STATISTICS": ("data", "checkpoint"),
}
# Lists of names, none of which stands twice.
_NAMES = (
    "MODEL.FPN.IN_FEATURES",
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.RPN.IN_FEATURES",
    "MODEL.ROI_HEADS.IN_FEATURES",
    "MODEL.RETINANET.IN_FEATURES",
    "MODEL.FCOS.IN_FEATURES",
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "BALANCE.TRAIN_ONLY",
    "BALANCE.TRUSTED_WEIGHTS",
)
# What may hold no fraction; of keys that hold a single integer, Detectron2 takes no other.
_INTEGERS = (
    "MODEL.RPN.CONV_DIMS",
    "INPUT.MIN_SIZE_TRAIN",
    "SOLVER.STEPS",
    "TEST.AUG.MIN_SIZES",
    "BALANCE.GRADIENT_FIGURE_PERIOD",
)
_NEVER_EMPTY = (
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.RPN.IN_FEATURES",
    "MODEL.ROI_HEADS.IN_FEATURES",
    "MODEL.RETINANET.IN_FEATURES",
    "MODEL.FCOS.IN_FEATURES",
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
    "INPUT.MIN_SIZE_TRAIN",
    "TEST.AUG.MIN_SIZES",
)
_LENGTHS = {
    "MODEL.RPN.BBOX_REG_WEIGHTS": 4,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": 4,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": 4,
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "INPUT.CROP.SIZE": 2,
}
# Keys that have a value by default, and that None turns off.
_CAN_BE_NONE = {
    "SOLVER.WEIGHT_DECAY_NORM",
    "BALANCE.COUNT_IMAGES",
    *(f"BALANCE.{part}.PRIOR_PROB" for part in PARTS),
    *_NORM_KEYS,
}
_MATCHERS = ("RPN", "ROI_HEADS", "RETINANET")
# Pyramids on a ResNet, and how many coarser levels each adds to those of FPN.IN_FEATURES.
_RESNET_PYRAMIDS = {"build_resnet_fpn_backbone": 1, "build_retinanet_resnet_fpn_backbone": 2}
# Where the names of the levels stand that each architecture uses.
_USES_FEATURES = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "RetinaNet": ("RETINANET",),
    "BalancedRetinaNet": ("RETINANET",),
    "BalancedFCOS": ("FCOS",),
}


def check_values(cfg: CfgNode) -> None:
    """Refuse a config with a value that cannot train, whatever the others are.

    Raises:
        InputError: naming the key, its value, and what it may be.
    """
    _refuse_none(cfg)
    _check_lists(cfg)
    _check_numbers(cfg)
    check_ranges(cfg)
    for key, choices in CHOICES.items():
        value = value_of(cfg, key)
        if value not in choices and not (value is None and key in _CAN_BE_NONE):
            known = ", ".join(repr(choice) for choice in choices)
            raise InputError(f"{key} is {value!r}; known are: {known}.")
    _check_device(cfg.MODEL.DEVICE)


def check_pairs(cfg: CfgNode) -> None:
    """Refuse a config with values that cannot train together; see :func:`check_values`.

    A file that others have as their base need not fit alone.

    Raises:
        InputError: naming both keys.
    """
    for sentence in _misfits(cfg):
        raise InputError(sentence)


# --- Each key for itself --------------------------------------------------------------------------


@functools.cache
def _defaults():
    """Return {key: default} of all keys but those of methods."""
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    methods = {node for node in cfg.BALANCE if isinstance(cfg.BALANCE[node], CfgNode)} - {*PARTS}
    return {
        key: value
        for key, value in all_values(cfg).items()
        if not (key.startswith("BALANCE.") and key.split(".")[1] in methods)
    }


def _refuse_none(cfg):
    """Refuse None where a value is wanted; yacs takes it for every key."""
    for key, default in _defaults().items():
        if default is None or key in _CAN_BE_NONE:
            continue
        if value_of(cfg, key) is None:
            raise InputError(
                f"{key} is None; it must be a {type(default).__name__}, as {default!r} is."
            )


def _check_numbers(cfg):
    """Refuse all but a number where None is the default, for which yacs takes anything."""
    for key in RANGES:
        value = value_of(cfg, key)
        if _defaults()[key] is None and isinstance(value, (bool, list, tuple)):
            raise InputError(f"{key} is {value!r}; it must be a number or None.")


def _check_lists(cfg):
    for key in _NAMES:
        names = value_of(cfg, key)
        if not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{key} is {names}; it must be a list of names.")
        if len({*names}) < len(names):
            raise InputError(f"{key} is {names}; a name stands twice in it.")
    for key in _NEVER_EMPTY:
        if not value_of(cfg, key):
            raise InputError(f"{key} is empty.")
    for key, length in _LENGTHS.items():
        value = value_of(cfg, key)
        if len(value) != length:
            raise InputError(f"{key} is {value}; it must have {length} values.")
    for key in _INTEGERS:
        value = value_of(cfg, key)
        if not all(n is None or _is_whole(n) for n in flat(value)):
            raise InputError(f"{key} is {value}; it must be made of whole numbers.")


def _is_whole(value):
    return is_number(value) and float(value).is_integer()  # 1.0 is whole, too


def _check_device(name):
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"MODEL.DEVICE is {name!r}; it must be 'cuda' or 'cpu'.") from None
    count = torch.cuda.device_count()
    # "cuda" alone becomes "cpu" where there is none, with a line in the log.
    if device.type == "cuda" and device.index is not None and device.index >= count:
        raise InputError(f"MODEL.DEVICE is {name!r}, but there are {count} GPUs.")


# --- Values that must fit each other --------------------------------------------------------------


def _misfits(cfg: CfgNode) -> Iterator[str]:
    """Yield a sentence for each pair of keys that do not fit."""
    yield from _input_misfits(cfg.INPUT)
    yield from _solver_misfits(cfg.SOLVER)
    yield from _data_misfits(cfg)
    if lazy_config(cfg) is None:  # else the model is not that of the keys
        yield from _model_misfits(cfg.MODEL)
        backbone = cfg.MODEL.BACKBONE.NAME
        inner = cfg.BALANCE.PYRAMID.BACKBONE if backbone == PYRAMID_BUILDER else backbone
        if inner in _RESNET_PYRAMIDS:
            yield from _feature_misfits(cfg.MODEL, _RESNET_PYRAMIDS[inner])


def _input_misfits(keys):
    sizes = keys.MIN_SIZE_TRAIN
    if keys.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; with INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' it must "
            "be the smallest and the largest size."
        )
    kind, size = keys.CROP.TYPE, keys.CROP.SIZE
    if kind.startswith("relative"):
        fits, wanted = all(is_number(n) and 0 < n <= 1 for n in size), "shares in (0, 1]"
    else:
        fits = all(_is_whole(n) and n >= 1 for n in size)
        wanted = "whole numbers of pixels"
    if keys.CROP.ENABLED and not fits:
        yield f"INPUT.CROP.SIZE is {size}; with INPUT.CROP.TYPE '{kind}' it must be two {wanted}."


def _solver_misfits(keys):
    steps, name = keys.STEPS, keys.LR_SCHEDULER_NAME
    if any(later <= earlier for earlier, later in zip(steps, steps[1:])):
        yield f"SOLVER.STEPS is {steps}; each iteration must be larger than the one before."
    used = [step for step in steps if step <= keys.MAX_ITER]
    if name == "WarmupMultiStepLR" and len(used) >= keys.MAX_ITER:
        yield (
            f"SOLVER.STEPS is {steps}, which are too many for SOLVER.MAX_ITER {keys.MAX_ITER}: a "
            "run has more iterations than steps of its learning rate."
        )
    if name == "WarmupStepWithFixedGammaLR" and keys.MAX_ITER <= keys.NUM_DECAYS:
        yield (
            f"SOLVER.NUM_DECAYS is {keys.NUM_DECAYS}; with SOLVER.LR_SCHEDULER_NAME '{name}' it "
            f"must be less than SOLVER.MAX_ITER, {keys.MAX_ITER}."
        )
    if name == "WarmupCosineLR" and keys.BASE_LR_END > keys.BASE_LR:
        yield (
            f"SOLVER.BASE_LR_END is {keys.BASE_LR_END}; it must be at most SOLVER.BASE_LR, "
            f"{keys.BASE_LR}."
        )
    if name == "WarmupCosineLR" and keys.BASE_LR == 0:
        yield "SOLVER.BASE_LR is 0; 'WarmupCosineLR' divides by it."


def _data_misfits(cfg):
    key, factors = "DATASETS.TRAIN_REPEAT_FACTOR", cfg.DATASETS.TRAIN_REPEAT_FACTOR
    for entry in factors:
        is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        if not (is_pair and is_number(entry[1]) and entry[1] > 0):
            yield f"{key}: {entry!r} is no [name, weight], with a weight above 0."
        elif entry[0] not in cfg.DATASETS.TRAIN:
            yield f"{key} names {entry[0]!r}, which is not in DATASETS.TRAIN."
    for entry in cfg.TEST.EXPECTED_RESULTS:
        is_row = isinstance(entry, (list, tuple)) and len(entry) == 4
        if not (is_row and all(map(is_number, entry[2:]))):
            yield f"TEST.EXPECTED_RESULTS: {entry!r} is no [task, metric, value, tolerance]."


def _model_misfits(keys):
    for node in _MATCHERS:
        yield from _matcher_misfits(f"MODEL.{node}", keys[node])
    if 0 in keys.RPN.CONV_DIMS:
        yield f"MODEL.RPN.CONV_DIMS is {keys.RPN.CONV_DIMS}; a layer has at least one channel."
    yield from _cascade_misfits(keys)
    yield from _anchor_misfits(keys)
    yield from _norm_misfits(keys)
    regions = keys.ROI_HEADS
    if regions.NAME == "Res5ROIHeads" and len(regions.IN_FEATURES) != 1:
        yield (
            f"MODEL.ROI_HEADS.IN_FEATURES is {regions.IN_FEATURES}; MODEL.ROI_HEADS.NAME "
            "'Res5ROIHeads' takes one."
        )
    head = keys.ROI_BOX_HEAD
    if head.NAME == "FastRCNNConvFCHead" and head.NUM_CONV + head.NUM_FC == 0:
        yield (
            "MODEL.ROI_BOX_HEAD.NUM_FC and MODEL.ROI_BOX_HEAD.NUM_CONV are 0; "
            "'FastRCNNConvFCHead' has at least one layer."
        )


def _matcher_misfits(name, keys):
    thresholds, labels = keys.IOU_THRESHOLDS, keys.IOU_LABELS
    if not thresholds or any(low > high for low, high in zip(thresholds, thresholds[1:])):
        yield f"{name}.IOU_THRESHOLDS is {thresholds}; it must be one IoU or more, ascending."
    elif len(labels) != len(thresholds) + 1:
        yield (
            f"{name}.IOU_LABELS is {labels}; {name}.IOU_THRESHOLDS {thresholds} needs "
            f"{len(thresholds) + 1} labels."
        )
    elif not all(label in (-1, 0, 1) for label in labels) or (labels[0], labels[-1]) != (0, 1):
        yield (
            f"{name}.IOU_LABELS is {labels}; it must begin with 0, background, end with 1, "
            "foreground, and have -1, ignored, or these in between."
        )


def _cascade_misfits(keys):
    if not keys.ROI_HEADS.NAME.endswith("CascadeROIHeads"):
        return
    stages, weights = keys.ROI_BOX_CASCADE_HEAD.IOUS, keys.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    if len(weights) != len(stages) or not all(
        isinstance(stage, (list, tuple)) and len(stage) == 4 for stage in weights
    ):
        yield (
            f"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS is {weights}; "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS has {len(stages)} stages, and each needs 4 weights."
        )
    if list(stages[:1]) != list(keys.ROI_HEADS.IOU_THRESHOLDS):
        yield (
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {stages}; it must begin with "
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS, {keys.ROI_HEADS.IOU_THRESHOLDS}."
        )
    if not keys.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        yield (
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False; a cascade has one box for all "
            "classes."
        )


def _anchor_misfits(keys):
    """The anchors of RPN, or of a RetinaNet."""
    architecture = keys.META_ARCHITECTURE
    if architecture not in ("GeneralizedRCNN", "RetinaNet", "BalancedRetinaNet"):
        return
    part = "RPN" if architecture == "GeneralizedRCNN" else "RETINANET"
    levels = len(keys[part].IN_FEATURES)
    numbers = {}
    for name in ("SIZES", "ASPECT_RATIOS"):
        key, value = f"MODEL.ANCHOR_GENERATOR.{name}", keys.ANCHOR_GENERATOR[name]
        nested = [isinstance(level, (list, tuple)) for level in value]
        if any(nested) != all(nested) or not value or (all(nested) and not all(value)):
            yield f"{key} is {value}; it must be numbers, or a list of numbers for each level."
            return
        if all(nested) and len(value) not in (1, levels):
            yield f"{key} has {len(value)} levels; MODEL.{part}.IN_FEATURES has {levels}."
            return
        numbers[name] = [len(level) for level in value] if all(nested) else [len(value)]
    counts = {
        sizes * ratios
        for sizes, ratios in zip(
            *(each * levels if len(each) == 1 else each for each in numbers.values())
        )
    }
    if len(counts) > 1:
        yield (
            "MODEL.ANCHOR_GENERATOR.SIZES and MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS must make as "
            "many anchors at each level."
        )


def _feature_misfits(keys, coarser):
    """The levels of a pyramid on a ResNet, which adds so many coarser ones."""
    known = ("stem", "res2", "res3", "res4", "res5")
    out, used = keys.RESNETS.OUT_FEATURES, keys.FPN.IN_FEATURES
    for name in out:
        if name not in known:
            yield f"MODEL.RESNETS.OUT_FEATURES has '{name}'; known are: {', '.join(known)}."
    for name in used:
        if name not in out:
            yield f"MODEL.FPN.IN_FEATURES has '{name}'; MODEL.RESNETS.OUT_FEATURES has no such."
    if not used or list(used) != list(known[known.index(used[0]) :][: len(used)]):
        yield f"MODEL.FPN.IN_FEATURES is {used}; it must be neighbours, fine to coarse."
        return
    last = max(known.index(used[-1]), 1) + 1  # p2 is of res2 and, as large as that, of the stem
    levels = [f"p{level}" for level in range(last - len(used) + 1, last + coarser + 1)]
    for node in _USES_FEATURES.get(keys.META_ARCHITECTURE, ()):
        for name in keys[node].IN_FEATURES:
            if name not in levels:
                yield (
                    f"MODEL.{node}.IN_FEATURES has '{name}'; by MODEL.BACKBONE.NAME and "
                    f"MODEL.FPN.IN_FEATURES there are {', '.join(levels)}."
                )
                return
    pooled = keys.ROI_HEADS.IN_FEATURES
    start = levels.index(pooled[0]) if keys.META_ARCHITECTURE == "GeneralizedRCNN" else None
    if start is not None and list(pooled) != levels[start : start + len(pooled)]:
        yield f"MODEL.ROI_HEADS.IN_FEATURES is {pooled}; it must be neighbours, fine to coarse."


def _norm_misfits(keys):
    """Group normalization has 32 groups."""
    channels = {
        "FPN": ("FPN.OUT_CHANNELS", True),
        "ROI_BOX_HEAD": ("ROI_BOX_HEAD.CONV_DIM", keys.ROI_BOX_HEAD.NUM_CONV > 0),
        "ROI_MASK_HEAD": ("ROI_MASK_HEAD.CONV_DIM", keys.MASK_ON),
        "RETINANET": ("FPN.OUT_CHANNELS", keys.META_ARCHITECTURE.endswith("RetinaNet")),
        "FCOS": ("FPN.OUT_CHANNELS", keys.META_ARCHITECTURE == "BalancedFCOS"),
    }
    for node, (key, is_used) in channels.items():
        number = value_of(keys, key)
        if is_used and keys[node].NORM == "GN" and number % 32:
            yield f"MODEL.{node}.NORM is 'GN', which needs 32 groups; MODEL.{key} is {number}."
