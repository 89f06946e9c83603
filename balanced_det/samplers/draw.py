"""The one operation that samplers are made of: the first rows of a kind, in each image."""

import torch


def take(
    kind: torch.Tensor, priority: torch.Tensor, number: torch.Tensor, most: int
) -> torch.Tensor:
    """Return the mask of the rows that are taken: of each kind, those of the highest priority.

    Of equal priorities any may be taken.

    Args:
        kind: (*, R) bool, the rows to choose from.
        priority: float, of a shape that broadcasts to that of ``kind``.
        number: (*) long, how many to take, on the device; all where there are fewer.
        most: what no ``number`` exceeds, known on the host.

    Returns:
        (*, R) bool, within ``kind``.
    """
    candidates = torch.where(kind, priority, -torch.inf)
    best = candidates.topk(min(most, kind.shape[-1])).indices  # (*, at most `most`)
    number = number.minimum(kind.sum(dim=-1)).unsqueeze(-1)
    place = torch.arange(best.shape[-1], device=kind.device)
    return torch.zeros_like(kind).scatter_(-1, best, place < number)


def take_of_one(kind: torch.Tensor, priority: torch.Tensor, number: int) -> torch.Tensor:
    """Say what :func:`take` takes of one image: (R,) bool, (R,) float and a number in, (R,) out."""
    rows = kind.nonzero().squeeze(1)
    best = rows[priority[rows].argsort(descending=True)][:number]
    return torch.zeros_like(kind).index_fill_(0, best, True)


def uniform(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return a uniform random number for each element of ``like``, float32, on its device."""
    return torch.rand(like.shape, generator=generator, device=like.device)
