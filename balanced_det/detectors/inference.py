"""From scores and box deltas to detections: threshold, best candidates, NMS, for a whole batch.

The detections are Detectron2's own, ties included; what differs is what is looked at on the way.
With 1,203 classes and a threshold near zero Detectron2 decodes, sorts and suppresses a million
boxes an image, of which 300 are wanted. Here a box is decoded only once it is known to be a
candidate, and all images share one call of the grouped NMS.

Region heads. Greedy NMS looks at better boxes of the same class alone. So the detections among the
best M candidates of an image are the first of all its detections, and if M candidates leave the
number that is wanted, those are all that count. M starts at some thousands and grows where too few
survive.

Dense heads. Detectron2 takes the best k (anchor, class) pairs of a level. They lie in the k anchors
of the best maximum over classes, and where scores rise with logits that maximum is taken of the
logits as the head left them: one read of the largest tensor, no copy. These maxima are small, so
the levels stand in one padded table from there on, and go through each step together.

"Best" is one order everywhere: by falling score, and among equal scores by rising index of (row,
class). Detectron2's region heads sort that way. Its dense heads call ``topk``, which leaves the
order of equal scores open; here it is fixed.

Two things differ from Detectron2 by design. Its ``batched_nms`` adds offsets to the boxes of up to
1,000 candidates on a CPU and 25,000 on CUDA, which rounds them; here groups do not meet. And its
second result, the rows of the detections, counts rows without those that were dropped for a number
that is not finite; here it counts all.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..criterion import BoxTransform, Criterion
from ..ops.nms import nms_mask
from ..rows import level_rows, on_device
from .proposals import clip

ABSENT = -1.0  # Stands for the score of a candidate that is none; probabilities are not negative.
_CANDIDATES = 4096  # Of an image, at first. 300 detections are nearly always found among them.
_GROWTH = 8
_ONE_GROUP = 1 << 14  # Up to so many candidates NMS need not ask how many are of one class.


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of each line, the smaller index first among equal scores.

    Args:
        scores: (N, C) float32, each >= 0 or ``ABSENT``; C < 2**31.
        k: at most C.

    Returns:
        (scores, indices), (N, k) each. It is what a stable sort begins with, for the price of
        ``topk``: each score and its index make one integer, and no two of these are equal.
    """
    last = scores.shape[1] - 1
    keys = scores.contiguous().view(torch.int32).long()  # Bits rise with a number that is >= 0.
    keys.bitwise_left_shift_(32).bitwise_or_(last - torch.arange(last + 1, device=scores.device))
    keys = keys.topk(k, dim=1).values
    return (keys >> 32).int().view(torch.float32), last - (keys & 0xFFFFFFFF)


def region_detections(
    scores: Tensor,
    deltas: Tensor,
    proposals: Sequence[Instances],
    box2box_transform: Box2BoxTransform,
    *,
    score_threshold: float | Tensor,
    nms_threshold: float,
    detections_per_image: int,
    num_candidates: int = _CANDIDATES,
) -> tuple[list[Instances], list[Tensor]]:
    """Return the detections of a region head: Detectron2's ``fast_rcnn_inference``.

    Args:
        scores: (R, K) probabilities of the proposals of all images, image after image.
        deltas: (R, 4 K), or (R, 4) for boxes that do not depend on the class.
        proposals: one ``Instances`` an image with ``proposal_boxes``.
        box2box_transform: decodes deltas.
        score_threshold: a score must exceed it; a number or (K,).
        nms_threshold: IoU beyond which the worse of two boxes of a class is dropped.
        detections_per_image: at most so many are returned; negative for all.
        num_candidates: M to begin with, see the module; it changes no result.

    Returns:
        (detections, rows): for each image ``Instances`` with ``pred_boxes``, ``scores`` and
        ``pred_classes``, by falling score; and (D,) the proposals that they come from.
        A proposal with a score or box that is not finite has no detections.
    """
    sizes = [len(p) for p in proposals]
    image_sizes = [p.image_size for p in proposals]
    num_classes = scores.shape[1]
    sources = torch.cat([p.proposal_boxes.tensor for p in proposals])  # (R, 4)
    deltas = deltas.unflatten(1, (-1, 4))  # (R, K or 1, 4)
    usable = _finite_scores(scores) & _finite_boxes(deltas, sources, box2box_transform)
    scores = scores.float().where((scores > score_threshold) & usable[:, None], ABSENT)
    # Lines of one length: what an image lacks to the most proposals is absent.
    table = pad_sequence(scores.split(sizes), batch_first=True, padding_value=ABSENT)
    table = table.flatten(1)  # (N, C), C = max R_i K
    first_row = _begins(sizes, deltas)  # (N, 1)

    total = table.shape[1]
    wanted = total if detections_per_image < 0 else detections_per_image
    num_candidates = max(num_candidates, wanted)
    while True:
        best, index = stable_topk(table, min(num_candidates, total))  # (N, M)
        row, classes = index // num_classes, index % num_classes
        at = (row + first_row).where(best >= 0, 0)  # what is absent may have no proposal
        own = deltas[at, classes if deltas.shape[1] > 1 else 0]  # (N, M, 4)
        boxes = box2box_transform.apply_deltas(own.flatten(0, 1), sources[at].flatten(0, 1))
        boxes = clip(boxes.view_as(own), image_sizes)
        kept, position = _suppress(boxes, best, classes, num_classes, nms_threshold, wanted)
        counts = (kept >= 0).sum(dim=1)
        # All that pass the threshold were candidates, or enough of the candidates survived.
        enough = (best[:, -1:] < 0).all(dim=1) | (counts >= wanted)
        *found, all_enough = torch.cat([counts, enough.all()[None]]).tolist()
        if all_enough or num_candidates >= total:
            rows = _cut(row.gather(1, position), found)
            return _instances(image_sizes, found, boxes, kept, classes, position), rows
        num_candidates *= _GROWTH


def dense_detections(
    anchors: Sequence[Boxes],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    criterion: Criterion,
    box2box_transform: Box2BoxTransform,
    *,
    score_threshold: float | Tensor,
    topk_per_level: int,
    nms_threshold: float,
    detections_per_image: int,
    centerness: Sequence[Tensor] | None = None,
) -> list[Instances]:
    """Return the detections of RetinaNet or FCOS: Detectron2's ``inference_single_image``.

    Args:
        anchors: of each level, A for each of its H W locations.
        logits, deltas: of each level, (N, A C, H, W) and (N, A 4, H, W), as the head leaves them;
            C is ``criterion.num_logits``.
        image_sizes: (height, width) of the N images.
        criterion: the :class:`~balanced_det.criterion.Criterion`, which makes scores of logits.
        box2box_transform: decodes deltas.
        score_threshold: a score must exceed it; a number or (K,).
        topk_per_level: so many candidates of each level go into NMS.
        nms_threshold: IoU beyond which the worse of two boxes of a class is dropped.
        detections_per_image: at most so many are returned.
        centerness: logits of each level, (N, A, H, W). With them the score is the geometric mean of
            probability and centerness (arXiv 2006.09214, Eq. 4).

    Returns:
        For each image ``Instances`` with ``pred_boxes``, not clipped, ``scores`` and
        ``pred_classes``, by falling score. A score that is not a number is no detection.
    """
    sizes = [len(boxes) for boxes in anchors]
    first = _begins(sizes, deltas[0])  # anchor of each level, (L, 1)
    all_anchors = Boxes.cat(list(anchors)).tensor  # (R, 4)
    by_logits = criterion.scores_rise_with_logits and not isinstance(score_threshold, Tensor)
    while True:
        row, scores, classes, has_nan = _dense_candidates(
            logits, centerness, sizes, criterion, score_threshold, topk_per_level, by_logits
        )
        own = torch.cat(_picked(deltas, row, 4), dim=1)  # (N, L k, 4)
        sources = all_anchors[row + first].flatten(0, 2)
        boxes = box2box_transform.apply_deltas(own.flatten(0, 1), sources).view_as(own)
        scores, classes = scores.flatten(1), classes.flatten(1)
        kept, position = _suppress(
            boxes, scores, classes, criterion.num_classes, nms_threshold, detections_per_image
        )
        counts = (kept >= 0).sum(dim=1)
        *found, any_nan = torch.cat([counts, has_nan[None]]).tolist()
        if not any_nan:
            return _instances(image_sizes, found, boxes, kept, classes, position)
        by_logits = False  # A maximum over numbers of which one is NaN says nothing of the others.


def traced_dense_detections(
    detector: Any,
    anchors: Sequence[Boxes],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    centerness: Sequence[Tensor] | None,
    image_sizes: Sequence[tuple[int, int]],
) -> list[Instances]:
    """Return what :func:`dense_detections` does as Detectron2 finds it, an image at a time.

    A trace may see other images than it was made of; the other asks how many candidates survive.
    """
    criterion = detector.criterion
    scores = [criterion.scores(level_rows(x, criterion.num_logits)) for x in logits]
    scores = [x.flatten(1, 3) for x in scores]  # (N, Ri, K) a level
    if centerness is not None:
        # The geometric mean of both, as in arXiv 2006.09214, Eq. 4.
        centers = [level_rows(x, 1).flatten(1, 3).float().sigmoid() for x in centerness]
        scores = [(x * c).sqrt() for x, c in zip(scores, centers, strict=True)]
    deltas = [level_rows(x, 4).flatten(1, 3) for x in deltas]
    return [
        detector.inference_single_image(
            anchors, [x[i] for x in scores], [x[i] for x in deltas], size
        )
        for i, size in enumerate(image_sizes)
    ]


def _dense_candidates(
    logits: Sequence[Tensor],
    centerness: Sequence[Tensor] | None,
    sizes: Sequence[int],
    criterion: Criterion,
    threshold: float | Tensor,
    k: int,
    by_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the best k pairs of an anchor and a class of each of L levels, if they pass.

    All levels go through each step together.

    Args:
        logits, centerness, criterion: as of :func:`dense_detections`.
        sizes: anchors of each level.
        threshold, k: as ``score_threshold`` and ``topk_per_level`` there.
        by_logits: whether maxima may be taken of logits.

    Returns:
        (anchor in its level, score or ``ABSENT``, class), (N, L, k) each, and whether a maximum was
        NaN. Where a level has fewer pairs than the largest, what it lacks is absent.
    """
    outputs = criterion.num_logits

    def passing(logits: Tensor, centerness: Tensor | None, exists: Tensor | bool = True) -> Tensor:
        scores = _scores(criterion, logits, centerness)
        return scores.where((scores > threshold) & exists, ABSENT)

    # 1. The anchors of the best maximum over classes.
    centers = None if centerness is None else _padded([level_rows(x, 1) for x in centerness], sizes)
    if by_logits:
        # Over the classes as the head left them: in the order of rows the reads would be apart.
        of_levels = [x.unflatten(1, (-1, outputs)).amax(dim=2) for x in logits]  # (N, A, H, W)
        best = _padded([level_rows(x, 1) for x in of_levels], sizes)
        best = _scores(criterion, best, centers).squeeze(-1)
    else:
        of_levels = []
        for index, level in enumerate(logits):
            center = None if centerness is None else level_rows(centerness[index], 1)
            scores = passing(level_rows(level, outputs), center)
            of_levels.append(scores.amax(dim=-1, keepdim=True))
        best = _padded(of_levels, sizes).squeeze(-1)
    size = on_device(sizes, best.new_empty(0, dtype=torch.long))[:, None]  # (L, 1)
    exists = torch.arange(best.shape[2], device=best.device) < size  # (L, R)
    best = best.where(exists, ABSENT)  # (N, L, R)
    _, row = stable_topk(best.flatten(0, 1), min(k, best.shape[2]))
    # So that the order of pairs is that of (row, class).
    row = row.sort(dim=1).values.view(*best.shape[:2], -1)  # (N, L, k)
    exists = row < size
    row = row.minimum(size - 1)

    # 2. The best pairs of these anchors.
    pairs = torch.stack(_picked(logits, row, outputs), dim=1)  # (N, L, k, C)
    centers = None if centers is None else centers.gather(2, row[..., None])
    pairs = passing(pairs, centers, exists[..., None])  # (N, L, k, K)
    scores, pair = stable_topk(pairs.flatten(0, 1).flatten(1), min(k, pairs[0, 0].numel()))
    scores, pair = (x.view(*row.shape[:2], -1) for x in (scores, pair))
    num_classes = pairs.shape[3]
    return row.gather(2, pair // num_classes), scores, pair % num_classes, best.isnan().any()


def _padded(levels: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return levels (N, H, W, A, C) in one table (N, L, R, C), R anchors of the largest.

    What a smaller level lacks is zero.
    """
    n, *_, channels = levels[0].shape
    table = levels[0].new_zeros(n, len(levels), max(sizes), channels)
    for index, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        table[:, index, :size].view(level.shape).copy_(level)
    return table


def _picked(levels: Sequence[Tensor], row: Tensor, channels: int) -> list[Tensor]:
    """Return what a head says of some anchors of each level.

    Args:
        levels: its output, (N, A channels, H, W) a level.
        row: (N, L, k) anchors of each level.

    Returns:
        L tensors (N, k, channels).
    """
    num_anchors = levels[0].shape[1] // channels
    image = torch.arange(len(row), device=row.device)[:, None]
    anchor, place = row % num_anchors, row // num_anchors
    return [
        level.unflatten(1, (num_anchors, channels)).flatten(3)[image, anchor[:, i], :, place[:, i]]
        for i, level in enumerate(levels)
    ]


def _begins(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return (len(sizes), 1) long: where each part begins when they stand one after the other."""
    begins = [0, *itertools.accumulate(sizes[:-1])]
    return on_device(begins, like.new_empty(0, dtype=torch.long))[:, None]


def _scores(criterion: Criterion, logits: Tensor, centerness: Tensor | None) -> Tensor:
    scores = criterion.scores(logits).float()
    if centerness is None:
        return scores
    return (scores * centerness.float().sigmoid()).sqrt()


def _finite_scores(scores: Tensor) -> Tensor:
    """Say of each row of (R, K) whether all its scores are finite; extremes pass NaN on."""
    if scores.numel() == 0:
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    lowest, highest = scores.aminmax(dim=1)
    return lowest.isfinite() & highest.isfinite()


def _finite_boxes(deltas: Tensor, sources: Tensor, transform: BoxTransform) -> Tensor:
    """Say of each row whether the boxes of all its classes are finite, by two of them.

    A corner is centre -+ size / 2; centre and size rise with their deltas. If the largest size
    around the smallest and the largest centre is finite, all are.

    Args:
        deltas: (R, K or 1, 4).
        sources: (R, 4).
    """
    if len(deltas) == 0:
        return torch.ones(0, dtype=torch.bool, device=deltas.device)
    lowest, highest = deltas.aminmax(dim=1)  # (R, 4)
    largest = torch.cat([lowest[:, :2], highest[:, 2:]], dim=1)
    boxes = (transform.apply_deltas(d, sources) for d in (highest, largest))
    return torch.cat(list(boxes), dim=1).isfinite().all(dim=1)


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    num_classes: int,
    nms_threshold: float,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """Return the best detections that NMS leaves of an image's candidates.

    Args:
        boxes, scores, classes: (N, C, 4), (N, C) and (N, C); a score of ``ABSENT`` for none.

    Returns:
        (scores, positions among the candidates), (N, D) each, by falling score and rising position;
        ``ABSENT`` where there are fewer than D = min(wanted, C).
    """
    n, count = scores.shape
    image = torch.arange(n, device=scores.device)[:, None]
    kept = nms_mask(
        boxes.flatten(0, 1),
        scores.flatten(),
        (image * num_classes + classes).flatten(),
        nms_threshold,
        valid=(scores >= 0).flatten(),
        max_group_size=count if count <= _ONE_GROUP else None,
    )
    return stable_topk(scores.where(kept.view_as(scores), ABSENT), min(wanted, count))


def _instances(
    image_sizes: Sequence[tuple[int, int]],
    found: Sequence[int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    position: Tensor,
) -> list[Instances]:
    """Return the ``Instances`` of each image, of the first ``found`` detections in its line."""
    boxes = boxes.gather(1, position[..., None].expand(-1, -1, 4))
    fields = zip(
        _cut(boxes, found),
        _cut(scores, found),
        _cut(classes.gather(1, position), found),
        strict=True,
    )
    return [
        Instances(size, pred_boxes=Boxes(box), scores=score, pred_classes=label)
        for size, (box, score, label) in zip(image_sizes, fields, strict=True)
    ]


def _cut(lines: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    # Not by iterating, whose views may not be changed in place where there are gradients.
    return [lines[index, :length] for index, length in enumerate(lengths)]
