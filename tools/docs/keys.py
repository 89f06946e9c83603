"""Tables of config keys: names and defaults from the constructors, meanings from their docstrings.

Keys of the nodes that no constructor makes are explained by the comments of
:mod:`balanced_det.config.keys`, which are read from its text.
"""

import functools
import inspect
import re
from collections.abc import Iterable

from text import arguments, in_cell

from balanced_det.config import keys
from balanced_det.pyramid import BalancedFeaturePyramid

_NODES = {  # the function of config.keys that makes a node, and the node
    "_run_keys": "BALANCE",
    "_trust_keys": "BALANCE",
    "_slot_defaults": "part",
    "_part_keys": "part",
    "_fcos_keys": "MODEL.FCOS",
    "_bottom_up_keys": "MODEL.BOTTOM_UP",
}
_KEY = re.compile(r'^\s*(?:"([A-Z_]+)":|\w+\["([A-Z_]+)"\] =)')
_PARTS = "|".join(keys.PARTS)


def table(names: Iterable[str]) -> str:
    """Return the Markdown table of methods' keys and of single keys.

    Args:
        names: of methods ("FocalLoss"), nodes and keys ("BALANCE.DENSE.PRIOR_PROB"), or "all".
    """
    names = list(names)
    if names == ["all"]:
        return "\n\n".join(_sections())
    rows = [row for name in names for row in _rows(name)]
    if not rows:
        return ""
    lines = [
        f"| {_breakable(key)} | `{default!r}` | {in_cell(told)} |" for key, default, told in rows
    ]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *lines]) + "\n"


def _breakable(key):
    """A key as code that may break after dots and underscores, where a page is narrow."""
    return "<code>" + re.sub(r"([._])", r"\1<wbr>", key) + "</code>"


def methods() -> dict[str, type]:
    """Return {name: class} of all registered methods."""
    return {name: method for registry in keys.SLOTS.values() for name, method in registry}


def meanings() -> dict[str, str]:
    """Return {full name: meaning} of every key that this project adds."""
    return {key: _meaning(key) for key in keys.default_values()}


def _rows(name):
    defaults = keys.default_values()
    if name in methods():
        name = f"BALANCE.{name}"
    found = [key for key in defaults if key == name or key.startswith(f"{name}.")]
    if not found and name.removeprefix("BALANCE.") not in methods():
        raise ValueError(f"'{name}' is no key and no method.")
    return [(key, defaults[key], _meaning(key)) for key in found]


def _sections():
    """Every key, in tables."""
    nodes = [f"BALANCE.{name}" for name in sorted(methods())]
    defaults = keys.default_values()
    run = [key for key in defaults if key.count(".") == 1 and key.startswith("BALANCE.")]
    titles = {
        "The run": run,
        **{f"Part {part}": [f"BALANCE.{part}"] for part in keys.PARTS},
        "Methods": [node for node in nodes if any(key.startswith(f"{node}.") for key in defaults)],
        "The balanced pyramid": ["BALANCE.PYRAMID"],
        "Detectron2's parts that had no keys": ["MODEL.FCOS", "MODEL.BOTTOM_UP"],
    }
    shown = {key for names in titles.values() for name in names for key, *_ in _rows(name)}
    left = sorted(set(defaults) - shown)
    if left:
        raise ValueError(f"Keys of no table: {', '.join(left)}.")
    for title, names in titles.items():
        yield f"## {title}\n\n{table(names)}"


def _meaning(key):
    node, _, name = key.rpartition(".")
    method = methods().get(node.rpartition(".")[2])
    if node == "BALANCE.PYRAMID" and name != "BACKBONE":
        method = BalancedFeaturePyramid
    if method is not None:
        return _arguments(method)[name.lower()]
    comments = _comments()
    if name == "CLASSIFICATION_LOSS":
        return "the classification loss: " + _listed("CLASSIFICATION_LOSS")
    if name == "SAMPLER":
        return "which rows take part: " + _listed("SAMPLER")
    part = re.fullmatch(rf"BALANCE\.({_PARTS})", node)
    return comments["part" if part else node, name]


def _listed(slot):
    return ", ".join(f"`{name}`" for name in keys.SLOTS[slot].names())


@functools.cache
def _arguments(method):
    """Return {argument: meaning} of a class, those told by its parents too."""
    found = {}
    for cls in reversed(method.__mro__):
        # "as in" refers to what a parent tells.
        told = {k: v for k, v in arguments(cls).items() if not v.startswith("as in")}
        found.update(told)
    return found


@functools.cache
def _comments():
    """Return {(node, key): comment} of the keys that have a comment in the text of config.keys."""
    found = {}
    for function, node in _NODES.items():
        lines = inspect.getsource(getattr(keys, function)).splitlines()
        comment, is_open = [], False
        for line in lines:
            text = line.strip()
            if text.startswith("#"):
                comment = [*comment, text] if is_open else [text]
                is_open = True
                continue
            is_open = False
            key = _KEY.match(line)
            if key:
                meaning = " ".join(part.lstrip("# ") for part in comment)
                found[node, key[1] or key[2]] = meaning
    found["BALANCE.PYRAMID", "BACKBONE"] = "the builder of the backbone that the pyramid is put on"
    return found
