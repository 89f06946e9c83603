"""The one exception that means: what you gave this package cannot be used."""


class InputError(ValueError):
    """Bad input: a config key, file or class; the message is one sentence that names it.

    ``train_net.py`` prints the message without a traceback.
    """
