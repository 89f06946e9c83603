"""Docstrings as Markdown, and what they say of arguments."""

import inspect
import re

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
_ARGUMENT = re.compile(r"([\w, ]+?)(?: \([^)]*\))?: (.*)")


def as_markdown(text: str) -> str:
    """Return a docstring with what Markdown has no word for rewritten."""
    text = _ROLE.sub(lambda found: f"`{found[1].removeprefix('.')}`", text)
    text = re.sub(r"^( *)Class attributes:$", r"\1Attributes:", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def arguments(cls: type) -> dict[str, str]:
    """Return {argument: meaning} of a class's docstring."""
    text = as_markdown(inspect.cleandoc(cls.__dict__.get("__doc__") or ""))
    block = re.search(r"^Args:\n((?: .*\n|\n)+)", text + "\n", re.MULTILINE)
    found, names = {}, []
    for line in block[1].splitlines() if block else ():
        start = _ARGUMENT.fullmatch(line.strip()) if re.match(r" {4}\S", line) else None
        if start:
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, start[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


def in_cell(text: str) -> str:
    """Return a text for a table's cell: what Markdown would read as markup is itself."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text):
    return re.sub(r"([|*_])", r"\\\1", text).replace("<", "&lt;")
