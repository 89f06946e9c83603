"""Convert Pascal VOC or YOLO annotations to LVIS-format json files.

::

    python datasets/convert.py voc --root VOCdevkit/VOC2007 --out datasets/voc
    python datasets/convert.py yolo --root my_data/data.yaml --out datasets/mine

Images stay where they are. Each split becomes ``OUT/SPLIT.json``, and the lines for a config file
are printed. Both formats are few and simple enough for the standard library, which spares a person
the video and science libraries that converters of many formats bring.
"""

import argparse
import json
import math
import os
import stat
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml

# The script runs in a bare clone, too, where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from balanced_det.data.images import is_turned, upright_size
from balanced_det.data.shapes import polygon_area
from balanced_det.data.statistics import add_counts
from balanced_det.errors import InputError, printable

VOC_SPLITS = ("train", "val", "trainval", "test")  # other files there list images of one class
YOLO_SPLITS = ("train", "val", "test")
# More than any list, label or annotation of one image has.
MAX_TEXT_BYTES = 64 * 2**20
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_voc(root, splits=None):
    """Read a Pascal VOC folder: ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.

    Boxes are 1-based, their last pixel included: xmin = 1 and xmax = W span the image, so the
    corners in coordinates are (xmin - 1, ymin - 1) and (xmax, ymax), as in Detectron2. Objects
    marked ``difficult`` are kept, as there.

    Args:
        root: the folder.
        splits: names of files in ``ImageSets/Main``; by default the usual ones that exist. A folder
            without ``ImageSets`` has one split, ``all``.

    Returns:
        ``(classes, images, image_root)``: the sorted names of all classes in ``Annotations``, for
        each split a list of images, and the folder of the images. An image is a dict of
        ``file_name``, ``width``, ``height`` and ``objects``, a list of
        ``(class name, XYXY box in pixels, (n, 2) polygon in pixels or None)``.
    """
    root = Path(root)
    annotation_files = sorted((root / "Annotations").glob("*.xml"))
    if not annotation_files:
        raise InputError(f"'{root / 'Annotations'}' holds no Pascal VOC annotation (*.xml).")
    image_root = root / "JPEGImages"
    if not image_root.is_dir():
        raise InputError(f"The image folder '{image_root}' does not exist.")
    file_names = {
        p.stem: p.name for p in image_root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
    }
    by_stem = {p.stem: _read_voc_file(p, image_root, file_names) for p in annotation_files}

    lists = root / "ImageSets" / "Main"
    if not lists.is_dir() and not splits:
        stems_of = {"all": list(by_stem)}
    else:
        wanted = splits or [s for s in VOC_SPLITS if (lists / f"{s}.txt").exists()]
        if not wanted:
            raise InputError(f"'{lists}' has none of {', '.join(VOC_SPLITS)} as a .txt file.")
        # Lines may go on with a flag, of which only the name counts here.
        stems_of = {s: [line.split()[0] for line in _lines(lists / f"{s}.txt")] for s in wanted}
    for split, stems in stems_of.items():
        for stem in stems:
            if stem not in by_stem:
                raise InputError(f"Split '{split}' lists '{stem}', which has no annotation file.")
    classes = sorted({o[0] for image in by_stem.values() for o in image["objects"]})
    images = {split: [by_stem[stem] for stem in stems] for split, stems in stems_of.items()}
    return classes, images, image_root


def _read_voc_file(path, image_root, file_names):
    if path.stem not in file_names:
        raise InputError(f"The image of '{path}' is missing in '{image_root}'.")
    text = _text(path)
    try:
        root = ElementTree.fromstring(text)
        size = [float(root.findtext(f"size/{key}") or 0) for key in ("width", "height")]
        objects = []
        for element in root.iter("object"):
            x1, y1, x2, y2 = (
                float(element.find(f"bndbox/{key}").text)
                for key in ("xmin", "ymin", "xmax", "ymax")
            )
            objects.append((element.find("name").text.strip(), (x1 - 1, y1 - 1, x2, y2), None))
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is no sound Pascal VOC annotation: {error}.") from None
    if not all(map(math.isfinite, (*size, *(x for o in objects for x in o[1])))):
        raise InputError(f"'{path}' holds a number that is not finite.")
    for name, *_ in objects:
        _check_name(name, path)
    file_name = file_names[path.stem]
    image_file = image_root / file_name
    width, height = upright_size(image_file)
    if all(size) and (width, height) != tuple(size):
        raise InputError(_wrong_size(path, image_file, size, (width, height)))
    return {"file_name": file_name, "width": width, "height": height, "objects": objects}


def _wrong_size(path, image_file, told, size):
    turned = " as its EXIF data turn it" if is_turned(image_file) else ""
    return (
        f"'{path}' tells of an image of {told[0]:g} x {told[1]:g} pixels, but '{image_file}' has "
        f"{size[0]} x {size[1]}{turned}: were its boxes drawn on another picture?"
    )


def read_yolo(root, splits=None):
    """Read a YOLO data set: a ``data.yaml`` and a label file for every image that has objects.

    Rows are ``class cx cy w h``, or ``class x1 y1 x2 y2 x3 y3 ...`` for a polygon, as shares of the
    image size. ``.../images/.../a.jpg`` has its rows in ``.../labels/.../a.txt``.

    Args:
        root: the yaml file, or the folder of ``data.yaml``.
        splits: keys of the yaml file; by default the usual ones that exist.

    Returns:
        As :func:`read_voc`; the classes in the order of the yaml file.
    """
    path = Path(root)
    path = path / "data.yaml" if path.is_dir() else path
    settings = _yolo_settings(path)
    names = _yolo_names(settings["names"], path)
    folder = path.parent / _yolo_text(settings.get("path") or "", "path", path)
    if not folder.is_dir():
        folder = path.parent

    files = {}
    for split in splits or [s for s in YOLO_SPLITS if settings.get(s)]:
        sources = settings.get(split)
        if not sources:
            raise InputError(f"'{path}' has no split '{split}'.")
        sources = sources if isinstance(sources, list) else [sources]
        files[split] = [
            image
            for source in sources
            for image in _yolo_images(folder, _yolo_text(source, split, path), path)
        ]
    if not files:
        raise InputError(f"'{path}' has none of {', '.join(YOLO_SPLITS)}.")
    # A list of images may name some outside the folder; file names never leave the image root.
    image_root = _common_folder(folder, [image for images in files.values() for image in images])
    images = {
        split: [_read_yolo_image(image, image_root, names) for image in files_of_split]
        for split, files_of_split in files.items()
    }
    return names, images, image_root


def _common_folder(folder, files):
    folder = Path(os.path.abspath(folder))
    return Path(os.path.commonpath([folder, *(os.path.abspath(file.parent) for file in files)]))


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML whose size is what it looks like: without aliases, and without keys twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases ('*name') are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 or not isinstance(key, str | int | float | bool | None):
                raise yaml.YAMLError(f"the key {key!r} stands twice or is no text or number")
        return super().construct_mapping(node, deep)


def _yolo_settings(path):
    text = _text(path)
    try:
        settings = yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"'{path}' is no readable YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, dict) or settings.get("names") is None:
        raise InputError(f"'{path}' is no readable YOLO data file with 'names'.")
    return settings


def _yolo_names(names, path):
    """Return the class names in the order of their indices, 0 ... K-1.

    A list is taken in its order. Keys of a mapping may be numbers or quoted numbers, but must be
    all of 0 ... K-1: with a gap, labels would mean other classes than they say.
    """
    if isinstance(names, dict):
        by_index = {}
        for key, name in names.items():
            index = key
            if isinstance(key, str) and key.strip().isascii() and key.strip().isdigit():
                index = int(key)
            if isinstance(index, bool) or not isinstance(index, int):
                raise InputError(f"'{path}': the key {key!r} of 'names' is no class number.")
            if index in by_index:
                raise InputError(f"'{path}': 'names' has class number {index} twice.")
            by_index[index] = name
        missing = sorted(set(range(len(by_index))) - by_index.keys())
        if missing:
            raise InputError(
                f"'{path}': 'names' has {len(by_index)} classes, but not number {missing[0]}: "
                "their numbers must be 0, 1, 2 and so on, without a gap."
            )
        names = [by_index[index] for index in range(len(by_index))]
    if not isinstance(names, list) or not names:
        raise InputError(f"'{path}': 'names' must be a list or a mapping, not {_short(names)}.")
    for index, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(
                f"'{path}': YAML reads the name of class {index} as {_short(name)}, not as a text: "
                "quote it."
            )
    names = [str(name).strip() for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"'{path}': 'names' has '{twice[0]}' twice.")
    for name in names:
        _check_name(name, path)
    return names


def _yolo_text(value, key, path):
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"'{path}': '{key}' must be a path, not {_short(value)}.")
    return value


def _yolo_images(folder, source, yaml_file):
    place = folder / source
    if not os.path.exists(place):
        # Some exports write '../train/images' for a folder beside the yaml file.
        place = folder / source.removeprefix("../")
    if place.is_dir():
        return sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if place.suffix == ".txt" and place.exists():
        # Lines begin at the folder of the list or of the data set, whichever has the image.
        starts = (folder, place.parent)
        return [
            next((start / line for start in starts if os.path.exists(start / line)), folder / line)
            for line in _lines(place)
        ]
    raise InputError(f"'{yaml_file}' names '{source}', which does not exist.")


def _read_yolo_image(image_file, folder, names):
    size = width, height = upright_size(image_file)
    parts = list(image_file.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    label_file = Path(*parts).with_suffix(".txt")
    objects = []
    for number, line in enumerate(_lines(label_file) if label_file.exists() else (), 1):
        where = f"'{label_file}', line {number}"
        try:
            index, *numbers = map(float, line.split())
        except ValueError:
            raise InputError(f"{where}: '{line}' is not a row of numbers.") from None
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{where}: '{line}' holds a number that is not finite.")
        if not (index.is_integer() and 0 <= index < len(names)):
            raise InputError(f"{where}: class {index:g} is not one of the {len(names)} names.")
        if len(numbers) == 4:
            cx, cy, w, h = numbers
            polygon = None
            corners = np.array([[cx - w / 2, cy - h / 2], [cx + w / 2, cy + h / 2]]) * size
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            corners = polygon = np.clip(np.reshape(numbers, (-1, 2)), 0, 1) * size
        else:
            raise InputError(f"{where}: {len(numbers) + 1} numbers are neither box nor polygon.")
        box = (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())
        objects.append((names[int(index)], box, polygon))
    return {
        "file_name": Path(os.path.relpath(image_file, folder)).as_posix(),
        "width": width,
        "height": height,
        "objects": objects,
    }


def to_lvis(classes, images):
    """Turn what a reader returned into the content of LVIS-format files.

    Every object of every class is taken to be annotated: each image lists all its absent classes as
    negative. The class counts, in every file, are those of the split ``train``, or else of
    ``trainval``, or else of all splits.

    Args:
        classes: K class names; category ids are 1 ... K in their order.
        images: for each split a list of images, see :func:`read_voc`.

    Returns:
        ``(content, skipped)``: for each split the json object, and how many boxes without area or
        outside their image were left out.
    """
    categories = [
        {"id": i, "name": name, "synset": name, "synonyms": [name], "def": name}
        for i, name in enumerate(classes, 1)
    ]
    id_of = {category["name"]: category["id"] for category in categories}
    content, skipped = {}, {}
    for split, images_of_split in images.items():
        entries, annotations = [], []
        skipped[split] = 0
        for image_id, image in enumerate(images_of_split, 1):
            size = np.array([image["width"], image["height"]])
            present = set()
            for name, box, polygon in image["objects"]:
                low, high = np.clip(np.reshape(box, (2, 2)), 0, size)
                if not (high > low).all():
                    skipped[split] += 1
                    continue
                present.add(id_of[name])
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": id_of[name],
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "iscrowd": 0,
                }
                if polygon is not None:
                    annotation["area"] = polygon_area(polygon)
                    annotation["segmentation"] = [polygon.ravel().tolist()]
                annotations.append(annotation)
            entries.append(
                {
                    "id": image_id,
                    "file_name": image["file_name"],
                    "width": image["width"],
                    "height": image["height"],
                    "neg_category_ids": sorted(set(id_of.values()) - present),
                    "not_exhaustive_category_ids": [],
                }
            )
        content[split] = {"images": entries, "annotations": annotations}

    training = [s for s in ("train", "trainval") if s in content][:1] or list(content)
    # Image ids start anew in every split, so the split is part of what tells images apart.
    counted = add_counts(
        categories,
        [
            {**a, "image_id": (split, a["image_id"])}
            for split in training
            for a in content[split]["annotations"]
        ],
    )
    for part in content.values():
        part["categories"] = counted
    return content, skipped


def convert(reader, root, out, splits=None, overwrite=False):
    """Convert a data set and write ``out/<split>.json``, all or none of them.

    Args:
        reader: :func:`read_voc` or :func:`read_yolo`.
        root, splits: its arguments.
        out: folder of the json files; created.
        overwrite: replace files that exist.

    Returns:
        ``(files, content, skipped, image_root)``: paths by split, and the rest as
        :func:`to_lvis` and the reader return it.

    Raises:
        InputError: something of the data set is missing or unreadable, or a file exists.
    """
    classes, images, image_root = reader(root, splits)
    content, skipped = to_lvis(classes, images)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {split: out / f"{split}.json" for split in content}
    for path in files.values():
        if path.exists() and not overwrite:
            raise InputError(f"'{path}' exists: choose another --out, or add --overwrite.")
    for split, path in files.items():
        path.with_suffix(".json.partial").write_text(json.dumps(content[split]))
    for path in files.values():
        os.replace(path.with_suffix(".json.partial"), path)
    return files, content, skipped, image_root


def _check_name(name, path):
    if not name or printable(name) != name:
        raise InputError(
            f"'{path}': the class name {name!r} is empty or holds a control character."
        )


def _short(value, length=60):
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]} ..."


def _text(path):
    """Return the text of a regular file of at most ``MAX_TEXT_BYTES`` in UTF-8."""
    try:
        status = os.stat(path)
        text = _content(path) if stat.S_ISREG(status.st_mode) else None
    except OSError:
        raise InputError(f"'{path}' does not exist or cannot be read.") from None
    except ValueError:  # broken UTF-8, or a path that cannot be
        raise InputError(f"'{path}' is no text in UTF-8.") from None
    if text is None:
        raise InputError(f"'{path}' is no file, or has more than {MAX_TEXT_BYTES} bytes.")
    return text


def _content(path):
    """Return the text of a file, None where it is too long."""
    with open(path, "rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    return content.decode("utf-8-sig") if len(content) <= MAX_TEXT_BYTES else None


def _lines(path):
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def main(arguments=None):
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(description="Convert annotations to LVIS-format json.")
    parser.add_argument("format", choices=["voc", "yolo"], help="format of the data set")
    parser.add_argument("--root", required=True, type=Path, help="its folder, or YOLO's yaml file")
    parser.add_argument("--out", required=True, type=Path, help="folder for the json files")
    parser.add_argument("--split", nargs="+", help="splits to convert; all usual ones by default")
    parser.add_argument("--name", help="what the data set is to be called; by default as --out")
    parser.add_argument("--overwrite", action="store_true", help="replace json files in --out")
    options = parser.parse_args(arguments)
    reader = {"voc": read_voc, "yolo": read_yolo}[options.format]
    try:
        files, content, skipped, image_root = convert(
            reader, options.root, options.out, options.split, options.overwrite
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    for split, path in files.items():
        names = {c["id"]: c["name"] for c in content[split]["categories"]}
        objects = np.bincount(
            [a["category_id"] for a in content[split]["annotations"]], minlength=len(names) + 1
        )
        counts = ", ".join(f"{printable(name)} {objects[i]}" for i, name in names.items())
        print(
            f"{path}: {len(content[split]['images'])} images, {objects.sum()} objects ({counts}); "
            f"{skipped[split]} boxes without area or outside their image left out"
        )
    print("\nFor a config file:\n\nBALANCE:\n  DATASETS:")
    name = options.name or options.out.resolve().name
    for split, path in files.items():
        entry = [f"{name}_{split}", str(path.resolve()), str(image_root.resolve())]
        print(f"    - {json.dumps(entry, ensure_ascii=False)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
