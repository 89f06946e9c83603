"""A config that a run or a checkpoint has kept: whole, as YAML, and perhaps a stranger's."""

from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from ..errors import InputError
from .keys import add_balanced_det_config


def saved_config(text: str, source: str, opts: Sequence[str] = ()) -> tuple[CfgNode, list[str]]:
    """Return the config that ``cfg.dump()`` wrote, not frozen. No data set is registered.

    Args:
        text: YAML.
        source: what messages call it.
        opts: KEY VALUE ... to set after that.

    Returns:
        (config, modules): ``BALANCE.IMPORTS`` are not imported, since that would run code that the
        text chooses, but returned.

    Raises:
        InputError: it is no config of this version, with the modules that are imported by now.
    """
    if len(opts) % 2:
        raise InputError(f"Not pairs of KEY VALUE: {' '.join(map(str, opts))}.")
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    try:
        loaded = CfgNode.load_cfg(text)
        cfg.merge_from_other_cfg(loaded)
        modules = list(map(str, cfg.BALANCE.IMPORTS))
        cfg.BALANCE.IMPORTS = []
        cfg.merge_from_list(list(opts))
    except Exception as error:  # whatever YAML and yacs raise for text that is no config
        reason = " ".join(str(error.args[0] if error.args else error).split()).rstrip(".!")
        raise InputError(f"The config in {source} cannot be used: {reason}.") from None
    return cfg, modules
