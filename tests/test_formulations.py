"""Each loss equals its usual formulation, on batches in turn: some keep statistics."""

import pytest
import torch
from formulations import (
    DenseEQLv2,
    LoopedGHM,
    LoopedSeesaw,
    MaskedEQL,
    dense_bce,
    one_hot_focal,
)

from balanced_det.losses import (
    BinaryCrossEntropyLoss,
    EqualizationLoss,
    EqualizationLossV2,
    FocalLoss,
    GHMClassificationLoss,
    SeesawLoss,
)

K = 12
FREQUENCY = torch.logspace(-4, -0.5, K)

FLOAT64, FLOAT32 = 1e-12, 1e-6  # rounding of sums of some thousand terms
# Ours, the usual formulation, by what its sum over rows is divided, and how well they agree.
CASES = {
    "BCE": (BinaryCrossEntropyLoss(K), dense_bce, 1, FLOAT64),
    "focal": (FocalLoss(K), one_hot_focal, 1, FLOAT32),  # fvcore computes in float32
    "GHM-C": (
        GHMClassificationLoss(K, bias_correction=False),
        LoopedGHM(bins=30, momentum=0.75),
        1,
        FLOAT64,
    ),
    "EQL": (
        EqualizationLoss(K, FREQUENCY, tail_share=0.25),
        MaskedEQL(FREQUENCY, 0.25),
        1,
        FLOAT64,
    ),
    "EQLv2": (EqualizationLossV2(K), DenseEQLv2(K), 200, FLOAT32),  # weights are float32
    "Seesaw": (SeesawLoss(K), LoopedSeesaw(K), 200, FLOAT32),  # logs of counts are float32
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_usual_formulation(name):
    ours, theirs, normalizer, rounding = CASES[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits = 2 * torch.randn(200, ours.num_logits, generator=generator, dtype=torch.float64) - 1
        labels = torch.randint(K, (200,), generator=generator)
        labels[torch.rand(200, generator=generator) < 0.5] = K
        if name != "EQL":  # of which the usual formulation ignores no row
            labels[torch.rand(200, generator=generator) < 0.1] = -1
        found, expected = (logits.clone().requires_grad_() for _ in range(2))
        value = ours(found, labels, normalizer)
        value.backward()
        reference = theirs(expected, labels)
        reference.backward()
        torch.testing.assert_close(value, reference.double(), rtol=rounding, atol=0)
        # A gradient is a difference of numbers up to 1, over the normalizer.
        atol = rounding / normalizer
        torch.testing.assert_close(found.grad, expected.grad, rtol=rounding, atol=atol)
