"""Start a command in one process, in several, or in those that torchrun started."""

import argparse
import multiprocessing
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.engine import launch
from detectron2.utils import comm

from ..errors import InputError

# How long processes that are told to end may take.
_GRACE_SECONDS = 10


def started_by_torchrun() -> bool:
    """Return whether this process is one of several that torchrun, or a like starter, made."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def is_first_process(args: argparse.Namespace) -> bool:
    """Return whether this process checks the command and keeps the output folder, for all."""
    if started_by_torchrun():
        return int(os.environ["RANK"]) == 0
    return args.machine_rank == 0


def num_processes(args: argparse.Namespace) -> int:
    """Return how many processes train, on all machines.

    Raises:
        InputError: more GPUs are asked for than this machine has. Without any, processes train on
            its CPU.
    """
    if started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus is {args.num_gpus}, but GPUs here are {torch.cuda.device_count()}."
        )
    return max(args.num_gpus, 1) * args.num_machines


def start(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``main(args)`` in as many processes as asked for, and end them all when one fails.

    Args:
        main: a function of a module, which other processes import.
        args: of Detectron2's command line; under torchrun its environment says how many.

    Raises:
        InputError: a process raised it, or died.
        KeyboardInterrupt: this process was interrupted; the others have ended.
    """
    if started_by_torchrun():
        _join_torchrun()
        try:
            main(args)
        finally:
            # A worker that failed must not wait for the others.
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except torch.multiprocessing.ProcessRaisedException as error:
        raise _input_error(error) or error from None
    except torch.multiprocessing.ProcessExitedException as error:
        raise InputError(f"A worker died, and the others were ended: {error}.") from None
    except KeyboardInterrupt:
        _end_children()
        raise


def _join_torchrun():
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if has_gpu:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, but there are "
                f"{torch.cuda.device_count()} GPUs."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def _input_error(error):
    """Return the InputError that a worker's traceback ends with, or None."""
    *_, last = str(error).rstrip().splitlines() or [""]
    name, _, message = last.partition(": ")
    known = {f"{c.__module__}.{c.__qualname__}" for c in (InputError, *InputError.__subclasses__())}
    return InputError(message) if name in known else None


def _end_children():
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(_GRACE_SECONDS)
        if child.is_alive():
            child.kill()
