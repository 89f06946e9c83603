"""The last net: what our checks did not foresee is told in one sentence, with a hint where."""

import contextlib
import os
import re
import traceback
from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg

from ..config.keys import add_balanced_det_config
from ..config.reads import all_values
from ..errors import InputError

# Set in the environment, errors come with all that led to them.
TRACEBACK = "BALANCED_DET_TRACEBACK"
_MAX_KEYS = 3


@contextlib.contextmanager
def in_a_sentence(what: str, cfg: CfgNode, keep: bool = True) -> Iterator[None]:
    """Raise whatever is raised inside as an :class:`InputError`, which is printed in one line.

    Detectron2 and torch raise nearly anything for a wrong value. The sentence has what they say,
    where, and the keys that were set to what the message speaks of.

    Args:
        what: the beginning of the sentence.
        cfg: the whole config.
        keep: write the traceback into the run's folder, if that is there. False before the run
            holds it: until then it may be another's.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        more = _kept(cfg, error) if keep else None
        more = f"'{more}' has more" if more else f"{TRACEBACK}=1 shows more"
        raise InputError(f"{what}: {_told(error)}{_suspects(cfg, str(error))}; {more}.") from error


def _kept(cfg, error):
    """Write the traceback into the run's folder and return its file; None where that fails."""
    path = os.path.join(cfg.OUTPUT_DIR, "traceback.txt")
    with contextlib.suppress(OSError), open(path, "a") as file:
        traceback.print_exception(error, file=file)
        return path
    return None


def _told(error):
    """Return what an exception says and, since that may be little, where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    # Of a KeyError and its like the text alone; the first argument of an OSError is a number.
    is_text = bool(error.args) and isinstance(error.args[0], str)
    text = str(error.args[0] if is_text else error).rstrip("!.")
    place = f"{os.path.basename(where.filename)}, line {where.lineno}"
    return f"{' '.join(text.split()) or where.line} ({type(error).__name__} in {place})"


def _suspects(cfg, message):
    """Name the keys, other than as they are by default, whose text is a word of the message."""
    words = {*re.findall(r"[\w.-]+", message)}
    defaults = get_cfg()
    add_balanced_det_config(defaults)
    defaults = all_values(defaults)
    found = [
        key
        for key, value in all_values(cfg).items()
        if value != defaults.get(key) and words & _texts(value)
    ]
    return f", perhaps by {' or '.join(found[:_MAX_KEYS])}" if found else ""


def _texts(value):
    if isinstance(value, (list, tuple)):
        return {text for item in value for text in _texts(item)}
    return {value} if isinstance(value, str) else set()
