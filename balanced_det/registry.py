"""Named methods that a config file can choose from."""

from .errors import InputError


class Registry:
    """A mapping from a name to the class registered under it.

    Usage::

        CLASSIFICATION_LOSSES = Registry("classification loss")

        @CLASSIFICATION_LOSSES.register
        class FocalLoss: ...

        CLASSIFICATION_LOSSES.get("FocalLoss")

    Detectron2's registry does the same but does not say which names it knows.
    """

    def __init__(self, kind):
        self.kind = kind
        self._methods = {}

    def register(self, method):
        """Register ``method`` under its ``__name__``; usable as a decorator."""
        name = method.__name__
        if name in self._methods:
            raise InputError(f"A {self.kind} named '{name}' is registered already.")
        self._methods[name] = method
        return method

    def get(self, name, key=None):
        """Return the method called ``name``.

        An unknown name is an :class:`InputError` that lists the known ones, and names the config
        ``key`` that asked for it where one is given.
        """
        if name not in self._methods:
            where = f"{key}: " if key else ""
            raise InputError(
                f"{where}unknown {self.kind} '{name}'; known are: {', '.join(self.names())}."
            )
        return self._methods[name]

    def names(self):
        """Return the registered names, sorted."""
        return sorted(self._methods)

    def __iter__(self):
        return iter(sorted(self._methods.items()))

    def __contains__(self, name):
        return name in self._methods
