"""Lines of a log in which nothing of a stranger's file acts on the terminal that shows them."""

import logging
import re
import traceback
from typing import Any

from .errors import printable

# Colours, which Detectron2 puts around tables and into the configs that it logs.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class PrintableRecord(logging.LogRecord):
    """A log record whose text has neither control characters nor colours, but line breaks and tabs.

    Detectron2 and others log what stands in files: paths, keys of a checkpoint, a whole config. The
    colour that a handler gives to a line's beginning is the handler's own, and stays.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.exc_info:
            # What handlers print in the place of making it themselves.
            self.exc_text = escaped("".join(traceback.format_exception(*self.exc_info)).rstrip())

    def getMessage(self) -> str:
        """Return the message with its arguments, escaped."""
        return escaped(super().getMessage())


def escaped(text: str) -> str:
    """Return ``text`` without colours, and printable but for its line breaks and tabs."""
    return "".join(
        part if part in ("\n", "\t") else printable(part)
        for part in re.split(r"([\n\t])", _COLOURS.sub("", text))
    )


def escape_log_records() -> None:
    """Make every record that this process logs from now on a :class:`PrintableRecord`."""
    logging.setLogRecordFactory(PrintableRecord)
