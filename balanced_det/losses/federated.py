"""Federated loss (arXiv 2103.07461, section 5.1; Detectron2's USE_FED_LOSS).

LVIS does not annotate every class in every image, so most negatives are unsure. Only some classes
take part in a batch: those that are labels in it and, up to num_sampled in all, others drawn
without replacement with a probability proportional to n_j^power, n_j being the training images that
hold class j:

    L = sum over rows and the classes that take part of BCE, divided by the number of rows.

Detectron2 draws on each GPU for itself and needs counts that are built in for LVIS alone. Here all
workers share one draw, around the labels of all of them, so that averaged gradients are those of
one process that sees the whole batch; the counts are those of the data; and a class that no
training image holds is never drawn. With K = 1,203 classes and a bias of 0 the first loss is
num_sampled log 2 a row: start with a prior of 0.01.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import shared_uniform, sum_over_workers
from ..errors import InputError
from ..rows import foreground
from .base import CLASSIFICATION_LOSSES, row_labels
from .sigmoid import SigmoidLoss
from .statistic import ClassStatistic


class DrawWeights(ClassStatistic):
    """The log of how likely each class is drawn, from how many training images hold it.

    Args:
        num_classes: K.
        class_counts: (K,), or None for a model that is built to load a checkpoint.
        power: of the counts.
    """

    class_counts: Tensor
    log_weight: Tensor

    def __init__(
        self, num_classes: int, class_counts: Sequence[float] | Tensor | None, power: float
    ):
        super().__init__(num_classes, class_counts)
        self.power = power
        self.register_buffer("log_weight", torch.zeros(num_classes), persistent=False)
        self.derive_if_known()

    def derive(self) -> None:
        """Take the logs; a count of 0 gives -inf."""
        self.log_weight.copy_(self.power * self.class_counts.log())
        self.log_weight[self.class_counts == 0] = -torch.inf  # also for a power of 0


@CLASSIFICATION_LOSSES.register
class FederatedLoss(SigmoidLoss):
    """Federated loss over K sigmoids; see the module's docstring.

    Args:
        num_classes: K.
        class_counts: (K,) training images that hold each class, or None for a model that is built
            to load a checkpoint.
        num_sampled: classes that take part in a batch, unless more are labels in it.
        power: of the counts; 0 draws all classes alike.
    """

    needs = ("class_counts",)
    sums_over_workers = True
    refused_on = {"RPN": "it draws classes; objectness has one"}
    neutral = {"num_sampled": 1_000_000}

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[float] | Tensor | None,
        num_sampled: int = 50,
        power: float = 0.5,
    ):
        super().__init__(num_classes)
        if num_sampled < 1:
            raise InputError(f"FederatedLoss: num_sampled must be at least 1, not {num_sampled}.")
        if not power >= 0:
            raise InputError(f"FederatedLoss: power must be at least 0, not {power}.")
        self.num_sampled = num_sampled
        self.draw = DrawWeights(num_classes, class_counts, power)

    @property
    def class_counts(self) -> Tensor:
        """The (K,) class counts, NaN while unknown."""
        return self.draw.class_counts

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return weight 1 for the classes that take part and 0 for the others."""
        return {"weight": self.taking_part(row_labels(levels)).float()}  # (K,)

    @torch.no_grad()
    def taking_part(self, labels: Tensor) -> Tensor:
        """Return the (K,) bool tensor of the classes that take part, for (R,) labels.

        Gumbel's trick: the num_sampled largest of log weight + Gumbel noise are a draw without
        replacement. Labels of the batch come before all, so no count of them is needed, for which
        the host would wait.
        """
        self.draw.check_known()
        # Rows without a class mark a place past the last class.
        index = labels.long().where(foreground(labels, self.num_classes), self.num_classes)
        marked = torch.zeros(self.num_classes + 1, device=labels.device).index_fill_(0, index, 1.0)
        is_label = (sum_over_workers(marked) if self.training else marked)[:-1] > 0
        uniform = shared_uniform(self.num_classes, labels.device, shared=self.training)
        gumbel = -(-uniform.clamp(min=1e-30).log()).clamp(min=1e-30).log()
        rank = (self.draw.log_weight + gumbel).masked_fill(is_label, torch.inf)
        value, first = rank.topk(min(self.num_sampled, self.num_classes))
        # Classes without images have rank -inf; with few classes they are among the first too.
        return is_label.index_fill(0, first, True) & ((rank > -torch.inf) | is_label)
