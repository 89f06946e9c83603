"""The contract of classification and box losses.

A loss sees rows and Detectron2's labels: ``0 … K-1`` an object class, ``K`` background, ``-1``
ignored. It owns its formula, the number of channels it needs and how channels become scores; the
detector owns the normalizer. One method lives in one file beside this one; most are of the families
in :mod:`.sigmoid` and :mod:`.softmax`.

R rows, K object classes, C channels (logits) a row; ``(*)`` any leading dimensions.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..registry import Registry
from .statistic import ClassStatistic

CLASSIFICATION_LOSSES = Registry("classification loss")
BOX_LOSSES = Registry("box loss")


def upcast(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as float32, or as it is where it is float64 already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor; Python's ``sum`` would add the first to 0 first."""
    return functools.reduce(operator.add, terms)


def row_labels(levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the labels of all levels as one (R,) tensor, which takes fewer calls than a list."""
    return torch.cat([y.flatten() for _, y in levels])


def reciprocal(normalizer: float | Tensor) -> float | Tensor:
    """Return 1 / normalizer for a number or a 0-dim tensor, which is not read on the host.

    0 counts as 1: it comes with a sum of 0, and an empty batch must give 0, not nan.
    """
    return 1.0 / (normalizer + (normalizer == 0))


def normalize(total: Tensor, normalizer: float | Tensor) -> Tensor:
    """Return ``total / normalizer`` in the dtype of ``total``; see :func:`reciprocal`."""
    return (total * reciprocal(normalizer)).to(total.dtype)


class ClassWeights(ClassStatistic):
    """How many times a row of each class counts.

    Args:
        num_classes: K.
        values: (K,), or None for a model that is built to load a checkpoint.
    """

    name = "class_weight"
    meaning = "a weight for each class"

    def __init__(self, num_classes: int, values: Sequence[float] | Tensor | None):
        super().__init__(num_classes, values)
        self.derive_if_known()


class ClassificationLoss(nn.Module):
    """Base class: labelled rows of logits in, one number out.

    A subclass implements :meth:`scaled_sum`, :meth:`row_losses`, :meth:`scores`,
    :meth:`predicted_class` and :meth:`initial_bias`. What it keeps between steps it keeps in
    buffers, so that a checkpoint holds it. What a detector must know beyond that, the class
    declares; nobody looks into its constructor or its attributes:

    Class attributes:
        needs: the counted statistics that the constructor takes by name, of "class_frequency",
            (K,) the fraction of training images that hold each class, and "class_counts", (K,) how
            many those are. None is given for a model that is built to load a checkpoint.
        divides_by_own_count: the loss is a mean by a count of its own; ``normalizer`` is ignored.
        sums_over_workers: each step asks all workers, so every worker must take every step.
        refused_on: {"DENSE", "RPN" or "ROI_HEADS": why the method cannot work on that part}.
        sampled_rows_warning: what goes wrong on the few rows that a sampler leaves of a region
            head, to be read after the method's name; None where nothing does.
        scores_rise_with_logits: every score is one and the same function of its own logit, and
            never falls where that rises. Inference then ranks logits.
        scores_are_a_distribution: the scores of a row and that of background sum to 1.
        neutral: constructor arguments under which the loss is the plain cross entropy of its
            channels; None where there are none. The tests of all losses start from them.
        example: constructor arguments that make a random method repeatable, for the same tests.

    Attributes:
        num_classes: K, the number of object classes.
        num_logits: C, channels of a row; any number, the detector sizes its last layer by it.
        class_weight: (K,), or None, see :meth:`weigh_classes`.
        per_level: each pyramid level is a batch of its own, so that the loss of a list of levels is
            another than that of all rows as one; False unless a subclass sets it.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    divides_by_own_count: ClassVar[bool] = False
    sums_over_workers: ClassVar[bool] = False
    refused_on: ClassVar[dict[str, str]] = {}
    sampled_rows_warning: ClassVar[str | None] = None
    scores_rise_with_logits: ClassVar[bool] = False
    scores_are_a_distribution: ClassVar[bool] = False
    neutral: ClassVar[dict | None] = None
    per_level = False
    example: ClassVar[dict] = {}

    def __init__(self, num_classes: int, num_logits: int):
        super().__init__()
        if num_classes < 1:
            raise InputError(f"{type(self).__name__} needs at least one class, not {num_classes}.")
        self.num_classes = num_classes
        self.num_logits = num_logits
        self.class_weights: ClassWeights | None = None

    def weigh_classes(self, class_weight: Tensor | Sequence[float] | None) -> "ClassificationLoss":
        """Let a row of class j count ``class_weight[j]`` times; return the loss itself.

        The weight multiplies the term of the row's own class: with a softmax the row's whole cross
        entropy, with sigmoids its term y = 1. Negatives and background rows keep weight 1, so that
        a rare class is pulled up and nothing else pushed down. The normalizer does not change.

        Args:
            class_weight: (K,) finite and not negative, of
                :func:`balanced_det.priors.class_weights` or one's own; None for a model that is
                built to load a checkpoint, which brings them.

        Raises:
            InputError: for weights of another length, or negative or not finite.
        """
        self.class_weights = ClassWeights(self.num_classes, class_weight)
        return self

    @property
    def class_weight(self) -> Tensor | None:
        """The (K,) weights of :meth:`weigh_classes`; None for a loss that weighs all alike."""
        if self.class_weights is None:
            return None
        self.class_weights.check_known()
        return self.class_weights.values

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        normalizer: float | Tensor,
        overwrite_logits: bool = False,
    ) -> Tensor:
        """Return the loss summed over rows labelled >= 0, divided by ``normalizer``.

        Args:
            logits: (*, C), any strides and any floating dtype, or a list of such tensors, one a
                pyramid level. Arithmetic is in float32 at least.
            labels: (*), long, or the list of them: 0 … K-1, K for background, -1 for ignored.
                Rows labelled -1 get exactly zero gradient.
            normalizer: a number or a 0-dim tensor; 0 counts as 1.
            overwrite_logits: the caller owns ``logits`` and reads it no more, so a loss may put the
                gradient into the same memory. A loss that gains nothing from it ignores it.

        Returns:
            A 0-dim tensor; without any row, a zero that backpropagates.

        Raises:
            InputError: when shapes do not fit; on the CPU also for a label outside -1 … K. On a
                device nobody waits to look at labels, and none reads out of bounds.
        """
        levels = self._levels(logits, labels)
        scale = 1.0 if self.divides_by_own_count else reciprocal(normalizer)
        return self.scaled_sum(levels, scale, overwrite_logits)

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale``, a number or 0-dim tensor, times the sum over all rows.

        ``levels`` is a list of (logits, labels) pairs of the shapes that :meth:`forward` takes.
        """
        raise NotImplementedError

    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how wrong each row is, for samplers that pick rows by their loss.

        It is the plain cross entropy of the channels, without the weights of the method: those say
        how a row that takes part is trained on, not whether it is a hard one.

        Args:
            logits: (*, C), as in :meth:`forward`.
            labels: (*).

        Returns:
            (*), float32 at least and without gradient; 0 where a row is ignored.
        """
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """Return the probability of every object class, (*, C) -> (*, K)."""
        raise NotImplementedError

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class that each row is most likely of, K for background, (*, C) -> (*) long.

        It is what the logged accuracy of a region head counts. Here, that of the highest score, or
        background where none reaches one half.
        """
        score, index = self.scores(logits).max(dim=-1)
        return index.where(score >= 0.5, self.num_classes)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (C,) bias that starts each object class at ``prior_prob``.

        ``None`` means a bias of zero. Raises InputError for a probability that cannot be had.
        """
        raise NotImplementedError

    def _levels(
        self, logits: Tensor | Sequence[Tensor], labels: Tensor | Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        logits = [logits] if isinstance(logits, Tensor) else logits
        labels = [labels] if isinstance(labels, Tensor) else labels
        if not logits or len(logits) != len(labels):
            raise InputError(
                f"{type(self).__name__} got {len(logits)} levels of logits "
                f"and {len(labels)} levels of labels."
            )
        for x, y in zip(logits, labels):
            if x.shape != (*y.shape, self.num_logits):
                raise InputError(
                    f"{type(self).__name__} has {self.num_logits} logits a row, but got logits of "
                    f"shape {tuple(x.shape)} with labels of shape {tuple(y.shape)}."
                )
            self._check_labels(y)
        return list(zip(logits, labels))

    def _check_labels(self, labels: Tensor) -> None:
        if labels.device.type != "cpu" or labels.numel() == 0:
            return
        least, largest = (int(label) for label in labels.aminmax())
        if least < -1 or largest > self.num_classes:
            wrong = least if least < -1 else largest
            raise InputError(
                f"{type(self).__name__} got the label {wrong}; labels are -1 (ignored), "
                f"0 to {self.num_classes - 1} and {self.num_classes} (background)."
            )


class BoxLoss(nn.Module):
    """Base class: predicted and true boxes of foreground rows in, one number out.

    Class attributes:
        divides_by_own_count, sums_over_workers: as in :class:`ClassificationLoss`.
        space: what a row of four numbers is: ``"deltas"``, the regression targets as the detector
            encodes them, or ``"boxes"``, corners (x1, y1, x2, y2) in pixels.

    Attributes:
        per_level: the loss wants to know which pyramid level each row is of, see
            :meth:`level_sum`; False unless a subclass sets it.
    """

    space: ClassVar[str] = "deltas"
    divides_by_own_count: ClassVar[bool] = False
    sums_over_workers: ClassVar[bool] = False
    per_level = False

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        normalizer: float | Tensor = 1.0,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss summed over all rows, divided by ``normalizer``.

        Args:
            pred: (N, 4), any floating dtype; arithmetic is in float32 at least.
            target: (N, 4).
            normalizer: a number or a 0-dim tensor; 0 counts as 1.
            levels: (L, N) bool, which rows are of each of L pyramid levels, fine to coarse; None
                where there are none, or nobody asks (:attr:`per_level`).

        Returns:
            A 0-dim tensor; for N = 0, a zero that backpropagates.

        Raises:
            InputError: when the shapes are not (N, 4) both.
        """
        if pred.dim() != 2 or pred.shape[1] != 4 or pred.shape != target.shape:
            raise InputError(
                f"{type(self).__name__} needs two (N, 4) tensors, not {tuple(pred.shape)} "
                f"and {tuple(target.shape)}."
            )
        pred, target = upcast(pred), upcast(target)
        if levels is None or not self.per_level:
            total = self.loss_sum(pred, target)
        else:
            total = self.level_sum(pred, target, levels)
        return total if self.divides_by_own_count else normalize(total, normalizer)

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss summed over the rows of two (N, 4) tensors."""
        raise NotImplementedError

    def level_sum(self, pred: Tensor, target: Tensor, levels: Tensor) -> Tensor:
        """Return the same where the level of each row matters; ``levels`` is (L, N) bool."""
        raise NotImplementedError
