"""Read LVIS v0.5, LVIS v1 and COCO-format data alike, and register it with Detectron2.

A person's own data needs a configuration key only::

    BALANCE:
      DATASETS: [["blood_train", "blood/train.json", "blood/images"]]
    DATASETS:
      TRAIN: ("blood_train",)

Detectron2's own LVIS and COCO names keep working, at Detectron2's paths; they are read by the same
reader, which tells what is wrong with a file in a sentence.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO, _PREDEFINED_SPLITS_LVIS
from detectron2.structures import BoxMode

from ..errors import InputError, printable
from .annotations import read_annotations
from .statistics import DatasetStatistics, dataset_statistics

logger = logging.getLogger(__name__)

_BUILTIN_NAMES = frozenset(_PREDEFINED_SPLITS_COCO["coco"]).union(*_PREDEFINED_SPLITS_LVIS.values())
# By name of the data set: whether its file names may leave its image root; json_file and image_root
# of all that this module registered; and what it has read.
_images_anywhere: dict[str, bool] = {}
_registered: dict[str, tuple[str, str]] = {}
_read: dict[str, "_Read"] = {}


@dataclass(frozen=True)
class _Read:
    """What is known of a data set beside Detectron2's metadata, once it is read.

    Attributes:
        classes: names as in the file, by contiguous id; Detectron2's own data sets have others.
        trained_without_mask: the name of the first object to train on that has no mask, or None.
        odd_one_without_mask: the name of the first object of all that has none where others have
            one, or None.
    """

    classes: tuple = ()
    trained_without_mask: str | None = None
    odd_one_without_mask: str | None = None


def register_datasets(cfg: CfgNode) -> None:
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
        _images_anywhere[name] = cfg.BALANCE.get("IMAGES_ANYWHERE", False)
        _register(name, _resolve(json_file), _resolve(image_root) if image_root else None)

    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name in _BUILTIN_NAMES and name not in _registered:
                metadata = MetadataCatalog.get(name)
                _images_anywhere[name] = cfg.BALANCE.get("IMAGES_ANYWHERE", False)
                _register(name, metadata.json_file, metadata.image_root)
            elif name not in DatasetCatalog:
                raise InputError(
                    f"DATASETS.{key} names '{name}', which is neither Detectron2's nor listed in "
                    "BALANCE.DATASETS."
                )


def load_detections(
    json_file: str, image_root: str, dataset_name: str | None = None, images_anywhere: bool = False
) -> list[dict]:
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
        images_anywhere: file names may leave ``image_root``.

    Returns:
        A list of dicts in Detectron2's standard format, sorted by image id. LVIS's
        ``neg_category_ids`` and ``not_exhaustive_category_ids`` are kept, as ids of the file.

    Raises:
        InputError: the file or an image is missing, or the file's content is unusable.
    """
    data = read_annotations(json_file)
    contiguous_ids = {category.id: i for i, category in enumerate(data.categories)}
    if dataset_name is not None:
        _set_metadata(dataset_name, json_file, image_root, data.categories, contiguous_ids)

    file_names = _locate_images(data.images, image_root, json_file, images_anywhere)
    records = [_record(image, file_names[image.id], json_file) for image in data.images]
    sizes = np.array([(record["width"], record["height"]) for record in records])  # (images, 2)
    boxes, usable, clipped = _clip_boxes(data.boxes, sizes[data.image])
    if dataset_name is not None:
        _read[dataset_name] = _Read(
            tuple(category.name for category in data.categories),
            _first_without_mask(data, usable & ~data.crowd & ~data.ignore),
            _first_without_mask(data, np.full(len(data), data.has_some_masks())),
        )
    columns = (data.image, data.category, boxes, data.crowd | data.ignore, clipped)
    rows = zip(*(column.tolist() for column in columns), data.segmentation)
    clipped_objects = without_corners = 0
    for image, category, box, left_out, was_clipped, mask in compress(rows, usable):
        parsed = {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": category,
            "iscrowd": int(left_out),  # Detectron2 does not train on it
        }
        if mask is not None:
            if not mask:
                without_corners += 1
                continue
            parsed["segmentation"] = _as_detectron2_takes_it(mask)
        clipped_objects += was_clipped
        records[image]["annotations"].append(parsed)

    skipped = len(data) - int(usable.sum())
    if skipped or clipped_objects or without_corners:
        logger.warning(
            f"'{printable(os.fspath(json_file))}': {skipped} boxes without area or outside their "
            f"image skipped, {clipped_objects} reaching outside clipped, {without_corners} "
            f"annotations with less than three polygon corners skipped, of {len(data)}."
        )
    logger.info(f"Read {len(records)} images from '{printable(os.fspath(json_file))}'.")
    return records


def training_statistics(cfg: CfgNode) -> DatasetStatistics:
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


def num_classes(cfg: CfgNode) -> int:
    """Return K, the number of classes of ``DATASETS.TRAIN``, or without one of ``DATASETS.TEST``.

    Raises:
        InputError: there is neither, or the data sets differ in their classes.
    """
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    if not names:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST are both empty.")
    return len(_common_classes(tuple(names)))


def check_num_classes(cfg: CfgNode, k: int, key: str, names: Sequence[str] | None = None) -> None:
    """Check that a configured number of classes is the data's.

    Args:
        cfg: a configuration whose data sets are registered.
        k: the configured number of classes.
        key: the configuration key that says so, for the message.
        names: data sets to check; by default ``DATASETS.TRAIN``, or without one ``DATASETS.TEST``.

    Raises:
        InputError: a data set has another number of classes, or classes other than the training
            set's, see :func:`check_same_classes`; a training set that cannot be read, as an
            evaluation may have none, is not compared.
    """
    for name in cfg.DATASETS.TRAIN or cfg.DATASETS.TEST if names is None else names:
        found = len(_class_names(name))
        if found != k:
            raise InputError(f"{key} is {k}, but data set '{name}' has {found} classes.")
        for trained in filter(_can_be_read, cfg.DATASETS.TRAIN):
            check_same_classes([trained, name])


def check_same_classes(names: Sequence[str]) -> None:
    """Check that each class of several data sets is the first's class of the same number.

    A model knows classes by number: class c is the c-th category by id. The same names under ids of
    another order would be taken for each other without an error.

    Args:
        names: of registered data sets; of one or none there is nothing to compare.

    Raises:
        InputError: the classes differ; the first one is named.
    """
    for name in names[1:]:
        expected, found = _file_classes(names[0]), _file_classes(name)
        # Some of Detectron2's own names for classes are not the file's; either will do.
        if expected == found or list(_class_names(names[0])) == list(_class_names(name)):
            continue
        differing = (i for i, pair in enumerate(zip(expected, found)) if pair[0] != pair[1])
        first = next(differing, min(len(expected), len(found)))
        raise InputError(
            f"Data sets '{names[0]}' and '{name}' differ in their classes: class {first}, counted "
            f"from 0 in the order of category ids, is {_class_text(expected, first)} in the first "
            f"and {_class_text(found, first)} in the second."
        )


def check_masks(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check that what ``MODEL.MASK_ON`` trains and evaluates has masks, where it is known.

    Args:
        cfg: a configuration whose data sets are registered.
        eval_only: the training set is not looked at.

    Raises:
        InputError: an object to train on has none; or of a test set some have, and others not.
    """
    if not cfg.MODEL.MASK_ON:
        return
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in _read:
                DatasetCatalog.get(name)  # another's data set stays unknown
            read = _read.get(name, _Read())
            missing = read.trained_without_mask if key == "TRAIN" else read.odd_one_without_mask
            if missing:
                raise InputError(
                    f"MODEL.MASK_ON is True, but in '{MetadataCatalog.get(name).json_file}' "
                    f"{missing} has no mask."
                )


def is_builtin(name: str) -> bool:
    """Whether ``name`` is one of Detectron2's own COCO or LVIS data sets."""
    return name in _BUILTIN_NAMES


def json_file_of(name: str, entries: Sequence[Sequence[str]]) -> str:
    """Return the annotation file of a data set, without registering it.

    Args:
        name: one of ``entries``, or of Detectron2's own.
        entries: ``BALANCE.DATASETS`` of a config.

    Raises:
        InputError: the name is neither.
    """
    for entry in entries:
        if entry[0] == name:
            return _resolve(entry[1])
    if name in _BUILTIN_NAMES:
        return MetadataCatalog.get(name).json_file
    raise InputError(f"'{name}' is neither Detectron2's nor listed in BALANCE.DATASETS.")


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
    DatasetCatalog.register(
        name, lambda: load_detections(json_file, image_root, name, _images_anywhere[name])
    )
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
    classes = [category.name for category in categories]
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
        category.image_count is not None for category in categories
    ):
        metadata.class_image_count = [
            {"id": category.id, "image_count": category.image_count} for category in categories
        ]


def _class_names(name):
    """The class names of a registered data set, which is read when they are not yet known."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    if metadata.get("thing_classes") is None:
        raise InputError(f"Data set '{name}' has no 'thing_classes' in its metadata.")
    return metadata.thing_classes


def _file_classes(name):
    """The class names as the annotation file has them, else as the metadata has them."""
    classes = _class_names(name)
    return list(_read[name].classes if name in _read else classes)


def _class_text(classes, index):
    return f"'{classes[index]}'" if index < len(classes) else "absent"


def _can_be_read(name):
    try:
        return bool(_class_names(name))
    except InputError:
        return False


def _common_classes(names):
    check_same_classes(names)
    return _class_names(names[0])


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


def _record(image, file_name, json_file):
    """An image in Detectron2's standard format, without objects yet."""
    for key in ("height", "width"):
        if getattr(image, key) is None:
            raise InputError(f"'{json_file}': the image {{'id': {image.id}}} has no '{key}'.")
    record = {
        "file_name": file_name,
        "height": image.height,
        "width": image.width,
        "image_id": image.id,
    }
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if getattr(image, key) is not None:
            record[key] = getattr(image, key)
    record["annotations"] = []
    return record


def _clip_boxes(boxes, sizes):
    """Clip boxes to their images.

    Args:
        boxes: (n, 4) x, y, width, height in pixels.
        sizes: (n, 2) width and height of the images.

    Returns:
        boxes (n, 4), usable (n,) bool: some area is left, and clipped (n,) bool: it was more. What
        needs no clipping keeps its numbers to the bit.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]  # (n, 2)
        new_low, new_high = np.maximum(low, 0.0), np.minimum(high, sizes)
        usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)
        usable &= (new_low < new_high).all(1)
        clipped = usable & ((new_low != low) | (new_high != high)).any(1)
        inside = np.concatenate([new_low, new_high - new_low], axis=1)
    return np.where(clipped[:, None], inside, boxes), usable, clipped


def _as_detectron2_takes_it(mask):
    """Polygons, or compressed run lengths."""
    if isinstance(mask, list) or isinstance(mask["counts"], (str, bytes)):
        return mask
    return mask_util.frPyObjects(dict(mask), *mask["size"])  # uncompressed


def _first_without_mask(data, among):
    """The name of the first object without a mask, of those that ``among`` (n,) marks; or None."""
    for index in np.flatnonzero(among):
        if data.segmentation[index] is None:
            return data.named(index)
    return None


def _locate_images(images, image_root, json_file, anywhere=False):
    """Return the path of every image by its id; each folder is listed once.

    A name that leaves ``image_root`` is refused unless images may lie ``anywhere``.

    LVIS v0.5 gives a ``file_name`` of COCO 2014, though the images are those of COCO 2017; the path
    in its ``coco_url`` is right. LVIS v1 gives ``coco_url`` alone. So the first that exists counts.
    """
    listings = {}

    def exists(path):
        folder, name = os.path.split(path)
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # no such folder; a NUL or a lone surrogate in its name
                listings[folder] = frozenset()
        return name in listings[folder]

    file_names, missing = {}, []
    for image in images:
        names = []
        if image.file_name:
            names.append(image.file_name)
        if image.coco_url:
            names.append("/".join(image.coco_url.split("/")[-2:]))
        if not names:
            raise InputError(
                f"'{json_file}': image {image.id} has neither 'file_name' nor 'coco_url'."
            )
        if image_root is None:
            file_names[image.id] = names[0]
            continue
        for name in names:
            if not anywhere and _leaves_its_folder(name):
                raise InputError(
                    f"'{json_file}': the file name '{name}' of image {image.id} leaves the image "
                    "root: BALANCE.IMAGES_ANYWHERE allows it."
                )
        paths = [os.path.join(image_root, name) for name in names]
        found = next(filter(exists, paths), None)
        if found is None:
            missing.append(paths[0])
        file_names[image.id] = found
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(images)} images of '{json_file}' are missing, the first "
            f"is '{missing[0]}'."
        )
    return file_names


def _leaves_its_folder(name):
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
