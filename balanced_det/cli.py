"""``balanced-det``: one command, with a subcommand for each module that runs by ``python -m``.

A subcommand's module is imported only when it is called, so that ``--help`` answers at once.
"""

import importlib
import sys
from pathlib import Path

from . import __version__
from .errors import InputError

# subcommand -> module with main(arguments), what it does
_COMMANDS = {
    "analyze": ("balanced_det.analyze", "what a data set holds, and what follows for training"),
    "new": ("balanced_det.new", "write a config for your own data"),
    "train": ("balanced_det.train", "train and evaluate a detector"),
    "compare": ("balanced_det.compare", "compare configs or finished runs"),
    "predict": ("balanced_det.predict", "detect objects in images"),
    "report": ("balanced_det.run_report", "write the page of a run again"),
    "evaluate": ("balanced_det.evaluation.__main__", "evaluate a file of detections"),
    "shapes": ("balanced_det.data.shapes", "generate a long-tailed data set"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand with the rest of the command line; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = _available()
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_usage(commands))
        return 0
    if name == "--version":
        print(f"balanced_det {__version__}")
        return 0
    if name not in commands:
        print(
            f"balanced-det: there is no '{name}'; known are: {', '.join(commands)}.",
            file=sys.stderr,
        )
        return 2
    try:
        return importlib.import_module(commands[name][0]).main(rest) or 0
    except InputError as error:
        print(f"balanced-det {name}: {error}", file=sys.stderr)
        return 2


def _available():
    """The subcommands whose module is there and can be run."""
    return {
        name: (module, help_text)
        for name, (module, help_text) in _COMMANDS.items()
        if _path(module).is_file()
    }


def _path(module):
    """A module's file, found without importing the packages that it is in."""
    return Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _usage(commands):
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in commands.items()]
    return "\n".join(
        [
            "usage: balanced-det COMMAND ...",
            "",
            *lines,
            "",
            "balanced-det COMMAND --help says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
