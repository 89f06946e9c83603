"""Values that a number of the config may have; what lies outside trains nothing sensible.

Intervals are written as in mathematics: ``[0, 1)`` holds 0 and not 1. In a list, or in lists of a
list, each number has to lie inside. Parameters of methods are checked by their constructors.
"""

import math
import operator
from typing import Any

from detectron2.config import CfgNode

from ..errors import InputError
from ..parts import PARTS
from .reads import value_of

_SHARE = "[0, 1]"
_AT_LEAST_0 = "[0, inf)"
_AT_LEAST_1 = "[1, inf)"
_ABOVE_0 = "(0, inf)"
_FINITE = "(-inf, inf)"

_SOLVER = {
    "SOLVER.IMS_PER_BATCH": _AT_LEAST_1,
    "TEST.IMS_PER_BATCH": _AT_LEAST_1,
    "SOLVER.BASE_LR": _AT_LEAST_0,
    "SOLVER.BASE_LR_END": _AT_LEAST_0,
    "SOLVER.BIAS_LR_FACTOR": _AT_LEAST_0,
    "SOLVER.MOMENTUM": "[0, 1)",
    "SOLVER.WEIGHT_DECAY": _AT_LEAST_0,
    "SOLVER.WEIGHT_DECAY_NORM": _AT_LEAST_0,
    "SOLVER.WEIGHT_DECAY_BIAS": _AT_LEAST_0,
    "SOLVER.GAMMA": _ABOVE_0,
    "SOLVER.STEPS": _AT_LEAST_1,
    "SOLVER.NUM_DECAYS": _AT_LEAST_1,
    "SOLVER.MAX_ITER": _AT_LEAST_1,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": _AT_LEAST_0,
    "SOLVER.CHECKPOINT_PERIOD": _AT_LEAST_1,
    "SOLVER.REFERENCE_WORLD_SIZE": _AT_LEAST_0,
    # A value below zero turns the gradients round.
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _ABOVE_0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "(0, inf]",
}
_DATA = {
    "DATALOADER.NUM_WORKERS": _AT_LEAST_0,
    "DATALOADER.REPEAT_THRESHOLD": _AT_LEAST_0,
    "DATALOADER.RANDOM_SUBSET_RATIO": "(0, 1]",
    "INPUT.MIN_SIZE_TRAIN": _AT_LEAST_1,
    "INPUT.MAX_SIZE_TRAIN": _AT_LEAST_1,
    "INPUT.MIN_SIZE_TEST": _AT_LEAST_0,  # 0 leaves the size as it is
    "INPUT.MAX_SIZE_TEST": _AT_LEAST_1,
    "TEST.EVAL_PERIOD": _AT_LEAST_0,
    "TEST.DETECTIONS_PER_IMAGE": _AT_LEAST_1,
    "TEST.AUG.MIN_SIZES": _AT_LEAST_1,
    "TEST.AUG.MAX_SIZE": _AT_LEAST_1,
    "TEST.PRECISE_BN.NUM_ITER": _AT_LEAST_1,
    "VIS_PERIOD": _AT_LEAST_0,
    # What numpy's generator takes, less the number of a worker; below zero there is no seed.
    "SEED": "(-inf, 4.29e9)",
}
_MODEL = {
    "MODEL.PIXEL_MEAN": _FINITE,
    "MODEL.PIXEL_STD": _ABOVE_0,
    "MODEL.BACKBONE.FREEZE_AT": _AT_LEAST_0,
    "MODEL.FPN.OUT_CHANNELS": _AT_LEAST_1,
    **{
        f"MODEL.RESNETS.{key}": _AT_LEAST_1
        for key in (
            "NUM_GROUPS",
            "WIDTH_PER_GROUP",
            "RES2_OUT_CHANNELS",
            "STEM_OUT_CHANNELS",
            "DEFORM_NUM_GROUPS",
        )
    },
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _AT_LEAST_0,
    "MODEL.ANCHOR_GENERATOR.SIZES": _ABOVE_0,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ABOVE_0,
    "MODEL.ANCHOR_GENERATOR.OFFSET": "[0, 1)",
    # -1 is as many channels as the features have.
    "MODEL.RPN.CONV_DIMS": "[-1, inf)",
    "MODEL.RPN.BBOX_REG_WEIGHTS": _ABOVE_0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _AT_LEAST_1,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.IOU_THRESHOLDS": _SHARE,
    "MODEL.RPN.LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _AT_LEAST_1,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _AT_LEAST_1,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _AT_LEAST_1,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _AT_LEAST_1,
    "MODEL.ROI_HEADS.NUM_CLASSES": _AT_LEAST_1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _AT_LEAST_1,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _SHARE,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _ABOVE_0,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _AT_LEAST_0,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _ABOVE_0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _AT_LEAST_0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _AT_LEAST_1,
    **{
        f"MODEL.{head}.{key}": interval
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
        for key, interval in {
            "NUM_CONV": _AT_LEAST_0,
            "CONV_DIM": _AT_LEAST_1,
            "POOLER_RESOLUTION": _AT_LEAST_1,
            "POOLER_SAMPLING_RATIO": _AT_LEAST_0,  # 0 takes as many samples as a bin has pixels
        }.items()
    },
    "MODEL.RETINANET.IOU_THRESHOLDS": _SHARE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _ABOVE_0,
    "MODEL.FCOS.CENTER_SAMPLING_RADIUS": _AT_LEAST_0,
    "MODEL.FCOS.INITIAL_DISTANCE": _ABOVE_0,
    **{
        f"MODEL.{detector}.{key}": interval
        for detector in ("RETINANET", "FCOS")
        for key, interval in {
            "NUM_CLASSES": _AT_LEAST_1,
            "NUM_CONVS": _AT_LEAST_1,
            "SCORE_THRESH_TEST": _SHARE,
            "NMS_THRESH_TEST": _SHARE,
            "TOPK_CANDIDATES_TEST": _AT_LEAST_1,
        }.items()
    },
}
_BALANCE = {
    "BALANCE.COUNT_IMAGES": _AT_LEAST_1,
    "BALANCE.GRADIENT_FIGURE_PERIOD": _AT_LEAST_1,
    "BALANCE.ACCUMULATE_STEPS": _AT_LEAST_1,
    "BALANCE.SKIP_BAD_STEPS": _AT_LEAST_0,
    "BALANCE.SKIP_BROKEN_IMAGES": _AT_LEAST_0,
    "BALANCE.DENSE.ROWS_PER_IMAGE": _AT_LEAST_1,
    "BALANCE.DENSE.POSITIVE_FRACTION": _SHARE,
    "BALANCE.DENSE.CLASS_WEIGHT_STRENGTH": _AT_LEAST_0,
    "BALANCE.ROI_HEADS.CLASS_WEIGHT_STRENGTH": _AT_LEAST_0,
    **{
        f"BALANCE.{part}.{key}": interval
        for part in PARTS
        for key, interval in {
            "CLASSIFICATION_WEIGHT": _AT_LEAST_0,
            "BOX_WEIGHT": _AT_LEAST_0,
            "PRIOR_PROB": "(0, 1)",
            "GUIDED_FACTOR": _ABOVE_0,
        }.items()
    },
}
RANGES = {**_SOLVER, **_DATA, **_MODEL, **_BALANCE}
# Where None is off, messages say so.
_CAN_BE_OFF = {"BALANCE.COUNT_IMAGES": "for all", "BALANCE.GRADIENT_FIGURE_PERIOD": "for never"}

# How older files say what None says now.
_OLD_OFF = {"BALANCE.IoUBalancedSampler.FLOOR_THRESHOLD": -1, "MODEL.FCOS.NORM": ""}


def check_ranges(cfg: CfgNode) -> None:
    """Refuse a config in which a number lies outside of its interval, or "off" is not None.

    Raises:
        InputError: naming the key, its value and the interval.
    """
    for key, old in _OLD_OFF.items():
        value = value_of(cfg, key)
        if value == old:
            raise InputError(f"{key} is {value!r}, which was off; off is None.")
    for key, interval in RANGES.items():
        value = value_of(cfg, key)
        for number in flat(value):
            if number is not None and not inside(number, interval):
                off = f", or be None {_CAN_BE_OFF[key]}" if key in _CAN_BE_OFF else ""
                raise InputError(f"{key} is {value}; it must lie in {interval}{off}.")


def flat(value: Any) -> list:
    """Return what is in a list and the lists in it, or a list of the value where it is none."""
    if not isinstance(value, (list, tuple)):
        return [value]
    return [inner for item in value for inner in flat(item)]


def inside(number: float, interval: str) -> bool:
    """Say whether a number lies in an interval like ``"[0, inf)"``; NaN lies in none.

    An infinite number lies in an interval that is closed there: ``"(0, inf]"``.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    after = operator.ge if interval[0] == "[" else operator.gt
    before = operator.le if interval[-1] == "]" else operator.lt
    return is_number(number) and after(number, low) and before(number, high)


def is_number(value: Any) -> bool:
    """Say whether a value is a number, and no NaN."""
    return isinstance(value, (int, float)) and not math.isnan(value)
