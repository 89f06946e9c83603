"""Configuration: every key of this project, and how files and command lines become a config."""

from .command_line import parse_args
from .keys import add_balanced_det_config
from .loading import load_config
from .ranges import check_ranges

__all__ = ["add_balanced_det_config", "check_ranges", "load_config", "parse_args"]
