"""Box losses: what all keep, references for each, and the shape of balanced L1."""

import math

import fvcore.nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_det.errors import InputError
from balanced_det.losses import BOX_LOSSES, BalancedL1Loss, GIoULoss, SmoothL1Loss, balanced_l1_loss

each_loss = pytest.mark.parametrize("name", BOX_LOSSES.names())

# Errors of every size a regression sees; beta from a hundredth of a stride to many pixels.
alphas = st.floats(0.1, 2.0)
gammas = st.floats(0.1, 5.0)
betas = st.floats(0.01, 20.0)


def make_boxes(num_rows=12, dtype=torch.float32):
    """Pairs of boxes, corners in order; some do not overlap."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, num_rows, 4, generator=generator, dtype=torch.float64)
    corners[..., 2:] = corners[..., :2] + 0.1 + corners[..., 2:] / 2
    return corners.to(dtype).unbind()


def gradient_of(x, **parameters):
    x = x.detach().requires_grad_()
    balanced_l1_loss(x, torch.zeros_like(x), **parameters).backward()
    return x.grad


@each_loss
def test_gradient_is_the_derivative(name):
    loss = BOX_LOSSES.get(name)().eval()  # GHM would count each of gradcheck's evaluations
    pred, target = make_boxes(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, 3.0), pred.requires_grad_())


@each_loss
def test_no_row_gives_a_zero_that_backpropagates(name):
    loss = BOX_LOSSES.get(name)()
    for normalizer in (0, 1.0, torch.tensor(0)):
        pred = torch.zeros(0, 4, requires_grad=True)
        value = loss(pred, torch.zeros(0, 4), normalizer)
        value.backward()
        assert value == 0 and pred.grad.shape == (0, 4)


@each_loss
def test_equal_boxes_have_no_loss_and_a_finite_gradient(name):
    loss = BOX_LOSSES.get(name)()
    pred = make_boxes()[0].requires_grad_()
    value = loss(pred, pred.detach(), 1.0)
    value.backward()
    # GIoU's 1e-7 in the denominators leaves about that relative to areas of 0.1, for 12 boxes.
    assert value.item() == pytest.approx(0, abs=1e-4)
    assert pred.grad.isfinite().all()


@each_loss
def test_half_precision_is_summed_in_float32(name):
    loss = BOX_LOSSES.get(name)().eval()
    pred, target = (x.bfloat16() for x in make_boxes())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(pred, target, 3.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(pred.float(), target.float(), 3.0))


@each_loss
def test_shapes_that_do_not_fit_are_refused(name):
    loss = BOX_LOSSES.get(name)()
    for pred, target in [((3, 4), (2, 4)), ((3, 5), (3, 5)), ((4,), (4,))]:
        with pytest.raises(InputError, match=name):
            loss(torch.zeros(pred), torch.zeros(target))


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_smooth_l1_equals_fvcore(beta):
    pred, target = make_boxes(dtype=torch.float64)
    expected = fvcore.nn.smooth_l1_loss(pred, target, beta, reduction="sum")
    # Float64 rounding of 48 terms.
    assert SmoothL1Loss(beta)(pred, target).item() == pytest.approx(expected.item(), rel=1e-14)


def test_giou_equals_fvcore():
    pred, target = make_boxes(dtype=torch.float64)
    assert GIoULoss.space == "boxes"
    expected = fvcore.nn.giou_loss(pred, target, reduction="none")
    assert (expected > 1).any() and (expected < 1).any()  # apart, and overlapping
    # Float64 rounding of 12 terms.
    value = GIoULoss()(pred, target, normalizer=4)
    assert value.item() == pytest.approx(expected.sum().item() / 4, rel=1e-14)


@settings(deadline=None)  # a slow machine is no failure
@given(alpha=alphas, gamma=gammas, beta=betas)
def test_balanced_l1_gradient_is_its_definition(alpha, gamma, beta):
    b = math.expm1(gamma / alpha)
    # Points below, at, around and beyond beta, and both signs.
    size = beta * torch.tensor([0, 1e-6, 0.01, 0.3, 0.999, 1, 1.001, 2, 50], dtype=torch.float64)
    below = alpha * torch.log1p(b * size / beta)
    expected = torch.where(size < beta, below, torch.full_like(size, gamma))
    for sign in (1, -1):
        gradient = gradient_of(sign * size, alpha=alpha, gamma=gamma, beta=beta)
        # Float64 rounding; autograd reaches the definition by a difference of terms of up to
        # gamma in size, b c ln(b c + 1) and c.
        torch.testing.assert_close(gradient, sign * expected, rtol=1e-10, atol=1e-13 * gamma)


@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_balanced_l1_as_published_divides_inside_the_logarithm_only(beta):
    size = torch.tensor([0, 1e-4, 0.03, 0.1, 0.109, 0.111, 0.5, 0.99, 1.01, 3], dtype=torch.float64)
    found = balanced_l1_loss(-size, 0 * size, beta=beta, reduction="none", as_published=True)
    b = math.e**3 - 1
    expected = [
        0.5 / b * (b * x + 1) * math.log(b * x / beta + 1) - 0.5 * x
        if x < beta
        else 1.5 * x + 1.5 / b - 0.5 * beta
        for x in size.tolist()
    ]
    # Float64 rounding of terms of at most 5.
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    # At no error the slope is alpha (1 / beta - 1), where the paper has none.
    slope = gradient_of(torch.tensor([1e-12], dtype=torch.float64), beta=beta, as_published=True)
    assert slope.item() == pytest.approx(0.5 * (1 / beta - 1), abs=1e-9)
    same = balanced_l1_loss(-size, 0 * size, beta=beta, reduction="none")
    assert torch.allclose(found, same, rtol=1e-12, atol=0) == (beta == 1)


@settings(deadline=None)  # a slow machine is no failure
@given(alpha=alphas, gamma=gammas, beta=betas)
def test_balanced_l1_is_smooth_and_bounded(alpha, gamma, beta):
    parameters = {"alpha": alpha, "gamma": gamma, "beta": beta}
    x = torch.linspace(-3 * beta, 3 * beta, 6001, dtype=torch.float64)
    gradient = gradient_of(x, **parameters)
    assert gradient_of(torch.zeros(1), **parameters) == 0
    # Float64 rounding of alpha ln(b + 1) = gamma.
    assert gradient.abs().max() <= gamma * (1 + 1e-12)
    # The slope of the gradient is steepest at zero error, alpha b / beta: no step anywhere is
    # larger than it allows, so there is no jump. A hair for rounding.
    steepest = alpha * math.expm1(gamma / alpha) / beta * (x[1] - x[0]).item()
    assert gradient.diff().abs().max() <= steepest * (1 + 1e-6) + 1e-12 * gamma
    # Where the gradient is continuous and bounded, so is the loss: no step exceeds gamma dx.
    loss = balanced_l1_loss(x, torch.zeros_like(x), **parameters, reduction="none")
    assert loss.diff().abs().max() <= gamma * (x[1] - x[0]).item() * (1 + 1e-9)
    # Float64 rounding of two terms of up to alpha |x| that cancel.
    assert loss.min() >= -1e-15 * alpha * beta


def test_balanced_l1_at_beta_1_is_the_paper():
    alpha, gamma = 0.5, 1.5
    b = math.exp(gamma / alpha) - 1
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    size = x.abs()
    inner = alpha / b * (b * size + 1) * torch.log(b * size + 1) - alpha * size
    # The constant joins the parts at 1 (Eq. 9 of the paper).
    expected = torch.where(size < 1, inner, gamma * size + gamma / b - alpha)
    loss = balanced_l1_loss(x, torch.zeros_like(x), reduction="none")
    # Float64 rounding of differences of terms below 2.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)


def test_balanced_l1_does_not_have_the_published_gradient_at_zero_error():
    # The published form has the one-sided gradient alpha (1 / beta - 1) = 4.05 here.
    tiny = torch.tensor([1e-9], dtype=torch.float64)
    # Ours has alpha b tiny / beta to first order: 8.7e-8.
    assert gradient_of(tiny, beta=0.11).item() < 1e-7


def test_balanced_l1_reductions_agree():
    pred, target = make_boxes(dtype=torch.float64)
    each = balanced_l1_loss(pred, target, reduction="none")
    assert each.shape == pred.shape
    # Float64 rounding of 48 terms.
    assert balanced_l1_loss(pred, target).item() == pytest.approx(each.sum().item(), rel=1e-14)
    mean = balanced_l1_loss(pred, target, reduction="mean")
    assert mean.item() == pytest.approx(each.mean().item(), rel=1e-14)
    assert balanced_l1_loss(pred[:0], target[:0], reduction="mean") == 0
    assert BalancedL1Loss()(pred, target, 2).item() == pytest.approx(each.sum().item() / 2)
    with pytest.raises(InputError, match="reduction 'max'"):
        balanced_l1_loss(pred, target, reduction="max")


@pytest.mark.parametrize("options", [{"alpha": 0}, {"gamma": -1}, {"beta": 0}, {"alpha": 1e-3}])
def test_balanced_l1_refuses_impossible_parameters(options):
    with pytest.raises(InputError, match=next(iter(options))):
        BalancedL1Loss(**options)


def test_smooth_l1_refuses_a_negative_beta():
    with pytest.raises(InputError, match="beta"):
        SmoothL1Loss(-1)
