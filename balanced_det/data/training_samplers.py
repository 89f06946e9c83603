"""Which training images a worker sees, and how often: samplers that know the classes.

Both work beside Detectron2's own and as they do: an infinite stream of indices, the same on all
workers for one seed, of which worker w takes every number from the w-th on.

**Instance-aware repeat-factor sampling** (IRFS, arXiv 2305.08069). Repeat-factor sampling (LVIS,
arXiv 1908.03195, appendix B.2) repeats an image r times an epoch,

    r = max over its classes of max(1, sqrt(t / f_j)),

f_j being the share of images that hold class j. IRFS puts f_j = sqrt(f_image,j f_instance,j), the
geometric mean of that and of the class's share of all objects, so that a class of which each image
holds many counts as less rare than one of which each holds one.

**Class-aware sampling** (arXiv 1512.05830, section 3.3): a class uniformly at random, then an image
that holds it uniformly at random. All classes are seen equally often, and an image of rare classes
very often.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import InputError
from .statistics import objects


def instance_aware_repeat_factors(
    dataset_dicts: Sequence[dict], repeat_thresh: float, sqrt: bool = True
) -> Tensor:
    """Return how often IRFS repeats each image in an epoch.

    Args:
        dataset_dicts: images in Detectron2's standard format; crowds do not count.
        repeat_thresh: t, the frequency below which classes are repeated; 0.001 on LVIS.
        sqrt: False repeats by t / f_j instead of its root, as Detectron2's option does.

    Returns:
        (N,) float32, at least 1, for ``RepeatFactorTrainingSampler``.

    Raises:
        InputError: for a threshold below 0.
    """
    if not repeat_thresh >= 0:
        raise InputError(f"A repeat threshold must be at least 0, not {repeat_thresh}.")
    images, classes = _image_class_pairs(dataset_dicts)  # (objects,) each
    factors = np.ones(len(dataset_dicts))
    if len(classes) == 0:
        return torch.from_numpy(factors).float()
    instance_count = np.bincount(classes)  # (K,)
    held = np.unique(np.stack([images, classes]), axis=1)  # (2, pairs)
    image_count = np.bincount(held[1], minlength=len(instance_count))
    frequency = np.sqrt(image_count / len(dataset_dicts) * instance_count / len(classes))
    with np.errstate(divide="ignore"):  # a class without objects, which no image asks for
        repeat = repeat_thresh / frequency
    repeat = np.maximum(np.sqrt(repeat) if sqrt else repeat, 1)
    np.maximum.at(factors, held[0], repeat[held[1]])
    return torch.from_numpy(factors).float()


class ClassAwareTrainingSampler(Sampler):
    """An infinite stream of images: a class at random, then an image that holds it at random.

    Args:
        dataset_dicts: images in Detectron2's standard format; one without objects is never drawn.
        seed: the same on all workers; None draws one that they share.

    Raises:
        InputError: when no image holds an object.
    """

    def __init__(self, dataset_dicts: Sequence[dict], seed: int | None = None):
        images, classes = _image_class_pairs(dataset_dicts)
        if len(classes) == 0:
            raise InputError("A class-aware sampler needs an image with an object; there is none.")
        held = torch.from_numpy(np.unique(np.stack([classes, images]), axis=1))  # (2, pairs)
        _, counts = torch.unique_consecutive(held[0], return_counts=True)
        self._images = held[1]  # (pairs,), those of the first class first
        self._counts = counts  # (classes that occur,)
        self._starts = counts.cumsum(0) - counts
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._indices(), self._rank, None, self._world_size)

    def _indices(self, chunk=1024):
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            chosen = torch.randint(len(self._counts), (chunk,), generator=generator)
            # A float64 below 1 times a count rounds to the count itself for no count below 2^53.
            uniform = torch.rand(chunk, generator=generator, dtype=torch.float64)
            place = (uniform * self._counts[chosen]).long()
            yield from self._images[self._starts[chosen] + place].tolist()


TRAINING_SAMPLERS = ("InstanceAwareRepeatFactorTrainingSampler", "ClassAwareTrainingSampler")


def build_training_sampler(cfg: CfgNode, dataset_dicts: Sequence[dict]) -> Sampler | None:
    """Build the sampler that ``DATALOADER.SAMPLER_TRAIN`` names.

    Args:
        cfg: the whole config; IRFS reads ``DATALOADER.REPEAT_THRESHOLD`` and ``REPEAT_SQRT``, and
            both ``SEED``, where one that is negative draws a seed that all workers share.
        dataset_dicts: the training images, as the loader is given them.

    Returns:
        The sampler, to be given to Detectron2's ``build_detection_train_loader``; None for a name
        that is not of :data:`TRAINING_SAMPLERS`, which Detectron2 builds itself.
    """
    loader = cfg.DATALOADER
    seed = cfg.SEED if cfg.SEED >= 0 else None
    if loader.SAMPLER_TRAIN == "ClassAwareTrainingSampler":
        return ClassAwareTrainingSampler(dataset_dicts, seed)
    if loader.SAMPLER_TRAIN == "InstanceAwareRepeatFactorTrainingSampler":
        factors = instance_aware_repeat_factors(
            dataset_dicts, loader.REPEAT_THRESHOLD, loader.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    return None


def _image_class_pairs(dataset_dicts):
    """Return the image and the class of every object, (objects,) int64 each."""
    classes = [
        [a["category_id"] for a in objects(record.get("annotations", ()))]
        for record in dataset_dicts
    ]
    images = np.repeat(np.arange(len(classes)), [len(c) for c in classes])
    flat = np.fromiter(itertools.chain.from_iterable(classes), np.int64, len(images))
    return images.astype(np.int64), flat
