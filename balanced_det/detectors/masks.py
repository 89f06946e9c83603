"""Run lengths of predicted masks, made on their boxes and not on the image.

Detectron2 pastes every mask into a picture of the image's size, which it then encodes: for 300
detections of 800 x 1216 pixels that is 290 MB to fill, to copy and to walk through, nearly all of
it zeros. Here a mask is sampled on the pixels of its box alone, by the same arithmetic; the places
where a column changes between outside and inside become run lengths and these become text on the
device, and only the text leaves it. It is the same, byte for byte.

``model(inputs)`` stays Detectron2's, with full-size ``pred_masks``. Who evaluates wraps the model
in :class:`MasksAsRLE` and gets ``pred_masks_rle`` in their place.

Letters: D detections with masks of M x M, H x W pixels of the image; T strips, L runs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..rows import on_device, without_waiting

# Pixels that are sampled at a time. A pixel takes some 15 bytes on the way.
_PIXELS = 1 << 23
_OUTSIDE = 3.0  # A coordinate beyond the mask, which reaches from -1 to 1 and is zero around.
_GROUPS = 7  # Of five bits: what the difference of two runs of 2^32 pixels needs.
_THRESHOLD = 0.5  # Of a probability, as everywhere in Detectron2.


class RunLengths(list):
    """COCO run lengths ``{"size": [height, width], "counts": bytes}``, one a detection.

    A list that a mask or a vector of indices picks from, as from the tensors in an ``Instances``.
    """

    def __getitem__(self, item: Any) -> Any:
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
        model: Any = getattr(self.model, "module", self.model)
        if not isinstance(model, GeneralizedRCNN):
            return self.model(batched_inputs)
        if self.training or not getattr(model.roi_heads, "mask_on", False):
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
        needed on the way, at any size of the image. The host waits for the device four times, and
        once for each 8 million pixels in the boxes.
    """
    if len(masks) == 0:
        return []
    height, width = image_size
    tiles = _tiles(masks, boxes, height, width)
    changes = [
        _changes(masks, boxes, tiles[chunk], height, width)
        for chunk in _chunks(tiles, masks.device)
    ]
    owner, runs = _run_lengths(changes, len(masks), height * width, masks.device)
    texts = _texts(owner, runs, len(masks))
    return [{"size": [height, width], "counts": text} for text in texts]


def _tiles(masks: Tensor, boxes: Tensor, height: int, width: int) -> np.ndarray:
    """Cut the boxes' pixels into upright strips of at most ``_PIXELS``, a row around included.

    Returns:
        (T, 5) int64 on the host: mask, x and y of the corner, width and height, largest first.
    """
    low, high = boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1  # as Detectron2 on a CPU
    if boxes.is_cuda:
        # There Detectron2 samples the whole image. Half a mask's value may show in a pixel that
        # lies outside of the box by less than the rounding of the grid, which runs from -1 to 1.
        margin = ((boxes[:, 2:] - boxes[:, :2]) * torch.finfo(masks.dtype).eps).ceil()
        low, high = low - margin, high + margin
    limit = on_device([width, height], high)
    corners = torch.cat([low.clamp(min=0), high.minimum(limit)], dim=1).long().cpu().numpy()
    x, y = corners[:, 0], corners[:, 1]
    columns, rows = (corners[:, 2:] - corners[:, :2]).clip(min=0).T
    strip = np.maximum(_PIXELS // (rows + 2), 1)  # columns of a strip
    strips = np.where(rows > 0, -(-columns // strip), 0)
    owner = np.repeat(np.arange(len(corners)), strips)
    before = np.arange(len(owner)) - np.repeat(strips.cumsum() - strips, strips)  # strips
    before = before * strip[owner]  # columns
    left = np.minimum(strip[owner], columns[owner] - before)
    tiles = np.stack([owner, x[owner] + before, y[owner], left, rows[owner]], axis=1)
    return tiles[np.argsort(-tiles[:, 3] * tiles[:, 4], kind="stable")]


def _chunks(tiles: np.ndarray, device: torch.device) -> Iterator[slice]:
    """Yield which tiles to sample together: as many as fit, each widened to the largest of them.

    On a CPU that is one, since nothing is gained by more.
    """
    start = 0
    while start < len(tiles):
        end = start + 1
        if device.type != "cpu":
            columns, rows = np.maximum.accumulate(tiles[start:, 3:]).T
            pixels = columns * (rows + 2) * np.arange(1, len(rows) + 1)  # of the first 1, 2, ...
            end = max(end, start + int(np.searchsorted(pixels, _PIXELS, side="right")))
        yield slice(start, end)
        start = end


def _changes(masks: Tensor, boxes: Tensor, tiles: np.ndarray, height: int, width: int) -> Tensor:
    """Return where the columns of some tiles change between outside and inside.

    Returns:
        (C,) int64 numbers of pixels from which on a mask's value is another, of the run's begin
        and of its end alike: mask * (height * width + 1) + x * height + y.
    """
    # (T,) each
    owner, x, y, columns, rows = without_waiting(torch.from_numpy(tiles), masks.device).unbind(1)
    x1, y1, x2, y2 = boxes[owner].split(1, dim=1)  # (T, 1) each
    across = torch.arange(int(tiles[:, 3].max()), device=masks.device)
    # A row around the tile is outside of the mask, so that each run has a begin and an end.
    down = torch.arange(-1, int(tiles[:, 4].max()) + 1, device=masks.device)
    # The arithmetic of Detectron2's paste, from the middle of a pixel to [-1, 1] in the box.
    grid_x = ((x[:, None] + across).float() + 0.5 - x1) / (x2 - x1) * 2 - 1  # (T, W)
    grid_y = ((y[:, None] + down).float() + 0.5 - y1) / (y2 - y1) * 2 - 1  # (T, H + 2)
    grid_x = grid_x.where(across < columns[:, None], _OUTSIDE)
    grid_y = grid_y.where((down >= 0) & (down < rows[:, None]), _OUTSIDE)
    shape = (len(tiles), len(across), len(down))
    grid = torch.stack([grid_x[:, :, None].expand(shape), grid_y[:, None, :].expand(shape)], dim=3)
    # Sampled by columns: (T, W, H + 2).
    values = F.grid_sample(masks[owner, None], grid.to(masks.dtype), align_corners=False)[:, 0]
    filled = values >= _THRESHOLD
    tile, column, row = (filled[..., 1:] != filled[..., :-1]).nonzero().unbind(1)
    first = owner * (height * width + 1) + x * height + y  # (T,)
    return first[tile] + column * height + row


def _run_lengths(
    changes: Sequence[Tensor], count: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the runs of zeros and ones in turn, of each of ``count`` masks, the first of zeros.

    Args:
        changes: what :func:`_changes` returned, in any order.
        count: D.
        size: pixels of the image.

    Returns:
        (owner, runs), (L,) int64 each: the mask of each run, ascending, and its length.
    """
    ends = torch.arange(count, device=device) * (size + 1) + size  # of the last run of each mask
    numbers = torch.cat([*changes, ends]).sort().values
    owner, position = numbers // (size + 1), numbers % (size + 1)
    # A run that ends where the next begins, at the foot of a column, goes on; and one that ends
    # with the image is the last.
    same = F.pad(numbers[1:] == numbers[:-1], (1, 1))
    before, after = same[:-1], same[1:]
    kept = (~(before | after) | ((position == size) & ~before)).nonzero().squeeze(1)
    owner, position = owner[kept], position[kept]
    begins = F.pad(position[:-1], (1, 0)).where(~_is_first(owner), 0)
    return owner, position - begins


def _is_first(owner: Tensor) -> Tensor:
    return F.pad(owner[1:] != owner[:-1], (1, 0), value=True)


def _texts(owner: Tensor, runs: Tensor, count: int) -> list[bytes]:
    """Return the runs of ``count`` masks as pycocotools writes them; see ``data/run_lengths.py``.

    Args:
        owner, runs: as from :func:`_run_lengths`; each mask has a run.

    Returns:
        A list of texts, as bytes.
    """
    place = torch.arange(len(runs), device=runs.device)
    place = place - place.where(_is_first(owner), 0).cummax(0).values  # of a run in its mask
    # From the fourth of a mask on, less the one two before; there may be a single run in all.
    numbers = runs - F.pad(runs, (2, 0))[:-2].where(place > 2, 0)
    # Groups of five bits, as many as hold a number with its sign.
    size = numbers ^ (numbers >> 63)  # of as many bits without the sign
    shifts = 5 * torch.arange(_GROUPS, device=runs.device)
    needed = 1 + (size[:, None] >> (shifts[1:] - 1) > 0).sum(dim=1)  # (L,)
    follows = shifts < 5 * (needed[:, None] - 1)  # (L, 7)
    groups = (numbers[:, None] >> shifts & 31) + 32 * follows + 48
    characters = groups[shifts < 5 * needed[:, None]].to(torch.uint8)
    lengths = torch.zeros(count, dtype=torch.long, device=runs.device).index_add_(0, owner, needed)
    data = torch.cat([lengths.view(torch.uint8), characters]).cpu().numpy()  # one copy
    ends = data[: 8 * count].view(np.int64).cumsum().tolist()
    text = data[8 * count :].tobytes()
    return [text[start:end] for start, end in itertools.pairwise([0, *ends])]
