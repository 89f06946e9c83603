"""Fuzzing of everything that reads a stranger's file: ``python -m tests.fuzz SECONDS``.

A reader may raise InputError, in one printable sentence, or nothing. Each round takes a sound file
of a reader, spoils it, as JSON or as bytes, and reads it. What the reader accepts must then go
through whatever comes after it, which is the reader's own function here.

A reader joins by::

    @reader("annotations", ".json", seeds)
    def read_annotations_and_use_them(path): ...

where ``seeds()`` returns sound files as bytes. The first input that goes wrong is kept and named;
``--seed`` repeats a run, and ``--reader`` picks one.
"""

import argparse
import copy
import faulthandler
import functools
import io
import json
import logging
import random
import re
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import annotations_to_instances
from PIL import Image
from pycocotools import mask as mask_util

from balanced_det.data.annotations import read_annotations
from balanced_det.data.images import read_image, upright_size
from balanced_det.data.loader import NamingMapper
from balanced_det.data.registration import load_detections
from balanced_det.data.statistics import dataset_statistics
from balanced_det.errors import InputError
from balanced_det.evaluation import Matcher, evaluate_lvis
from balanced_det.evaluation.detections import read_detection_files


@dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Attributes:
        name: what ``--reader`` calls it.
        suffix: of the file's name.
        seeds: returns sound files as bytes.
        read: reads the file at a path, and uses what it read.
    """

    name: str
    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], None]


READERS: dict[str, Reader] = {}


def reader(name, suffix, seeds):
    """Register a function of a path as a reader."""

    def register(function):
        READERS[name] = Reader(name, suffix, seeds, function)
        return function

    return register


# --- The readers ----------------------------------------------------------------------------------


def lvis_content():
    """Sound annotations in LVIS format, with every kind of mask."""
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    mask[5:20, 10:30] = 1
    compressed = mask_util.encode(mask)
    compressed["counts"] = compressed["counts"].decode()
    masks = [
        [[10, 5, 30, 5, 30, 20, 10, 20]],
        [[10.5, 5, 30, 5, 30, 20.25], [1, 1, 4, 1, 4, 4]],
        compressed,
        {"size": [40, 60], "counts": [405, 15, 1980]},
    ]
    return {
        "info": {"description": "fuzz"},
        "categories": [
            {"id": 7, "name": "dog", "frequency": "r", "image_count": 3, "synonyms": ["dog"]},
            {"id": 2, "name": "cat", "frequency": "f", "image_count": 200},
            {"id": 90, "name": "owl", "frequency": "c", "image_count": 50},
        ],
        "images": [
            {
                "id": 20 + i,
                "file_name": f"{i}.jpg",
                "coco_url": f"http://host/val2017/{i}.jpg",
                "height": 40,
                "width": 60,
                "neg_category_ids": [2],
                "not_exhaustive_category_ids": [90],
            }
            for i in range(2)
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 20 + i % 2,
                "category_id": (7, 2, 90)[i % 3],
                "bbox": [10, 5, 20, 15],
                "area": 300.0,
                "iscrowd": 0,
                "segmentation": mask,
            }
            for i, mask in enumerate(masks)
        ],
    }


def coco_content():
    """The same as COCO has it, with a crowd and without masks."""
    content = lvis_content()
    for category in content["categories"]:
        del category["frequency"], category["image_count"]
    for image in content["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"], image["coco_url"]
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    content["annotations"][0]["iscrowd"] = 1
    return content


def annotation_seeds():
    return [json.dumps(content()).encode() for content in (lvis_content, coco_content)]


@reader("annotations", ".json", annotation_seeds)
def use_annotations(path):
    """Read as training does; then count, make training examples, and evaluate."""
    records = load_detections(path, None)
    truth = read_annotations(path)
    num_classes = len(truth.categories)
    dataset_statistics(records, num_classes)
    use_records(records)
    detections = [
        {
            "image_id": truth.images[truth.image[i]].id,
            "category_id": truth.categories[truth.category[i]].id,
            "score": 0.5,
            "bbox": truth.boxes[i].tolist(),
            "segmentation": rle(truth, i),
        }
        for i in np.flatnonzero(truth.finite())
    ]
    evaluate_lvis(path, detections, "bbox")
    if truth.first_without_mask() is None:
        evaluate_lvis(path, detections, "segm")


def rle(truth, index):
    """A mask that has the size of the object's image: the left half of it."""
    image = truth.images[truth.image[index]]
    half = image.height * (image.width // 2)
    rest = image.height * image.width - half
    return {"size": [image.height, image.width], "counts": [0, half, rest]}


def use_records(records):
    """Turn records into training examples, as Detectron2's mapper does."""
    for record in records:
        objects = [copy.deepcopy(a) for a in record["annotations"] if not a["iscrowd"]]
        size = record["height"], record["width"]
        if all("segmentation" in a for a in objects) and size[0] * size[1] < 10**6:
            annotations_to_instances(objects, size, mask_format="bitmask")
        else:
            for annotation in objects:
                annotation.pop("segmentation", None)
            annotations_to_instances(objects, size)


def detection_seeds():
    content = lvis_content()
    rows = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [float(side) for side in a["bbox"]],
            "score": 0.25 * i + 0.1,
            "segmentation": content["annotations"][2 + i % 2]["segmentation"],
        }
        for i, a in enumerate(content["annotations"][:3])
    ]
    as_we_write_it = "[\n" + ",\n".join(json.dumps(row, separators=",:") for row in rows) + "\n]"
    return [json.dumps(rows).encode(), as_we_write_it.encode()]


@reader("detections", ".json", detection_seeds)
def use_detections(path):
    """Read a detection file and evaluate it."""
    truth = read_annotations(lvis_content())
    for iou_type in ("bbox", "segm"):
        matcher = Matcher(truth, iou_type)
        matcher.update_all(read_detection_files([path], truth, iou_type))
        matcher.result()


# Of Pillow's modes, and of how they are written; what is deeper than 8 bits is refused.
PICTURES = [
    ("RGB", "JPEG", {"quality": 90}),
    ("RGB", "JPEG", {"progressive": True}),
    ("L", "JPEG", {}),
    ("CMYK", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("P", "PNG", {"transparency": 0}),
    ("LA", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("1", "PNG", {}),
    ("I;16", "PNG", {}),
    ("P", "GIF", {}),
    ("RGB", "WEBP", {}),
    ("RGB", "BMP", {}),
    ("F", "TIFF", {}),
    ("CMYK", "TIFF", {"compression": "tiff_lzw"}),
]
WIDTH, HEIGHT = 60, 40


@functools.cache
def image_seeds():
    """Sound images of every mode, some turned by their EXIF data."""
    pixels = np.random.RandomState(0).randint(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    seeds = []
    for number, (mode, kind, options) in enumerate(PICTURES):
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
        else:
            image = Image.fromarray(pixels).convert(mode)
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = number % 9, "camera"
        file = io.BytesIO()
        image.save(file, kind, exif=exif, **options)
        seeds.append(file.getvalue())
    return seeds


@functools.cache
def image_mapper():
    """Detectron2's, as training has it."""
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    return NamingMapper(DatasetMapper(cfg, True))


@reader("images", ".jpg", image_seeds)
def use_image(path):
    """Read a picture as converters do, as pages do, and as training does."""
    width, height = upright_size(path)
    assert read_image(path).shape == (height, width, 3)
    record = {
        "file_name": str(path),
        "width": width,
        "height": height,
        "annotations": [{"bbox": [0, 0, width, height], "bbox_mode": 1, "category_id": 0}],
    }
    sample = image_mapper()(record)
    assert sample["image"].shape[0] == 3 and sample["image"].dtype == torch.uint8


# --- Spoiling -------------------------------------------------------------------------------------


def deep(depth):
    """A list of lists of lists ..."""
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 1.5, 64.0, 7.0, -0.0),
    *(float("nan"), float("inf"), float("-inf"), 1e300, 1e-300, 10**9, -(10**9), 10**30, 2**63),
    *(
        "",
        "1",
        "7",
        "r",
        "x",
        "a\nb",
        "\x1b[31mred",
        "\ud800",
        "\u202egnp",
        "\x00",
        "🦉",
        "n" * 999,
    ),
    *([], {}, [[]], [[], []], [None], [1, 2, 3], [0, 0, 5, 5], [0] * 7, ["1", "2", "3", "4"]),
    *([[1, 1, 2, 2]], [[0, 0, 9, 0, 9, 9]], [0, 0, 9, 0, 9, 9], [[0, 0, 10**9, 0, 9, 9]]),
    *([[1, 1, 1, 1, 1, 1]], [[0, 0, 9, 0, float("nan"), 9]], [[0, 0, 9, 0, 9, 9], "x"]),
    {"size": [2, 2], "counts": "11O0"},
    {"size": [40, 60], "counts": [1, 2, 3]},
    {"size": [40, 60], "counts": [2**40, -(2**40), 2400]},
    {"size": [40, 60], "counts": "zzz"},
    {"size": [40, 60]},
    {"size": None, "counts": None},
)


def spoil_json(content, rng):
    """Change a few places of ``content``, in place; return it, or what replaces it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(content))
        if not places:
            return rng.choice(ODD_VALUES)
        owner, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1:
            other_owner, other_key = rng.choice(places)
            owner[key] = copy.deepcopy(other_owner[other_key])
        elif kind == 2 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif kind == 3 and rng.random() < 0.05:
            owner[key] = deep(rng.choice((50, 5_000)))
        else:
            owner[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def _places(content, depth=0):
    """Every (container, key) of a JSON value."""
    if depth > 50:
        return
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    else:
        return
    for key in keys:
        yield content, key
        yield from _places(content[key], depth + 1)


def spoil_bytes(raw, rng):
    """Cut, flip, repeat, or encode otherwise."""
    kind = rng.choice([kind for kind in range(6) if kind != 4 or is_text(raw)])
    raw = bytearray(raw)
    position = rng.randrange(len(raw))
    if kind == 0:
        return bytes(raw[:position])
    if kind == 1:
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 2:
        raw[position : position + rng.randrange(1, 20)] = b""
    elif kind == 3:
        raw[position:position] = raw[position : position + rng.randrange(1, 50)]
    elif kind == 4:
        return raw.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-le")))
    else:
        raw[position:position] = rng.choice((b"\x00", b"\xff", b"[" * 9_999, b"9" * 9_999))
    return bytes(raw)


def is_text(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


# Sides of an image: none, too few, long but honest, more than a memory holds.
SIDES = (0, 1, 2, 59, 61, 3_000, 65_535, 10**6, 10**9, 2**31 - 1)


def spoil_image(raw, rng):
    """Spoil bytes; or lie about the size, or about what EXIF data say, where these stand."""
    kind = rng.randrange(4)
    sides = rng.choice(SIDES), rng.choice(SIDES)
    if kind == 0 and raw.startswith(b"\x89PNG"):
        head = b"IHDR" + struct.pack(">II", *sides) + raw[24:29]
        return raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:]
    frame = re.search(b"\xff[\xc0\xc2]..\x08", raw, re.DOTALL)
    if kind == 0 and raw.startswith(b"\xff\xd8") and frame:
        end = frame.end()
        lie = struct.pack(">HH", *(side % 2**16 for side in sides))
        return raw[:end] + lie + raw[end + 4 :]
    start = raw.find(b"Exif")
    if kind == 1 and start >= 0:
        rubbish = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
        at = start + rng.randrange(40)
        return raw[:at] + rubbish + raw[at + len(rubbish) :]
    return spoil_bytes(raw, rng)


def spoiled(reader, rng):
    """A spoiled file of ``reader``, as bytes."""
    raw = rng.choice(reader.seeds())
    if reader.seeds is image_seeds:
        return spoil_image(raw, rng)
    if reader.suffix != ".json" or rng.random() < 0.2:
        return spoil_bytes(raw, rng)
    try:
        content = spoil_json(json.loads(raw), rng)
        text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    except RecursionError:  # deeper than Python copies or writes
        text = "[" * 50_000
    return text.encode("utf-8", "surrogatepass")


# --- Running --------------------------------------------------------------------------------------


def read(reader, path):
    """Read a file; whether it was accepted. Anything but a printable InputError is raised."""
    try:
        reader.read(path)
    except InputError as error:
        assert str(error).isprintable(), f"an unprintable message: {error!r}"
        assert str(error).endswith("."), f"no sentence: {error}"
        return False
    return True


def fuzz(readers, seconds, seed, folder):
    """Read spoiled files until the time is over; return the counts, or raise at the first fault."""
    counts = {name: [0, 0, 0.0] for name in readers}  # read, accepted, slowest
    end = time.monotonic() + seconds
    number = seed
    while time.monotonic() < end:
        rng = random.Random(number)
        name = rng.choice(sorted(readers))
        # Written first: after a crash of the process the file is there.
        path = Path(folder) / f"{name}-{seed}{readers[name].suffix}"
        path.write_bytes(spoiled(readers[name], rng))
        start = time.monotonic()
        try:
            accepted = read(readers[name], path)
        except BaseException:
            print(f"\nThe reader '{name}' failed at --seed {number} on {path}:", file=sys.stderr)
            raise
        counts[name][0] += 1
        counts[name][1] += accepted
        counts[name][2] = max(counts[name][2], time.monotonic() - start)
        path.unlink()
        number += 1
    return counts


def main(arguments=None):
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("seconds", type=float, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--reader", choices=sorted(READERS), help="one reader alone")
    options = parser.parse_args(arguments)
    faulthandler.enable()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = {options.reader: READERS[options.reader]} if options.reader else READERS
    folder = tempfile.mkdtemp(prefix="fuzz-")
    try:
        counts = fuzz(chosen, options.seconds, options.seed, folder)
    except BaseException:
        traceback.print_exc()
        return 1
    for name, (total, accepted, slowest) in counts.items():
        print(f"{name}: {total} files, {accepted} accepted, slowest {slowest:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
