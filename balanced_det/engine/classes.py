"""Whether a model, a checkpoint and the data sets speak of the same classes."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.registration import check_num_classes
from ..errors import InputError

# Where a detector's number of object classes stands; others have none, or none that is known here.
_NUM_CLASSES_NODE = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "BalancedRetinaNet": "RETINANET",
    "BalancedFCOS": "FCOS",
}


def check_model_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Refuse a config whose number of classes is not that of the data sets called ``names``."""
    node = _NUM_CLASSES_NODE.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        check_num_classes(cfg, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES", names)


def dataset_classes(name: str) -> dict:
    """Return the classes of a registered data set: {"names": K texts, "ids": K numbers}.

    Both are in the order of the model's classes 0 ... K-1; the ids are those of the file.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    names = list(metadata.get("thing_classes") or [])
    by_index = {i: k for k, i in (metadata.get("thing_dataset_id_to_contiguous_id") or {}).items()}
    return {"names": names, "ids": [by_index.get(i, i) for i in range(len(names))]}


def compare_classes(found: dict | None, expected: dict, path: str) -> None:
    """Refuse a checkpoint of other classes; one that does not tell its classes passes.

    Args:
        found: "classes" of the checkpoint at ``path``.
        expected: :func:`dataset_classes` of the data.
    """
    if found is None:
        return
    difference = _difference(found["names"], expected["names"])
    if difference:
        raise InputError(
            f"The checkpoint '{path}' was trained on other classes than the data's: {difference}; "
            "BALANCE.OTHER_CLASSES loads it all the same."
        )


def _difference(names, expected):
    """Tell how two lists of class names differ, or return an empty text."""
    if names == expected:
        return ""
    if len(names) != len(expected):
        return f"{len(names)} classes instead of {len(expected)}"
    index = next(i for i, pair in enumerate(zip(names, expected)) if pair[0] != pair[1])
    order = "the same names in another order, " if sorted(names) == sorted(expected) else ""
    return f"{order}class {index} is '{names[index]}' instead of '{expected[index]}'"
