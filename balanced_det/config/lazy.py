"""Detectron2's Python configs (``LazyConfig``), whose objects are built by constructors alone.

A file has the parts that Detectron2's ``lazyconfig_train_net.py`` reads: ``model``, ``dataloader``
(with ``train``, ``test`` and, if LVIS's evaluation is not wanted, ``evaluator``), ``optimizer``,
``lr_multiplier`` and ``train``. ``balance`` may hold keys of ``BALANCE`` that are the run's and not
the model's: ``DATASETS``, ``TRAIN_ONLY`` and the like.

What the trainer itself has to know stands in a config of the usual kind as well, so that all checks
and the whole trainer serve both; the Python config travels with it, see :func:`lazy_config`.
"""

import builtins
import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import InputError
from .keys import add_balanced_det_config

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
# Keys of `train`, and the trainer's own that they mean.
_TRAIN_KEYS = {
    "output_dir": "OUTPUT_DIR",
    "init_checkpoint": "MODEL.WEIGHTS",
    "max_iter": "SOLVER.MAX_ITER",
    "amp.enabled": "SOLVER.AMP.ENABLED",
    "checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "eval_period": "TEST.EVAL_PERIOD",
    "device": "MODEL.DEVICE",
    "seed": "SEED",
    "cudnn_benchmark": "CUDNN_BENCHMARK",
    "float32_precision": "FLOAT32_PRECISION",
}
# Arguments of `dataloader.train`, and the trainer's own keys that they mean.
_LOADER_ARGUMENTS = {
    "total_batch_size": "SOLVER.IMS_PER_BATCH",
    "num_workers": "DATALOADER.NUM_WORKERS",
    "aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
    "dataset.filter_empty": "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
}
# Keys that Detectron2's common configs have and this trainer does not: their only values.
_FIXED_TRAIN_KEYS = {
    "checkpointer.max_to_keep": 100,
    "log_period": 20,
    "ddp.broadcast_buffers": False,
    "ddp.find_unused_parameters": False,
    "ddp.fp16_compression": False,
}


def is_lazy_file(path: str) -> bool:
    """Say whether a config file is a Python config."""
    return path.endswith(".py")


def lazy_config(cfg: CfgNode) -> Any:
    """Return the Python config that ``cfg`` is the run of, or None for a config of keys alone."""
    return cfg.__dict__.get("lazy")


def load_lazy_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a Python config, change it by ``path.key=value`` texts, and return the run's config.

    Args:
        config_file: path of a .py file. It is code, and runs.
        opts: ["train.max_iter=10", ...], in Hydra's syntax.

    Raises:
        InputError: the file cannot be loaded or lacks a part, a key does not exist, or one that was
            set has no effect.
    """
    lazy = _load(config_file)
    _override(lazy, opts)
    missing = [part for part in PARTS if part not in lazy]
    if missing:
        raise InputError(f"The config file '{config_file}' has no '{missing[0]}'.")
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    # Beside the keys: yacs keeps there what is none, and clones it.
    cfg.__dict__["lazy"] = lazy
    cfg.MODEL.META_ARCHITECTURE = "LazyConfig"
    for key, value in _run_values(lazy, config_file).items():
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{config_file}: {str(error.args[0]).rstrip('.')}.") from None
    return cfg


def _load(config_file):
    if not os.path.isfile(config_file):
        raise InputError(f"The config file '{config_file}' does not exist.")
    original = builtins.__import__
    try:
        return LazyConfig.load(config_file)
    except InputError:
        raise
    except Exception as error:  # whatever a file of code may raise
        raise InputError(
            f"The config file '{config_file}' cannot be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())}."
        ) from error
    finally:
        # Detectron2 exchanges it while it loads, and leaves it so where the file raises.
        builtins.__import__ = original


def _override(lazy, opts):
    for text in map(str, opts):
        key, equals, _ = text.partition("=")
        if not equals:
            raise InputError(f"'{text}' is no key=value, as a Python config takes them.")
        key = key.lstrip("+")
        if not _may_set(lazy, key):
            raise InputError(f"{text}: the config has no key '{key}'.")
        try:
            LazyConfig.apply_overrides(lazy, [text])
        except (OmegaConfBaseException, HydraException, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{text}: {reason.rstrip('.')}.") from None


def _may_set(lazy, key):
    """Say whether a key exists, or is an argument of the constructor that holds it."""
    if key.startswith("balance."):
        return True  # the keys of BALANCE are known, see _run_values
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(lazy, parent) if parent else lazy
    except OmegaConfBaseException:
        return False
    if node is None or not OmegaConf.is_config(node):
        return False
    if OmegaConf.is_list(node):
        return name.isdigit() and int(name) < len(node)
    target = node.get("_target_")
    return name in node or (callable(target) and name in inspect.signature(target).parameters)


def _run_values(lazy, config_file):
    """Return {full key: value} of what the trainer itself has to know."""
    values = {}
    for split, key in (("train", "DATASETS.TRAIN"), ("test", "DATASETS.TEST")):
        names = _get(lazy, f"dataloader.{split}.dataset.names", ())
        values[key] = (names,) if isinstance(names, str) else tuple(names)
    for argument, key in _LOADER_ARGUMENTS.items():
        values[key] = _get(lazy, f"dataloader.train.{argument}")
    for key, value in _leaves(lazy.train).items():
        if key in _TRAIN_KEYS:
            values[_TRAIN_KEYS[key]] = value
        elif key not in _FIXED_TRAIN_KEYS or value != _FIXED_TRAIN_KEYS[key]:
            known = ", ".join(_TRAIN_KEYS)
            raise InputError(
                f"{config_file}: train.{key} is {value!r}, which has no effect here; keys of "
                f"'train' are {known}."
            )
    for key, value in _leaves(lazy.get("balance", {})).items():
        if "." in key and not key.endswith(".OPTIMAL_PRIOR"):
            raise InputError(
                f"{config_file}: balance.{key} has no effect: arguments of 'model' take its place."
            )
        values[f"BALANCE.{key}"] = value
    return {key: value for key, value in values.items() if value is not None}


def _get(lazy, key, default=None):
    value = OmegaConf.select(lazy, key, default=default)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _leaves(node, prefix=""):
    found = {}
    for key in node:
        value = node[key]
        if OmegaConf.is_dict(value):
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            found[f"{prefix}{key}"] = plain
    return found


def save_lazy_config(cfg: CfgNode) -> None:
    """Write the Python config, as it is after all overrides, into the run's folder."""
    LazyConfig.save(copy.deepcopy(lazy_config(cfg)), os.path.join(cfg.OUTPUT_DIR, "lazy.yaml"))
