"""Docstrings as Markdown: Sphinx roles become code, and ``::`` before a code block a colon."""

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


def as_markdown(text: str) -> str:
    """Return a docstring with what Markdown has no word for rewritten."""
    text = _ROLE.sub(lambda found: f"`{found[1].removeprefix('.')}`", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that the reference shows."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
