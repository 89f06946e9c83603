"""Optimal prior, class-adaptive thresholds and the guided scale (arXiv 1909.04868)."""

import math

import pytest
import torch
from distributed import run_workers

from balanced_det.errors import InputError
from balanced_det.losses import BinaryCrossEntropyLoss, guided_scale
from balanced_det.priors import class_adaptive_thresholds, optimal_prior, prior_bias


@pytest.mark.parametrize(
    "num_foreground, num_samples, num_classes", [(3, 500, 4), (1, 2000, 1), (40, 100, 2)]
)
def test_initial_loss_is_least_at_the_optimal_prior(num_foreground, num_samples, num_classes):
    loss = BinaryCrossEntropyLoss(num_classes)
    labels = torch.full((num_samples,), num_classes)
    labels[:num_foreground] = torch.arange(num_foreground) % num_classes

    def initial_loss(prior):
        bias = torch.tensor(prior_bias(prior), dtype=torch.float64)
        return loss(bias.expand(num_samples, num_classes), labels, 1).item()

    best = optimal_prior(num_foreground, num_samples, num_classes)
    least = initial_loss(best)
    count = num_samples * num_classes
    expected = -num_foreground * math.log(best) - (count - num_foreground) * math.log1p(-best)
    # Float64 rounding of a sum of at most 2,000 terms.
    assert least == pytest.approx(expected, rel=1e-11)
    for factor in (0.01, 0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 1.5, 2.0):
        assert initial_loss(best * factor) > least


def test_prior_bias_gives_the_prior():
    for prior in (1.113e-5, 0.01, 0.5, 0.99):
        # Float64 rounding.
        assert 1 / (1 + math.exp(-prior_bias(prior))) == pytest.approx(prior, rel=1e-12)


@pytest.mark.parametrize("prior", [0, 1, -0.1, 1.5, math.nan])
def test_prior_outside_its_range_is_refused(prior):
    with pytest.raises(InputError, match=str(prior)):
        prior_bias(prior)


@pytest.mark.parametrize("counts", [(1, 0, 3), (5, 4, 3), (-1, 4, 3), (1, 4, 0)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(InputError, match="count|class"):
        optimal_prior(*counts)


def test_class_adaptive_thresholds_follow_the_class_counts():
    thresholds = class_adaptive_thresholds(2, 1000, [6, 0, 2])
    # Rounded once to float32.
    assert thresholds.tolist() == pytest.approx([0.0015, 0, 0.0005], rel=1e-7)
    assert thresholds.sum().item() == pytest.approx(0.002, rel=1e-6)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [[1, 2]], [1, math.nan]])
def test_impossible_class_counts_are_refused(counts):
    with pytest.raises(InputError, match="box counts"):
        class_adaptive_thresholds(2, 1000, counts)


def test_guided_scale_gives_the_classification_loss_the_size_of_the_box_loss():
    loss_cls = torch.tensor(4.0, requires_grad=True)
    loss_box = torch.tensor(0.5, requires_grad=True)
    scale = guided_scale(loss_cls * 1, loss_box * 1)
    assert scale == 0.125
    assert not scale.requires_grad and scale.dtype == torch.float32


@pytest.mark.parametrize(
    "loss_cls, loss_box, expected",
    [
        (3.0, 0.0, 1.0),  # no foreground row
        (0.0, 0.0, 1.0),
        (0.0, 2.0, 1.0),  # nothing to scale
        (1e-42, 1.0, torch.finfo(torch.float32).max),  # the quotient would overflow
    ],
)
def test_guided_scale_is_always_finite(loss_cls, loss_box, expected):
    assert guided_scale(torch.tensor(loss_cls), torch.tensor(loss_box)) == expected


def scale_on_worker(rank):
    losses = [(6.0, 0.0), (2.0, 1.0)][rank]  # only the second worker has foreground rows
    without_foreground = guided_scale(torch.tensor(1.0 + rank), torch.tensor(0.0))
    return guided_scale(*map(torch.tensor, losses)), without_foreground


def test_guided_scale_is_one_number_on_all_workers():
    for scale, without_foreground in run_workers(scale_on_worker):
        assert scale == 1.0 / 8.0
        assert without_foreground == 1
