"""Configuration: every key of this project, and how files and command lines become a config."""

from .command_line import parse_args
from .keys import add_balanced_det_config
from .loading import load_config
from .values import check_pairs, check_values

__all__ = ["add_balanced_det_config", "check_pairs", "check_values", "load_config", "parse_args"]
