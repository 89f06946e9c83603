"""What a training does about its rare classes, told in a line each when it starts."""

import logging

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from ..data.registration import training_statistics
from ..data.statistics import DatasetStatistics
from ..data.survey import class_repeats
from ..errors import printable
from ..losses.tail import TailClasses
from .classes import dataset_classes

logger = logging.getLogger(__name__)

# So many names are told; of 1,203 classes a line would hold 800.
_NAMES = 50
_REPEATING = {
    "RepeatFactorTrainingSampler": lambda s: s.frequency,
    "InstanceAwareRepeatFactorTrainingSampler": lambda s: s.joint_frequency,
}


def log_remedies(cfg: CfgNode, model: nn.Module) -> None:
    """Log which classes are the tail of the model's losses, and how often the data's are repeated.

    Args:
        cfg: the config of the training.
        model: with its statistics, counted or loaded.
    """
    if not cfg.DATASETS.TRAIN:  # a trainer with a loader of its own
        return
    statistics = training_statistics(cfg)
    names = [printable(name) for name in dataset_classes(cfg.DATASETS.TRAIN[0])["names"]]
    lines = {  # one a loss: the stages of a cascade have the same
        _tail_line(module, statistics, names): None
        for module in model.modules()
        if isinstance(module, TailClasses)
    }
    if cfg.DATALOADER.SAMPLER_TRAIN in _REPEATING:
        lines[_repeat_line(cfg.DATALOADER, statistics, names)] = None
    for line in lines:
        logger.info(line)


def _tail_line(tail: TailClasses, statistics: DatasetStatistics, names: list[str]) -> str:
    num_tail, num_present = tail.counts()
    count = statistics.image_count.tolist()
    chosen = [i for i, is_tail in enumerate(tail.mask().tolist()) if is_tail and count[i]]
    rarest_first = sorted(chosen, key=lambda i: count[i])
    told = _listed([f"{names[i]} ({count[i]})" for i in rarest_first])
    return (
        f"{tail.loss}: {tail.setting} makes {num_tail} of the {num_present} classes that occur "
        f"tail classes, with so many training images each: {told}."
    )


def _repeat_line(keys: CfgNode, statistics: DatasetStatistics, names: list[str]) -> str:
    frequency = np.asarray(_REPEATING[keys.SAMPLER_TRAIN](statistics))
    factor = class_repeats(frequency, keys.REPEAT_THRESHOLD, keys.REPEAT_SQRT)
    repeated = [i for i in np.argsort(-factor, kind="stable") if factor[i] > 1]
    told = _listed([f"{names[i]} ({factor[i]:.1f} times)" for i in repeated])
    return (
        f"{keys.SAMPLER_TRAIN}: DATALOADER.REPEAT_THRESHOLD {keys.REPEAT_THRESHOLD} repeats images "
        f"of {len(repeated)} of the {int((frequency > 0).sum())} classes that occur: {told}."
    )


def _listed(texts: list[str]) -> str:
    more = len(texts) - _NAMES
    return ", ".join(texts[:_NAMES] or ["none"]) + (f" and {more} more" if more > 0 else "")
