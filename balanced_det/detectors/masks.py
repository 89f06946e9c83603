"""Run lengths of predicted masks, made on their boxes and not on the image.

Detectron2 pastes every mask into a picture of the image's size, which it then encodes: for 300
detections of 800 x 1216 pixels that is 290 MB to fill, to copy and to walk through, nearly all of
it zeros. Here a mask is sampled on the pixels of its box alone, by the same arithmetic, and only
the places where a column changes between outside and inside leave the device. The run lengths are
the same, byte for byte.

``model(inputs)`` stays Detectron2's, with full-size ``pred_masks``. Who evaluates wraps the model
in :class:`MasksAsRLE` and gets ``pred_masks_rle`` in their place.
"""

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

# Pixels that are sampled at a time. A pixel takes some 20 bytes on the way.
_PIXELS = 1 << 23
_THRESHOLD = 0.5  # Of a probability, as everywhere in Detectron2.


class RunLengths(list):
    """COCO run lengths ``{"size": [height, width], "counts": bytes}``, one a detection.

    A list that a mask or a vector of indices picks from, as from the tensors in an ``Instances``.
    """

    def __getitem__(self, item):
        """Return one for a number; for a slice, (D,) bool or integers, those in a new list."""
        if isinstance(item, Tensor) and item.dim():
            rows = item.nonzero().squeeze(1) if item.dtype == torch.bool else item
            return RunLengths(list.__getitem__(self, row) for row in rows.tolist())
        picked = super().__getitem__(item)
        return RunLengths(picked) if isinstance(item, slice) else picked


class MasksAsRLE(nn.Module):
    """A detector whose detections carry run lengths: the switch for evaluation.

    A model that has no masks is called as it is.

    Args:
        model: any detector that is built by Detectron2, perhaps within DistributedDataParallel.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Return ``[{"instances": Instances}, ...]`` as in Detectron2, but for the masks.

        Instead of ``pred_masks`` (D, H, W) an ``Instances`` has ``pred_masks_rle``, D
        :class:`RunLengths`.
        """
        model = getattr(self.model, "module", self.model)
        has_masks = isinstance(model, GeneralizedRCNN) and getattr(
            model.roi_heads, "mask_on", False
        )
        if not has_masks or self.training:
            return self.model(batched_inputs)
        outputs = []
        raw = model.inference(batched_inputs, do_postprocess=False)
        for instances, image in zip(raw, batched_inputs, strict=True):
            height, width = instances.image_size
            size = image.get("height", height), image.get("width", width)
            outputs.append({"instances": postprocess_with_rle(instances, *size)})
        return outputs


def postprocess_with_rle(results: Instances, height: int, width: int) -> Instances:
    """Detectron2's ``detector_postprocess``, with ``pred_masks_rle`` in place of ``pred_masks``.

    Args:
        results: a model's raw output; ``pred_masks`` (D, 1, M, M) are probabilities in the boxes.
            May be changed, as by Detectron2.
        height, width: of the image that is wanted.
    """
    fields = results.get_fields()
    probabilities = fields.pop("pred_masks")
    results = Instances(results.image_size, probabilities=probabilities, **fields)
    results = detector_postprocess(results, height, width)  # drops what has become empty
    boxes, probabilities = results.pred_boxes.tensor, results.probabilities[:, 0]
    results.pred_masks_rle = RunLengths(masks_to_rle(probabilities, boxes, (height, width)))
    results.remove("probabilities")
    return results


def masks_to_rle(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> list[dict]:
    """Return the COCO run lengths of masks pasted into an image.

    They are what pycocotools makes of Detectron2's ``paste_masks_in_image`` at threshold 0.5.

    Args:
        masks: (D, M, M) probabilities on the grid of each box, floating point.
        boxes: (D, 4) corners in pixels of the image; they may reach beyond it.
        image_size: (height, width) of the image.

    Returns:
        A list of D dicts ``{"size": [height, width], "counts": bytes}``. At most some 200 MB are
        needed on the way, at any size of the image. The host waits for the device once for the
        boxes, and once for each 8 million pixels in them.
    """
    if len(masks) == 0:
        return []
    height, width = image_size
    tiles = _tiles(masks, boxes, height, width)
    changes = [
        _changes(masks, boxes, tiles[chunk], height) for chunk in _chunks(tiles, masks.device)
    ]
    owner, position = np.concatenate([np.zeros((2, 0), np.int64), *changes], axis=1)
    order = np.lexsort((position, owner))
    owner, position = owner[order], position[order]

    # A run that ends where the next begins, at the foot of a column, goes on.
    joined = np.zeros(len(owner) + 1, dtype=bool)  # each change to the one before it
    joined[1:-1] = (owner[1:] == owner[:-1]) & (position[1:] == position[:-1])
    kept = ~(joined[1:] | joined[:-1])
    owner, position = owner[kept], position[kept]

    ends = np.searchsorted(owner, np.arange(1, len(masks) + 1))
    runs = [_run_lengths(part, height * width) for part in np.split(position, ends)[:-1]]
    return coco_mask.frPyObjects(
        [{"size": [height, width], "counts": run} for run in runs], height, width
    )


def _tiles(masks, boxes, height, width):
    """Cut the boxes' pixels into upright strips of at most ``_PIXELS``.

    Returns:
        (T, 5) int64 on the host: mask, x and y of the corner, width and height, largest first.
    """
    low, high = boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1  # as Detectron2 on a CPU
    if boxes.is_cuda:
        # There Detectron2 samples the whole image. Half a mask's value may show in a pixel that
        # lies outside of the box by less than the rounding of the grid, which runs from -1 to 1.
        margin = ((boxes[:, 2:] - boxes[:, :2]) * torch.finfo(masks.dtype).eps).ceil()
        low, high = low - margin, high + margin
    limit = boxes.new_tensor([width, height])
    corners = torch.cat([low.clamp(min=0), high.minimum(limit)], dim=1)
    tiles = []
    for index, (x1, y1, x2, y2) in enumerate(corners.long().tolist()):
        if x2 <= x1 or y2 <= y1:
            continue
        strip = max(_PIXELS // (y2 - y1), 1)
        tiles += [[index, x, y1, min(strip, x2 - x), y2 - y1] for x in range(x1, x2, strip)]
    tiles = np.array(tiles, dtype=np.int64).reshape(-1, 5)
    return tiles[np.argsort(-tiles[:, 3] * tiles[:, 4], kind="stable")]


def _chunks(tiles, device) -> Iterator[slice]:
    """Yield which tiles to sample together: as many as fit, each widened to the largest of them.

    On a CPU that is one, since nothing is gained by more.
    """
    start = 0
    while start < len(tiles):
        end = start + 1
        if device.type != "cpu":
            columns, rows = np.maximum.accumulate(tiles[start:, 3:]).T
            pixels = columns * rows * np.arange(1, len(rows) + 1)  # of the first 1, 2, ...; rises
            end = max(end, start + int(np.searchsorted(pixels, _PIXELS, side="right")))
        yield slice(start, end)
        start = end


def _changes(masks, boxes, tiles, height):
    """Return where the columns of some tiles change between outside and inside.

    Returns:
        (2, C) int64 on the host: the mask, and the position x * height + y of the pixel from which
        on a mask's value is another; of each column first the begin of a run, then its end.
    """
    owner, x, y, columns, rows = torch.from_numpy(tiles).to(masks.device).unbind(1)  # (T,) each
    x1, y1, x2, y2 = boxes[owner].split(1, dim=1)  # (T, 1) each
    across = torch.arange(int(tiles[:, 3].max()), device=masks.device)
    down = torch.arange(int(tiles[:, 4].max()), device=masks.device)
    # The arithmetic of Detectron2's paste, from the middle of a pixel to [-1, 1] in the box.
    grid_x = ((x[:, None] + across).float() + 0.5 - x1) / (x2 - x1) * 2 - 1  # (T, W)
    grid_y = ((y[:, None] + down).float() + 0.5 - y1) / (y2 - y1) * 2 - 1  # (T, H)
    shape = (len(tiles), len(down), len(across))
    grid = torch.stack([grid_x[:, None, :].expand(shape), grid_y[:, :, None].expand(shape)], dim=3)
    if not masks.is_floating_point():
        masks = masks.float()
    values = F.grid_sample(masks[owner, None], grid.to(masks.dtype), align_corners=False)[:, 0]
    inside = (across < columns[:, None])[:, None, :] & (down < rows[:, None])[:, :, None]
    filled = ((values >= _THRESHOLD) & inside).transpose(1, 2)  # (T, W, H)
    filled = F.pad(filled.to(torch.int8), (1, 1))
    tile, column, row = (filled[..., 1:] != filled[..., :-1]).nonzero().unbind(1)
    position = (x[tile] + column) * height + y[tile] + row
    return torch.stack([owner[tile], position]).cpu().numpy()


def _run_lengths(changes, size):
    """Return the lengths of the runs of zeros and ones in turn, the first of zeros."""
    if len(changes) and changes[-1] == size:
        return np.diff(changes, prepend=0)
    return np.diff(changes, prepend=0, append=size)
