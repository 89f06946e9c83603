"""The contract of classification and box losses, and the families of classification losses.

A loss sees rows and Detectron2's labels: ``0 … K-1`` an object class, ``K`` background, ``-1``
ignored. It owns its formula, the number of channels it needs and how channels become scores; the
detector owns the normalizer. One method lives in one file beside this one.

R rows, K object classes, C channels (logits) a row; ``(*)`` any leading dimensions.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..ops import sigmoid_loss
from ..priors import prior_bias
from ..registry import Registry
from ..rows import foreground

CLASSIFICATION_LOSSES = Registry("classification loss")
BOX_LOSSES = Registry("box loss")

# The gradient of float16 logits is float16, and made before a gradient scaler's factor reaches it.
# Divided by thousands of rows it would vanish below 6e-8; made this much larger, it does not, and
# the division follows together with the scaler's factor. A power of two rounds nothing.
_FLOAT16_SCALE = 2.0**12


def upcast(tensor):
    """Return ``tensor`` as float32, or as it is where it is float64 already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add(terms):
    """Return the sum of at least one tensor; Python's ``sum`` would add the first to 0 first."""
    return functools.reduce(operator.add, terms)


def row_labels(levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the labels of all levels as one (R,) tensor, which takes fewer calls than a list."""
    return torch.cat([y.flatten() for _, y in levels])


def reciprocal(normalizer):
    """Return 1 / normalizer for a number or a 0-dim tensor, which is not read on the host.

    0 counts as 1: it comes with a sum of 0, and an empty batch must give 0, not nan.
    """
    return 1.0 / (normalizer + (normalizer == 0))


def normalize(total, normalizer):
    """Return ``total / normalizer`` in the dtype of ``total``; see :func:`reciprocal`."""
    return (total * reciprocal(normalizer)).to(total.dtype)


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
        class_weight: (K,) buffer, or None, see :meth:`weigh_classes`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    divides_by_own_count: ClassVar[bool] = False
    sums_over_workers: ClassVar[bool] = False
    refused_on: ClassVar[dict[str, str]] = {}
    sampled_rows_warning: ClassVar[str | None] = None
    scores_rise_with_logits: ClassVar[bool] = False
    scores_are_a_distribution: ClassVar[bool] = False
    neutral: ClassVar[dict | None] = None
    example: ClassVar[dict] = {}

    def __init__(self, num_classes: int, num_logits: int):
        super().__init__()
        if num_classes < 1:
            raise InputError(f"{type(self).__name__} needs at least one class, not {num_classes}.")
        self.num_classes = num_classes
        self.num_logits = num_logits
        self.register_buffer("class_weight", None)

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
        if class_weight is None:
            weight = torch.full((self.num_classes,), torch.nan)
        else:
            weight = torch.as_tensor(class_weight, dtype=torch.float32)
            if weight.shape != (self.num_classes,):
                raise InputError(
                    f"class_weight has shape {tuple(weight.shape)}, but there are "
                    f"{self.num_classes} classes."
                )
            if not (weight.isfinite() & (weight >= 0)).all():
                raise InputError("Class weights must be finite numbers of at least 0.")
        self.class_weight = weight
        return self

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

    def _levels(self, logits, labels):
        if isinstance(logits, Tensor):
            logits, labels = [logits], [labels]
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

    def _check_labels(self, labels):
        if labels.device.type != "cpu" or labels.numel() == 0:
            return
        least, largest = (int(label) for label in labels.aminmax())
        if least < -1 or largest > self.num_classes:
            wrong = least if least < -1 else largest
            raise InputError(
                f"{type(self).__name__} got the label {wrong}; labels are -1 (ignored), "
                f"0 to {self.num_classes - 1} and {self.num_classes} (background)."
            )


class SigmoidLoss(ClassificationLoss):
    """A loss of K independent sigmoids: one pass of :func:`balanced_det.ops.sigmoid_loss` a level.

    A subclass says which weights make it (:meth:`pass_options`); logits are read where they lie,
    never concatenated.
    """

    scores_rise_with_logits: ClassVar[bool] = True
    neutral: ClassVar[dict | None] = {}

    def __init__(self, num_classes: int):
        super().__init__(num_classes, num_logits=num_classes)

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the keyword arguments of ``sigmoid_loss`` that make the method."""
        return {}

    def after_pass(self, gradient_sums: Tensor, scale: float | Tensor) -> None:
        """Take what a training step's pass has summed, where the options ask for gradient sums.

        Args:
            gradient_sums: (2, C) float64, of this worker: the sum over rows of |dL/dx| of every
                channel where y = 1, and where y = 0, before ``scale``.
            scale: what the loss is multiplied by.
        """

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times the loss summed over rows and channels."""
        options = dict(self.pass_options(levels), overwrite_logits=overwrite_logits)
        if self.class_weight is not None:
            self._add_class_weight(options)
        is_float16 = any(x.dtype == torch.float16 for x, _ in levels)
        options["scale"] = self._float16_scale() if is_float16 else scale
        results = [sigmoid_loss(x, y, **options) for x, y in levels]
        if options.get("gradient_sums", False):
            results, sums = zip(*results)
            if self.training:
                self.after_pass(add(sums), scale)
        total = add(results)
        return (total * (scale / options["scale"])).to(total.dtype) if is_float16 else total

    def _add_class_weight(self, options):
        # Channels beyond the classes, such as one of background, keep weight 1.
        weight = F.pad(self.class_weight, (0, self.num_logits - self.num_classes), value=1.0)
        given = options.get("positive_weight")
        options["positive_weight"] = weight if given is None else weight * given

    def _float16_scale(self):
        if self.class_weight is None:
            return _FLOAT16_SCALE
        # A weight may be as large as K, and the gradient has to stay below 65,504.
        return _FLOAT16_SCALE / self.class_weight.max().clamp(min=1)

    @torch.no_grad()
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross entropy of each row summed over its channels; see the base."""
        # -log(1 - p) for every channel; for the true one -log(p), which is smaller by the logit.
        x = upcast(logits)
        true_channel = labels.clamp(0, self.num_logits - 1).long().unsqueeze(-1)
        has_channel = foreground(labels, self.num_logits)
        losses = F.softplus(x).sum(dim=-1)
        losses = losses - x.gather(-1, true_channel).squeeze(-1).where(has_channel, 0.0)
        return losses.where(labels >= 0, 0.0)

    def scores(self, logits: Tensor) -> Tensor:
        """Return sigmoid(logits), (*, K) -> (*, K)."""
        return upcast(logits).sigmoid()

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class of the highest logit, or background where none is at least 0."""
        value, index = logits.max(dim=-1)
        return index.where(value >= 0, self.num_classes)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K,) bias whose sigmoid is ``prior_prob``; zeros for None."""
        bias = 0.0 if prior_prob is None else prior_bias(prior_prob)
        return torch.full((self.num_logits,), bias)


class SigmoidWithBackgroundLoss(SigmoidLoss):
    """A loss of K + 1 independent sigmoids, the last of which says background.

    Its target is 1 on background rows: for the pass it is one class more, and every row that takes
    part has a class. An object class scores sigmoid(z_j) (1 - sigmoid(z_background)).
    """

    scores_rise_with_logits: ClassVar[bool] = False

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.num_logits = num_classes + 1

    def scores(self, logits: Tensor) -> Tensor:
        """Return sigmoid(z_j) sigmoid(-z_background), (*, K + 1) -> (*, K)."""
        logits = upcast(logits)
        return logits[..., :-1].sigmoid() * (-logits[..., -1:]).sigmoid()

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class of the highest score, or K where background's sigmoid is higher."""
        background = upcast(logits[..., -1:]).sigmoid()
        return torch.cat([self.scores(logits), background], dim=-1).argmax(dim=-1)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K + 1,) bias that scores each class ``prior_prob``; zeros for None.

        Background starts undecided, at one half, so a class starts at twice ``prior_prob``.
        """
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            if not 0 < prior_prob < 0.5:
                raise InputError(
                    f"{type(self).__name__} cannot start a class at probability {prior_prob}: "
                    "beside a background of one half it must lie between 0 and one half."
                )
            bias[:-1] = prior_bias(2 * prior_prob)
        return bias


class SoftmaxLoss(ClassificationLoss):
    """A loss of one softmax over K + 1 channels, background last."""

    refused_on: ClassVar[dict[str, str]] = {
        "RPN": "it is a softmax loss; RPN predicts one logit an anchor"
    }
    scores_are_a_distribution: ClassVar[bool] = True
    neutral: ClassVar[dict | None] = {}

    def __init__(self, num_classes: int):
        super().__init__(num_classes, num_logits=num_classes + 1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of every row, 0 where it is ignored.

        Args:
            logits: (*, K + 1).
            labels: (*), long.

        Returns:
            (R,) for the R rows of (*).
        """
        return softmax_cross_entropy(logits, labels)

    def weighted_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return :meth:`cross_entropy` times the class weight of each row, (R,)."""
        losses = self.cross_entropy(logits, labels)
        return losses if self.class_weight is None else losses * self.row_weight(labels)

    def row_weight(self, labels: Tensor) -> Tensor:
        """Return the class weight of each row's own class, 1 for background, (R,)."""
        weight = F.pad(self.class_weight, (0, 1), value=1.0)  # (K + 1,)
        return weight[labels.flatten().clamp(0, self.num_classes).long()]

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times the loss summed over rows."""
        total = add(self.weighted_cross_entropy(x, y).sum() for x, y in levels)
        return (total * scale).to(total.dtype)

    @torch.no_grad()
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each row over all its channels; see the base."""
        # Not a subclass's cross_entropy, which may weigh channels or drop them at random.
        return softmax_cross_entropy(logits, labels).view(labels.shape)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax without its background channel, (*, K + 1) -> (*, K)."""
        return upcast(logits).softmax(dim=-1)[..., :-1]

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the channel of the highest logit; the last is background."""
        return logits.argmax(dim=-1)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K + 1,) bias whose softmax gives each class ``prior_prob``; zeros for None.

        Object classes get 0 and background log((1 - K p) / p), which is why p < 1 / K.
        """
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            bias[-1] = math.log(background_probability(self, prior_prob) / prior_prob)
        return bias


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of the last dimension's softmax, 0 where a row is ignored.

    Args:
        logits: (*, C), any floating dtype.
        labels: (*), a channel, or negative where ignored.

    Returns:
        (R,) float32 at least, for the R rows of (*).
    """
    # Overwriting ignored rows, rather than multiplying by zero, keeps an inf in them out of
    # the gradient. An inf elsewhere would be nan: the ends of float32 say the same.
    logits = finite(upcast(logits).masked_fill((labels < 0).unsqueeze(-1), 0.0))
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long().clamp(min=-1),
        ignore_index=-1,
        reduction="none",
    )


# Half of the largest float32, so that the difference of two is one too.
_LARGEST = torch.finfo(torch.float32).max / 2


class _Finite(torch.autograd.Function):
    """A clamp that lets gradients through, which are bounded anyway, without a mask to save."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clamp(-_LARGEST, _LARGEST)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output


def finite(logits: Tensor) -> Tensor:
    """Return ``logits`` with what lies beyond +-1.7e38 moved there; nan stays."""
    return _Finite.apply(logits)


def background_probability(loss: ClassificationLoss, prior_prob: float) -> float:
    """Return 1 - K p, what K classes of probability p each leave to background.

    Raises:
        InputError: when nothing is left, or p is not positive.
    """
    background = 1 - loss.num_classes * prior_prob
    if prior_prob <= 0 or background <= 0:
        raise InputError(
            f"{type(loss).__name__} cannot start {loss.num_classes} classes at probability "
            f"{prior_prob} each: it must lie between 0 and {1 / loss.num_classes:.3g}."
        )
    return background


class BoxLoss(nn.Module):
    """Base class: predicted and true boxes of foreground rows in, one number out.

    Class attributes:
        divides_by_own_count, sums_over_workers: as in :class:`ClassificationLoss`.
        space: what a row of four numbers is: ``"deltas"``, the regression targets as the detector
            encodes them, or ``"boxes"``, corners (x1, y1, x2, y2) in pixels.
    """

    space: ClassVar[str] = "deltas"
    divides_by_own_count: ClassVar[bool] = False
    sums_over_workers: ClassVar[bool] = False

    def forward(self, pred: Tensor, target: Tensor, normalizer: float | Tensor = 1.0) -> Tensor:
        """Return the loss summed over all rows, divided by ``normalizer``.

        Args:
            pred: (N, 4), any floating dtype; arithmetic is in float32 at least.
            target: (N, 4).
            normalizer: a number or a 0-dim tensor; 0 counts as 1.

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
        total = self.loss_sum(upcast(pred), upcast(target))
        return total if self.divides_by_own_count else normalize(total, normalizer)

    def loss_sum(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss summed over the rows of two (N, 4) tensors."""
        raise NotImplementedError
