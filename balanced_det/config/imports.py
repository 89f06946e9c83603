"""Modules of one's own, named in a config, that register losses, samplers and other methods."""

import hashlib
import importlib
import importlib.util
import os
import sys
from typing import Any

from ..errors import InputError


def resolve_imports(names: Any, folder: str) -> list[str]:
    """Return names in which a .py file that lies relative to ``folder`` has its absolute path.

    Args:
        names: the value of ``BALANCE.IMPORTS`` in a config file.
        folder: the folder of that file.

    Raises:
        InputError: it is no list of texts.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise InputError(
            f"BALANCE.IMPORTS is {names!r}; it must be a list of modules or .py files."
        )
    return [_resolve(name, folder) for name in names]


def import_modules(names: list[str]) -> None:
    """Import modules by name and .py files by path, each once in a process.

    Raises:
        InputError: one does not exist, or raises an exception.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(name)
            else:
                importlib.import_module(name)
        except InputError as error:
            raise InputError(f"BALANCE.IMPORTS: '{name}': {error}") from None
        except Exception as error:  # whatever a module of one's own may raise
            raise InputError(
                f"BALANCE.IMPORTS: '{name}' cannot be imported: {type(error).__name__}: {error}."
            ) from error


def _resolve(name, folder):
    beside = os.path.join(folder, os.path.expanduser(name))
    if name.endswith(".py") and os.path.isfile(beside):
        return os.path.abspath(beside)
    return name


def _import_file(path):
    path = os.path.realpath(path)
    if not os.path.isfile(path):
        raise InputError("the file does not exist.")
    # Two files of one name in different folders are two modules.
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"balanced_det_import_{stem}_{hashlib.sha1(path.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import statement does, so that classes can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
