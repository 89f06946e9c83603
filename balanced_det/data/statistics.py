"""How often each class occurs in a data set: the numbers every remedy for class imbalance needs."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..errors import InputError

# LVIS (Gupta et al., arXiv 1908.03195): a class is rare in 1-10 training images, common in 11-100.
RARE_MAX_IMAGES = 10
COMMON_MAX_IMAGES = 100


def frequency_group(image_count: int) -> str:
    """Return LVIS's group of a class in ``image_count`` training images: 'r', 'c' or 'f'.

    Rare is up to 10 images, common 11 to 100, frequent more. A class in no image, which LVIS's
    training set does not have, counts as rare.
    """
    if image_count <= RARE_MAX_IMAGES:
        return "r"
    return "c" if image_count <= COMMON_MAX_IMAGES else "f"


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetStatistics:
    """The class counts of a data set of ``num_images`` images and K classes.

    Attributes:
        num_images: number of images, those without an object included.
        image_count: (K,) long, the number of images that hold the class.
        instance_count: (K,) long, the number of objects of the class.
    """

    num_images: int
    image_count: torch.Tensor
    instance_count: torch.Tensor

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.image_count)

    @cached_property
    def frequency(self) -> torch.Tensor:
        """(K,) float in [0, 1]: the fraction of images that hold the class; 0 without images."""
        return self.image_count / max(self.num_images, 1)

    @cached_property
    def joint_frequency(self) -> torch.Tensor:
        """(K,) float in [0, 1]: the geometric mean of ``frequency`` and the share of all objects.

        IRFS (arXiv 2305.08069) repeats images by it.
        """
        share = self.instance_count / self.instance_count.sum().clamp(min=1)
        return (self.frequency * share).sqrt()

    @cached_property
    def group(self) -> list[str]:
        """The K groups 'r', 'c' or 'f' (:func:`frequency_group`), a list."""
        return [frequency_group(count) for count in self.image_count.tolist()]

    def __str__(self) -> str:
        group = self.group
        return (
            f"{self.num_images} images, {int(self.instance_count.sum())} objects, "
            f"{self.num_classes} classes: {group.count('r')} rare, {group.count('c')} common, "
            f"{group.count('f')} frequent; {int((self.image_count == 0).sum())} without an object"
        )


def objects(annotations: Iterable[Any]) -> list[Any]:
    """Return the annotations that are objects to train on, neither crowds nor marked ``ignore``."""
    return [a for a in annotations if not (a.get("iscrowd") or a.get("ignore"))]


def dataset_statistics(dataset_dicts: Sequence[dict], num_classes: int) -> DatasetStatistics:
    """Count images and objects of every class.

    Args:
        dataset_dicts: images in Detectron2's standard format, category ids contiguous from 0.
            Their :func:`objects` are counted.
        num_classes: K.

    Returns:
        :class:`DatasetStatistics`.

    Raises:
        InputError: a category id is outside 0 ... K-1.
    """
    classes_by_image = [
        [a["category_id"] for a in objects(record.get("annotations", ()))]
        for record in dataset_dicts
    ]
    objects_per_image = np.fromiter(map(len, classes_by_image), np.int64, len(classes_by_image))
    classes = np.fromiter(
        chain.from_iterable(classes_by_image), np.int64, int(objects_per_image.sum())
    )  # (objects,)
    images = np.repeat(np.arange(len(objects_per_image)), objects_per_image)  # (objects,)

    outside = (classes < 0) | (classes >= num_classes)
    if outside.any():
        first = int(outside.argmax())
        raise InputError(
            f"'{dataset_dicts[images[first]].get('file_name')}' has an object of category id "
            f"{classes[first]}, but with K = {num_classes} classes ids are 0 to {num_classes - 1}."
        )

    # An image counts once for a class, however many objects of it it holds.
    image_class_pairs = np.unique(images * num_classes + classes)
    return DatasetStatistics(
        num_images=len(classes_by_image),
        image_count=_count(image_class_pairs % max(num_classes, 1), num_classes),
        instance_count=_count(classes, num_classes),
    )


def add_counts(categories: Sequence[dict], annotations: Iterable[dict]) -> list[dict]:
    """Return LVIS-format ``categories`` with their counts over ``annotations``.

    Args:
        categories: dicts with ``id``; they are not changed.
        annotations: dicts with ``image_id`` and ``category_id`` of the training set.

    Returns:
        Copies with ``image_count``, ``instance_count`` and ``frequency`` as LVIS writes them.
    """
    images: dict[int, set[int]] = {category["id"]: set() for category in categories}
    instances = dict.fromkeys(images, 0)
    for annotation in objects(annotations):
        images[annotation["category_id"]].add(annotation["image_id"])
        instances[annotation["category_id"]] += 1
    return [
        {
            **category,
            "image_count": len(images[category["id"]]),
            "instance_count": instances[category["id"]],
            "frequency": frequency_group(len(images[category["id"]])),
        }
        for category in categories
    ]


def _count(classes, num_classes):
    return torch.from_numpy(np.bincount(classes, minlength=num_classes).astype(np.int64))
