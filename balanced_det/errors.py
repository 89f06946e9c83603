"""The one exception that means: what you gave this package cannot be used."""


class InputError(ValueError):
    """Bad input: a config key, file or class; the message is one sentence that names it.

    ``train_net.py`` prints the message without a traceback. Names in it come from strangers' files,
    so the message is made :func:`printable`: one line, whatever they hold.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    r"""Return ``text`` with everything that is not printed as itself escaped, as in ``\x1b``.

    Class and file names pass through here before they reach a terminal, a log or a table: no
    control sequence, line break, text direction mark or lone surrogate is left. A text without
    these, of whatever script, comes back as it is; a second pass changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
