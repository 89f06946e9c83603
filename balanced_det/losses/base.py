"""The contract of classification and box losses, and the two families of classification losses.

A loss sees rows and Detectron2's labels: ``0 … K-1`` an object class, ``K`` background, ``-1``
ignored. It owns its formula, the number of channels it needs and how channels become scores; the
detector owns the normalizer. One method lives in one file beside this one.
"""

import functools
import math
import operator

import torch
from torch import nn
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

    Attributes:
        num_classes: K, the number of object classes.
        num_logits: channels of a row; the detector sizes its last layer by it.
        needs: names of the constructor's arguments that are counted in the training set:
            "class_frequency" (K,) or "class_counts" (K,).
        refused_on: {name of a part: why the method cannot work on it}.
        sampled_rows_warning: why the method does badly on the few rows that a sampler leaves of a
            region head; None where it does not.
        scores_rise_with_logits: every score is one and the same function of its own logit, and
            never falls where that rises. Inference then ranks logits.

    A subclass implements :meth:`scaled_sum`, :meth:`row_losses`, :meth:`scores` and
    :meth:`initial_bias`. What it keeps between steps it keeps in buffers, so that a checkpoint
    holds it.
    """

    needs = ()
    refused_on = {}
    sampled_rows_warning = None
    scores_rise_with_logits = False

    def __init__(self, num_classes, num_logits):
        super().__init__()
        if num_classes < 1:
            raise InputError(f"{type(self).__name__} needs at least one class, not {num_classes}.")
        self.num_classes = num_classes
        self.num_logits = num_logits

    def forward(self, logits, labels, normalizer, overwrite_logits=False):
        """Return the loss summed over rows labelled >= 0, divided by ``normalizer``.

        Args:
            logits: (*lead, num_logits), any strides and any floating dtype, or a list of such
                tensors, one a pyramid level. Arithmetic is in float32 at least.
            labels: (*lead), long, or the list of them: 0 … K-1, K for background, -1 for ignored.
                Rows labelled -1 get exactly zero gradient.
            normalizer: a number or a 0-dim tensor; 0 counts as 1.
            overwrite_logits: the caller owns ``logits`` and reads it no more, so a loss may put the
                gradient into the same memory. A loss that gains nothing from it ignores it.

        Returns:
            A 0-dim tensor; without any row, a zero that backpropagates.

        Raises:
            InputError: when shapes do not fit.
        """
        levels = self._levels(logits, labels)
        return self.scaled_sum(levels, reciprocal(normalizer), overwrite_logits)

    def scaled_sum(self, levels, scale, overwrite_logits):
        """Return ``scale``, a number or 0-dim tensor, times the sum over all rows.

        ``levels`` is a list of (logits, labels) pairs of the shapes that :meth:`forward` takes.
        """
        raise NotImplementedError

    def row_losses(self, logits, labels):
        """Return how wrong each row is, for samplers that pick rows by their loss.

        It is the plain cross entropy of the family, without the weights of the method: those say
        how a row that takes part is trained on, not whether it is a hard one.

        Args:
            logits: (*lead, num_logits), as in :meth:`forward`.
            labels: (*lead).

        Returns:
            (*lead), float32 at least and without gradient; 0 where a row is ignored.
        """
        raise NotImplementedError

    def scores(self, logits):
        """Return the probability of every object class, (*lead, num_logits) -> (*lead, K)."""
        raise NotImplementedError

    def initial_bias(self, prior_prob=None):
        """Return the (num_logits,) bias that starts each object class at ``prior_prob``.

        ``None`` means a bias of zero. Raises InputError for a probability that cannot be had.
        """
        raise NotImplementedError

    def _levels(self, logits, labels):
        if isinstance(logits, torch.Tensor):
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
        return list(zip(logits, labels))


class SigmoidLoss(ClassificationLoss):
    """A loss of K independent sigmoids: one pass of :func:`balanced_det.ops.sigmoid_loss` a level.

    A subclass is a set of small tables (:meth:`tables`); logits are read where they lie, never
    concatenated.
    """

    scores_rise_with_logits = True

    def __init__(self, num_classes):
        super().__init__(num_classes, num_logits=num_classes)

    def tables(self, levels):
        """Return the keyword arguments of ``sigmoid_loss`` that make the method."""
        return {}

    def scaled_sum(self, levels, scale, overwrite_logits):
        """Return ``scale`` times the loss summed over rows and classes."""
        remaining = None
        if any(x.dtype == torch.float16 for x, _ in levels):
            scale, remaining = _FLOAT16_SCALE, scale / _FLOAT16_SCALE
        options = dict(self.tables(levels), scale=scale, overwrite_logits=overwrite_logits)
        total = add(sigmoid_loss(x, y, **options) for x, y in levels)
        return total if remaining is None else total * remaining

    @torch.no_grad()
    def row_losses(self, logits, labels):
        """Return the binary cross entropy of each row summed over its classes; see the base."""
        # -log(1 - p) for every class; for the true class -log(p), which is smaller by the logit.
        x = upcast(logits)
        true_class = labels.clamp(0, self.num_classes - 1).long().unsqueeze(-1)
        is_foreground = foreground(labels, self.num_classes)
        losses = F.softplus(x).sum(dim=-1)
        losses = losses - x.gather(-1, true_class).squeeze(-1).where(is_foreground, 0.0)
        return losses.where(labels >= 0, 0.0)

    def scores(self, logits):
        """Return sigmoid(logits), (*lead, K) -> (*lead, K)."""
        return upcast(logits).sigmoid()

    def initial_bias(self, prior_prob=None):
        """Return the (K,) bias whose sigmoid is ``prior_prob``; zeros for None."""
        bias = 0.0 if prior_prob is None else prior_bias(prior_prob)
        return torch.full((self.num_logits,), bias)


class SoftmaxLoss(ClassificationLoss):
    """A loss of one softmax over K + 1 channels, background last."""

    def __init__(self, num_classes):
        super().__init__(num_classes, num_logits=num_classes + 1)

    def cross_entropy(self, logits, labels):
        """Return the cross entropy of every row, 0 where it is ignored.

        Args:
            logits: (*lead, K + 1).
            labels: (*lead), long.

        Returns:
            (R,) for the R rows of ``lead``.
        """
        # Overwriting ignored rows, rather than multiplying by zero, keeps an inf in them out of
        # the gradient.
        logits = upcast(logits).masked_fill((labels < 0).unsqueeze(-1), 0.0)
        return F.cross_entropy(
            logits.reshape(-1, self.num_logits),
            labels.reshape(-1).long(),
            ignore_index=-1,
            reduction="none",
        )

    def scaled_sum(self, levels, scale, overwrite_logits):
        """Return ``scale`` times the loss summed over rows."""
        total = add(self.cross_entropy(x, y).sum() for x, y in levels)
        return (total * scale).to(total.dtype)

    @torch.no_grad()
    def row_losses(self, logits, labels):
        """Return the cross entropy of each row over all its channels; see the base."""
        # Not a subclass's cross_entropy, which may weigh channels or drop them at random.
        return SoftmaxLoss.cross_entropy(self, logits, labels).view(labels.shape)

    def scores(self, logits):
        """Return the softmax without its background channel, (*lead, K + 1) -> (*lead, K)."""
        return upcast(logits).softmax(dim=-1)[..., :-1]

    def initial_bias(self, prior_prob=None):
        """Return the (K + 1,) bias whose softmax gives each class ``prior_prob``; zeros for None.

        Object classes get 0 and background log((1 - K p) / p), which is why p < 1 / K.
        """
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            background = 1 - self.num_classes * prior_prob
            if prior_prob <= 0 or background <= 0:
                raise InputError(
                    f"{type(self).__name__} cannot start {self.num_classes} classes at probability "
                    f"{prior_prob} each: it must lie between 0 and {1 / self.num_classes:.3g}."
                )
            bias[-1] = math.log(background / prior_prob)
        return bias


class BoxLoss(nn.Module):
    """Base class: predicted and true boxes of foreground rows in, one number out.

    Attributes:
        space: what a row of four numbers is: ``"deltas"``, the regression targets as the detector
            encodes them, or ``"boxes"``, corners (x1, y1, x2, y2) in pixels.
    """

    space = "deltas"

    def forward(self, pred, target, normalizer=1.0):
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
        return normalize(self.loss_sum(upcast(pred), upcast(target)), normalizer)

    def loss_sum(self, pred, target):
        """Return the loss summed over the rows of two (N, 4) tensors."""
        raise NotImplementedError
