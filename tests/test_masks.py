"""Run lengths against Detectron2's paste and pycocotools' encoder, byte for byte."""

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from models import FASTER, MASK, RETINANET, batch, config
from pycocotools import mask as coco_mask

from balanced_det.detectors import masks as module
from balanced_det.detectors.masks import MasksAsRLE, masks_to_rle

DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()


def pasted(masks, boxes, size):
    full = paste_masks_in_image(masks, boxes, size).cpu().numpy()
    return [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in full]


def make_masks(count, side=28):
    """Blobs with holes and flat edges; probabilities of exactly 0, 1/2 and 1 among them."""
    coarse = 8 * torch.randn(count, 1, 5, 5)
    masks = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[:, 0]
    masks = masks.sigmoid()
    masks[::3] = masks[::3].round()
    masks[1::3] = torch.rand(len(masks[1::3]), side, side)
    masks[::7] = 1.0
    masks[3::11] = 0.0
    masks[5::11] = 0.5
    return masks


def make_boxes(count, height, width, kind):
    low = torch.rand(count, 2) * torch.tensor([width, height])
    extent = torch.rand(count, 2) ** 3 * torch.tensor([width, height])
    if kind == "tiny":
        extent = 2 * torch.rand(count, 2)
    if kind == "beyond the image":
        low = low - extent
    boxes = torch.cat([low, low + extent], dim=1)
    if kind != "beyond the image":
        boxes = boxes.minimum(torch.tensor([width, height, width, height]).float())
    if kind == "whole":
        boxes[::2] = boxes[::2].round()
        boxes[::5] = torch.tensor([0.0, 0.0, width, height])
        boxes[1::5, 1::2] = torch.tensor([0.0, height])  # from the top to the bottom
    return boxes


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("kind", ["usual", "tiny", "whole", "beyond the image"])
@pytest.mark.parametrize("size", [(60, 90), (1, 40), (37, 1), (130, 70)])
@pytest.mark.parametrize("pixels", [1 << 23, 500])
@pytest.mark.parametrize("together", [False, True])
def test_run_lengths_are_those_of_the_pasted_masks(
    device, monkeypatch, kind, size, pixels, together
):
    monkeypatch.setattr(module, "_PIXELS", pixels)  # few: boxes are cut into strips
    if together:  # many boxes at a time, as on a GPU
        chunks = module._chunks
        monkeypatch.setattr(module, "_chunks", lambda tiles, _: chunks(tiles, torch.device("cuda")))
    torch.manual_seed(0)
    masks, boxes = make_masks(60).to(device), make_boxes(60, *size, kind).to(device)
    if kind == "beyond the image" and device == "cpu":
        # Detectron2 fails on the CPU at boxes wholly outside.
        inside = (boxes[:, 2:] > 0).all(dim=1)
        masks, boxes = masks[inside], boxes[inside]
    assert masks_to_rle(masks, boxes, size) == pasted(masks, boxes, size)


def test_boxes_without_area(device):
    torch.manual_seed(0)
    masks = make_masks(6).to(device)
    boxes = torch.tensor(
        [
            [5, 5, 5, 9],
            [5, 5, 9, 5],
            [5, 5, 5, 5],
            [4.5, 4.5, 4.5, 4.5],
            [0, 0, 0, 0],
            [20, 30, 20, 30],
        ],
        device=device,
    )
    assert masks_to_rle(masks, boxes, (30, 20)) == pasted(masks, boxes, (30, 20))


def test_no_masks_and_masks_that_fill_the_image(device):
    assert masks_to_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), (10, 10)) == []
    masks = torch.ones(1, 28, 28, device=device)
    box = torch.tensor([[-5.0, -5, 25, 35]], device=device)
    (rle,) = masks_to_rle(masks, box, (30, 20))
    assert rle == pasted(masks, box, (30, 20))[0] and coco_mask.area(rle) == 600


@pytest.mark.parametrize("count", [1, 2])
def test_masks_of_which_nothing_shows_are_one_run_each(device, count):
    masks = torch.zeros(count, 28, 28, device=device)
    boxes = torch.tensor([[3.0, 4, 15, 20]], device=device).repeat(count, 1)
    found = masks_to_rle(masks, boxes, (30, 20))
    assert found == pasted(masks, boxes, (30, 20))
    assert [coco_mask.area(rle) for rle in found] == [0] * count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_of_other_types(device, dtype):
    torch.manual_seed(0)
    masks, boxes = make_masks(20).to(device, dtype), make_boxes(20, 600, 500, "usual").to(device)
    if device == "cpu" and dtype != torch.float64:
        pytest.skip("torch samples no 16-bit numbers on the CPU")
    assert masks_to_rle(masks, boxes, (600, 500)) == pasted(masks, boxes, (600, 500))


def test_memory_does_not_grow_with_the_image(monkeypatch):
    # A mask from the top to the bottom of a tall image goes by in strips.
    largest = []
    sample = torch.nn.functional.grid_sample

    def watched(values, grid, **options):
        largest.append(grid.shape[:3].numel())
        return sample(values, grid, **options)

    monkeypatch.setattr(module.F, "grid_sample", watched)
    monkeypatch.setattr(module, "_PIXELS", 1 << 20)
    masks, box, size = make_masks(1), torch.tensor([[100.0, 0, 800, 10_000]]), (10_000, 1000)
    rle = masks_to_rle(masks, box, size)
    assert len(largest) > 1 and max(largest) <= 1 << 20
    assert rle == pasted(masks, box, size)


@torch.no_grad()
def test_a_wrapped_detector_gives_run_lengths_in_place_of_masks():
    torch.manual_seed(0)
    model = build_model(config(MASK)).eval()
    model.roi_heads.box_predictor.score_threshold.fixed = 1e-4
    torch.nn.init.normal_(model.roi_heads.mask_head.predictor.weight, std=1.0)
    inputs = batch()
    for image, size in zip(inputs, [(96, 128), (210, 301)], strict=True):
        image["height"], image["width"] = size
    wrapped = MasksAsRLE(model).eval()
    for ours, plain in zip(wrapped(inputs), model(inputs), strict=True):
        ours, plain = ours["instances"], plain["instances"]
        assert len(ours) > 0 and ours.image_size == plain.image_size
        assert not ours.has("pred_masks")
        assert torch.equal(ours.pred_boxes.tensor, plain.pred_boxes.tensor)
        assert torch.equal(ours.scores, plain.scores)
        full = plain.pred_masks.numpy()
        expected = [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in full]
        assert ours.pred_masks_rle == expected
        assert 0 < sum(coco_mask.area(expected)) < full.size
        # Detections are picked together with their masks.
        best = ours.scores > ours.scores.median()
        assert ours[best].to("cpu").pred_masks_rle == [expected[i] for i in best.nonzero()]
        assert ours[torch.tensor([2, 0])].pred_masks_rle == [expected[2], expected[0]]
        assert ours[1:3].pred_masks_rle == expected[1:3]


@pytest.mark.parametrize("choice", [FASTER, RETINANET], ids=["faster", "retinanet"])
@torch.no_grad()
def test_a_detector_without_masks_is_called_as_it_is(choice):
    torch.manual_seed(0)
    model = build_model(config(choice)).eval()
    inputs = batch()
    for ours, plain in zip(MasksAsRLE(model).eval()(inputs), model(inputs), strict=True):
        ours, plain = ours["instances"], plain["instances"]
        assert ours.get_fields().keys() == plain.get_fields().keys()
        assert torch.equal(ours.scores, plain.scores)
