"""Files that are there whole or not at all, whatever interrupts their writing."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


def write_whole(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write a file so that no reader, and no interruption, ever meets a part of it.

    Folders are created. The text is UTF-8; half of a surrogate pair, which UTF-8 does not have,
    becomes a question mark.

    Raises:
        InputError: the place cannot be written.
    """
    path = Path(path)
    content = content.encode("utf-8", "replace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since only there one step can replace the old file.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                file.write(content)
                file.flush()
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from None
    return path


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write a table as CSV. Names may hold commas, quotes and line breaks; None is left empty.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return write_whole(path, text.getvalue())


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write JSON; a number that is not finite, which JSON does not have, becomes null."""
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")


def write_json_lines(path: str | os.PathLike, rows: Iterable[Any]) -> Path:
    """Write one line of JSON a row, as :func:`write_json` has its content."""
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) for row in rows)
    return write_whole(path, "".join(f"{line}\n" for line in lines))


def finite(content: Any) -> Any:
    """Return ``content`` as JSON has it: lists, dicts, texts, finite numbers, and None for others.

    Arrays become lists, and half of a surrogate pair in a text a question mark.
    """
    if hasattr(content, "tolist"):  # arrays and numbers of numpy and torch
        content = content.tolist()
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode()
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _harmless(cell):
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + cell
    return cell


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
