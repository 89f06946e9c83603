"""How much of the classification gradient the rare, common and frequent classes have."""

import functools
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor

from ..criterion import criteria
from ..data.annotations import GROUPS
from ..distributed import sum_over_workers

NAME = "gradient_share"


class LogGradientShare(HookBase):
    """Write each group's share of the gradient to the event storage, for every part with classes.

    The share of a group is the sum of |dL / d logit| over all rows and the group's classes, divided
    by that over all classes: the quantity that the equalization loss (arXiv 2003.05176, Fig. 1) is
    about. A background channel belongs to no group. Of one step a period, over all workers.

    Args:
        groups: K of "r", "c" and "f".
        period: iterations between two entries.
    """

    def __init__(self, groups: list[str], period: int = 20):
        self.groups = groups
        self.period = period
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def before_step(self) -> None:
        """Watch the logits of the steps that are looked at."""
        if (self.trainer.iter + 1) % self.period and self.trainer.iter + 1 < self.trainer.max_iter:
            return
        for name, criterion in criteria(self.trainer.model):
            if "proposal_generator" in name or criterion.num_classes != len(self.groups):
                continue  # a proposal has no class
            device = next(self.trainer.model.parameters()).device
            self._sums[name] = torch.zeros(criterion.num_classes, device=device)
            watch = functools.partial(self._watch, self._sums[name])
            self._handles.append(criterion.classification_loss.register_forward_pre_hook(watch))

    def after_step(self) -> None:
        """Log what was seen, and watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for owner, sums in self._sums.items():
            of_classes = sum_over_workers(sums).tolist()
            total = sum(of_classes)
            if not 0 < total < float("inf"):
                continue  # no row took part, or a gradient overflowed
            for group in GROUPS:
                share = sum(s for s, g in zip(of_classes, self.groups, strict=True) if g == group)
                name = f"{owner}/{NAME}_{group}"
                self.trainer.storage.put_scalar(name, share / total, smoothing_hint=False)
        self._sums = {}

    @staticmethod
    def _watch(sums, _loss, inputs):
        logits = inputs[0]
        for level in logits if isinstance(logits, list | tuple) else [logits]:
            if level.requires_grad and level.numel():
                level.register_hook(functools.partial(LogGradientShare._add, sums))

    @staticmethod
    @torch.no_grad()
    def _add(sums, gradient):
        """Add |gradient| of rows (*, C) to the (K,) sums; the background's channel is not."""
        rows = tuple(range(gradient.ndim - 1))
        sums += torch.linalg.vector_norm(gradient, 1, dim=rows, dtype=torch.float32)[: len(sums)]
