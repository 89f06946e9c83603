"""The folder of a run: one run at a time writes to it, and none over another by accident."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from detectron2.config import CfgNode

from ..errors import InputError
from .checkpoint import BEST, saved_checkpoints


def check_output_dir(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Refuse a run that would start over where it should resume, or write over another run.

    Raises:
        InputError: what ``BALANCE.RESUME_OR_START`` or ``BALANCE.OVERWRITE`` would allow; or
            ``MODEL.WEIGHTS`` is one of the checkpoints that the run would replace.
    """
    folder = cfg.OUTPUT_DIR
    found = saved_checkpoints(folder)
    if resume and not found and not cfg.BALANCE.RESUME_OR_START:
        raise InputError(
            f"--resume: '{folder}' holds no checkpoint to resume from. Leave --resume out to "
            "start, or set BALANCE.RESUME_OR_START to start where there is none."
        )
    if eval_only or resume or not found:
        return
    if not cfg.BALANCE.OVERWRITE:
        raise InputError(
            f"OUTPUT_DIR: '{folder}' holds the checkpoint '{os.path.basename(found[0])}' of "
            "an earlier run: use --resume to go on, another folder, or BALANCE.OVERWRITE to "
            "replace it."
        )
    if os.path.realpath(cfg.MODEL.WEIGHTS) in map(os.path.realpath, found):
        raise InputError(
            f"MODEL.WEIGHTS: '{cfg.MODEL.WEIGHTS}' lies in OUTPUT_DIR, whose checkpoints this run "
            "would replace: choose another OUTPUT_DIR."
        )


def remove_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier run, so that none is ever taken for one of the next."""
    others = [os.path.join(folder, name) for name in ("last_checkpoint", f"{BEST}.pth")]
    for path in [*saved_checkpoints(folder), *others]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _lock_file(folder):
    try:
        os.makedirs(folder, exist_ok=True)
        return open(os.path.join(folder, ".lock"), "a")
    except OSError as error:  # a full disk, a folder of the system
        raise InputError(f"OUTPUT_DIR: '{folder}' cannot be written: {error.strerror}.") from None


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold ``folder`` for this process, which creates it; the lock ends with the process.

    Raises:
        InputError: another run holds it.
    """
    with _lock_file(folder) as file:
        try:
            # Not flock, which the processes that load images would inherit and hold for longer.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"OUTPUT_DIR: another run is writing to '{folder}'.") from None
        yield
