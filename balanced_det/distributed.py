"""Sums over the workers of a distributed job; with one process they change nothing."""

import torch.distributed as dist


def num_workers():
    """Return how many processes train together, 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_workers(tensor):
    """Sum ``tensor`` in place over all workers and return it; every worker must call this."""
    if num_workers() > 1:
        dist.all_reduce(tensor)
    return tensor
