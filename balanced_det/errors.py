"""The exceptions that mean: what you gave this package, or what came of it, cannot be used."""


def printable(text: object) -> str:
    """Return ``text`` on one line, without characters that a terminal, log or browser acts on.

    Control characters, line breaks, marks that turn the direction of writing and lone surrogates
    become escapes as Python writes them; letters, signs and emoji of any language stay.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


class InputError(ValueError):
    """Bad input: a config key, file or class; the message is one sentence that names it.

    ``train_net.py`` prints the message without a traceback. Names from files may stand in it as
    they are: what is not :func:`printable` is escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class NonFiniteError(InputError, FloatingPointError):
    """A loss, gradient or weight of a training is no finite number; the message names it."""
