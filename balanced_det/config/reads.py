"""Which keys of a config are read."""

from detectron2.config import CfgNode


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


def recorded(cfg: CfgNode) -> tuple[CfgNode, set]:
    """Return a copy of a config, and a set in which the keys of this project appear as it is read.

    Args:
        cfg: the whole config.

    Returns:
        (config, reads): ``reads`` gets the full names of all keys in ``BALANCE`` and ``MODEL.FCOS``
        that are read of the config or of its clones. Config nodes cannot be of this kind always:
        yacs merges nodes of equal types alone.
    """
    cfg, reads = cfg.clone(), set()
    dict.__setitem__(cfg, "BALANCE", _RecordingNode(cfg.BALANCE, "BALANCE", reads))
    dict.__setitem__(cfg.MODEL, "FCOS", _RecordingNode(cfg.MODEL.FCOS, "MODEL.FCOS", reads))
    return cfg, reads


def leaves(node: CfgNode, name: str) -> dict:
    """Return {full name: value} of every key below ``node``, which is no read of them."""
    found = {}
    for key, value in node.items():
        full = f"{name}.{key}"
        found.update(leaves(value, full) if isinstance(value, CfgNode) else {full: value})
    return found
