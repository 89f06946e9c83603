"""From a config file and a command line to a config: files are read and merged, mistakes named."""

import logging
import os

import torch
import yaml
from detectron2.config import get_cfg

from ..data.registration import register_datasets
from ..errors import InputError
from .keys import add_balanced_det_config

logger = logging.getLogger(__name__)


def load_config(config_file, opts=(), **overrides):
    """Read a config file of this project and register the data sets that it names.

    Args:
        config_file: path of a YAML file.
        opts: ["KEY", "VALUE", ...] to set after that, as on the command line.
        overrides: more keys to set, with "__" for each dot.

    Returns:
        The config, not frozen. A key that does not exist, or a value of the wrong type, is an
        :class:`InputError`.
    """
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    _merge_file(cfg, config_file)
    if len(opts) % 2:
        raise InputError(f"Not pairs of KEY VALUE: {' '.join(map(str, opts))}.")
    pairs = [*zip(opts[::2], opts[1::2])]
    for key, value in [*pairs, *((k.replace("__", "."), v) for k, v in overrides.items())]:
        try:
            cfg.merge_from_list([key, value])
        except _CONFIG_ERRORS as error:
            raise InputError(f"{key} {value}: {_reason(error)}.") from None
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        logger.warning("No GPU is available: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    return cfg


# What yacs and Detectron2 raise for a key or value that they refuse.
_CONFIG_ERRORS = (KeyError, ValueError, TypeError, AssertionError)


def _merge_file(cfg, config_file):
    if not os.path.isfile(config_file):
        raise InputError(f"The config file '{config_file}' does not exist.")
    try:
        with open(config_file, encoding="utf-8") as file:
            has_keys = isinstance(yaml.safe_load(file), dict)
        if has_keys:
            # Detectron2's default may execute code from the file.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as error:
        raise InputError(f"{config_file}: its _BASE_ '{error.filename}' does not exist.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{config_file} is no valid YAML: {reason}.") from None
    except _CONFIG_ERRORS as error:
        raise InputError(f"{config_file}: {_reason(error)}.") from None
    if not has_keys:
        raise InputError(f"The config file '{config_file}' holds no 'KEY: value'.")


def _reason(error):
    return str(error.args[0] if error.args else error).rstrip(".!")
