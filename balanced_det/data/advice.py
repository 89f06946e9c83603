"""What a data set's numbers say about how to train on it, as plain rules with their reasons.

The rules are starting points that :mod:`balanced_det.analyze` tells and :mod:`balanced_det.new`
writes down. They are scaled from settings that are published or were tried here; none is a result
about the data at hand, so a run beside its control decides.
"""

import dataclasses

import numpy as np

from ..errors import InputError
from .statistics import COMMON_MAX_IMAGES, RARE_MAX_IMAGES
from .survey import Columns

# The tail threshold of the EQL paper (arXiv 2003.05176): with LVIS v0.5's 57,000 training images,
# a class of up to 100 images is tail, which is LVIS's limit of "common".
LVIS_TAIL_THRESHOLD = 0.00177
# The repeat threshold of LVIS (arXiv 1908.03195): 100 of 100,000 images.
LVIS_REPEAT_THRESHOLD = 0.001
# A threshold that makes a larger share of the classes tail is not suggested, TAIL_SHARE is. With a
# tail of 168 of 173 classes EQL was behind its control (docs/results.md).
SUGGESTED_TAIL_SHARE = 0.8

_EPOCHS = 12  # Detectron2's 1x schedule on COCO
_LEAST_ITERATIONS = 1800  # at batch 8; a few hundred photographs then are seen some 40 times
_LARGEST_ITERATIONS = 90_000
_STRIDES = (4, 8, 16, 32, 64)  # of p2 to p6


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings for one data set.

    Attributes:
        limit: a class in at most this many training images, never more than half of them, is
            called small here.
        frequency_limit: ``limit`` as a fraction of the training images: the threshold that a
            published one becomes on data of this size.
        num_small: classes that occur, in at most ``limit`` images.
        num_present: classes that occur.
        size: the longer side of training images, pixels.
        anchor_sizes: one a level, p2 to p6, pixels at ``size``.
        aspect_ratios: of anchors, height over width.
        max_iter, steps: of a batch of ``batch`` images.
        batch: images.
        score_threshold, detections: least score and most detections of an image at inference.
    """

    limit: int
    frequency_limit: float
    num_small: int
    num_present: int
    size: int
    anchor_sizes: tuple[int, ...]
    aspect_ratios: tuple[float, ...]
    batch: int
    max_iter: int
    steps: tuple[int, int]
    score_threshold: float
    detections: int

    @property
    def repeats(self) -> bool:
        """Whether repeat-factor sampling at ``frequency_limit`` would repeat any class."""
        return self.num_small > 0


def advise(
    data: Columns,
    num_training_images: int,
    image_count: np.ndarray,
    *,
    limits: tuple[int, int] = (RARE_MAX_IMAGES, COMMON_MAX_IMAGES),
    size: int | None = None,
    batch: int = 8,
) -> Advice:
    """Return settings for a data set.

    Args:
        data: its objects.
        num_training_images: images that are trained on.
        image_count: (K,) images of each class among these.
        limits: most images of a rare and of a common class.
        size: the longer side of training images; by default :func:`training_size` chooses.
        batch: images of a training step.

    Raises:
        InputError: there is no object, or an argument is out of range.
    """
    if not len(data.image):
        raise InputError("There is no object to train on.")
    if batch < 1:
        raise InputError(f"A batch has at least one image, not {batch}.")
    if size is not None and not 64 <= size <= 4096:
        raise InputError(f"A training size lies between 64 and 4096 pixels; {size} does not.")
    present = image_count[image_count > 0]
    size = size or training_size(data)
    max_iter = iterations(num_training_images, batch)
    many = len(image_count) > 100
    limit = min(limits[1], num_training_images // 2)
    return Advice(
        limit=limit,
        frequency_limit=min(limits[1] / num_training_images, 0.5),
        num_small=int((present <= limit).sum()),
        num_present=len(present),
        size=size,
        anchor_sizes=anchor_sizes(scaled_sides(data, size)),
        aspect_ratios=aspect_ratios(data),
        batch=batch,
        max_iter=max_iter,
        # Where the learning rate falls to a tenth, and again: 1,150 and 1,500 of 1,800.
        steps=(round(max_iter * 0.64), round(max_iter * 0.83)),
        # Of many classes each gets little of a softmax; LVIS's protocol keeps 300 of any score.
        score_threshold=0.0001 if many else 0.01,
        detections=300 if many else 100,
    )


def iterations(num_images: int, batch: int) -> int:
    """Return the length of a training: 12 epochs, but no less than 14,400 images are seen.

    Detectron2's 1x schedule has 12 epochs. Small data needs more of them: the least is the schedule
    of configs/Base-lite0-RCNN.yaml, 1,800 iterations of 8 images.
    """
    wanted = round(num_images * _EPOCHS / batch)
    least = round(_LEAST_ITERATIONS * 8 / batch)
    return int(np.clip(wanted, least, max(least, _LARGEST_ITERATIONS)))


def training_size(data: Columns) -> int:
    """Return the longer side of training images, pixels: a multiple of 32 from 128 to 800.

    It is 416, more where a tenth of the objects would have sides below 12 pixels, and never more
    than the images have.
    """
    longest = data.image_size.max(axis=1)  # (N,)
    relative = data.side / longest[data.image]
    small = max(np.quantile(relative, 0.1), 1e-6)
    wanted = np.clip(12 / small, 416, 800)
    most = max(float(np.median(longest)), 128.0)
    return int(-(-min(wanted, most) // 32) * 32)


def scaled_sides(data: Columns, size: int) -> np.ndarray:
    """Return (R,) sides of the boxes in pixels once an image's longer side is ``size``."""
    return data.side * size / data.image_size.max(axis=1)[data.image]


def anchor_sizes(sides: np.ndarray) -> tuple[int, ...]:
    """Return an anchor's size for each level p2 to p6.

    The five sizes are spread over the objects' sides. A level's anchors are at least 2 strides
    large, since smaller ones leave gaps between them, and at most 8, as Detectron2's are.

    Args:
        sides: (R,) of the objects at the training size, pixels.
    """
    wanted = np.quantile(sides, (0.05, 0.275, 0.5, 0.725, 0.95))
    return tuple(
        int(np.clip(round(size), 2 * stride, 8 * stride)) for size, stride in zip(wanted, _STRIDES)
    )


def aspect_ratios(data: Columns) -> tuple[float, float, float]:
    """Return three ratios of height to width: 1, and the long and wide boxes' own."""
    ratio = data.box[:, 3] / np.maximum(data.box[:, 2], 1e-6)
    elongation = np.quantile(np.maximum(ratio, 1 / np.maximum(ratio, 1e-6)), 0.8)
    long = float(np.clip(round(float(elongation), 1), 1.5, 4.0))
    return (round(1 / long, 2), 1.0, long)
