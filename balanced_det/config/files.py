"""Config files: YAML, whatever a stranger wrote into it, as one flat dict of keys a file."""

import dataclasses
import os

import yaml
from detectron2.utils.file_io import PathManager

from ..errors import InputError

_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000
BASE = "_BASE_"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The keys that one file sets, or the command line.

    Attributes:
        source: the file, or "the command line".
        values: {full key: value}, in the order in which they stand there.
    """

    source: str
    values: dict


def read_layers(path: str, *, allow_urls: bool = False, readers: tuple = ()) -> list[Layer]:
    """Read a config file and all files that its ``_BASE_`` names, in the order of merging.

    ``_BASE_`` is one path or a list of them, relative to the file that names them; of a list, a
    later base wins over an earlier one, and the file itself over all.

    Args:
        path: of a YAML file.
        allow_urls: a ``_BASE_`` may be an address such as ``https://...`` to download.
        readers: files that are being read, since they have this one as their base.

    Returns:
        A :class:`Layer` a file.

    Raises:
        InputError: a file is missing, no YAML or no mapping of keys, a key stands twice in it, or
            it has itself as its base.
    """
    name = os.path.realpath(path) if "://" not in path else path
    if name in readers:
        raise InputError(f"'{path}' has itself as its {BASE}, directly or by way of others.")
    content = _parse(_read(path), path)
    layers = []
    for base in _bases(content.pop(BASE, []), path, allow_urls):
        layers += read_layers(base, allow_urls=allow_urls, readers=(*readers, name))
    return [*layers, Layer(path, _flat(content, path))]


def _bases(value, path, allow_urls):
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(base, str) and base for base in bases):
        raise InputError(f"{path}: {BASE} is {value!r}; it must be a path or a list of paths.")
    for base in bases:
        if "://" in base:
            if not allow_urls:
                raise InputError(
                    f"{path}: its {BASE} '{base}' is an address; give BALANCE.BASE_FROM_URL True "
                    "on the command line to download it."
                )
            yield base
            continue
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(base):
            raise InputError(f"{path}: its {BASE} '{base}' does not exist.")
        yield base


def _read(path):
    if "://" in path:
        try:
            with PathManager.open(path, "rb") as file:
                return file.read(_MAX_BYTES + 1)
        except Exception as error:  # whatever the handler of the address raises
            raise InputError(f"The config file '{path}' cannot be read: {error}.") from None
    if not os.path.isfile(path):
        raise InputError(
            f"The config file '{path}' does not exist."
            if path
            else "No config file is given: --config-file names one, for example "
            "configs/quickstart.yaml."
        )
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"The config file '{path}' cannot be read: {error.strerror}.") from None


def _parse(content, path):
    """Return the mapping that a YAML file holds. A byte order mark tells its encoding."""
    if len(content) > _MAX_BYTES:
        raise InputError(f"The config file '{path}' has more than {_MAX_BYTES:,} bytes.")
    try:
        loader = yaml.SafeLoader(content)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise InputError(f"The config file '{path}' holds no 'KEY: value'.")
            _refuse_duplicates(node, path)
            if _count(node, {}) > _MAX_VALUES:
                raise InputError(f"{path} holds more than {_MAX_VALUES:,} values, by its aliases.")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no valid YAML: {reason}.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply, or holds itself.") from None
    except (ValueError, OverflowError) as error:  # a date of month 13, a number too long
        raise InputError(f"{path} holds a value that cannot be read: {error}.") from None


def _refuse_duplicates(node, path, prefix="", seen=None):
    """Refuse a key that stands twice in one mapping, where YAML would drop the first in silence."""
    seen = set() if seen is None else seen
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, prefix, seen)
    elif isinstance(node, yaml.MappingNode):
        lines = {}
        for key, value in node.value:
            line, full = key.start_mark.line + 1, f"{prefix}{key.value}"
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise InputError(
                    f"{path}: the key '{full}' stands twice, in the lines {lines[key.value]} and "
                    f"{line}; the first would be lost."
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
            _refuse_duplicates(value, path, f"{full}.", seen)


def _count(node, known):
    """Return how many values a node stands for when its aliases are written out."""
    if id(node) not in known:
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [item for pair in node.value for item in pair]
        # An alias inside itself recurses without end, which is refused as such.
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _flat(content, path, prefix=""):
    values = {}
    for key, value in content.items():
        if not isinstance(key, str) or not key or "." in key:
            raise InputError(f"{path}: {prefix}{key!r} is no name of a key.")
        if isinstance(value, dict):
            values.update(_flat(value, path, f"{prefix}{key}."))
        else:
            values[f"{prefix}{key}"] = value
    return values
