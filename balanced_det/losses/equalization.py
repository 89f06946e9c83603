"""Equalization losses (EQL, SEQL; arXiv 2003.05176).

A tail class sees few positives, and every positive of another class is one more negative for it.
EQL drops those negatives, so that they cannot suppress the class:

    L = -sum_j w_j log(p_j'),  p_j' = p_j if y_j = 1 else 1 - p_j,  p = sigmoid(z)        (Eq. 3)
    w_j = 1 - E(r) T(f_j) (1 - y_j)                                                      (Eq. 4)

where E(r) is 1 on foreground rows and 0 on background rows, f_j is the fraction of training images
that hold class j, and T(f) is 1 where f < tail_threshold. The sum is divided by the number of
rows, which is the normalizer that a region head passes. The official code
(tztztztztz/eql.detectron2) is the same.

SEQL is the form for softmax classification:

    L = -log(exp(z_y) / sum_k w_k exp(z_k))                                              (Eq. 6, 7)
    w_k = 1 - beta T(f_k) (1 - y_k),  beta ~ Bernoulli(drop_probability)                 (Eq. 8)

The paper does not say what beta is drawn for; its authors' reference (issue 9 of the repository
above) draws one for every (row, class), and so do we. It sets dropped logits to -1e7, we to -inf;
the true class is never dropped, so the sum is never empty. The paper has no background class; ours
is channel K, which is never tail. Background rows drop tail classes like any other row, because
SEQL has no E(r).
"""

import logging

import torch
from torch import nn

from ..errors import InputError
from .base import CLASSIFICATION_LOSSES, SigmoidLoss, SoftmaxLoss

logger = logging.getLogger(__name__)


class TailClasses(nn.Module):
    """Which of K classes are the tail, from their frequency.

    Args:
        num_classes: K.
        class_frequency: (K,) fractions of the training images that hold each class, or None for a
            model that is built to load a checkpoint, which brings them.
        tail_threshold: T(f) = 1 where f < tail_threshold.
        tail_share: a share of classes in (0, 1) that replaces the threshold when given: the rarest
            round(tail_share K) classes are the tail; of equally rare classes those of
            smaller index come first.

    Attributes:
        class_frequency: (K,) buffer, saved with the checkpoint; NaN while unknown.
    """

    def __init__(self, num_classes, class_frequency, tail_threshold, tail_share=None):
        super().__init__()
        if tail_share is not None and not 0 < tail_share < 1:
            raise InputError(f"tail_share must lie between 0 and 1, exclusive, not {tail_share}.")
        self.tail_threshold = tail_threshold
        self.tail_share = tail_share
        self.register_buffer("class_frequency", torch.full((num_classes,), torch.nan))
        # Derived from the frequencies, hence not saved.
        self.register_buffer("_mask", torch.zeros(num_classes, dtype=torch.bool), persistent=False)
        self.register_buffer("_negative_weight", torch.ones(num_classes), persistent=False)
        self._known = False
        if class_frequency is not None:
            self.class_frequency.copy_(_checked_frequency(class_frequency, num_classes))
            self._find_tail()
        self.register_load_state_dict_post_hook(TailClasses._after_load)

    def mask(self):
        """Return the (K,) bool tensor that is True for tail classes.

        Raises:
            InputError: while the frequencies are unknown.
        """
        self._check_known()
        return self._mask

    def negative_weight(self):
        """Return the (K,) float32 tensor 1 - T(f): 0 for tail classes, 1 for the others.

        Raises:
            InputError: while the frequencies are unknown.
        """
        self._check_known()
        return self._negative_weight

    def _check_known(self):
        if not self._known:
            raise InputError(
                "An equalization loss needs class_frequency to train: give the fraction of "
                "training images that hold each class, or load a checkpoint that has it."
            )

    @staticmethod
    def _after_load(module, incompatible_keys):
        # A host read is free of harm here: loading is not training.
        if not module.class_frequency.isnan().any():
            module._find_tail()

    def _find_tail(self):
        frequency, num_classes = self.class_frequency, len(self.class_frequency)
        if self.tail_share is None:
            tail = frequency < self.tail_threshold
            setting = f"tail_threshold {self.tail_threshold}"
        else:
            tail = torch.zeros_like(self._mask)
            rarest_first = frequency.argsort(stable=True)
            tail[rarest_first[: round(self.tail_share * num_classes)]] = True
            setting = f"tail_share {self.tail_share}"
        count = int(tail.sum())
        if count in (0, num_classes):
            logger.warning(
                "%s makes %d of %d classes tail classes (class frequencies are %.3g to %.3g).",
                setting,
                count,
                num_classes,
                frequency.min(),
                frequency.max(),
            )
        self._mask.copy_(tail)
        self._negative_weight.copy_(~tail)
        self._known = True


def _checked_frequency(class_frequency, num_classes):
    frequency = torch.as_tensor(class_frequency, dtype=torch.float32)
    if frequency.shape != (num_classes,):
        raise InputError(
            f"class_frequency has shape {tuple(frequency.shape)}, but there are {num_classes} "
            "classes."
        )
    # Written so that NaN fails as well.
    if not ((frequency >= 0) & (frequency <= 1)).all():
        raise InputError("class_frequency holds a value that is not a fraction between 0 and 1.")
    return frequency


@CLASSIFICATION_LOSSES.register
class EqualizationLoss(SigmoidLoss):
    """EQL over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        class_frequency: (K,) fraction of training images that hold each class, or None for a model
            that is built to load a checkpoint.
        tail_threshold: classes with a smaller frequency are the tail (lambda in the paper; 0.00177
            for LVIS v0.5).
        tail_share: replaces ``tail_threshold``: the rarest round(tail_share K) classes are tail.

    Raises:
        InputError: for frequencies of another length than K or outside [0, 1]; in ``forward``
            while they are unknown. A tail of no class, or of all, is logged as a warning.
    """

    needs = ("class_frequency",)

    def __init__(self, num_classes, class_frequency, tail_threshold=0.00177, tail_share=None):
        super().__init__(num_classes)
        self.tail = TailClasses(num_classes, class_frequency, tail_threshold, tail_share)

    @property
    def class_frequency(self):
        """The (K,) class frequencies, NaN while unknown."""
        return self.tail.class_frequency

    def tables(self, levels):
        """Return the weight of y = 0 on foreground rows; everything else keeps weight 1."""
        return {"negative_weight": self.tail.negative_weight()}  # (K,)


@CLASSIFICATION_LOSSES.register
class SoftmaxEqualizationLoss(SoftmaxLoss):
    """SEQL over K + 1 channels; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 1 logits.
        class_frequency: as in :class:`EqualizationLoss`.
        tail_threshold: as in :class:`EqualizationLoss`.
        drop_probability: P(beta = 1), the probability to drop a tail class from a row's softmax,
            which keeps the row from suppressing it (gamma in the paper); 0 is cross entropy.
        tail_share: as in :class:`EqualizationLoss`.

    Raises:
        InputError: as :class:`EqualizationLoss`, and for a probability outside [0, 1].
    """

    needs = ("class_frequency",)

    def __init__(
        self,
        num_classes,
        class_frequency,
        tail_threshold=0.00177,
        drop_probability=0.9,
        tail_share=None,
    ):
        super().__init__(num_classes)
        if not 0 <= drop_probability <= 1:
            raise InputError(f"drop_probability must be in [0, 1], not {drop_probability}.")
        self.tail = TailClasses(num_classes, class_frequency, tail_threshold, tail_share)
        self.drop_probability = drop_probability

    @property
    def class_frequency(self):
        """The (K,) class frequencies, NaN while unknown."""
        return self.tail.class_frequency

    def cross_entropy(self, logits, labels):
        """Return every row's cross entropy over the channels that were not dropped, (R,)."""
        channel = torch.arange(self.num_logits, device=logits.device)
        tail = nn.functional.pad(self.tail.mask(), (0, 1))  # (K + 1,), background is never tail
        beta = torch.rand(logits.shape, device=logits.device) < self.drop_probability
        dropped = beta & tail & (channel != labels.unsqueeze(-1))  # (*lead, K + 1)
        return super().cross_entropy(logits.masked_fill(dropped, -torch.inf), labels)
