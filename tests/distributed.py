"""Runs a function on several gloo processes of this machine, or a command in one of its own."""

import multiprocessing
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Workers are forked from a process that has imported these, which takes seconds, once.
multiprocessing.set_forkserver_preload(["torch.distributed", "detectron2.engine"])


def run_workers(function, *args, num_workers=2):
    """Call ``function(rank, *args)`` in ``num_workers`` joined processes; return their results.

    ``function`` is a module's top-level function; it may return tensors and containers of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _work, (function, args, num_workers, folder), num_workers, start_method="forkserver"
        )
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(num_workers)]


def run_command(main, arguments, folder):
    """Call a command's ``main(arguments)`` in a folder and a process of its own; it must work."""
    mp.start_processes(_run, (main, arguments, str(folder)), 1, start_method="forkserver")


def _run(rank, main, arguments, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    assert not main(arguments)


def _work(rank, function, args, num_workers, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), num_workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)
    try:
        torch.save(function(rank, *args), os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
