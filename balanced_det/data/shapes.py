"""A generated long-tailed data set in LVIS v1 format: drawn shapes, boxes and polygons.

It costs nothing to get, trains in minutes and has what makes LVIS hard: a few classes in most
images and a tail of classes in hardly any. A class is a shape, a colour and, from the 145th class
on, a pattern in a second colour, so that classes share parts and the rare ones are easily taken
for the frequent ones they resemble. Command line::

    python -m balanced_det.data.shapes --out datasets/shapes --classes 20 --train 600 --val 150

The training set follows Zipf's law: the class of rank r is in about c / r^s images, with c and s
such that rare (<= 10 images), common (11-100) and frequent (> 100) classes all exist, whatever the
seed, given 150 images or more, 3 classes or more and 5 images a class. The validation set holds
every class equally often. All of it is a function of the arguments.
"""

import argparse
import colorsys
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..errors import InputError
from .statistics import COMMON_MAX_IMAGES, add_counts

SPLITS = ("train", "val")
MANIFEST = "shapes.json"
MANIFEST_VERSION = 1  # raise it with any change that changes the generated files

# The class plan.
CLASSES_PER_IMAGE = 2.0  # mean number of distinct classes in an image
MAX_OBJECTS = 4  # in an image
MAX_IMAGE_SHARE = 0.8  # of the training images, that hold the most frequent class
RAREST_IMAGES = 8  # training images of the rarest class: few, yet enough to learn something from
LISTED_NEGATIVES = 20  # absent classes that an image lists at most; LVIS, too, lists only some

# The pictures; lengths are shares of the image side.
OBJECT_SIZE = (0.16, 0.48)  # the longer side of an object's box, before it is turned
MAX_OVERLAP = 0.1  # of two objects' boxes: intersection over the smaller one's area
MAX_TURN = 12.0  # degrees; less than makes a square a diamond
NOISE = 8.0  # standard deviation of the pixel noise, in grey levels of 255
SUPERSAMPLING = 4  # per side, for smooth edges
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class ShapesPaths:
    """Where a generated data set lies: two LVIS v1 json files and the folder of their images."""

    train_json: Path
    val_json: Path
    image_root: Path


def generate(out, classes=20, train=600, val=150, size=128, seed=0, overwrite=False):
    """Generate a data set in the folder ``out``, or keep the equal one that is there.

    Nothing half-written is left behind: the folder appears under its name once it is complete.

    Args:
        out: folder; created.
        classes: number of classes K, up to :data:`MAX_CLASSES`.
        train, val: number of images; K classes need at least K / 2 and K / 4.
        size: side of the square images, pixels.
        seed: of all random choices, >= 0.
        overwrite: replace a generated data set with other parameters in ``out``.

    Returns:
        :class:`ShapesPaths`.

    Raises:
        InputError: an argument is out of range, or ``out`` holds something else.
    """
    out = Path(out)
    _check_at_least("--classes", classes, 1)
    _check_at_least("--train", train, max(1, -int(-classes // CLASSES_PER_IMAGE)))
    _check_at_least("--val", val, max(1, -(-classes // MAX_OBJECTS)))
    _check_at_least("--size", size, 32)
    _check_at_least("--seed", seed, 0)
    if classes > MAX_CLASSES:
        raise InputError(f"--classes is {classes}, but at most {MAX_CLASSES} can be told apart.")

    parameters = {
        "version": MANIFEST_VERSION,
        "classes": classes,
        "train": train,
        "val": val,
        "size": size,
        "seed": seed,
    }
    paths = ShapesPaths(out / "train.json", out / "val.json", out / "images")
    if not _already_there(out, parameters, overwrite):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            complete = Path(scratch) / "complete"
            _write(complete, parameters)
            if overwrite and out.exists():
                shutil.rmtree(out)
            os.replace(complete, out)
    return paths


def class_image_counts(classes: int, train: int) -> np.ndarray:
    """Plan the training images of every class, most frequent first, by Zipf's law.

    The count of rank r is ``top / r**s``. ``top`` is as large as ``MAX_IMAGE_SHARE`` and the total
    of ``CLASSES_PER_IMAGE * train`` allow, s takes the last rank to ``RAREST_IMAGES``, or to fewer
    where the images do not suffice for so many and a frequent class.

    Args:
        classes: K.
        train: number of training images, at least K / ``CLASSES_PER_IMAGE``.

    Returns:
        (K,) ints, falling, from 1 to ``MAX_IMAGE_SHARE * train``.
    """
    budget = CLASSES_PER_IMAGE * train
    rank = np.arange(1, classes + 1)

    def counts(top: float, rarest: int) -> np.ndarray:
        exponent = np.log(top / rarest) / np.log(max(classes, 2))
        return np.maximum(np.rint(top / rank**exponent), 1).astype(int)

    largest = max(int(MAX_IMAGE_SHARE * train), 1)
    # Twice the bound, so that more than one class or two are frequent.
    wanted = min(largest, 2.0 * COMMON_MAX_IMAGES)
    for rarest in range(min(RAREST_IMAGES, largest), 0, -1):
        # With an exponent up to 3 the second rank has at least 1/8 of the first one's images, so
        # that no step leaps over the common classes, which span a factor of 9.
        steepest = rarest * float(classes) ** 3
        top = min(largest, steepest)
        while top >= rarest and counts(top, rarest).sum() > budget:
            top *= 0.99
        if top >= min(wanted, steepest):
            break
    return counts(max(top, rarest), rarest)


def assign_classes(
    image_counts: Sequence[int] | np.ndarray,
    num_images: int,
    spread: float,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Choose the images of every class, as many as planned.

    Args:
        image_counts: (K,) ints, the planned number of images of every class; those of the fifth
            largest must not exceed half the images, so that the fullest can be avoided.
        num_images: number of images.
        spread: how much images may differ in their number of classes; up to 1 they are as equal as
            can be, above it some may stay without a class.
        rng: numpy's Generator.

    Returns:
        A list of ``num_images`` lists of class indices, at most ``MAX_OBJECTS`` each, no class
        twice.
    """
    load = np.zeros(num_images, dtype=int)
    classes_of: list[list[int]] = [[] for _ in range(num_images)]
    for c in np.argsort(-np.asarray(image_counts), kind="stable"):
        order = np.where(load < MAX_OBJECTS, load + spread * rng.random(num_images), np.inf)
        chosen = np.argsort(order, kind="stable")[: image_counts[c]]
        load[chosen] += 1
        for i in chosen:
            classes_of[i].append(int(c))
    return classes_of


# --- The classes' looks ---------------------------------------------------------------------------


def _regular(corners, inner=None):
    """A regular polygon, or with ``inner`` a star whose notches lie at that radius."""
    steps = corners * (1 if inner is None else 2)
    angle = 2 * np.pi * np.arange(steps) / steps - np.pi / 2
    radius = np.ones(steps)
    if inner is not None:
        radius[1::2] = inner
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart():
    t = 2 * np.pi * np.arange(32) / 32
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _crescent():
    outer = np.pi * (0.25 + 1.5 * np.arange(25) / 24)  # three quarters of a circle
    tip_x, tip_y = np.cos(np.pi / 4), np.sin(np.pi / 4)
    centre, radius = 0.5, np.hypot(tip_x - 0.5, tip_y)  # of the inner circle, through both tips
    start = np.arctan2(tip_y, tip_x - centre)
    inner = np.linspace(2 * np.pi - start, start, 19)[1:-1]
    return np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], axis=1),
        ]
    )


def _points(*corners):
    return np.array(corners, dtype=float)


def _fit(points):
    """Scale and move (n, 2) points so that their box is centred at 0 with a longer side of 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()


_SHAPES = {
    name: _fit(points)
    for name, points in {
        "circle": _regular(32),
        "triangle": _regular(3),
        "square": _points((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "star": _regular(5, inner=0.4),
        "cross": _points(
            *((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)),
            *((1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)),
        ),
        "heart": _heart(),
        "ellipse": _regular(32) * (1, 0.5),
        "diamond": _points((0, -5), (3, 0), (0, 5), (-3, 0)),
        "arrow": _points((-4, -1), (0, -1), (0, -3), (4, 0), (0, 3), (0, 1), (-4, 1)),
        "crescent": _crescent(),
        "hexagon": _regular(6),
        "tee": _points((-3, -3), (3, -3), (3, -1), (1, -1), (1, 3), (-1, 3), (-1, -1), (-3, -1)),
    }.items()
}

# Hue, saturation and value. Any two differ by more than the jitter, in hue or in another of them.
_COLOURS = {
    "red": (0.00, 0.90, 0.90),
    "orange": (0.08, 0.95, 0.95),
    "yellow": (0.16, 0.90, 0.95),
    "lime": (0.24, 0.90, 0.90),
    "green": (0.34, 0.90, 0.60),
    "turquoise": (0.47, 0.80, 0.80),
    "cyan": (0.53, 0.60, 1.00),
    "blue": (0.62, 0.90, 0.90),
    "violet": (0.74, 0.80, 0.80),
    "magenta": (0.84, 0.85, 0.95),
    "pink": (0.92, 0.45, 1.00),
    "brown": (0.06, 0.75, 0.45),
}

# Where a pattern shows its second colour; u and v are pixel coordinates in units of the period.
_PATTERNS = {
    "bars": lambda u, v: u % 1 < 0.5,
    "rows": lambda u, v: v % 1 < 0.5,
    "slopes": lambda u, v: (u + v) % 1 < 0.5,
    "checks": lambda u, v: (u % 1 < 0.5) ^ (v % 1 < 0.5),
    "dots": lambda u, v: (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1,
    "mesh": lambda u, v: (u % 1 < 0.25) | (v % 1 < 0.25),
    "rings": lambda u, v: np.hypot(u, v) % 1 < 0.5,
}
_PATTERN_PERIODS = 3.0  # in an object's longer side

# A pattern in its own shape's colour would not show.
MAX_CLASSES = len(_SHAPES) * len(_COLOURS) * (1 + len(_PATTERNS) * (len(_COLOURS) - 1))


@dataclasses.dataclass(frozen=True)
class Look:
    """How the objects of a class look: names of a shape, a colour and perhaps a pattern."""

    shape: str
    colour: str
    pattern: str | None = None
    second_colour: str | None = None

    @property
    def name(self) -> str:
        """The class name, for instance ``red_star`` or ``red_star_with_blue_dots``."""
        plain = f"{self.colour}_{self.shape}"
        return f"{plain}_with_{self.second_colour}_{self.pattern}" if self.pattern else plain


@cache
def class_look(index: int) -> Look:
    """Return the :class:`Look` of class ``index``, 0 <= index < ``MAX_CLASSES``; all differ."""
    shapes, colours, patterns = list(_SHAPES), list(_COLOURS), list(_PATTERNS)
    rest, shape = divmod(index, len(shapes))
    # Shifting the colour by the shape spreads the colours over the first classes. Each pair of
    # shape and colour still comes once in every `shapes * colours` classes.
    colour = (rest + shape) % len(colours)
    texture = rest // len(colours)
    if texture == 0:
        return Look(shapes[shape], colours[colour])
    shift, pattern = divmod(texture - 1, len(patterns))
    second = colours[(colour + 1 + (shift * 5 + 5) % (len(colours) - 1)) % len(colours)]
    return Look(shapes[shape], colours[colour], patterns[pattern], second)


# --- One image ------------------------------------------------------------------------------------


def draw_image(
    classes: Sequence[int], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw an image with an object of each of ``classes``, and perhaps more of the same classes.

    Args:
        classes: class indices, at most ``MAX_OBJECTS``, the objects drawn first to last.
        size: side, pixels.
        rng: numpy's Generator.

    Returns:
        ``(image, objects)``: (size, size, 3) uint8 RGB and a list of ``(class, polygon)``, where
        polygon is an (n, 2) array of x, y in pixels, inside the image.
    """
    image = _background(size, rng)
    objects: list[tuple[int, np.ndarray]] = []
    boxes: list[tuple] = []
    room = MAX_OBJECTS - len(classes)
    repeated: Iterable[int] = (
        rng.choice(classes, rng.integers(0, min(room, 2) + 1)) if classes else []
    )
    for c in chain(classes, repeated):
        polygon = _place(_SHAPES[class_look(int(c)).shape], boxes, size, rng)
        boxes.append(_box(polygon))
        _paint(image, polygon, class_look(int(c)), rng)
        objects.append((int(c), polygon))
    # Noise comes last: it lies over the objects and the background alike.
    image += rng.normal(0.0, NOISE, image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), objects


def _background(size, rng):
    """A (size, size, 3) float32 image of soft, hardly coloured clouds."""
    clouds = rng.uniform(60, 200) + rng.normal(0, 20, (5, 5, 1)) + rng.normal(0, 6, (5, 5, 3))
    clouds = Image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8))
    return np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _place(shape, boxes, size, rng):
    """Scale, turn and move a shape to where it is clear of ``boxes``; an (n, 2) polygon.

    A crowded image may have no room for a large object: it shrinks from attempt to attempt, and
    after the last one the least overlap will do, so that a planned object is always there.
    """
    low, high = OBJECT_SIZE
    length = rng.uniform(low, high)
    best = None
    for _ in range(60):
        angle = np.deg2rad(rng.uniform(-MAX_TURN, MAX_TURN))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        polygon = length * size * (shape @ turn.T)
        x1, y1, x2, y2 = _box(polygon)
        polygon = polygon + (rng.uniform(-x1, size - x2), rng.uniform(-y1, size - y2))
        # json holds hundredths of a pixel; what is drawn is what is written.
        polygon = np.clip(np.round(polygon, 2), 0, size)
        overlap = max((_overlap(_box(polygon), box) for box in boxes), default=0.0)
        if best is None or overlap < best[0]:
            best = overlap, polygon
        if overlap <= MAX_OVERLAP:
            break
        length = max(low, 0.95 * length)
    return best[1]


def _paint(image, polygon, look, rng):
    """Paint an object into ``image``, in place, with smooth edges."""
    x1, y1 = np.floor(polygon.min(axis=0)).astype(int)
    x2, y2 = np.ceil(polygon.max(axis=0)).astype(int)
    mask = Image.new("L", ((x2 - x1) * SUPERSAMPLING, (y2 - y1) * SUPERSAMPLING))
    corners = (polygon - (x1, y1)) * SUPERSAMPLING - 0.5  # PIL's pixel centres are whole numbers
    ImageDraw.Draw(mask).polygon([tuple(p) for p in corners], fill=255)
    alpha = np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32)[..., None] / 255  # (h, w, 1)

    paint = _jittered(look.colour, rng)  # (3,)
    if look.pattern:
        period = (polygon.max(axis=0) - polygon.min(axis=0)).max() / _PATTERN_PERIODS
        centre = (polygon.max(axis=0) + polygon.min(axis=0)) / 2
        u = (np.arange(x1, x2)[None, :] + 0.5 - centre[0]) / period
        v = (np.arange(y1, y2)[:, None] + 0.5 - centre[1]) / period
        second = np.broadcast_to(_PATTERNS[look.pattern](u, v), alpha.shape[:2])[..., None]
        paint = np.where(second, _jittered(look.second_colour, rng), paint)  # (h, w, 3)
    region = image[y1:y2, x1:x2]
    region += alpha * (paint - region)


def _jittered(colour, rng):
    """The colour (3,) in RGB of 255, slightly off as under another light."""
    hue, saturation, value = _COLOURS[colour]
    rgb = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-0.015, 0.015)) % 1,
        saturation * rng.uniform(0.9, 1.0),
        value * rng.uniform(0.85, 1.0),
    )
    return np.array(rgb, dtype=np.float32) * 255


def _box(polygon):
    return (*polygon.min(axis=0), *polygon.max(axis=0))


def _overlap(a, b):
    """Intersection of two XYXY boxes over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


# --- The data set ---------------------------------------------------------------------------------


def _plan(parameters):
    """Return, for each split, the classes of every image."""
    classes, train, val = (parameters[key] for key in ("classes", "train", "val"))
    rng = np.random.default_rng((parameters["seed"], len(SPLITS)))
    by_rank = rng.permutation(classes)  # so that a class's look tells nothing of its frequency
    counts = np.empty(classes, dtype=int)
    counts[by_rank] = class_image_counts(classes, train)
    train_plan = assign_classes(counts, train, spread=2.0, rng=rng)
    for classes_of_image in train_plan:
        if not classes_of_image:  # filled up with the most frequent class
            classes_of_image.append(int(by_rank[0]))
    each = max(1, round(CLASSES_PER_IMAGE * val / classes))
    val_plan = assign_classes(np.full(classes, min(each, val)), val, spread=1.0, rng=rng)
    return {"train": train_plan, "val": val_plan}


def _write(folder, parameters):
    """Write the whole data set into the new folder ``folder``."""
    categories = [_category(index) for index in range(parameters["classes"])]
    plan = _plan(parameters)
    contents = {}
    with tqdm(total=sum(map(len, plan.values())), unit="image", desc="Drawing") as progress:
        for split_index, split in enumerate(SPLITS):
            (folder / "images" / split).mkdir(parents=True)
            images, annotations = [], []
            for index, classes in enumerate(plan[split]):
                rng = np.random.default_rng((parameters["seed"], split_index, index))
                pixels, objects = draw_image(classes, parameters["size"], rng)
                name = f"{split}/{index + 1:06d}.jpg"
                Image.fromarray(pixels).save(folder / "images" / name, quality=JPEG_QUALITY)
                images.append(_image_entry(index + 1, name, classes, parameters, rng))
                for c, polygon in objects:
                    annotations.append(
                        _annotation_entry(len(annotations) + 1, index + 1, c, polygon)
                    )
                progress.update()
            contents[split] = {"images": images, "annotations": annotations}

    # As in LVIS, both files give the counts of the training set.
    categories = add_counts(categories, contents["train"]["annotations"])
    for split in SPLITS:
        content = {"info": parameters, **contents[split], "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    (folder / MANIFEST).write_text(json.dumps(parameters))


def _category(index):
    name = class_look(index).name
    return {
        "id": index + 1,
        "name": name,
        "synset": f"{name}.n.01",
        "synonyms": [name],
        "def": f"a drawn {name.replace('_', ' ')}",
    }


def _image_entry(image_id, name, classes, parameters, rng):
    absent = np.setdiff1d(np.arange(parameters["classes"]), classes)
    listed = rng.choice(absent, min(LISTED_NEGATIVES, len(absent)), replace=False)
    return {
        "id": image_id,
        "file_name": name,
        # LVIS v1 has no file_name: readers take the last two parts of this address.
        "coco_url": f"http://localhost/{name}",
        "height": parameters["size"],
        "width": parameters["size"],
        "neg_category_ids": sorted((listed + 1).tolist()),
        "not_exhaustive_category_ids": [],  # every drawn object is annotated
    }


def polygon_area(polygon: np.ndarray) -> float:
    """Area of an (n, 2) polygon that does not cross itself, by the shoelace formula."""
    x, y = polygon.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def _annotation_entry(annotation_id, image_id, c, polygon):
    x1, y1, x2, y2 = _box(polygon)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": c + 1,
        "bbox": [round(float(length), 2) for length in (x1, y1, x2 - x1, y2 - y1)],
        "area": round(polygon_area(polygon), 2),
        "segmentation": [polygon.ravel().tolist()],
        "iscrowd": 0,
    }


def _check_at_least(option, value, least):
    if value < least:
        raise InputError(f"{option} is {value}, but must be at least {least} here.")


def _already_there(out, parameters, overwrite):
    """Whether ``out`` is this data set; an InputError where it must not be written either."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"'{out}' exists and is no generated data set: choose another --out."
        ) from None
    if found == parameters:
        return True
    if overwrite:
        return False
    raise InputError(
        f"'{out}' holds a data set generated with other parameters: choose another --out, or add "
        "--overwrite to replace it."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.data.shapes",
        description="Generate a long-tailed data set of drawn shapes in LVIS v1 format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--classes", type=int, default=20, help="number of classes")
    parser.add_argument("--train", type=int, default=600, help="number of training images")
    parser.add_argument("--val", type=int, default=150, help="number of validation images")
    parser.add_argument("--size", type=int, default=128, help="side of the images, pixels")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a generated data set in --out"
    )
    options = parser.parse_args(arguments)
    try:
        paths = generate(**vars(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{paths.train_json}, {paths.val_json} and the images in {paths.image_root} are there.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
