"""Which rows of a batch take part in the losses, and what the losses are divided by.

A detector labels the rows of a batch (:class:`Rows`), asks its :class:`Selection` which of them
take part, and divides the losses by :meth:`Selection.normalizer`::

    rows = selection(rows)  # those that do not take part are labelled -1
    losses = criterion(logits, rows.labels, boxes, selection.normalizer(rows))

A sampler (:class:`Sampler`, one method a file in :mod:`balanced_det.samplers`) chooses the rows; a
normalizer says what the sums over them are divided by. The normalizers by two batches of two
images, 1,000 rows each and 256 of them sampled, 20 of which are foreground in the first batch and
200 in the second: :class:`PerRow` and :class:`PerQuota` divide by 512 in both, so that the box loss
of the first is a tenth of the second's. :class:`PerForegroundRow` divides by 20 and by 200, and
:class:`PerForegroundOnAverage` by a number in between that changes slowly. With all rows in the
loss, 512 would become 2,000 and say nothing of the objects, which is why a detector that takes all
rows divides by foreground rows.

Letters: N images of a batch, R rows of an image, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import nn

from .distributed import mean_over_workers, num_workers, sum_over_workers
from .errors import InputError
from .registry import Registry
from .rows import foreground

SAMPLERS = Registry("sampler")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The labelled rows of a batch; an image with fewer rows than another ends in ignored ones.

    Attributes:
        labels: (N, R) long: 0 ... K-1 an object class, K background, -1 ignored.
        num_classes: K.
        ious: (N, R) float, each row's largest IoU with any object of its image, 0 without an
            object and for points, which have none; None where nobody computed it.
        matched: (N, R) long, which object of its image that is; 0 without an object. None for rows
            that are matched to no objects.
        losses: (N, R) float, each row's loss; None unless the sampler needs it.
    """

    labels: torch.Tensor
    num_classes: int
    ious: torch.Tensor | None = None
    matched: torch.Tensor | None = None
    losses: torch.Tensor | None = None

    @functools.cached_property
    def foreground(self) -> torch.Tensor:
        """(N, R) bool: the rows that carry an object class."""
        return foreground(self.labels, self.num_classes)

    @functools.cached_property
    def background(self) -> torch.Tensor:
        """(N, R) bool: the rows that are labelled background."""
        return self.labels == self.num_classes

    @functools.cached_property
    def takes_part(self) -> torch.Tensor:
        """(N, R) bool: the rows that are not ignored."""
        return self.labels >= 0

    def known(self, name: str) -> torch.Tensor:
        """Return ``ious``, ``matched`` or ``losses``, by name.

        Raises:
            InputError: nobody computed it.
        """
        value = getattr(self, name)
        if value is None:
            raise InputError(f"These rows came without their {name}, which is needed here.")
        return value

    def keep(self, mask: torch.Tensor) -> "Rows":
        """Return these rows with all of them ignored that are not in ``mask`` (N, R)."""
        return dataclasses.replace(self, labels=self.labels.where(mask, -1))


@dataclasses.dataclass(frozen=True)
class Quota:
    """How many rows of an image a sampler takes, as Detectron2's ``subsample_labels``.

    Attributes:
        rows_per_image: the rows to take in all.
        positive_fraction: the largest share of foreground rows among them.
    """

    rows_per_image: int
    positive_fraction: float

    def __post_init__(self) -> None:
        if self.rows_per_image < 0:
            raise InputError(f"rows_per_image is {self.rows_per_image}; it must not be negative.")
        if not 0 <= self.positive_fraction <= 1:
            raise InputError(
                f"positive_fraction is {self.positive_fraction}; it must lie between 0 and 1."
            )

    def numbers(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many foreground and how many background rows to take, (N,) long each."""
        most = int(self.rows_per_image * self.positive_fraction)
        num_foreground = rows.foreground.sum(dim=1).clamp(max=most)
        num_background = rows.background.sum(dim=1)
        return num_foreground, num_background.minimum(self.rows_per_image - num_foreground)


class Sampler:
    """Which rows of a batch take part. A subclass says what it needs, and chooses.

    Attributes:
        needs_ious: it reads ``rows.ious`` and ``rows.matched``.
        needs_losses: it reads ``rows.losses``, so it is asked when the classifier has run.
        takes_all: it takes all rows, or as many of them as it likes, and keeps to no quota; losses
            are then divided by foreground rows.
    """

    needs_ious = False
    needs_losses = False
    takes_all = False

    def __call__(
        self, rows: Rows, quota: Quota, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (N, R) bool mask of the rows to take; ``rows`` stay as they are.

        Args:
            rows: of the batch, on any device, R at least 1; what the sampler does not need may be
                None.
            quota: how many rows of an image to take.
            generator: of the rows' device, for samplers that draw; None is torch's own.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"


class PerRow(nn.Module):
    """Divide by the rows that take part, as Detectron2's region heads do.

    They divide by those of each worker; here by their mean over the workers, so that a row of a
    worker with few weighs no more than the others.
    """

    def forward(self, rows: Rows, quota: Quota) -> torch.Tensor:
        """Return a 0-dim float32 tensor, which is not read on the host; 0 without any row."""
        return mean_over_workers(rows.takes_part.sum().float())


class PerQuota(nn.Module):
    """Divide by the rows that a batch may have at most, as Detectron2's RPN does."""

    def forward(self, rows: Rows, quota: Quota) -> int:
        """Return a number."""
        return quota.rows_per_image * len(rows.labels)


class PerForegroundRow(nn.Module):
    """Divide by the foreground rows of a worker's batch, on average over the workers.

    The average gives every row the same weight, whichever worker it is on. A batch that has no
    foreground row on any worker is divided by its number of rows instead: a loss per row is small,
    where the sum over all would be huge.
    """

    def forward(self, rows: Rows, quota: Quota) -> torch.Tensor:
        """Return a 0-dim float32 tensor, which is not read on the host; 0 without any row."""
        counts = torch.stack([rows.foreground.sum(), rows.takes_part.sum()]).float()
        num_foreground, num_rows = mean_over_workers(counts).unbind()
        return torch.where(num_foreground > 0, num_foreground, num_rows)


class PerForegroundOnAverage(nn.Module):
    """Divide by a moving average of the foreground rows, as Detectron2's dense detectors do.

    Detectron2 averages those of each worker for itself. Here the average is that of one process
    with the batches of all workers: it is the same however many there are, also when a run goes on
    with another number of them.

    Args:
        initial: foreground rows of the whole batch while none was seen.
        momentum: of the average; a step counts for ``1 - momentum``.

    Attributes:
        average: 0-dim buffer, foreground rows of a step on all workers together; it is saved with
            the model, and no step waits for the device to know it.
    """

    statistics = ("average",)  # see balanced_det.engine.checkpoint
    average: torch.Tensor

    def __init__(self, initial: float, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.tensor(float(initial)))

    def forward(self, rows: Rows, quota: Quota) -> torch.Tensor:
        """Take the batch into the average and return a worker's part of it, a 0-dim tensor."""
        count = sum_over_workers(rows.foreground.sum().to(self.average.dtype)).clamp(min=1)
        return self.average.lerp_(count, 1 - self.momentum) / num_workers()


class Selection(nn.Module):
    """Which rows take part in the losses of one part of a detector, and what divides them.

    Args:
        sampler: a :class:`Sampler`.
        normalizer: :class:`PerRow`, :class:`PerQuota`, :class:`PerForegroundRow`,
            :class:`PerForegroundOnAverage`, or a callable of one's own with their arguments. None
            is :class:`PerForegroundRow` where the sampler takes all rows, else :class:`PerRow`.
        rows_per_image, positive_fraction: the sampler's :class:`Quota`.
    """

    def __init__(
        self,
        sampler: Sampler,
        normalizer: Callable[[Rows, Quota], float | torch.Tensor] | None = None,
        rows_per_image: int = 512,
        positive_fraction: float = 0.25,
    ):
        super().__init__()
        self.sampler = sampler
        if normalizer is None:
            normalizer = PerForegroundRow() if sampler.takes_all else PerRow()
        self.divisor = normalizer
        self.quota = Quota(rows_per_image, positive_fraction)

    @torch.no_grad()
    def forward(self, rows: Rows, row_losses: Callable[[], torch.Tensor] | None = None) -> Rows:
        """Return the rows with those ignored that do not take part; ``rows`` stay as they are.

        Args:
            rows: the labelled rows of a batch.
            row_losses: a function without arguments that returns each row's loss (N, R), called
                only where the sampler needs it.
        """
        if rows.labels.numel() == 0:
            return rows
        if self.sampler.needs_losses and row_losses is not None:
            rows = dataclasses.replace(rows, losses=row_losses())
        return rows.keep(self.sampler(rows, self.quota))

    def normalizer(self, rows: Rows) -> float | torch.Tensor:
        """Return what the losses over ``rows``, which take part, are divided by.

        To be asked once a step, since a normalizer may keep an average.
        """
        return self.divisor(rows, self.quota)
