"""Read LVIS v0.5, LVIS v1 and COCO-format data alike, and register it with Detectron2.

A person's own data needs a configuration key only::

    BALANCE:
      DATASETS: [["blood_train", "blood/train.json", "blood/images"]]
    DATASETS:
      TRAIN: ("blood_train",)

Detectron2's own LVIS and COCO names keep working, at Detectron2's paths; they are read by the same
reader, which tells what is wrong with a file in a sentence.
"""

import json
import logging
import math
import os
from functools import lru_cache

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO, _PREDEFINED_SPLITS_LVIS
from detectron2.structures import BoxMode

from ..errors import InputError
from .statistics import dataset_statistics

logger = logging.getLogger(__name__)

_BUILTIN_NAMES = frozenset(_PREDEFINED_SPLITS_COCO["coco"]).union(*_PREDEFINED_SPLITS_LVIS.values())
_registered = {}  # name -> (json_file, image_root), of all that this module registered


def register_datasets(cfg):
    """Register what ``BALANCE.DATASETS`` lists, and Detectron2's names that ``DATASETS`` uses.

    Call it once the configuration is merged; calling it again with the same entries is fine.

    Args:
        cfg: a Detectron2 configuration. ``BALANCE.DATASETS`` is a list of
            ``[name, json_file, image_root]``. Relative paths are relative to the folder named by
            the environment variable ``DETECTRON2_DATASETS``, ``datasets`` when unset. An empty
            ``image_root`` registers annotations without images, for statistics and evaluation.

    Raises:
        InputError: an entry has another form, a name is used twice with different paths, or
            ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names an unknown data set.
    """
    for entry in cfg.BALANCE.DATASETS:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 3
            and all(isinstance(part, str) for part in entry)
            and entry[0]
            and entry[1]
        ):
            raise InputError(
                "Each entry of BALANCE.DATASETS must be [name, json_file, image_root], three "
                f"texts, but one is {entry!r}."
            )
        name, json_file, image_root = entry
        _register(name, _resolve(json_file), _resolve(image_root) if image_root else None)

    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name in _BUILTIN_NAMES and name not in _registered:
                metadata = MetadataCatalog.get(name)
                _register(name, metadata.json_file, metadata.image_root)
            elif name not in DatasetCatalog:
                raise InputError(
                    f"DATASETS.{key} names '{name}', which is neither Detectron2's nor listed in "
                    "BALANCE.DATASETS."
                )


def load_detections(json_file, image_root, dataset_name=None):
    """Read a file in LVIS v0.5, LVIS v1 or COCO format.

    Category ids become contiguous, 0 ... K-1 in the order of the file's ids. Boxes without area or
    wholly outside their image are skipped, boxes reaching outside are clipped to it, as Detectron2
    clips them in training, and annotations whose polygons all have less than three corners are
    skipped, as Detectron2's reader skips them; the counts are logged as one warning. Pixels are not
    read.

    Args:
        json_file: path. ``annotations`` may be absent only in test sets, whose file names begin
            with ``image_info``, or contain ``_image_info_``, by convention of COCO and LVIS.
        image_root: folder that ``file_name``, or else the last two parts of ``coco_url``, is
            relative to; ``None`` when there are no images.
        dataset_name: when given, the classes and paths are put into Detectron2's metadata of that
            name. Classes are called by the file's ``name``; Detectron2's own data sets keep the
            names that Detectron2 gives.

    Returns:
        A list of dicts in Detectron2's standard format, sorted by image id. LVIS's
        ``neg_category_ids`` and ``not_exhaustive_category_ids`` are kept, as ids of the file.

    Raises:
        InputError: the file or an image is missing, or the file's content is unusable.
    """
    content = _read_json(json_file)
    categories = _by_id(content["categories"], "category", json_file)
    images = _by_id(content["images"], "image", json_file)
    contiguous_ids = {category_id: i for i, category_id in enumerate(sorted(categories))}
    if dataset_name is not None:
        _set_metadata(dataset_name, json_file, image_root, categories, contiguous_ids)

    file_names = _locate_images(images, image_root, json_file)
    records = {}
    for image_id in sorted(images):
        image = images[image_id]
        record = {
            "file_name": file_names[image_id],
            "height": _length(image, "height", json_file),
            "width": _length(image, "width", json_file),
            "image_id": image_id,
        }
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key in image:
                record[key] = image[key]
        record["annotations"] = []
        records[image_id] = record

    skipped = clipped = without_mask = 0
    for annotation in content["annotations"]:
        record, category = _references(annotation, records, contiguous_ids, json_file)
        box, was_clipped = _clip_box(annotation, record, json_file)
        if box is None:
            skipped += 1
            continue
        parsed = {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": category,
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if annotation.get("segmentation"):
            mask = _mask(annotation, json_file)
            if not mask:
                without_mask += 1
                continue
            parsed["segmentation"] = mask
        clipped += was_clipped
        record["annotations"].append(parsed)

    if skipped or clipped or without_mask:
        logger.warning(
            f"'{json_file}': {skipped} boxes without area or outside their image skipped, "
            f"{clipped} reaching outside clipped, {without_mask} annotations with less than three "
            f"polygon corners skipped, of {len(content['annotations'])}."
        )
    logger.info(f"Read {len(records)} images from '{json_file}'.")
    return list(records.values())


def training_statistics(cfg):
    """Count the classes of ``DATASETS.TRAIN``, as they are after Detectron2's filtering.

    Args:
        cfg: a configuration whose data sets are registered.

    Returns:
        :class:`~balanced_det.data.statistics.DatasetStatistics`; counted once in a process for the
        same data sets and filters.

    Raises:
        InputError: there is no training set, the data sets differ in their classes, or the filters
            leave no image.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    return _training_statistics(
        tuple(cfg.DATASETS.TRAIN), cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, keypoints
    )


def num_classes(cfg):
    """Return K, the number of classes of ``DATASETS.TRAIN``, or without one of ``DATASETS.TEST``.

    Raises:
        InputError: there is neither, or the data sets differ in their classes.
    """
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    if not names:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST are both empty.")
    return len(_common_classes(tuple(names)))


def check_num_classes(cfg, k, key, names=None):
    """Check that a configured number of classes is the data's.

    Args:
        cfg: a configuration whose data sets are registered.
        k: the configured number of classes.
        key: the configuration key that says so, for the message.
        names: data sets to check; by default ``DATASETS.TRAIN``, or without one ``DATASETS.TEST``.

    Raises:
        InputError: a data set has another number of classes.
    """
    for name in cfg.DATASETS.TRAIN or cfg.DATASETS.TEST if names is None else names:
        found = len(_class_names(name))
        if found != k:
            raise InputError(f"{key} is {k}, but data set '{name}' has {found} classes.")


# --- Registration ---------------------------------------------------------------------------------


def _resolve(path):
    """Detectron2's rule: relative paths are relative to the folder of all data sets."""
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, os.path.expanduser(path))


def _register(name, json_file, image_root):
    if name in _registered:
        if _registered[name] != (json_file, image_root):
            raise InputError(
                f"BALANCE.DATASETS gives '{name}' the paths {json_file!r} and {image_root!r}, but "
                f"it is registered already with {_registered[name][0]!r} and "
                f"{_registered[name][1]!r}."
            )
        return
    if name in DatasetCatalog and name not in _BUILTIN_NAMES:
        raise InputError(
            f"BALANCE.DATASETS lists '{name}', but a data set of this name is registered already."
        )
    _set_paths(name, json_file, image_root)
    DatasetCatalog.pop(name, None)
    DatasetCatalog.register(name, lambda: load_detections(json_file, image_root, name))
    _registered[name] = json_file, image_root


def _set_paths(name, json_file, image_root):
    metadata = MetadataCatalog.get(name)
    paths = {
        "json_file": os.fspath(json_file),
        "image_root": None if image_root is None else os.fspath(image_root),
    }
    for key, path in paths.items():
        if metadata.get(key, path) != path:
            raise InputError(
                f"Data set '{name}' is known with the {key} {metadata.get(key)!r}, not {path!r}."
            )
    # LVIS's evaluation serves any data; Detectron2's COCO names keep COCO's.
    metadata.set(**paths, evaluator_type=metadata.get("evaluator_type", "lvis"))


def _set_metadata(name, json_file, image_root, categories, contiguous_ids):
    metadata = MetadataCatalog.get(name)
    classes = [_field(categories[i], "name", "category", json_file) for i in contiguous_ids]
    known = metadata.get("thing_classes", classes)
    # Detectron2 calls LVIS's classes by their first synonym, so only the numbers can be compared.
    same = len(known) == len(classes) if name in _BUILTIN_NAMES else known == classes
    if not same or metadata.get("thing_dataset_id_to_contiguous_id", contiguous_ids) != (
        contiguous_ids
    ):
        raise InputError(
            f"'{json_file}' lists {len(classes)} categories other than the {len(known)} that data "
            f"set '{name}' is known to have."
        )
    metadata.set(thing_classes=known, thing_dataset_id_to_contiguous_id=contiguous_ids)
    _set_paths(name, json_file, image_root)
    # Detectron2's federated loss samples classes by it.
    if metadata.get("class_image_count") is None and all(
        "image_count" in category for category in categories.values()
    ):
        metadata.class_image_count = [
            {"id": i, "image_count": categories[i]["image_count"]} for i in contiguous_ids
        ]


def _class_names(name):
    """The class names of a registered data set, which is read when they are not yet known."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    if metadata.get("thing_classes") is None:
        raise InputError(f"Data set '{name}' has no 'thing_classes' in its metadata.")
    return metadata.thing_classes


def _common_classes(names):
    classes = _class_names(names[0])
    for name in names[1:]:
        if _class_names(name) != classes:
            raise InputError(f"Data sets '{names[0]}' and '{name}' differ in their classes.")
    return classes


@lru_cache(maxsize=8)
def _training_statistics(names, filter_empty, min_keypoints):
    if not names:
        raise InputError("DATASETS.TRAIN is empty: there is nothing to count classes in.")
    try:
        # Without the consistency check it does not print the table of classes, which the loader
        # of the training images will print.
        dataset_dicts = get_detection_dataset_dicts(
            list(names), filter_empty, min_keypoints, check_consistency=False
        )
    except AssertionError as error:
        if "No valid data" not in str(error):
            raise
        raise InputError(
            f"No image of DATASETS.TRAIN ({', '.join(names)}) holds an annotation to train on."
        ) from None
    return dataset_statistics(dataset_dicts, len(_common_classes(names)))


# --- Reading --------------------------------------------------------------------------------------


def _read_json(json_file):
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise InputError(f"The annotation file '{json_file}' does not exist.") from None
    except OSError as error:
        raise InputError(
            f"The annotation file '{json_file}' cannot be read: {error.strerror}."
        ) from None
    except ValueError as error:  # broken JSON and broken UTF-8
        raise InputError(
            f"The annotation file '{json_file}' is no valid JSON, perhaps cut off: {error}."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"The annotation file '{json_file}' does not hold a JSON object.")
    base = os.path.basename(json_file)
    if base.startswith("image_info") or "_image_info_" in base:
        content.setdefault("annotations", [])
    for key in ("categories", "images", "annotations"):
        if not isinstance(content.get(key), list):
            raise InputError(f"The annotation file '{json_file}' has no list '{key}'.")
        if not content[key] and key != "annotations":
            raise InputError(f"The annotation file '{json_file}' has an empty list '{key}'.")
    return content


def _field(entry, key, kind, json_file):
    try:
        return entry[key]
    except (KeyError, TypeError):
        raise InputError(f"'{json_file}': the {kind} {_shortened(entry)} has no '{key}'.") from None


def _length(image, key, json_file):
    length = _field(image, key, "image", json_file)
    if not (isinstance(length, int | float) and length > 0):
        raise InputError(
            f"'{json_file}': the '{key}' of image {image['id']} is {length!r}, not a number above "
            "0."
        )
    return length


def _shortened(entry, length=80):
    text = repr(entry)
    return text if len(text) <= length else text[:length] + " ..."


def _by_id(entries, kind, json_file):
    by_id = {}
    for entry in entries:
        entry_id = _field(entry, "id", kind, json_file)
        if entry_id in by_id:
            raise InputError(f"'{json_file}' lists {kind} id {entry_id} twice.")
        by_id[entry_id] = entry
    return by_id


def _references(annotation, records, contiguous_ids, json_file):
    """The record of an annotation's image, and its contiguous category id."""
    image_id = _field(annotation, "image_id", "annotation", json_file)
    category_id = _field(annotation, "category_id", "annotation", json_file)
    if category_id not in contiguous_ids:
        raise InputError(
            f"'{json_file}': annotation {annotation.get('id')} uses category id {category_id}, "
            "which 'categories' does not list."
        )
    if image_id not in records:
        raise InputError(
            f"'{json_file}': annotation {annotation.get('id')} uses image id {image_id}, which "
            "'images' does not list."
        )
    return records[image_id], contiguous_ids[category_id]


def _clip_box(annotation, record, json_file):
    """Return ``(box, was_clipped)``: XYWH in pixels, or None when nothing is left of the box."""
    box = _field(annotation, "bbox", "annotation", json_file)
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        raise InputError(
            f"'{json_file}': the 'bbox' of annotation {annotation.get('id')} is not four numbers "
            f"but {_shortened(box)}."
        ) from None
    if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
        return None, False
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, record["width"]), min(y + height, record["height"])
    if x1 >= x2 or y1 >= y2:
        return None, False
    if (x1, y1, x2, y2) == (x, y, x + width, y + height):
        return [x, y, width, height], False
    return [x1, y1, x2 - x1, y2 - y1], True


def _mask(annotation, json_file):
    """Polygons or a compressed RLE, as Detectron2 takes them; empty when no polygon is valid."""
    segmentation = annotation["segmentation"]
    try:
        if isinstance(segmentation, dict):
            if isinstance(segmentation["counts"], list):  # uncompressed
                return mask_util.frPyObjects(segmentation, *segmentation["size"])
            return segmentation
        if not isinstance(segmentation[0], list):  # one polygon, not a list of them
            segmentation = [segmentation]
        return [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"'{json_file}': the 'segmentation' of annotation {annotation.get('id')} is neither "
            f"polygons nor RLE but {_shortened(segmentation)}."
        ) from None


def _locate_images(images, image_root, json_file):
    """Return the path of every image by its id; each folder is listed once.

    LVIS v0.5 gives a ``file_name`` of COCO 2014, though the images are those of COCO 2017; the path
    in its ``coco_url`` is right. LVIS v1 gives ``coco_url`` alone. So the first that exists counts.
    """
    listings = {}

    def exists(path):
        folder, name = os.path.split(path)
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(folder))
            except OSError:
                listings[folder] = frozenset()
        return name in listings[folder]

    file_names, missing = {}, []
    for image_id, image in images.items():
        names = []
        if image.get("file_name"):
            names.append(image["file_name"])
        if image.get("coco_url"):
            names.append("/".join(image["coco_url"].split("/")[-2:]))
        if not names:
            raise InputError(
                f"'{json_file}': image {image_id} has neither 'file_name' nor 'coco_url'."
            )
        if image_root is None:
            file_names[image_id] = names[0]
            continue
        paths = [os.path.join(image_root, name) for name in names]
        found = next(filter(exists, paths), None)
        if found is None:
            missing.append(paths[0])
        file_names[image_id] = found
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(images)} images of '{json_file}' are missing, the first "
            f"is '{missing[0]}'."
        )
    return file_names
