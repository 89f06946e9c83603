"""Config nodes that tell which of their keys were read."""

import contextlib
import contextvars

from detectron2.config import CfgNode

_reads = contextvars.ContextVar("reads", default=None)


@contextlib.contextmanager
def recorded_reads():
    """Collect the full names of the keys that are read inside, of every :class:`Node`.

    Cloning, merging, freezing and printing a config read no key in this sense.
    """
    reads = set()
    token = _reads.set(reads)
    try:
        yield reads
    finally:
        _reads.reset(token)


class Node(CfgNode):
    """A ``CfgNode`` that knows its own name, and tells :func:`recorded_reads` what is read.

    Args:
        name: the full name, "BALANCE.RPN".
        keys: {key: default value or node}.
    """

    def __init__(self, name: str, keys: dict):
        super().__init__()
        # yacs keeps attributes of a node in __dict__, and what is set as an attribute is a key.
        self.__dict__["name"] = name
        for key, value in keys.items():
            self[key] = value

    def __getitem__(self, key):
        value = super().__getitem__(key)
        reads = _reads.get()
        if reads is not None and not isinstance(value, CfgNode):
            reads.add(f"{self.__dict__['name']}.{key}")
        return value


class PartNode(Node):
    """The keys of one part of a detector, in which any method may have a node of its own.

    Such a node appears when one of its keys is set; a key that is not set is None, and means the
    value that all parts share.

    Args:
        name: the full name.
        keys: {key: default value}.
        methods: {name of a method: its keys}.
    """

    def __init__(self, name: str, keys: dict, methods: dict):
        super().__init__(name, keys)
        self.__dict__["methods"] = methods

    def __contains__(self, key):
        return super().__contains__(key) or key in self.__dict__.get("methods", ())

    def __missing__(self, method):
        # yacs asks for a node before it sets one of its keys.
        if method not in self.__dict__.get("methods", ()):
            raise KeyError(method)
        keys = dict.fromkeys(self.__dict__["methods"][method])
        self[method] = Node(f"{self.__dict__['name']}.{method}", keys)
        return self[method]

    def own(self, method: str, key: str):
        """Return what this part alone has for a method's key; None where it has nothing."""
        return self[method][key] if super().__contains__(method) else None


def leaves(node: CfgNode, name: str) -> dict:
    """Return {full name: value} of every key below ``node``, which none of them is a read of."""
    found = {}
    for key, value in node.items():
        full = f"{name}.{key}"
        found.update(leaves(value, full) if isinstance(value, CfgNode) else {full: value})
    return found
