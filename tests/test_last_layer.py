import pytest
import torch
from torch import nn

from balanced_det.detectors.last_layer import WideConv2d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pair(*args, **kwargs):
    """A convolution of each kind with the same parameters."""
    torch.manual_seed(0)
    plain, wide = nn.Conv2d(*args, **kwargs), WideConv2d(*args, **kwargs)
    wide.load_state_dict(plain.state_dict())
    return plain, wide


def outputs_and_gradients(layer, x, weight_of_output):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(weight_of_output.to(y.dtype))
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


OPTIONS = [
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"padding": 2, "dilation": 2},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": 1, "groups": 2},
]
REFLECT = {"padding": 1, "padding_mode": "reflect"}  # of a single pixel there is nothing to reflect
CASES = [
    *((size, options) for size in [(8, 6), (7, 5)] for options in [*OPTIONS, REFLECT]),
    *(((1, 1), options) for options in OPTIONS),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
@pytest.mark.parametrize("out_channels", [8, 60])
def test_it_is_a_convolution(device, size, options, out_channels):
    plain, wide = (m.double().to(device) for m in pair(4, out_channels, 3, **options))
    x = torch.randn(2, 4, *size, dtype=torch.double, device=device)
    weight = torch.randn_like(plain(x))
    theirs = outputs_and_gradients(plain, x, weight)
    ours = outputs_and_gradients(wide, x, weight)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_it_in_bfloat16(device):
    plain, wide = (m.to(device) for m in pair(4, 60, 3, padding=1))
    x = torch.randn(2, 4, 8, 8, device=device)
    weight = torch.randn(2, 60, 8, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        theirs = outputs_and_gradients(plain, x, weight)
        ours = outputs_and_gradients(wide, x, weight)
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        # Both sum 128 products in float32; each rounds its result to bfloat16.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(trained):
    _, layer = pair(4, 60, 3, padding=1)
    x = torch.randn(2, 4, 8, 8)
    inputs = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == trained)
    layer(x).sum().backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name == trained)


def test_it_is_exported_as_a_convolution():
    _, layer = pair(4, 60, 3, padding=1)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
    assert "_convolution" in str(traced.inlined_graph)
    assert "Python" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), layer(x).detach())
