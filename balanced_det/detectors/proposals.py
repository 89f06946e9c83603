"""The proposals of a batch: the best anchors of every level, without those that overlap a better.

What Detectron2's ``find_top_rpn_proposals`` does image by image is done here for all images and
levels at once, with the same proposals in the same order, and one copy to the host.

Letters: N images, C candidates of an image, P proposals of an image at most.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..criterion import BoxTransform
from ..ops.nms import nms_mask
from ..rows import on_device


@torch.no_grad()
def top_proposals(
    anchors: Sequence[Boxes],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    transform: BoxTransform,
    nms_threshold: float,
    before_nms: int,
    after_nms: int,
    min_size: float,
    refuse_infinite: bool,
) -> list[Instances]:
    """Return one ``Instances`` an image with ``proposal_boxes`` and ``objectness_logits``.

    Args:
        anchors: Detectron2's ``Boxes`` of each level, Ri each.
        logits, deltas: (N, Ri) and (N, Ri, 4) a level.
        image_sizes: (height, width) of each image.
        transform: Detectron2's ``Box2BoxTransform``.
        nms_threshold: of two proposals of a level that overlap by more, the better is kept.
        before_nms: the best of each level that are looked at.
        after_nms: the best of each image that are returned.
        min_size: proposals with a smaller side, in pixels, are dropped.
        refuse_infinite: raise FloatingPointError for a box or logit that is not finite, rather than
            drop it.
    """
    boxes, scores, level = _candidates(anchors, logits, deltas, transform, before_nms)
    num_images, num_candidates = scores.shape
    finite = boxes.isfinite().all(dim=2) & scores.isfinite()  # (N, C)
    boxes = clip(boxes, image_sizes)
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = finite & (sides > min_size).all(dim=2)

    image = torch.arange(num_images, device=level.device).unsqueeze(1)
    kept = nms_mask(
        boxes.flatten(0, 1),
        # A row that is not valid takes no part, whatever its score; sorting wants a number.
        scores.flatten().where(valid.flatten(), -torch.inf),
        (image * len(anchors) + level).flatten(),
        nms_threshold,
        valid=valid.flatten(),
        max_group_size=before_nms,
    ).view_as(valid)
    # The best first; those that are not kept go to the end.
    best = scores.where(kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    best = best[:, :after_nms]  # (N, P)
    counts = kept.sum(dim=1).clamp(max=after_nms)
    *numbers, all_finite = torch.cat([counts, finite.all().unsqueeze(0)]).tolist()
    if refuse_infinite and not all_finite:
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf/NaN. Training has diverged."
        )
    boxes = boxes.gather(1, best.unsqueeze(2).expand(-1, -1, 4))  # (N, P, 4)
    scores = scores.gather(1, best)
    proposals = [Instances(size) for size in image_sizes]
    for of_image, *found, count in zip(proposals, boxes, scores, numbers):
        of_image.proposal_boxes = Boxes(found[0][:count])
        of_image.objectness_logits = found[1][:count]
    return proposals


def _candidates(
    anchors: Sequence[Boxes],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    transform: BoxTransform,
    before_nms: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best anchors of each level: boxes (N, C, 4), logits (N, C) and levels (C,)."""
    boxes, scores, levels = [], [], []
    for index, (anchors_of, logits_of, deltas_of) in enumerate(zip(anchors, logits, deltas)):
        best, order = logits_of.topk(min(before_nms, logits_of.shape[1]), dim=1)  # (N, Ci)
        chosen = deltas_of.gather(1, order.unsqueeze(2).expand(-1, -1, 4))
        sources = anchors_of.tensor[order.flatten()]
        boxes.append(transform.apply_deltas(chosen.flatten(0, 1), sources).view_as(chosen))
        scores.append(best)
        levels.append(torch.full((best.shape[1],), index, device=best.device))
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)


def clip(boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the boxes (N, C, 4) of each image clipped to its size, (height, width)."""
    limits = on_device([(w, h, w, h) for h, w in image_sizes], boxes)  # (N, 4)
    return boxes.clamp(min=0).minimum(limits.unsqueeze(1))
