"""What Detectron2 logs of the rows of a step, with one copy to the host each."""

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..selection import Rows


@torch.no_grad()
def log_regions(predicted: Tensor, rows: Rows, num_images: int) -> int:
    """Log how a region head classifies its rows, as Detectron2 does, and count the foreground.

    Args:
        predicted: (T,) long, the class of each row, K for background.
        rows: the :class:`~balanced_det.selection.Rows` of the batch, labels (T,).
        num_images: of the batch.

    Returns:
        The number of foreground rows.
    """
    is_right = predicted == rows.labels
    counts = [
        rows.foreground,
        rows.takes_part,
        is_right,
        is_right & rows.foreground,
        (predicted == rows.num_classes) & rows.foreground,
    ]
    # One copy to the host.
    num_foreground, num_rows, right, right_foreground, missed = (
        torch.stack(counts).sum(dim=1).tolist()
    )
    storage = get_event_storage()
    storage.put_scalar("roi_head/num_fg_samples", num_foreground / num_images)
    storage.put_scalar("roi_head/num_bg_samples", (num_rows - num_foreground) / num_images)
    if num_rows:
        storage.put_scalar("fast_rcnn/cls_accuracy", right / num_rows)
    if num_foreground:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", right_foreground / num_foreground)
        storage.put_scalar("fast_rcnn/false_negative", missed / num_foreground)
    return num_foreground


def log_masks(logits: Tensor, targets: Tensor, vis_period: int) -> None:
    """Log how many pixels of the masks (F, S, S) are right, and show them every ``vis_period``."""
    is_wrong = (logits > 0) != targets
    counts = [is_wrong, targets, is_wrong & ~targets, is_wrong & targets]
    wrong, positive, extra, missed = torch.stack(counts).flatten(1).sum(dim=1).tolist()
    storage = get_event_storage()
    storage.put_scalar("mask_rcnn/accuracy", 1 - wrong / targets.numel())
    storage.put_scalar("mask_rcnn/false_positive", extra / max(targets.numel() - positive, 1))
    storage.put_scalar("mask_rcnn/false_negative", missed / max(positive, 1))
    if vis_period > 0 and storage.iter % vis_period == 0:
        for index, pair in enumerate(zip(logits.sigmoid(), targets.float(), strict=True)):
            image = torch.cat(pair, dim=1).expand(3, -1, -1)
            storage.put_image(f"Left: mask prediction;   Right: mask GT ({index})", image)
