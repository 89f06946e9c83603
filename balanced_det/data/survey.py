"""What a data set holds, counted: the numbers that :mod:`balanced_det.analyze` shows.

All is counted from annotations in Detectron2's standard format, without reading a pixel. Letters in
shapes: N images, R objects, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.structures import BoxMode

from .statistics import objects

# An IoU above which two boxes of one image are probably one object that was annotated twice.
NEAR_DUPLICATE_IOU = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """The objects of a data set as columns, in the order of its images; crowds are left out.

    Attributes:
        image_size: (N, 2) float, width and height in pixels.
        image: (R,) int, 0 ... N-1, never falling.
        category: (R,) int, 0 ... K-1.
        box: (R, 4) float, x, y, width, height in pixels.
    """

    image_size: np.ndarray
    image: np.ndarray
    category: np.ndarray
    box: np.ndarray

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_size)

    @property
    def objects_per_image(self) -> np.ndarray:
        """(N,) int."""
        return np.bincount(self.image, minlength=self.num_images)

    @property
    def side(self) -> np.ndarray:
        """(R,) float, the square root of each box's area, pixels."""
        return np.sqrt(self.box[:, 2] * self.box[:, 3])


def columns(dataset_dicts: Sequence[dict]) -> Columns:
    """Return the objects of Detectron2's ``dataset_dicts`` as :class:`Columns`."""
    sizes: list[tuple[int, int]] = []
    counts: list[int] = []
    categories: list[int] = []
    boxes: list[Sequence[float]] = []
    for record in dataset_dicts:
        found = objects(record.get("annotations", ()))
        sizes.append((record["width"], record["height"]))
        counts.append(len(found))
        categories.extend(a["category_id"] for a in found)
        boxes.extend(_xywh(a) for a in found)
    return Columns(
        image_size=np.array(sizes, dtype=np.float64).reshape(-1, 2),
        image=np.repeat(np.arange(len(counts)), counts),
        category=np.array(categories, dtype=np.int64),
        box=np.array(boxes, dtype=np.float64).reshape(-1, 4),
    )


def pairs_of_an_image(image: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of entries that belong to one image, some at a time.

    Args:
        image: (R,) int, never falling.

    Yields:
        (i, j), two equally long index arrays with i < j: the entries that are 1 apart, then those
        2 apart, and so on. The memory is that of R indices, however many pairs there are.
    """
    first = np.arange(len(image))
    distance = 1
    while len(first):
        # What has no neighbour at this distance has none further away.
        first = first[first + distance < len(image)]
        first = first[image[first + distance] == image[first]]
        if len(first):
            yield first, first + distance
        distance += 1


def co_occurrence(data: Columns, num_classes: int) -> np.ndarray:
    """Return (K, K) int: images that hold both classes; on the diagonal, that hold the class."""
    # An image counts once for a class, however many objects of it it holds.
    pairs = np.unique(data.image * num_classes + data.category)
    image, category = np.divmod(pairs, max(num_classes, 1))
    counts = np.zeros(num_classes * num_classes, dtype=np.int64)
    for i, j in pairs_of_an_image(image):
        counts += np.bincount(category[i] * num_classes + category[j], minlength=len(counts))
    pair_counts = counts.reshape(num_classes, num_classes)
    return pair_counts + pair_counts.T + np.diag(np.bincount(category, minlength=num_classes))


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Pairs of boxes of one image with an IoU above ``NEAR_DUPLICATE_IOU``.

    Attributes:
        same_class, other_class: pairs whose boxes have one class, or two.
        class_pairs: {(class, class): pairs} of the second kind, the most frequent first.
    """

    same_class: int
    other_class: int
    class_pairs: dict[tuple[int, int], int]


def near_duplicates(data: Columns) -> NearDuplicates:
    """Count boxes that lie nearly on each other."""
    same = 0
    others = []
    for i, j in pairs_of_an_image(data.image):
        near = box_iou(data.box[i], data.box[j]) > NEAR_DUPLICATE_IOU
        first, second = data.category[i[near]], data.category[j[near]]
        same += int((first == second).sum())
        differ = first != second
        others.append(np.sort(np.stack([first[differ], second[differ]], axis=1), axis=1))
    pairs, counts = np.unique(
        np.concatenate([np.zeros((0, 2), np.int64), *others]), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return NearDuplicates(
        same_class=same,
        other_class=int(counts.sum()),
        class_pairs={(int(pairs[k][0]), int(pairs[k][1])): int(counts[k]) for k in order},
    )


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of each box of ``a`` with the one of ``b``: (P, 4) x, y, width, height."""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(a[:, 2:], axis=1) + np.prod(b[:, 2:], axis=1) - overlap
    return overlap / np.maximum(union, np.finfo(float).tiny)


def class_repeats(frequency: np.ndarray, threshold: float, sqrt: bool = True) -> np.ndarray:
    """Return how often repeat-factor sampling repeats each class, r(c) = max(1, sqrt(t / f(c))).

    Args:
        frequency: f, (K,). Repeat-factor sampling takes the fraction of images that hold the class
            (LVIS, arXiv 1908.03195, appendix B.2); IRFS the geometric mean of that and of the
            class's fraction of all objects (arXiv 2305.08069).
        threshold: t.
        sqrt: False is Detectron2's option to repeat by t / f(c) itself.

    Returns:
        (K,) float; 1 for a class that does not occur.
    """
    present = frequency > 0
    repeats = np.ones(len(frequency))
    ratio = threshold / frequency[present]
    repeats[present] = np.maximum(1, np.sqrt(ratio) if sqrt else ratio)
    return repeats


def image_repeats(data: Columns, repeats: np.ndarray) -> np.ndarray:
    """Return how often each image is repeated: as its most repeated class. (N,) float, 1 if none.

    Args:
        data: the objects.
        repeats: (K,) of :func:`class_repeats`.
    """
    result = np.ones(data.num_images)
    np.maximum.at(result, data.image, repeats[data.category])
    return result


def class_aware_draws(data: Columns) -> np.ndarray:
    """Return how often class-aware sampling draws each image beside plain sampling.

    It draws a class that occurs, then an image that holds it (arXiv 1512.05830, section 3.3), so
    an image comes with the probability sum over its classes of 1 / (K n_c).

    Returns:
        (N,) float of mean 1; 0 for an image without an object. Plain sampling has 1 for all.
    """
    image, category = np.unique(np.stack([data.image, data.category]), axis=1)
    _, place, count = np.unique(category, return_inverse=True, return_counts=True)
    probability = np.bincount(
        image, weights=1 / (len(count) * count[place]), minlength=data.num_images
    )
    return probability * data.num_images


def group_names(image_count: np.ndarray, limits: tuple[int, int]) -> list[str]:
    """Return "rare", "common" or "frequent" for each class; limits are included below.

    Args:
        image_count: (K,) int.
        limits: the most images that a rare and a common class is in; LVIS has 10 and 100.
    """
    names = ("rare", "common", "frequent")
    return [names[i] for i in np.searchsorted(np.asarray(limits), image_count)]


def _xywh(annotation):
    box, mode = annotation["bbox"], annotation["bbox_mode"]
    return box if mode == BoxMode.XYWH_ABS else BoxMode.convert(box, mode, BoxMode.XYWH_ABS)
