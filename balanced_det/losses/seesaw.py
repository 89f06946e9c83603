"""Seesaw loss (arXiv 2008.10032): a softmax in which frequent classes push rare ones less.

K class logits and two of objectness, [foreground, background]. The loss is

    L = CE(objectness, all rows) + CE(class logits, foreground rows),

each summed and divided by the number of rows, where on a row of class i the logit of j != i is
raised by log(M_ij C_ij):

    mitigation    M_ij = (m_j / m_i)^p where m_j < m_i, else 1                           (Eq. 5)
    compensation  C_ij = (s_j / s_i)^q where s_j > s_i, else 1                           (Eq. 6)

m_j counts the labels of sampled rows since the start, this batch included, and is at least 1; s is
the softmax over the K classes, without gradient, and s_i at least 0.01. In logs both are one line
for a whole matrix of rows and classes,

    p min(log m_j - log m_i, 0) + q max(log s_j - max(log s_i, log 0.01), 0),

which is 0 at j = i. Class j scores softmax_K(z)_j softmax_2(objectness)_foreground.

The official code (mmdetection) counts on each worker for itself and loops over the labels on the
host; here counts are of all workers, float64, and saved with the model. It is used with a cosine
classifier of scale 20 and repeat-factor sampling.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed import sum_over_workers
from ..errors import InputError
from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, ClassificationLoss, add, upcast
from .softmax import background_probability, finite, softmax_cross_entropy

_LEAST_SCORE = 0.01


@CLASSIFICATION_LOSSES.register
class SeesawLoss(ClassificationLoss):
    """Seesaw loss over K + 2 logits; see the module's docstring.

    Args:
        num_classes: K; the loss has K + 2 logits.
        p: strength of mitigation, >= 0.
        q: strength of compensation, >= 0.

    Attributes:
        label_counts: (K,) float64 buffer, m before its minimum of 1.
    """

    sums_over_workers = True
    scores_are_a_distribution = True
    refused_on = {"RPN": "it has two logits beside the classes; RPN predicts one logit an anchor"}
    neutral = {"p": 0.0, "q": 0.0}
    label_counts: Tensor

    def __init__(self, num_classes: int, p: float = 0.8, q: float = 2.0):
        super().__init__(num_classes, num_logits=num_classes + 2)
        if not (p >= 0 and q >= 0):
            raise InputError(f"SeesawLoss: p and q must be at least 0, not {p} and {q}.")
        self.p = p
        self.q = q
        self.register_buffer("label_counts", torch.zeros(num_classes, dtype=torch.float64))

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times both cross entropies summed over rows."""
        counts = add(self._count(y) for _, y in levels)
        if self.training:
            self.label_counts += sum_over_workers(counts)
            counts = self.label_counts
        else:
            counts = self.label_counts + counts
        log_counts = counts.clamp(min=1).log().float()  # (K,)
        total = add(self._losses_sum(x, y, log_counts) for x, y in levels)
        return (total * scale).to(total.dtype)

    def _losses_sum(self, logits: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
        """Return both cross entropies summed over the rows of a level."""
        classes, class_label, objectness, is_object = self._parts(logits, labels)
        if classes.device.type == "cpu":  # where nobody waits for their number, objects alone
            rows = (class_label >= 0).nonzero().squeeze(1)
            classes, class_label = classes[rows], class_label[rows]
        raised = classes + self.margins(classes.detach(), class_label, log_counts)
        losses = F.cross_entropy(raised, class_label, ignore_index=-1, reduction="none")
        if self.class_weight is not None:
            losses = losses * self.class_weight[class_label.clamp(min=0)]
        return losses.sum() + softmax_cross_entropy(objectness, is_object).sum()

    def _count(self, labels: Tensor) -> Tensor:
        labels = labels.flatten().long()
        index = labels.where(foreground(labels, self.num_classes), self.num_classes)
        counts = self.label_counts.new_zeros(self.num_classes + 1)
        # Whole numbers in float64: exact in any order.
        return counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))[:-1]

    def _parts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the class logits and the class of each row, and the same of objectness.

        (R, K), finite; (R,), -1 where the row is no object; (R, 2); and (R,), 0 an object, 1
        background, -1 ignored.
        """
        logits, labels = logits.reshape(-1, self.num_logits), labels.flatten().long()
        classes, objectness = logits.split([self.num_classes, 2], dim=-1)
        is_foreground = foreground(labels, self.num_classes)
        class_label = labels.where(is_foreground, -1)
        is_object = (~is_foreground).long().where(labels >= 0, -1)
        # As in softmax_cross_entropy.
        classes = finite(upcast(classes).masked_fill(~is_foreground.unsqueeze(-1), 0.0))
        return classes, class_label, objectness, is_object

    @torch.no_grad()
    def margins(self, logits: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
        """Return log(M_ij C_ij) for rows (R, K) of the classes (R,); of no meaning where < 0."""
        own = labels.clamp(min=0).unsqueeze(-1)  # (R, 1)
        log_scores = logits.log_softmax(dim=-1)
        own_score = log_scores.gather(1, own).clamp_(min=math.log(_LEAST_SCORE))
        compensation = log_scores.sub_(own_score).clamp_(min=0)
        mitigation = (log_counts - log_counts[own]).clamp_(max=0)
        return compensation.mul_(self.q).add_(mitigation, alpha=self.p)

    @torch.no_grad()
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropies of objectness and, of an object, its class; see the base."""
        classes, class_label, objectness, is_object = self._parts(logits, labels)
        losses = softmax_cross_entropy(classes, class_label)
        return (losses + softmax_cross_entropy(objectness, is_object)).view(labels.shape)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the class's softmax times that of foreground, (*, K + 2) -> (*, K)."""
        classes, objectness = upcast(logits).split([self.num_classes, 2], dim=-1)
        return classes.softmax(dim=-1) * objectness.softmax(dim=-1)[..., :1]

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class of the highest score, or K where background's is higher."""
        background = upcast(logits[..., -2:]).softmax(dim=-1)[..., 1:]
        return torch.cat([self.scores(logits), background], dim=-1).argmax(dim=-1)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K + 2,) bias that scores each class ``prior_prob``; zeros for None."""
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            background = background_probability(self, prior_prob)
            bias[-1] = math.log(background / (1 - background))
        return bias
