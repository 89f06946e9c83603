"""Losses as they are usually written: dense targets, masks and loops over bins and classes.

What each loss must equal, and what its time is compared with (``benchmarks/bench_losses.py``).
Letters: R rows, K classes.
"""

import torch
from fvcore.nn import sigmoid_focal_loss_jit
from torch.nn import functional as F


def one_hot_focal(logits, labels, alpha=0.25, gamma=2.0):
    """Focal loss as Detectron2's RetinaNet computes it: valid rows, one-hot, scripted formula."""
    valid = labels >= 0
    num_classes = logits.shape[-1]
    target = F.one_hot(labels[valid], num_classes + 1)[:, :-1].to(logits.dtype)
    return sigmoid_focal_loss_jit(logits[valid], target, alpha=alpha, gamma=gamma, reduction="sum")


def dense_bce(logits, labels):
    """Binary cross entropy with a dense target."""
    target = _target(logits, labels)
    weight = (labels >= 0).to(logits.dtype).unsqueeze(-1)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


class LoopedGHM:
    """GHM-C with a loop over bins, (R, K) masks and (R, K) weights."""

    def __init__(self, bins, momentum):
        self.momentum = momentum
        self.running = [0.0] * bins

    def __call__(self, logits, labels):
        """Return the harmonized loss."""
        target = _target(logits, labels)
        valid = (labels >= 0).unsqueeze(-1).expand_as(logits)
        length = (logits.sigmoid().detach() - target).abs()
        total = max(valid.sum().item(), 1)
        weight = torch.zeros_like(logits)
        occupied = 0
        bins = len(self.running)
        for b in range(bins):
            upper = (b + 1) / bins if b < bins - 1 else 1 + 1e-6
            inside = (length >= b / bins) & (length < upper) & valid
            count = inside.sum().item()
            if count > 0:
                self.running[b] = self.momentum * self.running[b] + (1 - self.momentum) * count
                weight[inside] = total / self.running[b]
                occupied += 1
        weight = weight / max(occupied, 1)
        return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / total


class MaskedEQL:
    """EQL with (R, K) masks for its two conditions."""

    def __init__(self, frequency, tail_share):
        threshold = frequency.quantile(tail_share)
        self.tail = (frequency < threshold).float()

    def __call__(self, logits, labels):
        """Return the sum over rows and classes."""
        self.tail = self.tail.to(logits.device)
        num_classes = logits.shape[-1]
        target = _target(logits, labels)
        foreground = (labels < num_classes).to(logits.dtype).view(-1, 1).expand_as(logits)
        tail = self.tail.view(1, -1).expand_as(logits)
        weight = 1 - foreground * tail * (1 - target)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss * weight).sum()


class DenseEQLv2:
    """EQLv2 with dense targets and weights, and a second look at the gradients after the loss."""

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.sums = None

    def __call__(self, logits, labels):
        """Return the mean over rows."""
        k = self.num_classes
        if self.sums is None:
            self.sums = logits.new_zeros(2, k)
            self.ratio = logits.new_full((k,), 100.0)
        valid = (labels >= 0).to(logits.dtype).unsqueeze(-1)
        target = F.one_hot(labels.clamp(min=0), k + 1).to(logits.dtype)
        share = F.pad(1 / (1 + torch.exp(-12 * (self.ratio - 0.8))), (0, 1), value=1.0)
        weight = ((1 + 4 * (1 - share)) * target + share * (1 - target)) * valid
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        gradient = (logits.detach().sigmoid() - target).abs() * weight
        self.sums[0] += (gradient * target).sum(0)[:k]
        self.sums[1] += (gradient * (1 - target)).sum(0)[:k]
        self.ratio = self.sums[0] / (self.sums[1] + 1e-10)
        return (loss * weight).sum() / len(labels)


class LoopedSeesaw:
    """Seesaw as it is published: labels counted one by one on the host, a (K, K) ratio matrix."""

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.counts = None

    def __call__(self, logits, labels):
        """Return the mean over rows."""
        k = self.num_classes
        if self.counts is None:
            self.counts = logits.new_zeros(k)
        rows = (labels >= 0) & (labels < k)
        for label in labels[rows].unique():
            self.counts[label.item()] += (labels == label.item()).sum()
        counts = self.counts.clamp(min=1)
        ratio = counts.view(1, k) / counts.view(k, 1)
        mitigation = torch.where(ratio < 1, ratio**0.8, torch.ones_like(ratio))
        z, y = logits[rows, :k], labels[rows]
        target = F.one_hot(y, k).to(z.dtype)
        scores = z.detach().softmax(1)
        relative = scores / scores.gather(1, y.view(-1, 1)).clamp(min=0.01)
        compensation = torch.where(relative > 1, relative**2, torch.ones_like(relative))
        factor = mitigation[y] * compensation
        of_class = F.cross_entropy(z + factor.log() * (1 - target), y, reduction="sum")
        valid = labels >= 0
        background = (labels[valid] == k).long()
        objectness = F.cross_entropy(logits[valid, k:], background, reduction="sum")
        return (of_class + objectness) / len(labels)


def _target(logits, labels):
    num_classes = logits.shape[-1]
    target = torch.zeros_like(logits)
    foreground = (labels >= 0) & (labels < num_classes)
    target[torch.arange(len(labels), device=labels.device), labels.clamp(0, num_classes - 1)] = (
        foreground.to(logits.dtype)
    )
    return target
