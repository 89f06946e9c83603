"""What losses are divided by when all rows take part."""

import torch

from ..distributed import num_workers, sum_over_workers


def foreground_normalizer(is_foreground, takes_part):
    """Return the number of foreground rows of a worker's batch, on average over the workers.

    Without sampling the number of rows says nothing about the number of objects, so the losses are
    per foreground row, as in a one-stage detector. The average over workers gives every row the
    same weight, whichever worker it is on. A batch that has no foreground row on any worker gives
    the number of rows instead: a loss per row is small, where the sum over all would be huge.

    Args:
        is_foreground, takes_part: bool, shaped alike; of this worker.

    Returns:
        0-dim float32 tensor, which is not read on the host; 0 without any row.
    """
    counts = torch.stack([is_foreground.sum(), takes_part.sum()]).float()
    num_foreground, num_rows = (sum_over_workers(counts) / num_workers()).unbind()
    return torch.where(num_foreground > 0, num_foreground, num_rows)
