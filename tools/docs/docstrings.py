"""What the reference does to docstrings before it reads them."""

import griffe
from text import as_markdown


class Docstrings(griffe.Extension):
    """Rewrites every docstring that the reference shows."""

    def on_object(self, *, obj, **kwargs):
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
