"""The command line: Detectron2's, with ``--with`` for fragments of configs."""

import argparse
import itertools
import re
from collections.abc import Sequence

from detectron2.engine import default_argument_parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return Detectron2's arguments and ``fragments``, the names given to ``--with``.

    Args:
        arguments: a list of texts; those of the process by default.
    """
    parser = default_argument_parser()
    parser.add_argument(
        "--with",
        dest="fragments",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="fragments to merge over the config file: names of files in configs/methods that fit "
        "the detector (eql rfs), or paths of .yaml files",
    )
    args = parser.parse_args(arguments)
    # argparse gives the KEY VALUE pairs after the names to --with, too.
    names = list(itertools.takewhile(lambda text: not _is_key(text), args.fragments))
    args.opts = [*args.fragments[len(names) :], *args.opts]
    args.fragments = names
    return args


def _is_key(text):
    """Tell KEY, PATH.KEY and path.key=value from the name of a fragment and a path."""
    return not text.endswith((".yaml", ".yml")) and re.match(r"[A-Z_]+(\.|$)|.*=", text) is not None
