"""The one reader of annotation files, and its rules: LVIS v0.5, LVIS v1 and COCO format.

The check before a run, training, statistics and evaluation all read annotations here, so what one
accepts all accept, and what is refused is refused before anything is trained, in a sentence that
names the file and the entry. The rules:

* Ids are integers; ``3.0`` is one, text and true are not. No id of a kind stands twice; an object
  may have none. Category ids may have gaps: class c of K is the c-th in the order of ids.
* ``height`` and ``width`` are whole numbers of pixels, 64.0 is one. A reader that needs them says
  so where they are absent.
* ``bbox`` is x, y, width, height. A box of NaN or infinite numbers is no object anywhere. A box
  without area, or outside its image, is an object to find, as the `lvis` package has it, but none
  to train on.
* ``area`` may be absent or null: the box's, or the mask's where masks are compared. ``iscrowd``
  and ``ignore`` are 0 or 1: neither is trained on, and what matches them in evaluation is ignored.
* ``segmentation`` is absent, null or empty: no mask; a polygon or a list of polygons, of which
  those with an odd number of values or less than three corners are left out; or run lengths,
  compressed or not, whose size is the image's and whose runs add up to it.
* ``frequency`` of a category is "r", "c" or "f", or absent. Names are made printable.
* Unknown keys are left alone.
"""

import gc
import json
import math
import operator
import os
import stat
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError, printable
from . import columns
from .run_lengths import check_run_lengths

GROUPS = ("r", "c", "f")  # rare, common, frequent in the training set

# The largest side of an image, which is JPEG's too. All pixels of an image then have numbers of 32
# bits, as masks in run lengths need.
MAX_SIDE = 65_535

_MAX_ID = 2**63 - 1  # what numpy and the writers of detections hold


@dataclass(frozen=True, slots=True)
class Category:
    """A class.

    Attributes:
        id: as in the file.
        name: printable; the id as text where the file gives none.
        frequency: "r", "c" or "f", None where the file gives none.
        image_count: training images that hold the class, as LVIS gives them, or None.
    """

    id: int
    name: str
    frequency: str | None = None
    image_count: int | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An image.

    Attributes:
        id: as in the file.
        height, width: pixels, None where the file gives none.
        file_name, coco_url: None where the file gives none.
        neg_category_ids: ids of classes known to be absent; None (COCO) stands for all classes
            that are not annotated in the image.
        not_exhaustive_category_ids: ids of classes of which not all objects are annotated; None
            where the file does not say.
    """

    id: int
    height: int | None = None
    width: int | None = None
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list | None = None
    not_exhaustive_category_ids: list | None = None


@dataclass(frozen=True, eq=False)
class Annotations:
    """A checked annotation file: K classes, images, and n objects in columns.

    Attributes:
        source: what messages call it, ``'path'`` or "The annotation dictionary".
        categories: K :class:`Category` by ascending id; class c is ``categories[c]``.
        images: :class:`Image` by ascending id.
        image: (n,) int64, each object's index in ``images``.
        category: (n,) int64, each object's class, 0 ... K-1.
        boxes: (n, 4) float64, x, y, width, height in pixels as written, NaN and infinity too.
        area: (n,) float64, square pixels; NaN where the file gives none.
        crowd, ignore: (n,) bool.
        segmentation: n entries: None without a mask, a list of polygons (empty where none has
            three corners), or a dictionary of run lengths.
        ids: n ids, None where the file gives none.
    """

    source: str
    categories: list[Category]
    images: list[Image]
    image: np.ndarray = field(repr=False)
    category: np.ndarray = field(repr=False)
    boxes: np.ndarray = field(repr=False)
    area: np.ndarray = field(repr=False)
    crowd: np.ndarray = field(repr=False)
    ignore: np.ndarray = field(repr=False)
    segmentation: list = field(repr=False)
    ids: list = field(repr=False)

    def __len__(self) -> int:
        """n, the number of objects, crowds included."""
        return len(self.ids)

    def named(self, index: int) -> str:
        """Return what messages call object ``index``."""
        return _named("annotation", self.ids[index], index)

    def finite(self) -> np.ndarray:
        """(n,) bool: the box is four finite numbers; others are no objects."""
        return np.isfinite(self.boxes).all(axis=1)

    def first_without_mask(self) -> int | None:
        """Return the index of the first object that has no mask, None where all have one."""
        return next((i for i, mask in enumerate(self.segmentation) if mask is None), None)

    def has_some_masks(self) -> bool:
        """Whether at least one object has a mask."""
        return any(mask is not None for mask in self.segmentation)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """While millions of values are made and kept, do not look through all of them for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@without_garbage_collection()
def read_annotations(annotations: str | os.PathLike | Mapping) -> Annotations:
    """Read and check annotations; see the module for the rules.

    Args:
        annotations: a path, or the dictionary itself, which is not changed. ``annotations`` may be
            absent only in test sets, whose file names begin with ``image_info``, or contain
            ``_image_info_``, by convention of COCO and LVIS.

    Raises:
        InputError: the file cannot be read, or breaks a rule.
    """
    if isinstance(annotations, Mapping):
        source, content, may_lack_objects = "The annotation dictionary", annotations, False
    else:
        path = os.fspath(annotations)
        source, content = f"'{path}'", read_json(path, "annotation file")
        base = os.path.basename(path)
        may_lack_objects = base.startswith("image_info") or "_image_info_" in base
    entries = {
        key: _list(content, key, source, may_lack_objects)
        for key in ("categories", "images", "annotations")
    }
    categories = _categories(entries["categories"], source)
    images = _images(entries["images"], source)
    found = _objects(entries["annotations"], categories, images, source)
    return Annotations(source, list(categories.values()), list(images.values()), **found)


def read_json(path: str, kind: str) -> dict:
    """Return the JSON object of a file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        kind: what messages call it, as in "annotation file".

    Raises:
        InputError: it is no regular file, or cannot be read, or is no JSON object.
    """
    named = f"The {kind} '{path}'"
    raw = read_bytes(path, kind)
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{named} is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{named} is no valid JSON: byte {error.start} is not UTF-8, as JSON must be."
        ) from None
    except ValueError as error:
        raise InputError(f"{named} is no valid JSON, perhaps cut off: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{named} does not hold a JSON object.")
    return content


def read_bytes(path: str, kind: str) -> bytes:
    """Return what a regular file holds; anything else is an :class:`InputError` (no pipe waits)."""
    named = f"The {kind} '{path}'"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{named} cannot be read: it is no regular file.")
        with open(path, "rb") as file:
            return file.read()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{named} does not exist.") from None
    except OSError as error:
        raise InputError(f"{named} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a path with a NUL or a lone surrogate
        raise InputError(f"{named} cannot be read: {error}.") from None


# --- Values ---------------------------------------------------------------------------------------


def integer(value: Any) -> int | None:
    """Return ``value`` where it is an integer, 3.0 included; None for anything else.

    Numbers of numpy are fine; true is none, nor is what needs more than 64 bits.
    """
    if value.__class__ is int:
        pass
    elif isinstance(value, (bool, np.bool_)):
        return None
    elif isinstance(value, (float, np.floating)):
        if not math.isfinite(value) or value != int(value):
            return None
        value = int(value)
    else:
        try:
            value = operator.index(value)
        except TypeError:
            return None
    return value if -_MAX_ID <= value <= _MAX_ID else None


def number(value: Any) -> float | None:
    """Return ``value`` as a float where it is a number, NaN too; None for text, true and others."""
    if value.__class__ is float:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        return None
    try:
        return float(value)
    except (TypeError, OverflowError):  # complex numbers, integers beyond all floats
        return None


_FLOAT = {float}


def box(value: Any) -> list[float] | None:
    """Return four numbers as floats, NaN and infinity among them; None for anything else."""
    if value.__class__ is list and len(value) == 4 and _FLOAT.issuperset(map(type, value)):
        return value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    numbers = [n for entry in value if (n := number(entry)) is not None]
    return numbers if len(numbers) == 4 else None


def shortened(value: Any, length: int = 80) -> str:
    """Return a text of ``value`` for a message, however long or deeply nested it is."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= length else f"{text[:length]} ..."


# --- Lists of the file ----------------------------------------------------------------------------


def _list(content, key, source, may_lack_objects):
    entries = content.get(key, [] if may_lack_objects and key == "annotations" else None)
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"{source} has no list '{key}'.")
    if not entries and key != "annotations":
        raise InputError(f"{source} has an empty list '{key}'.")
    return entries


def _by_id(entries, kind, source) -> Iterator[tuple[int, Mapping]]:
    """Yield id and entry by ascending id."""
    by_id = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or "id" not in entry:
            raise InputError(f"{source}: the {kind} {shortened(entry)} has no 'id'.")
        entry_id = integer(entry["id"])
        if entry_id is None:
            raise InputError(f"{source}: the {kind} id {shortened(entry['id'])} is not an integer.")
        if entry_id in by_id:
            raise InputError(f"{source} lists {kind} id {entry_id} twice.")
        by_id[entry_id] = entry
    return ((entry_id, by_id[entry_id]) for entry_id in sorted(by_id))


def _categories(entries, source) -> dict[int, Category]:
    return {
        category_id: Category(
            category_id,
            printable(_text(entry, "name", f"category {category_id}", source) or str(category_id)),
            _frequency(entry, category_id, source),
            _image_count(entry, category_id, source),
        )
        for category_id, entry in _by_id(entries, "category", source)
    }


def _frequency(entry, category_id, source):
    frequency = entry.get("frequency")
    if frequency is None or (isinstance(frequency, str) and frequency in GROUPS):
        return frequency
    raise InputError(
        f"{source}: category {category_id} has frequency {shortened(frequency)}; known are: "
        f"{', '.join(GROUPS)}."
    )


def _image_count(entry, category_id, source):
    given = entry.get("image_count")
    count = None if given is None else integer(given)
    if given is not None and (count is None or count < 0):
        raise InputError(
            f"{source}: the 'image_count' of category {category_id} is {shortened(given)}, not a "
            "number of images."
        )
    return count


def _images(entries, source) -> dict[int, Image]:
    images = {}
    for image_id, entry in _by_id(entries, "image", source):
        name = f"image {image_id}"
        images[image_id] = Image(
            image_id,
            _side(entry, "height", name, source),
            _side(entry, "width", name, source),
            _text(entry, "file_name", name, source),
            _text(entry, "coco_url", name, source),
            _class_ids(entry, "neg_category_ids", name, source),
            _class_ids(entry, "not_exhaustive_category_ids", name, source),
        )
    return images


def _text(entry, key, name, source):
    text = entry.get(key)
    if text is None or isinstance(text, str):
        return text
    raise InputError(f"{source}: the '{key}' of {name} is {shortened(text)}, not a text.")


def _side(entry, key, name, source):
    if key not in entry:
        return None
    given = entry[key]
    value = number(given)
    if value is None or not value > 0 or math.isinf(value):
        reason = "not a number above 0"
    elif value != int(value):
        reason = "not a whole number of pixels"
    elif value > MAX_SIDE:
        reason = f"more than {MAX_SIDE} pixels"
    else:
        return int(value)
    raise InputError(f"{source}: the '{key}' of {name} is {shortened(given)}, {reason}.")


def _class_ids(entry, key, name, source):
    if key not in entry:
        return None
    given = entry[key]
    ids = [integer(i) for i in given] if isinstance(given, (list, tuple)) else [None]
    if None in ids:
        raise InputError(
            f"{source}: the '{key}' of {name} are {shortened(given)}, not a list of category ids."
        )
    return ids


# --- Objects --------------------------------------------------------------------------------------


def _objects(entries, categories, images, source) -> dict:
    """The columns of :class:`Annotations`."""
    found = _plain_objects(entries, categories, images, source)
    if found is None:
        found = _checked_objects(entries, categories, images, source)
    _check_unique(found["ids"], source)
    return found


def _plain_objects(entries, categories, images, source):
    """What :func:`_checked_objects` returns for plain integers and floats; else None.

    A column at a time: LVIS has 1.3 million objects.
    """
    image_index, class_index = columns.index(images), columns.index(categories)
    sizes = [(image.height, image.width) for image in images.values()]
    found, segmentation = [], []
    try:
        for part in columns.parts(entries):
            ids, category, image, boxes = (
                columns.field(part, key) for key in ("id", "category_id", "image_id", "bbox")
            )
            crowd, ignore = (
                columns.flags([entry.get(key, 0) for entry in part])
                for key in ("iscrowd", "ignore")
            )
            category = columns.positions(category, class_index)
            image = columns.positions(image, image_index)
            boxes, area = columns.boxes(boxes), _plain_areas(part)
            found.append((columns.integers(ids), category, image, boxes, area, crowd, ignore))
            for entry, index in zip(part, image.tolist(), strict=True):
                mask = entry.get("segmentation")
                if mask is not None:
                    mask = _mask(mask, sizes[index], entry, None, source)
                segmentation.append(mask)
    except columns.NOT_PLAIN:  # a mask that is refused among them
        return None
    ids, category, image, boxes, area, crowd, ignore = columns.joined(found)
    return {
        "image": image,
        "category": category,
        "boxes": boxes,
        "area": area,
        "crowd": crowd,
        "ignore": ignore,
        "segmentation": segmentation,
        "ids": ids.tolist(),
    }


def _plain_areas(entries):
    given = [entry.get("area") for entry in entries]
    if all(area is None for area in given):
        return np.full(len(given), math.nan)
    area = columns.numbers(given)
    if not ((area >= 0) & (area < math.inf)).all():
        raise ValueError
    return area


def _checked_objects(entries, categories, images, source) -> dict:
    """Check one object after the other, and name the first that is wrong."""
    image_index, class_index = columns.index(images), columns.index(categories)
    sizes = [(image.height, image.width) for image in images.values()]
    image, category, area, crowd, ignore, segmentation, ids = ([] for _ in range(7))
    boxes = array("d")
    for position, entry in enumerate(entries):
        if entry.__class__ is not dict and not isinstance(entry, Mapping):
            raise InputError(f"{source}: annotation {shortened(entry)} is no JSON object.")
        ids.append(_own_id(entry, position, source))
        category.append(_reference(entry, "category", class_index, "categories", position, source))
        image.append(_reference(entry, "image", image_index, "images", position, source))
        boxes.extend(_own_box(entry, position, source))
        area.append(_own_area(entry, position, source))
        crowd.append(_flag(entry, "iscrowd", position, source))
        ignore.append(_flag(entry, "ignore", position, source))
        mask = entry.get("segmentation")
        if mask is not None:
            mask = _mask(mask, sizes[image[-1]], entry, position, source)
        segmentation.append(mask)
    return {
        "image": np.array(image, dtype=np.int64),
        "category": np.array(category, dtype=np.int64),
        "boxes": np.array(boxes).reshape(-1, 4),
        "area": np.array(area, dtype=np.float64),
        "crowd": np.array(crowd, dtype=bool),
        "ignore": np.array(ignore, dtype=bool),
        "segmentation": segmentation,
        "ids": ids,
    }


def _named(kind, entry_id, position):
    return f"{kind} {entry_id}" if entry_id is not None else f"{kind} at position {position}"


def _name(entry, position):
    return _named("annotation", integer(entry.get("id")), position)


def _own_id(entry, position, source):
    given = entry.get("id")
    if given.__class__ is int and -_MAX_ID <= given <= _MAX_ID:
        return given
    if given is None:
        return None
    own = integer(given)
    if own is None:
        raise InputError(
            f"{source}: the 'id' of the annotation at position {position} is {shortened(given)}, "
            "not an integer."
        )
    return own


def _check_unique(ids, source):
    given = [own for own in ids if own is not None]
    if len(set(given)) == len(given):
        return
    seen = set()
    twice = next(own for own in given if own in seen or seen.add(own))
    raise InputError(f"{source} lists annotation id {twice} twice.")


def _field(entry, key, source):
    if key not in entry:
        raise InputError(f"{source}: the annotation {shortened(entry)} has no '{key}'.")
    return entry[key]


def _reference(entry, kind, index_by_id, key, position, source):
    """The index of the image or category that an annotation refers to."""
    given = _field(entry, f"{kind}_id", source)
    index = index_by_id.get(integer(given))  # no id is None
    if index is None:
        raise InputError(
            f"{source}: {_name(entry, position)} uses {kind} id {shortened(given)}, which '{key}' "
            "does not list."
        )
    return index


def _own_box(entry, position, source):
    given = _field(entry, "bbox", source)
    numbers = box(given)
    if numbers is None:
        raise InputError(
            f"{source}: the 'bbox' of {_name(entry, position)} is not four numbers but "
            f"{shortened(given)}."
        )
    return numbers


def _own_area(entry, position, source):
    given = entry.get("area")
    if given is None:
        return math.nan
    area = number(given)
    if area is None or not 0 <= area < math.inf:
        raise InputError(
            f"{source}: the 'area' of {_name(entry, position)} is {shortened(given)}, not a number "
            "of pixels."
        )
    return area


def _flag(entry, key, position, source):
    flag = entry.get(key, 0)
    # As text first: comparing an array with 0 gives no truth value.
    if flag.__class__ is int or isinstance(flag, (bool, float, np.bool_, np.number)):
        if flag == 0:
            return False
        if flag == 1:
            return True
    elif flag is None:
        return False
    raise InputError(
        f"{source}: the '{key}' of {_name(entry, position)} is {shortened(flag)}, neither 0 nor 1."
    )


def _mask(given, size, entry, position, source):
    """Return polygons of three corners and more, run lengths, or None where there is no mask."""
    try:
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, Mapping):
            return _run_lengths(given, *size) if given else None
        if isinstance(given, (list, tuple)):
            return _polygons(given) if given else None
        raise ValueError("it is neither a list nor an object")
    except ValueError as error:
        raise InputError(
            f"{source}: the 'segmentation' of {_name(entry, position)} is neither polygons nor RLE "
            f"but {shortened(given)}: {error}."
        ) from None


def _run_lengths(rle, height, width):
    if height is None or width is None:
        # The image gives no size. Its own must at least be one.
        height, width = _own_size(rle)
    check_run_lengths(rle, height, width)
    return rle


def _own_size(rle):
    size = rle.get("size")
    sides = [integer(side) for side in size] if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or any(side is None or not 0 < side <= MAX_SIDE for side in sides):
        raise ValueError("its size is no height and width")
    return sides


_PLAIN = {int, float}


def _polygons(given):
    if not isinstance(given[0], (list, tuple, np.ndarray)):
        given = [given]  # one polygon, not a list of them
    kept = []
    for polygon in given:
        if not (isinstance(polygon, list) and _PLAIN.issuperset(map(type, polygon))):
            polygon = _numbers(polygon)
        if len(polygon) % 2 or len(polygon) < 6:
            continue
        # Far corners would let a rasterizer walk along the edge for ever. Only a sum sees each NaN.
        if not (
            min(polygon) >= -MAX_SIDE and max(polygon) <= MAX_SIDE and math.isfinite(sum(polygon))
        ):
            raise ValueError(f"a corner is not within {MAX_SIDE} pixels")
        kept.append(polygon)
    return kept


def _numbers(polygon):
    """A polygon as floats where it is none of plain numbers, one of numpy for example."""
    if not isinstance(polygon, (list, tuple, np.ndarray)):
        raise ValueError("a polygon is no list of numbers")
    numbers = [number(value) for value in polygon]
    if None in numbers:
        raise ValueError("a polygon holds something that is no number")
    return numbers
