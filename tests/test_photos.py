"""Pixels and boxes are the same picture: turned, mirrored, deep, broken and hostile images."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.utils.events import EventStorage
from distributed import run_workers
from PIL import Image

from balanced_det.data.images import is_turned, read_image, upright_size
from balanced_det.data.loader import TrainLoader, build_test_loader
from balanced_det.distributed import num_workers
from balanced_det.engine import load_config
from balanced_det.engine.step import TrainStep
from balanced_det.errors import InputError

WIDTH, HEIGHT = 60, 40
BOX = (9, 5, 24, 12)  # x, y, width, height: nowhere near the picture's middle
# How a camera that is held in each of the eight ways stores the upright picture: the inverse of
# what the EXIF standard says to do with it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture():
    """Return the upright picture: white where the box is, black elsewhere."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x, y, w, h = BOX
    pixels[y : y + h, x : x + w] = 255
    return Image.fromarray(pixels)


def save_photo(path, orientation):
    image, exif = picture(), Image.Exif()
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def data_set(folder, files):
    """Write one annotation file of pictures that all have the one box; return its path."""
    images = [
        {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(files, 1)
    ]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": list(BOX), "area": BOX[2] * BOX[3]}
        for i in range(1, len(files) + 1)
    ]
    content = {"categories": [{"id": 1, "name": "white"}], "images": images}
    path = folder / "photos.json"
    path.write_text(json.dumps({**content, "annotations": annotations}))
    return path


def config(path, **overrides):
    name = str(path)
    return load_config(
        "configs/quickstart.yaml",
        BALANCE__DATASETS=[[name, name, str(path.parent)]],
        DATASETS__TRAIN=(name,),
        DATASETS__TEST=(name,),
        INPUT__MIN_SIZE_TRAIN=(HEIGHT,),
        INPUT__MIN_SIZE_TEST=HEIGHT,
        INPUT__RANDOM_FLIP="none",
        SOLVER__IMS_PER_BATCH=1,
        **{"DATALOADER__NUM_WORKERS": 0, **overrides},
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    names = [f"{orientation}.png" for orientation in STORED]
    for orientation, name in zip(STORED, names):
        save_photo(folder / name, orientation)
    return data_set(folder, names)


def assert_white_where_the_box_is(image):
    """Check a (3, HEIGHT, WIDTH) image."""
    expected = torch.as_tensor(np.array(picture().convert("L")))
    assert torch.equal(image, expected.expand(3, -1, -1))


def test_training_sees_every_photo_upright_and_its_box_on_it(photos):
    batches = iter(TrainLoader(config(photos)))
    seen = set()
    for (sample,) in (next(batches) for _ in range(len(STORED))):
        seen.add(sample["file_name"])
        assert_white_where_the_box_is(sample["image"])
        x, y, w, h = BOX
        (box,) = sample["instances"].gt_boxes.tensor.tolist()
        assert box == [x, y, x + w, y + h]
    assert len(seen) == len(STORED)


def test_inference_sees_every_photo_upright(photos):
    loader = build_test_loader(config(photos), str(photos))
    samples = [sample for batch in loader for sample in batch]
    assert len(samples) == len(loader) == len(STORED)
    for sample in samples:
        assert_white_where_the_box_is(sample["image"])


def test_evaluation_takes_as_many_images_at_a_time_as_it_is_told(photos):
    cfg = config(photos)
    names = [sample["file_name"] for (sample,) in build_test_loader(cfg, str(photos))]
    cfg.TEST.IMS_PER_BATCH = 3
    batches = list(build_test_loader(cfg, str(photos)))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert [sample["file_name"] for batch in batches for sample in batch] == names


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_inference_on_a_terminal_shows_images_a_second_and_the_time_left(photos, monkeypatch):
    shown = {}
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", screen)
        assert sum(map(len, build_test_loader(config(photos), str(photos)))) == len(STORED)
        shown[type(screen)] = screen.getvalue()
    assert shown[io.StringIO] == ""
    last = shown[Terminal].replace("\r", "\n").strip().splitlines()[-1]
    name, count = re.escape(str(photos)), len(STORED)
    assert re.fullmatch(rf"{name}: 100%.* {count}/{count} \[00:\d\d<00:00, .*image/s\]", last)


@pytest.mark.parametrize("orientation", STORED)
def test_size_is_that_of_the_upright_photo(photos, orientation):
    path = photos.parent / f"{orientation}.png"
    assert upright_size(path) == (WIDTH, HEIGHT)
    assert is_turned(path) == (orientation != 1)
    image = detection_utils.read_image(str(path), "RGB")
    np.testing.assert_array_equal(image, np.array(picture()))


@pytest.mark.parametrize("orientation", STORED)
def test_turned_tiff_is_read_upright_and_not_trained_on_turned_twice(tmp_path, orientation):
    """Pillow turns a TIFF when it loads it; Detectron2 would do so once more."""
    path = tmp_path / "a.tiff"
    save_photo(path, orientation)
    assert upright_size(path) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(read_image(path), np.array(picture()))
    loader = TrainLoader(config(data_set(tmp_path, ["a.tiff"])))
    if orientation == 1:
        (sample,) = next(iter(loader))
        assert_white_where_the_box_is(sample["image"])
    else:
        with pytest.raises(InputError, match="a.tiff' is a TIFF that its EXIF data turn"):
            next(iter(loader))


def test_boxes_drawn_on_the_photo_as_stored_are_refused(tmp_path):
    save_photo(tmp_path / "a.png", 6)
    path = data_set(tmp_path, ["a.png"])
    content = json.loads(path.read_text())
    content["images"][0].update(width=HEIGHT, height=WIDTH)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="a.png' cannot be used: Mismatched image shape"):
        next(iter(TrainLoader(config(path))))


def truncated(path):
    picture().resize((600, 400)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path):
    picture().save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (10**9).to_bytes(4, "big") * 2  # PNG's width and height
    path.write_bytes(content)


BROKEN = {
    "16 bits": (
        lambda path: Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, np.uint16)).save(path),
        "more than 8 bits a channel",
    ),
    "32 bits": (
        lambda path: Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)).save(path, "TIFF"),
        "more than 8 bits a channel",
    ),
    "truncated": (truncated, "truncated"),
    "text": (lambda path: path.write_text("no image"), "missing or unreadable"),
    "empty": (lambda path: path.touch(), "missing or unreadable"),
    "pipe": (os.mkfifo, "is no file"),
    "bomb": (bomb, "missing or unreadable"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_with_its_batch(tmp_path, kind, workers):
    spoil, message = BROKEN[kind]
    spoil(tmp_path / "a.png")
    path = data_set(tmp_path, ["a.png"])
    with pytest.raises(InputError, match=f"^Batch 0 of the training: .*a.png'.*{message}"):
        next(iter(TrainLoader(config(path, DATALOADER__NUM_WORKERS=workers))))
    with pytest.raises(InputError, match=f"a.png'.*{message}"):
        next(iter(build_test_loader(config(path), str(path))))


def test_broken_image_is_replaced_by_key_and_told(tmp_path):
    truncated(tmp_path / "a.png")
    save_photo(tmp_path / "b.png", 1)
    path = data_set(tmp_path, ["a.png", "b.png"])
    loader = TrainLoader(config(path, BALANCE__SKIP_BROKEN_IMAGES=9))
    batches = iter(loader)
    samples = [next(batches)[0] for _ in range(4)]  # two epochs
    assert all(sample["file_name"].endswith("b.png") for sample in samples)
    replaced = [sample for sample in samples if "skipped_images" in sample]
    assert len(replaced) == 2
    for sample in replaced:
        assert all("a.png" in reason for reason in sample["skipped_images"])


class Mean(torch.nn.Module):
    """A model of one weight, on batches that tell their broken images as the loader does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight * len(batch)}


def broken_images_of(rank, reasons_of):
    """Train three steps; return how many images were counted after each, and the error."""
    model = Mean()
    batches = [[{"skipped_images": reasons}] for reasons in reasons_of[rank]]
    if num_workers() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, batches, optimizer, max_skipped_images=2)
    counts = []
    with EventStorage():
        for step.iter in range(len(batches)):
            try:
                step.run_step()
            except InputError as error:
                return counts, str(error)
            counts.append(step.skipped_images)
    return counts, None


def test_limit_of_broken_images_is_that_of_all_workers_together():
    reasons = [[["a.png"], [], ["b.png"], []], [[], ["c.png"], [], []]]
    results = run_workers(broken_images_of, reasons)
    for counts, error in results:
        assert counts == [1, 2]
        assert error.startswith("Iteration 2: b.png; BALANCE.SKIP_BROKEN_IMAGES allows 2 of it")
    alone = broken_images_of(0, [[["a.png"], ["b.png"], [], []]])
    assert alone == ([1, 2, 2, 2], None)
