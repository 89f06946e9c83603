"""Training and test images as Detectron2 loads them, restartable, and with broken files named.

Detectron2's loader is a stream that only goes forward: which image comes next depends on how many
came before, and how it is augmented on which process loads it. Here a batch is a function of its
number. The order is that of Detectron2's sampler and of its aspect ratio grouping, replayed without
reading an image; the augmentations of the sample at a position of the stream are seeded by (seed,
position). So a run that starts again at any iteration sees what it would have seen, for any number
of loading processes; and with images of one orientation, for any number of workers that share the
same total batch.
"""

import itertools
import logging
import signal
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils, get_detection_dataset_dicts
from detectron2.data import build_detection_test_loader as detectron2_test_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from PIL import Image
from tqdm import tqdm

from ..errors import InputError, printable
from ..seeds import derived_seed, seeded
from .images import is_turned, is_turned_by_pillow
from .training_samplers import build_training_sampler

logger = logging.getLogger(__name__)

# The streams of random numbers that one run seed feeds; see also balanced_det.engine.step.
_SAMPLER_STREAM, _SAMPLE_STREAM = 1, 2
# How many other images are tried in the place of a broken one.
_REPLACEMENTS = 10
# What Pillow and Detectron2 raise for a file whose bytes or size are wrong.
_IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    detection_utils.SizeMismatchError,
)


class NamingMapper:
    """A mapper that says in one sentence which image cannot be used, and why.

    Args:
        mapper: Detectron2's, from a data set's record to what the model takes.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """Return what the mapper makes of ``record``; raises InputError for a broken image."""
        path = record["file_name"]
        if is_turned(path):
            _refuse_turned(path)
        try:
            return self.mapper(record)
        except InputError:
            raise
        except _IMAGE_ERRORS as error:
            raise InputError(f"The image '{path}' cannot be used: {_reason(error)}.") from error


def _reason(error):
    return " ".join(printable(getattr(error, "strerror", None) or error).split()).rstrip(".!")


def _refuse_turned(path):
    """Refuse an image that EXIF data turn, where Detectron2 would turn it not at all or twice."""
    if not detectron2_turns_photos():
        raise InputError(
            f"'{path}' is turned by its EXIF data, which the installed Detectron2 ignores, so "
            "boxes would lie elsewhere: run tools/restore_detectron2.py on it."
        )
    if is_turned_by_pillow(path):
        raise InputError(
            f"'{path}' is a TIFF that its EXIF data turn, which Pillow does, and Detectron2 "
            "then does again, so boxes would lie elsewhere: save it upright."
        )


@cache
def detectron2_turns_photos() -> bool:
    """Return whether the installed Detectron2 turns photographs as their EXIF data say."""
    image = Image.new("L", (2, 1))
    image.getexif()[0x0112] = 6
    return detection_utils._apply_exif_orientation(image).size == (1, 2)


class Broken:
    """What a loading process returns instead of raising: the message of an :class:`InputError`."""

    def __init__(self, message: str):
        self.message = message


class BatchStream(torch.utils.data.Sampler):
    """The endless batches of one worker, as lists of (batch, position, index of the record).

    Positions are those of the stream that all workers share: of W workers, the one of rank w has w,
    w + W, w + 2 W and so on, as Detectron2's samplers deal them out.

    Args:
        sampler: Detectron2's endless stream of indices.
        batch_size: images a batch of this worker.
        group: (n,) the aspect ratio group of every record; only images of one group share a batch.
        start: how many batches to leave out at the beginning.
    """

    def __init__(self, sampler: Iterable[int], batch_size: int, group: np.ndarray, start: int = 0):
        self.sampler = sampler
        self.batch_size = batch_size
        self.group = group
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        buckets: dict[int, list] = {int(group): [] for group in np.unique(self.group)}
        number = 0
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        for position, index in zip(positions, self.sampler):
            bucket = buckets[int(self.group[index])]
            bucket.append((position, int(index)))
            if len(bucket) < self.batch_size:
                continue
            if number >= self.start:
                yield [(number, *sample) for sample in bucket]
            number += 1
            bucket.clear()


class TrainLoader:
    """The batches of a training, to be started at any of them.

    Iterating yields lists of mapped dicts, as Detectron2's loader does, from batch ``start`` on.

    Args:
        cfg: the config; the same keys are read as by Detectron2's loader.
        mapper: from a record to what the model takes; by default Detectron2's.
        sampler: from (cfg, records) to an endless sampler, or None for that of
            ``DATALOADER.SAMPLER_TRAIN``.

    Attributes:
        seed: of the run: of the order where ``SEED`` does not fix it, and of the augmentations.
        start: number of the first batch. Both are read when iteration begins.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable | None = None, sampler: Any = None):
        self.cfg = cfg
        self.build_sampler = sampler or _named_sampler
        self.mapper = NamingMapper(mapper or DatasetMapper(cfg, True))
        keypoints = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        self.records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints or 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start = 0

    @property
    def batch_size(self) -> int:
        """Images a batch of this worker."""
        return self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()

    def stream(self) -> BatchStream:
        """Return which images come, without loading any."""
        with seeded(derived_seed(self.seed, _SAMPLER_STREAM)):
            sampler = self.build_sampler(self.cfg, self.records)
        wide = np.array([record["width"] > record["height"] for record in self.records])
        grouped = self.cfg.DATALOADER.ASPECT_RATIO_GROUPING
        group = wide if grouped else np.zeros(len(self.records), dtype=bool)
        return BatchStream(sampler, self.batch_size, group, self.start)

    def __iter__(self) -> Iterator[list[dict]]:
        workers = self.cfg.DATALOADER.NUM_WORKERS
        samples = _Samples(
            DatasetFromList(self.records, copy=False),
            self.mapper,
            (self.seed, _SAMPLE_STREAM),
            bool(self.cfg.BALANCE.SKIP_BROKEN_IMAGES),
        )
        return _raising(
            torch.utils.data.DataLoader(
                samples,
                batch_sampler=self.stream(),
                num_workers=workers,
                collate_fn=_as_list,
                worker_init_fn=_ignore_interrupts,
                # The thread that pins images also takes them from the workers, which for eight
                # images takes as long as a tenth of a step.
                pin_memory=torch.cuda.is_available(),
            )
        )


class _Samples(torch.utils.data.Dataset):
    """Mapped records by (batch, position, index), each with its own random numbers."""

    def __init__(self, records, mapper, seeds, skip_broken):
        self.records = records
        self.mapper = mapper
        self.seeds = seeds
        self.skip_broken = skip_broken

    def __getitem__(self, key):
        batch, position, index = key
        skipped = []
        with seeded(derived_seed(*self.seeds, position)):
            for _ in range(1 + self.skip_broken * _REPLACEMENTS):
                try:
                    sample = self.mapper(self.records[index])
                except InputError as error:
                    skipped.append(str(error).rstrip("."))
                    # The replacement, too, is a function of the position alone.
                    index = np.random.randint(len(self.records))
                else:
                    return {**sample, "skipped_images": skipped} if skipped else sample
        return Broken(f"Batch {batch} of the training: {skipped[0]}.")


def _named_sampler(cfg, records):
    """Return the sampler that ``DATALOADER.SAMPLER_TRAIN`` names, ours or Detectron2's."""
    ours = build_training_sampler(cfg, records)
    if ours is not None:
        return ours
    return _train_loader_from_config(cfg, mapper=_as_list, dataset=records)["sampler"]


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "TestLoader":
    """Return Detectron2's loader of a test set, with broken images named."""
    mapper = _Catching(NamingMapper(DatasetMapper(cfg, False)))
    loader = detectron2_test_loader(
        cfg, dataset_name, mapper=mapper, batch_size=cfg.TEST.IMS_PER_BATCH
    )
    return TestLoader(loader, dataset_name)


class TestLoader:
    """The batches of a test set; iterating raises InputError for an image that cannot be used.

    On a terminal the main process shows images a second and the time left; Detectron2's log has
    seconds a batch.

    Args:
        loader: Detectron2's, whose mapper returns :class:`Broken` where it cannot map.
        name: of the test set, for the progress.
    """

    __test__ = False  # for pytest

    def __init__(self, loader: torch.utils.data.DataLoader, name: str):
        self.loader = loader
        self.name = name

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        hidden = None if comm.is_main_process() else True  # None: where there is no terminal
        images = len(cast(Sized, self.loader.sampler))  # of this worker
        name = printable(self.name)
        with tqdm(total=images, desc=name, unit="image", disable=hidden) as progress:
            for batch in _raising(self.loader):
                yield batch
                progress.update(len(batch))


class _Catching:
    def __init__(self, mapper):
        self.mapper = mapper

    def __call__(self, record):
        try:
            return self.mapper(record)
        except InputError as error:
            return Broken(str(error))


def _raising(loader):
    """Yield the loader's batches; raise what a process of it returned or died of."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
                raise
            raise InputError(
                "A process that loads images died, perhaps for want of memory: "
                "lower DATALOADER.NUM_WORKERS."
            ) from error
        for sample in batch:
            if isinstance(sample, Broken):
                raise InputError(sample.message)
        yield batch


def _ignore_interrupts(_):
    # Ctrl-C goes to all processes of a terminal; this one ends with the one that it loads for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_list(samples):
    return samples
