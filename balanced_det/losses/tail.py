"""Which classes are the tail, from how many training images hold them (arXiv 2003.05176)."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .statistic import ClassStatistic

logger = logging.getLogger(__name__)

# A tail of nearly no class or nearly all of them weighs all classes alike.
LEAST_TAIL_SHARE, LARGEST_TAIL_SHARE = 0.05, 0.95


def tail_is_useful(num_tail: int, num_present: int) -> bool:
    """Whether a tail of that many of the classes that occur tells them apart."""
    return LEAST_TAIL_SHARE <= num_tail / max(num_present, 1) <= LARGEST_TAIL_SHARE


class TailClasses(ClassStatistic):
    """Which of K classes are the tail, from their frequency.

    Args:
        num_classes: K.
        class_frequency: (K,) fractions of the training images that hold each class, or None for a
            model that is built to load a checkpoint, which brings them.
        tail_threshold: T(f) = 1 where f < tail_threshold.
        tail_share: a share of classes in (0, 1) that replaces the threshold when given: the rarest
            round(tail_share K) classes are the tail; of equally rare classes those of
            smaller index come first.
        tail_includes_threshold: T(f) = 1 where f <= tail_threshold.
        loss: name of the loss that has these classes, whose keys a warning names.

    Attributes:
        class_frequency: (K,) buffer, saved with the checkpoint; NaN while unknown.

    A tail of fewer than 5% or more than 95% of the classes that occur is logged as a warning.
    """

    name = "class_frequency"
    meaning = "the fraction of training images that hold each class"
    class_frequency: Tensor
    _mask: Tensor
    _negative_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        class_frequency: Sequence[float] | Tensor | None,
        tail_threshold: float,
        tail_share: float | None = None,
        *,
        tail_includes_threshold: bool = False,
        loss: str,
    ):
        super().__init__(num_classes, class_frequency)
        self.loss = loss
        if tail_share is not None and not 0 < tail_share < 1:
            raise InputError(f"tail_share must lie between 0 and 1, exclusive, not {tail_share}.")
        if not 0 <= tail_threshold <= 1:  # NaN neither
            raise InputError(f"tail_threshold must be a share of images, not {tail_threshold}.")
        self.tail_threshold = tail_threshold
        self.tail_share = tail_share
        self.tail_includes_threshold = tail_includes_threshold
        # Derived from the frequencies, hence not saved.
        self.register_buffer("_mask", torch.zeros(num_classes, dtype=torch.bool), persistent=False)
        self.register_buffer("_negative_weight", torch.ones(num_classes), persistent=False)
        self.derive_if_known()

    def check(self, values: Tensor) -> None:
        """Raise an InputError for values that are no fractions."""
        if not ((values >= 0) & (values <= 1)).all():
            raise InputError("class_frequency must be fractions of the images, from 0 to 1.")

    def mask(self) -> Tensor:
        """Return the (K,) bool tensor that is True for tail classes.

        Raises:
            InputError: while the frequencies are unknown.
        """
        self.check_known()
        return self._mask

    def negative_weight(self) -> Tensor:
        """Return the (K,) float32 tensor 1 - T(f): 0 for tail classes, 1 for the others.

        Raises:
            InputError: while the frequencies are unknown.
        """
        self.check_known()
        return self._negative_weight

    def derive(self) -> None:
        """Find the tail."""
        frequency = self.class_frequency
        if self.tail_share is None and self.tail_includes_threshold:
            tail = frequency <= self.tail_threshold
        elif self.tail_share is None:
            tail = frequency < self.tail_threshold
        else:
            tail = torch.zeros_like(self._mask)
            rarest_first = frequency.argsort(stable=True)
            tail[rarest_first[: round(self.tail_share * len(frequency))]] = True
        self._mask.copy_(tail)
        self._negative_weight.copy_(~tail)
        self._warn_unless_useful()

    @property
    def setting(self) -> str:
        """What makes the tail, for messages: "tail_threshold 0.00177"."""
        if self.tail_share is None:
            return f"tail_threshold {self.tail_threshold}"
        return f"tail_share {self.tail_share}"

    def counts(self) -> tuple[int, int]:
        """Return how many of the classes that occur are tail, and how many these are."""
        present = self.class_frequency > 0
        return int((self._mask & present).sum()), int(present.sum())

    def _warn_unless_useful(self) -> None:
        num_tail, num_present = self.counts()
        if not tail_is_useful(num_tail, num_present):
            frequency = self.class_frequency[self.class_frequency > 0].tolist() or [0.0]
            key = f"BALANCE.{self.loss}"
            logger.warning(
                "%s: %s makes %d of the %d classes that occur tail classes, whose frequencies are "
                "%.3g to %.3g, so it tells them hardly apart; change %s.TAIL_THRESHOLD or set "
                "%s.TAIL_SHARE.",
                self.loss,
                self.setting,
                num_tail,
                num_present,
                min(frequency),
                max(frequency),
                key,
                key,
            )
