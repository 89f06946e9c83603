"""Named methods that a config file can choose from, and the parameters that they take from it."""

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

from .errors import InputError

Method = TypeVar("Method", bound=type)

# What a config key can hold.
_PLAIN = (bool, int, float, str, tuple, list, type(None))


class Registry:
    """A mapping from a name to the class registered under it.

    Usage::

        CLASSIFICATION_LOSSES = Registry("classification loss")

        @CLASSIFICATION_LOSSES.register
        class FocalLoss: ...

        CLASSIFICATION_LOSSES.get("FocalLoss")
        CLASSIFICATION_LOSSES.parameters("FocalLoss")  # {"alpha": 0.25, "gamma": 2.0}

    The parameters of a method are those of its constructor, with their defaults: each becomes the
    key ``BALANCE.<name>.<PARAMETER>`` of the config. Detectron2's registry knows neither these nor
    which names it has.

    Args:
        kind: what the methods are, for messages.
        given: arguments that a detector gives to every method of this kind, no config keys.

    A class may declare ``needs``, names of arguments that are counted in the training set
    (``class_frequency``, ``class_counts``, ``instance_count``); they are no config keys either.
    """

    def __init__(self, kind: str, given: tuple[str, ...] = ("num_classes",)):
        self.kind = kind
        self.given = given
        self._methods: dict[str, Any] = {}

    def register(self, method: Method) -> Method:
        """Register ``method`` under its ``__name__``; usable as a decorator.

        Raises:
            InputError: the name is taken, or the constructor has an argument that no detector gives
                and no config can hold.
        """
        name = method.__name__
        if name in self._methods:
            raise InputError(f"A {self.kind} named '{name}' is registered already.")
        self._parameters_of(method)
        self._methods[name] = method
        return method

    def get(self, name: str, key: str | None = None) -> Any:
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

    def parameters(self, name: str) -> dict:
        """Return {parameter: default} of the method called ``name``: its constructor's."""
        return self._parameters_of(self.get(name))

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._methods)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(sorted(self._methods.items()))

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def _parameters_of(self, method: Any) -> dict:
        passed = {*self.given, *getattr(method, "needs", ())}
        parameters = {
            p.name: p.default
            for p in inspect.signature(method).parameters.values()
            if p.name not in passed and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        for parameter, default in parameters.items():
            if not isinstance(default, _PLAIN):
                raise InputError(
                    f"The {self.kind} '{method.__name__}' has the argument '{parameter}', which is "
                    f"neither given by a detector ({', '.join(sorted(passed)) or 'nothing is'}) "
                    "nor has a number, text, list or None as its default."
                )
        return parameters
