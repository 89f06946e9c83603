"""What the workers of a distributed job share; with one process nothing changes."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_workers() -> int:
    """Return how many processes train together, 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` in place over all workers and return it; every worker must call this."""
    if num_workers() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_workers(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over all workers; every worker must call this.

    Distributed training averages gradients over workers. A sum over rows that is divided by the
    mean of a count over workers so gives each row the weight that it has in one process.
    """
    return sum_over_workers(tensor.clone()) / num_workers()


def shared_uniform(count: int, device: torch.device, shared: bool = True) -> Tensor:
    """Return (count,) random numbers of [0, 1) that are the same on all workers.

    Each worker draws its own, and what they sum to, without its whole part, is uniform again: no
    worker has to know another's generator. Every worker must call this; with ``shared`` False each
    keeps its own.
    """
    own = torch.rand(count, device=device, dtype=torch.float64)
    return (sum_over_workers(own) if shared else own) % 1
