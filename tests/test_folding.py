"""A folded backbone computes and learns what Detectron2's does, to rounding."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from models import DETECTORS, config

from balanced_det.detectors.folding import FoldedConv2d, fold_frozen_norms


def normalized_backbone(*keys):
    """A ResNet-50-FPN whose frozen normalization is none of the identity."""
    torch.manual_seed(0)
    backbone = build_model(config(DETECTORS["faster"], *keys)).backbone
    randomize(backbone)
    return backbone


def randomize(module):
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.2, 0.6)
            norm.running_var.uniform_(0.5, 2)
            norm.running_mean.normal_()
            norm.bias.normal_()


def output(backbone, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return backbone(torch.randn(2, 3, 96, 128, generator=generator))


def assert_equal(ours, theirs):
    for name, expected in theirs.items():
        # The products of 53 layers are rounded in another order; of 1e-7 each that is 4e-7 at
        # random, and five times as much at worst.
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-6 * scale)


def test_outputs_and_gradients_are_those_of_the_layers_apart():
    stock = normalized_backbone()
    folded = fold_frozen_norms(copy.deepcopy(stock))
    assert sum(isinstance(m, FoldedConv2d) for m in folded.modules()) == 53
    assert_equal(output(folded), output(stock))
    gradients = []
    for backbone in (folded, stock):
        sum(x.square().sum() for x in output(backbone).values()).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        # Gradients come back through as many layers.
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=1e-5 * scale)


def test_checkpoints_fit_both_ways_and_take_effect():
    stock, other = normalized_backbone(), normalized_backbone()
    randomize(other)
    folded = fold_frozen_norms(copy.deepcopy(stock))
    output(folded)  # what is kept from here on must not outlive the next line
    folded.load_state_dict(other.state_dict())
    assert_equal(output(folded), output(other))
    stock.load_state_dict(folded.state_dict())
    assert_equal(output(stock), output(other))


@torch.no_grad()
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_weights_that_change_between_two_inferences_take_effect(amp):
    folded = fold_frozen_norms(normalized_backbone()).eval()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    (name, conv), *_ = (
        (name, m) for name, m in folded.named_modules() if isinstance(m, FoldedConv2d)
    )

    def inferred():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return folded(image)["p2"]

    def anew():
        """What a model that has inferred nothing yet says."""
        state = {key: value.clone() for key, value in folded.state_dict().items()}
        fresh = fold_frozen_norms(normalized_backbone()).eval()
        fresh.load_state_dict(state)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return fresh(image)["p2"]

    def by_data():
        conv.weight.data.mul_(-1)  # leaves no trace but a later change of mode
        folded.eval()

    state = {f"{name}.weight": conv.weight.clone()}
    changes = [lambda: None, lambda: conv.weight.mul_(2), lambda: conv.norm.weight.mul_(2), by_data]
    changes += [lambda: folded.load_state_dict(state, strict=False)]
    for change in changes:
        before = inferred()
        change()
        after = inferred()
        assert torch.equal(after, anew())
        assert torch.equal(after, before) == (change is changes[0])


@torch.no_grad()
def test_memory_that_is_given_out_again_is_not_taken_for_the_weight_of_before():
    # Its normalization is the identity.
    conv = FoldedConv2d(Conv2d(8, 8, 3, norm=FrozenBatchNorm2d(8), bias=False))
    image = torch.randn(1, 8, 5, 5)
    for _ in range(200):
        # As a module exchanges memory that is moved or gets another type. At the second time the
        # memory that the first has freed is free, and is given out in most of the rounds.
        conv.weight.data = torch.randn(8, 8, 3, 3)
        conv.weight.data = torch.randn(8, 8, 3, 3)
        expected = torch.nn.functional.conv2d(image, conv.weight, torch.zeros(8))
        assert torch.equal(conv(image), expected)


def test_inference_under_autocast_leaves_that_without_it_as_it_was():
    folded = fold_frozen_norms(normalized_backbone()).eval()
    with torch.no_grad():
        expected = output(folded)
        with torch.autocast("cpu", torch.bfloat16):
            output(folded)
        found = output(folded)
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@torch.no_grad()
def test_shapes_are_known_without_numbers():
    folded = fold_frozen_norms(normalized_backbone()).eval()
    expected = {name: value.shape for name, value in output(folded).items()}
    found = folded.to("meta")(torch.empty(2, 3, 96, 128, device="meta"))
    assert {name: value.shape for name, value in found.items()} == expected


def test_normalization_that_learns_stays_as_it_is():
    backbone = fold_frozen_norms(normalized_backbone({"MODEL.RESNETS.NORM": "BN"}))
    # The frozen stem and first stage have frozen normalization whatever the others have.
    assert sum(isinstance(m, FoldedConv2d) for m in backbone.modules()) == 11
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules()) == 42


@torch.no_grad()
def test_what_inference_mode_computes_can_be_trained_with():
    backbone = fold_frozen_norms(normalized_backbone())
    with torch.inference_mode():
        output(backbone)
    with torch.enable_grad():
        sum(x.sum() for x in output(backbone).values()).backward()


@pytest.mark.parametrize("name", ["faster", "retinanet"])
def test_every_layout_in_memory_computes_the_same(name):
    torch.manual_seed(0)
    model = build_model(config(DETECTORS[name]))
    randomize(model)
    expected = output(model.backbone)
    last = fold_frozen_norms(model).backbone.to(memory_format=torch.channels_last)
    assert_equal(output(last), expected)
