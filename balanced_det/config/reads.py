"""Which keys of a config are read."""

import functools
from typing import Any

from detectron2.config import CfgNode

# Nodes whose keys are this project's alone.
OWN_NODES = ("BALANCE", "MODEL.FCOS", "MODEL.BOTTOM_UP")


class _RecordingNode(CfgNode):
    """A node that adds to a set the full name of each key that is read of it.

    Cloning, freezing and printing read no key in this sense, nor does ``in``.
    """

    def __init__(self, node: CfgNode, name: str, reads: set):
        super().__init__()
        # yacs keeps what is no key in __dict__: also whether the node is frozen.
        self.__dict__.update(node.__dict__, recording=_Recording(name, reads))
        for key, value in node.items():
            if isinstance(value, CfgNode):
                value = _RecordingNode(value, f"{name}.{key}", reads)
            self[key] = value

    def __getitem__(self, key):
        value = super().__getitem__(key)
        # There is none while a copy of the node is being made.
        recording = self.__dict__.get("recording")
        if recording is not None and not isinstance(value, CfgNode):
            recording.reads.add(f"{recording.name}.{key}")
        return value


class _Recording:
    def __init__(self, name, reads):
        self.name = name
        self.reads = reads

    def __deepcopy__(self, memo):
        # Clones of the config are read too.
        return self


def recorded(cfg: CfgNode) -> tuple[CfgNode, set[str]]:
    """Return a copy of a config, and a set in which the keys of this project appear as it is read.

    Args:
        cfg: the whole config.

    Returns:
        (config, reads): ``reads`` gets the full names of all keys in :data:`OWN_NODES` that are
        read of the config or of its clones. Config nodes cannot be of this kind always: yacs merges
        nodes of equal types alone.
    """
    cfg = cfg.clone()
    reads: set[str] = set()
    for name in OWN_NODES:
        *parents, key = name.split(".")
        node = functools.reduce(dict.__getitem__, parents, cfg)
        dict.__setitem__(node, key, _RecordingNode(node[key], name, reads))
    return cfg, reads


def value_of(cfg: CfgNode, name: str) -> Any:
    """Return what a full name such as "SOLVER.BASE_LR" has in a config, which is no read of it."""
    return functools.reduce(dict.__getitem__, name.split("."), cfg)


def own_values(cfg: CfgNode) -> dict:
    """Return {full name: value} of the keys of this project; none of them is read in that."""
    found: dict[str, Any] = {}
    for name in OWN_NODES:
        found.update(leaves(value_of(cfg, name), name))
    return found


def all_values(cfg: CfgNode) -> dict:
    """Return {full name: value} of every key, Detectron2's too."""
    found = {}
    for name, node in cfg.items():
        found.update(leaves(node, name) if isinstance(node, CfgNode) else {name: node})
    return found


def leaves(node: CfgNode, name: str) -> dict:
    """Return {full name: value} of every key below ``node``, which is no read of them."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        full = f"{name}.{key}"
        found.update(leaves(value, full) if isinstance(value, CfgNode) else {full: value})
    return found
