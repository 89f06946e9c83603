"""balanced_det.ops against a float64 one-hot formulation that is written here, independently.

Every test that takes ``implementation`` runs on all that this machine has: the reference on the
CPU, the reference and the kernels on CUDA. Without CUDA the kernels run in Triton's interpreter,
which must be chosen before triton is imported: test_kernels_in_the_interpreter starts a pytest
for that.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import run_in_interpreter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_det import ops
from balanced_det.errors import InputError
from balanced_det.ops import choice, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = [("reference", "cpu")]
if torch.cuda.is_available() and not INTERPRETED:
    IMPLEMENTATIONS += [
        pytest.param((name, "cuda"), marks=pytest.mark.gpu) for name in ("reference", "triton")
    ]
elif INTERPRETED:
    IMPLEMENTATIONS += [("triton", "cpu")]

# float32 results, as a share of the exact ones. The worst step is exp(-|x|), whose argument's
# rounding is amplified by |x|: at |x| = 20 and gamma = 3 that is 4 * 20 * 2**-24 = 5e-6.
FLOAT32 = 1e-5
TINY = torch.finfo(torch.float32).tiny  # Smaller values may be flushed to zero.

METHODS = {
    "bce": {},
    "focal": dict(alpha=0.25, gamma=2.0),
    "focal, gamma 1, no alpha": dict(gamma=1.0),
    "focal, gamma 1.5": dict(alpha=0.5, gamma=1.5),
    "positive weight": dict(tables="p"),
    "negative weight": dict(tables="n"),  # EQL
    "background weight": dict(tables="b"),
    "bins": dict(bins=30),  # GHM-C
    "weight": dict(tables="w"),  # federated loss, ECM
    "gamma a class": dict(alpha=0.25, tables="gw"),  # EFL
    "all": dict(alpha=0.75, gamma=2.0, tables="wpnb", bins=7, scale=0.01),
}
LAYOUTS = [
    "rows",
    "transposed",
    "columns of a wider matrix",
    "every other row",
    "expanded",
    "head",
    "head, channels last",
    "head, cropped",
    "head, cropped, channels last",
]
LABELS = ["mixed", "ignored", "background", "foreground"]


@pytest.fixture(params=IMPLEMENTATIONS, ids="-".join)
def implementation(request):
    """Switch to an implementation; the value is the device to test it on."""
    name, device = request.param
    with ops.implementation(name):
        yield device


def make_logits(layout, rows, num_classes, dtype=torch.float32):
    """Logits (*lead, K) with values that spread over easy and hard; `rows` sets the size."""
    if layout == "rows":
        logits = torch.randn(rows, num_classes)
    elif layout == "transposed":
        logits = torch.randn(num_classes, rows).t()
    elif layout == "columns of a wider matrix":
        logits = torch.randn(rows, num_classes + 3)[:, 2 : num_classes + 2]
    elif layout == "every other row":
        logits = torch.randn(2 * rows, num_classes)[::2]
    elif layout == "expanded":
        logits = torch.randn(1, num_classes)
    else:
        anchors = 3
        conv = torch.randn(2, anchors * num_classes, rows, 5)
        if "channels last" in layout:
            conv = conv.to(memory_format=torch.channels_last)
        if "cropped" in layout:
            conv = conv[:, :, : max(rows - 1, 0), 1:4]
        height, width = conv.shape[2:]
        logits = conv.view(2, anchors, num_classes, height, width).permute(0, 3, 4, 1, 2)
    logits = (4 * logits - 2).to(dtype)
    return logits.expand(rows, num_classes) if layout == "expanded" else logits


def make_labels(mix, shape, num_classes):
    low, high = {
        "mixed": (-1, num_classes + 1),
        "ignored": (-1, 0),
        "background": (num_classes, num_classes + 1),
        "foreground": (0, num_classes),
    }[mix]
    return torch.randint(low, high, shape)


def make_options(method, num_classes):
    """Keyword arguments of sigmoid_loss for a method; tables hold random weights and zeros."""
    options = dict(METHODS[method])
    names = dict(
        w="weight", p="positive_weight", n="negative_weight", b="background_weight", g="gamma"
    )
    for letter in options.pop("tables", ""):
        options[names[letter]] = torch.rand(num_classes) * (torch.rand(num_classes) > 0.3)
        if letter == "g":
            # 0, or beyond 1: in between, autograd's power at a gradient length of 0 is inf.
            options["gamma"] = torch.where(options["gamma"] > 0, 1 + 3 * options["gamma"], 0.0)
    if "bins" in options:
        options["bin_weight"] = 2 * torch.rand(options.pop("bins"))
    return options


def off_the_edges(logits, labels, bins):
    """Move the logits whose gradient length is so near a bin's edge that rounding decides."""
    position = one_hot_length(logits, labels) * bins
    # float32 rounds g to 2**-24; a hundred times that is clear of it.
    near = (position - position.round()).abs() < bins * 1e-5
    return logits.masked_fill(near & (position > 0.5) & (position < bins - 0.5), 0.123)


def one_hot(labels, num_classes):
    return F.one_hot(labels.clamp(min=0), num_classes + 1)[..., :-1].bool()


def one_hot_length(logits, labels):
    """|sigmoid(x) - y| in float64, shape of the logits."""
    x = logits.double()
    return torch.where(one_hot(labels, logits.shape[-1]), (-x).sigmoid(), x.sigmoid())


def one_hot_loss(
    logits,
    labels,
    alpha=None,
    gamma=0.0,
    weight=None,
    positive_weight=None,
    negative_weight=None,
    background_weight=None,
    bin_weight=None,
    scale=1.0,
):
    """The loss and its gradient in float64, by autograd, from (R, K) targets and weights."""
    x = logits.detach().double().requires_grad_()
    num_classes = x.shape[-1]
    y = one_hot(labels, num_classes)
    loss = F.binary_cross_entropy_with_logits(x, y.double(), reduction="none")
    gamma = gamma.double() if torch.is_tensor(gamma) else gamma
    loss = loss * one_hot_length(x, labels) ** gamma
    if alpha is not None:
        loss = loss * torch.where(y, alpha, 1 - alpha)
    foreground = ((labels >= 0) & (labels < num_classes)).unsqueeze(-1)
    background = (labels == num_classes).unsqueeze(-1)
    one = torch.ones(num_classes)
    if weight is not None:
        loss = loss * weight.double()
    for table, where in (
        (positive_weight, y),
        (negative_weight, foreground & ~y),
        (background_weight, background),
    ):
        loss = loss * torch.where(where, one if table is None else table, one).double()
    if bin_weight is not None:
        bins = len(bin_weight)
        index = (one_hot_length(x, labels) * bins).long().clamp(max=bins - 1)
        loss = loss * bin_weight.double()[index]
    loss = scale * loss[labels >= 0].sum()
    (gradient,) = torch.autograd.grad(loss, x, materialize_grads=True)
    return loss.detach(), gradient


def run(device, logits, labels, **options):
    """Loss and raw gradient (layout as it leaves the operation), on the device."""
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    x = to_device(logits.detach(), device).requires_grad_()
    loss = ops.sigmoid_loss(x, labels.to(device), **options)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, x


def to_device(logits, device):
    """Move without losing gaps: the storage goes, and the view is made again."""
    if device == "cpu":
        return logits
    moved = whole_storage(logits).to(device)
    return moved.as_strided(logits.shape, logits.stride(), logits.storage_offset())


def whole_storage(tensor):
    """All elements of the memory that a tensor views, (n,)."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def assert_matches(loss, gradient, expected_loss, expected_gradient):
    """Compare with float64, each element of the gradient for itself."""
    rounding = FLOAT32
    if gradient.dtype != torch.float32:
        # The float32 gradient is rounded to nearest (the interpreter truncates bfloat16).
        half_step = torch.finfo(gradient.dtype).eps / 2
        rounding += half_step * (2 if INTERPRETED and gradient.dtype == torch.bfloat16 else 1)
    smallest = max(TINY, torch.finfo(gradient.dtype).smallest_normal * rounding)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=FLOAT32, atol=TINY)
    torch.testing.assert_close(
        gradient.cpu().double(), expected_gradient, rtol=rounding, atol=smallest
    )


# The fixture only switches the implementation, which no example changes.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=st.sampled_from(list(METHODS)),
    layout=st.sampled_from(LAYOUTS),
    mix=st.sampled_from(LABELS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(0, 9),
    num_classes=st.integers(1, 19),
    seed=st.integers(0, 1000),
)
def test_equals_one_hot_formulation(
    implementation, method, layout, mix, dtype, rows, num_classes, seed
):
    torch.manual_seed(seed)
    logits = make_logits(layout, rows, num_classes, dtype)
    labels = make_labels(mix, logits.shape[:-1], num_classes)
    options = make_options(method, num_classes)
    if "bin_weight" in options and layout != "expanded":
        logits.copy_(off_the_edges(logits, labels, len(options["bin_weight"])))
    elif "bin_weight" in options:
        logits = off_the_edges(logits, labels, len(options["bin_weight"]))
    loss, gradient, _ = run(implementation, logits, labels, **options)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert gradient.dtype == dtype
    assert_matches(loss, gradient, *one_hot_loss(logits, labels, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["rows", "head", "head, cropped"])
def test_equals_one_hot_formulation_over_many_pieces(implementation, monkeypatch, method, layout):
    monkeypatch.setattr(reference, "_CPU_PIECE", 50)
    monkeypatch.setattr(reference, "_DEVICE_PIECE", 50)
    torch.manual_seed(0)
    logits = make_logits(layout, 17, 41)
    labels = make_labels("mixed", logits.shape[:-1], 41)
    options = make_options(method, 41)
    if "bin_weight" in options:
        logits.copy_(off_the_edges(logits, labels, len(options["bin_weight"])))
    loss, gradient, _ = run(implementation, logits, labels, **options)
    assert_matches(loss, gradient, *one_hot_loss(logits, labels, **options))


def assert_sums_match(device, logits, labels, **options):
    """Loss, gradient and sums of one call, with a gradient and without, against float64."""
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    x = to_device(logits.detach(), device).requires_grad_()
    loss, sums = ops.sigmoid_loss(x, labels.to(device), gradient_sums=True, **arguments)
    (gradient,) = torch.autograd.grad(loss, x)
    assert_matches(loss.detach(), gradient, *one_hot_loss(logits, labels, **options))
    assert sums.dtype == torch.float64 and not sums.requires_grad
    _, exact = one_hot_loss(logits, labels, **{**options, "scale": 1.0})
    own = one_hot(labels, logits.shape[-1])
    expected = [exact.abs().where(mask, 0.0).flatten(0, -2).sum(dim=0) for mask in (own, ~own)]
    # Sums of positive float32 numbers, added in float32 in the kernel's lanes.
    torch.testing.assert_close(sums.cpu(), torch.stack(expected), rtol=FLOAT32, atol=TINY)
    with torch.no_grad():
        again = ops.sigmoid_loss(x, labels.to(device), gradient_sums=True, **arguments)
    # Compiled without the gradient, an addition may be fused otherwise.
    torch.testing.assert_close(again[0], loss.detach(), rtol=FLOAT32, atol=TINY)
    torch.testing.assert_close(again[1], sums, rtol=FLOAT32, atol=TINY)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    method=st.sampled_from(list(METHODS)),
    layout=st.sampled_from(LAYOUTS),
    mix=st.sampled_from(LABELS),
    rows=st.integers(0, 9),
    num_classes=st.integers(1, 19),
    seed=st.integers(0, 1000),
)
def test_gradient_sums_equal_one_hot_formulation(
    implementation, method, layout, mix, rows, num_classes, seed
):
    torch.manual_seed(seed)
    logits = make_logits(layout, rows, num_classes)
    labels = make_labels(mix, logits.shape[:-1], num_classes)
    options = make_options(method, num_classes)
    if "bin_weight" in options:
        logits = off_the_edges(logits, labels, len(options["bin_weight"]))
    assert_sums_match(implementation, logits, labels, **options)


@pytest.mark.parametrize("num_classes", [1, 16, 41, 513])
@pytest.mark.parametrize("layout", ["rows", "transposed", "head", "head, cropped"])
def test_gradient_sums_over_many_steps_and_programs(implementation, layout, num_classes):
    # More elements than all programs of the interpreter take in one step, and a class number that
    # shares no factor with their block, some, and all.
    torch.manual_seed(0)
    rows = max(20_000 // num_classes, 20)
    logits = make_logits(layout, rows // 10 if "head" in layout else rows, num_classes)
    labels = make_labels("mixed", logits.shape[:-1], num_classes)
    options = make_options("gamma a class", num_classes)
    assert_sums_match(implementation, logits, labels, **options)


def test_gradient_sums_come_with_overwritten_logits(implementation):
    torch.manual_seed(0)
    logits, labels = make_logits("head", 4, 6), make_labels("mixed", (2, 4, 5, 3), 6)
    plain = ops.sigmoid_loss(
        logits.to(implementation), labels.to(implementation), gamma=2.0, gradient_sums=True
    )
    leaf = logits.to(implementation).requires_grad_()
    loss, sums = ops.sigmoid_loss(
        leaf + 0, labels.to(implementation), gamma=2.0, overwrite_logits=True, gradient_sums=True
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain[0], rtol=FLOAT32, atol=TINY)
    torch.testing.assert_close(sums, plain[1], rtol=FLOAT32, atol=TINY)
    _, expected = one_hot_loss(logits, labels, gamma=2.0)
    assert_matches(loss.detach(), leaf.grad, one_hot_loss(logits, labels, gamma=2.0)[0], expected)


SATURATED = [0.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, 3e38, -3e38, float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("a_class", [False, True])
def test_every_gradient_is_finite_whatever_the_logits(implementation, dtype, gamma, a_class):
    values = torch.tensor(SATURATED).to(dtype)
    logits = torch.stack([values, values.flip(0), torch.zeros_like(values)], dim=1).repeat(5, 1)
    labels = torch.arange(-1, 4).repeat_interleave(len(values))
    options = {"gamma": torch.full((3,), gamma) if a_class else gamma, "alpha": 0.25}
    for name in ("weight", "positive_weight", "negative_weight", "background_weight"):
        for table in (torch.zeros(3), torch.full((3,), 10.0)):
            loss, gradient, _ = run(implementation, logits, labels, **options, **{name: table})
            assert gradient.isfinite().all()
            assert not loss.isnan()
            assert (gradient[: len(values)] == 0).all()
    with torch.no_grad():
        _, sums = ops.sigmoid_loss(
            logits.to(implementation),
            labels.to(implementation),
            gamma=options["gamma"].to(implementation) if a_class else gamma,
            gradient_sums=True,
        )
    assert sums.isfinite().all()


def test_nan_logits_are_not_hidden(implementation):
    logits = torch.tensor([[float("nan"), 0.0]])
    for gamma in (0.0, 0.5, 1.0, 2.0, torch.ones(2)):
        loss, gradient, _ = run(implementation, logits, torch.tensor([2]), gamma=gamma)
        assert loss.isnan() and gradient[0, 0].isnan() and gradient[0, 1].isfinite()


@pytest.mark.parametrize("layout", ["rows", "head, cropped"])
def test_64_bit_counting_changes_no_sums(implementation, wide_kernels, layout):
    torch.manual_seed(0)
    logits = make_logits(layout, 40, 37)
    labels = make_labels("mixed", logits.shape[:-1], 37)
    assert_sums_match(implementation, logits, labels, alpha=0.25, gamma=2.0)


@pytest.mark.parametrize("layout", ["rows", "head, channels last", "transposed", "head"])
def test_gradient_lies_in_memory_as_the_logits_do(implementation, layout):
    logits = make_logits(layout, 4, 6)
    _, gradient, x = run(implementation, logits, make_labels("mixed", logits.shape[:-1], 6))
    assert gradient.stride() == x.stride()


def test_gradient_of_logits_with_gaps_is_dense_in_their_order(implementation):
    logits = make_logits("head, cropped", 4, 6)  # (2, 3, 3, 3, 6) out of (2, 3 * 6, 4, 5)
    _, gradient, _ = run(implementation, logits, make_labels("mixed", logits.shape[:-1], 6))
    assert gradient.permute(0, 3, 4, 1, 2).is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_reference_gradient_is_the_derivative_of_its_loss(method):
    torch.manual_seed(0)
    logits = make_logits("rows", 9, 5, torch.float64)
    labels = torch.tensor([-1, 0, 1, 2, 3, 4, 5, 5, -1])
    options = make_options(method, 5)
    if "bin_weight" in options:  # The loss jumps at a bin's edge.
        logits = off_the_edges(logits, labels, len(options["bin_weight"]))
    # gradcheck's own step and tolerance, which suit float64.
    assert torch.autograd.gradcheck(
        lambda x: ops.sigmoid_loss(x, labels, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_logits_stay_finite(implementation, method, size):
    logits = torch.tensor([[size, -size, 0.0]]).repeat(5, 1)
    labels = torch.tensor([0, 1, 2, 3, -1])
    options = make_options(method, 3)
    loss, gradient, _ = run(implementation, logits, labels, **options)
    expected_loss, expected_gradient = one_hot_loss(logits, labels, **options)
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=FLOAT32, atol=TINY)
    # exp(-100) cannot have 1e-5 relative precision in float32; beside 1, nothing hangs on it.
    torch.testing.assert_close(
        gradient.cpu().double(), expected_gradient, rtol=FLOAT32, atol=FLOAT32
    )


@pytest.mark.parametrize("size", [1e-7, 1e-5])
def test_easy_examples_keep_their_loss(implementation, size):
    # A sum of losses that 1 + exp(x) would round: 1 + 1e-7 is 1 + 1.2e-7, off by a fifth.
    logits = torch.full((40, 50), size).log()
    labels = torch.full((40,), 50)
    loss, gradient, _ = run(implementation, logits, labels)
    assert_matches(loss, gradient, *one_hot_loss(logits, labels))


@pytest.mark.parametrize("method", METHODS)
def test_ignored_rows_have_exactly_zero_gradient_whatever_they_hold(implementation, method):
    torch.manual_seed(0)
    options = make_options(method, 4)
    kept, kept_labels = make_logits("rows", 3, 4), torch.tensor([0, 4, 3])
    broken = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0]])
    loss, gradient, _ = run(
        implementation,
        torch.cat([broken, kept, broken]),
        torch.cat([torch.tensor([-1]), kept_labels, torch.tensor([-2])]),
        **options,
    )
    assert (gradient[[0, -1]] == 0).all()
    alone_loss, alone_gradient, _ = run(implementation, kept, kept_labels, **options)
    torch.testing.assert_close(loss, alone_loss, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(gradient[1:-1], alone_gradient, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3, 1, 4)])
def test_no_elements_give_a_zero_that_backpropagates(implementation, shape):
    loss, gradient, _ = run(implementation, torch.randn(shape), torch.zeros(shape[:-1]).long())
    assert loss == 0 and gradient.shape == shape


@pytest.mark.parametrize("layout", ["rows", "head", "head, cropped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [1, 30, 32])
def test_histogram_counts_gradient_lengths(implementation, layout, dtype, bins):
    torch.manual_seed(0)
    logits = make_logits(layout, 25, 33, dtype)
    labels = make_labels("mixed", logits.shape[:-1], 33)
    logits.copy_(off_the_edges(logits, labels, bins))
    counts = ops.gradient_histogram(
        to_device(logits, implementation), labels.to(implementation), bins
    )
    index = (one_hot_length(logits, labels) * bins).long().clamp(max=bins - 1)
    expected = torch.bincount(index[labels >= 0].flatten(), minlength=bins)
    assert counts.dtype == torch.int64  # Exact beyond 2**24.
    assert counts.tolist() == expected.tolist()


def test_histogram_and_loss_agree_on_the_bins(implementation):
    # Also at the edges: a weight that is 1 in one bin selects as many elements as the bin counts.
    logits = torch.linspace(-8, 8, 4001).unsqueeze(1)
    labels = torch.zeros(4001, dtype=torch.long)
    counts = ops.gradient_histogram(logits.to(implementation), labels.to(implementation), 10)
    for b, count in enumerate(counts.tolist()):
        weight = F.one_hot(torch.tensor(b), 10).float()
        _, gradient, _ = run(implementation, logits, labels, bin_weight=weight)
        assert gradient.count_nonzero() == count


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("layout", ["rows", "head", "head, cropped"])
@pytest.mark.parametrize("large", [False, True])
def test_backward_multiplies_by_the_incoming_gradient(
    implementation, monkeypatch, factor, layout, large
):
    if implementation == "cuda" or INTERPRETED:
        kernels = pytest.importorskip("balanced_det.ops.triton_kernels")
        monkeypatch.setattr(kernels, "_SMALL", 0 if large else kernels._SMALL)
    torch.manual_seed(0)
    logits = make_logits(layout, 25, 17)
    labels = make_labels("mixed", logits.shape[:-1], 17)
    x = to_device(logits, implementation).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.sigmoid_loss(x, labels.to(implementation)) * factor, x)
    _, expected = one_hot_loss(logits, labels)
    # One more float32 rounding, far below FLOAT32.
    torch.testing.assert_close(gradient.cpu().double(), factor * expected, rtol=FLOAT32, atol=TINY)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scale_multiplies_loss_and_gradient(implementation, as_tensor):
    torch.manual_seed(0)
    logits = make_logits("rows", 5, 7)
    labels = make_labels("mixed", (5,), 7)
    scale = torch.tensor(0.125) if as_tensor else 0.125
    loss, gradient, _ = run(implementation, logits, labels, scale=scale)
    plain_loss, plain_gradient, _ = run(implementation, logits, labels)
    # A power of two: exact.
    assert loss == plain_loss / 8
    assert torch.equal(gradient, plain_gradient / 8)


def test_retained_graph_gives_the_same_gradient_again(implementation):
    x = torch.randn(5, 7, device=implementation, requires_grad=True)
    loss = 2 * ops.sigmoid_loss(x, torch.arange(5, device=implementation))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (last,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second) and torch.equal(first, last)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_overwriting_puts_the_gradient_where_the_logits_were(implementation, layout):
    torch.manual_seed(0)
    logits = make_logits(layout, 6, 5)
    labels = make_labels("mixed", logits.shape[:-1], 5)
    leaf = whole_storage(to_device(logits, implementation)).clone().requires_grad_()
    view = logits.shape, logits.stride(), logits.storage_offset()
    x = (leaf * 1.0).as_strided(*view)
    loss = ops.sigmoid_loss(x, labels.to(implementation), overwrite_logits=True)
    (3 * loss).backward()
    expected_loss, expected = one_hot_loss(logits, labels)
    assert_matches(loss.detach(), x.detach(), expected_loss, 3 * expected)
    assert torch.equal(leaf.grad.as_strided(*view), x)
    # What lies between the logits is nobody's gradient.
    assert leaf.grad.count_nonzero() == x.count_nonzero()


def test_overwriting_without_a_gradient_leaves_the_logits_alone(implementation):
    logits = torch.randn(4, 3, device=implementation)
    before = logits.clone()
    loss = ops.sigmoid_loss(
        logits, torch.zeros(4, dtype=torch.long, device=implementation), overwrite_logits=True
    )
    assert torch.equal(logits, before) and not loss.requires_grad
    with torch.no_grad():
        assert not ops.sigmoid_loss(
            logits.requires_grad_(), torch.zeros(4, dtype=torch.long, device=implementation)
        ).requires_grad


def test_overwritten_logits_that_others_need_are_refused(implementation):
    labels = torch.zeros(4, dtype=torch.long, device=implementation)
    leaf = torch.randn(4, 3, device=implementation, requires_grad=True)
    exponential = leaf.exp()  # Its backward reads its own output.
    loss = ops.sigmoid_loss(exponential, labels, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    made = leaf * 1.0
    loss = ops.sigmoid_loss(made, labels, overwrite_logits=True)
    with torch.no_grad():
        made.zero_()
    with pytest.raises(RuntimeError, match="were modified before backward"):
        loss.backward()

    for held in (leaf, leaf.view(3, 4).t()):
        with pytest.raises(InputError, match="leaf"):
            ops.sigmoid_loss(held, labels, overwrite_logits=True)
    with pytest.raises(InputError, match="share memory"):
        ops.sigmoid_loss((leaf[:1] * 1.0).expand(4, 3), labels, overwrite_logits=True)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_sums_are_the_same_every_time(implementation, layout):
    torch.manual_seed(0)
    logits = make_logits(layout, 300, 41)
    labels = make_labels("mixed", (300,), 41)
    losses = {run(implementation, logits, labels, gamma=2.0)[0].item() for _ in range(5)}
    assert len(losses) == 1
    rows = logits.to(implementation), labels.to(implementation)
    sums = [ops.sigmoid_loss(*rows, gamma=2.0, gradient_sums=True)[1] for _ in range(5)]
    assert all(torch.equal(again, sums[0]) for again in sums)


def test_autocast_does_not_change_the_arithmetic(implementation):
    torch.manual_seed(0)
    logits = make_logits("rows", 20, 7, torch.bfloat16)
    labels = make_labels("mixed", (20,), 7)
    plain = run(implementation, logits, labels, gamma=2.0)
    with torch.autocast(implementation, torch.bfloat16):
        cast = run(implementation, logits, labels, gamma=2.0)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(implementation, dtype):
    logits, labels = make_logits("head", 4, 6), make_labels("background", (2, 4, 5, 3), 6)
    labels[0] = 2
    expected = run(implementation, logits, labels)
    loss, gradient, _ = run(implementation, logits, labels.to(dtype))
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


def test_reference_allocates_one_gradient_and_pieces():
    logits = torch.randn(10_000, 80, requires_grad=True)
    labels = make_labels("mixed", (10_000,), 80)
    # An int64 temporary of one piece, the largest there should be, is a third of the logits.
    limit = 8 * reference._CPU_PIECE
    assert limit < logits.numel() * logits.element_size() / 3

    class LargeStorages(TorchDispatchMode):
        found = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > limit:
                self.found.add(out.untyped_storage().data_ptr())
            return out

    with ops.implementation("reference"), LargeStorages() as storages:
        loss = ops.sigmoid_loss(logits, labels, alpha=0.25, gamma=2.0, bin_weight=torch.ones(9))
        (gradient,) = torch.autograd.grad(3 * loss, logits)
    assert storages.found <= {logits.data_ptr(), gradient.data_ptr()}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.zeros(4, 3, dtype=torch.long)), "floating point"),
        (dict(logits=torch.zeros(1, 1, 1, 1, 4, 3)), "1 to 5 dimensions"),
        (dict(labels=torch.zeros(5, dtype=torch.long)), r"labels must have the shape \(4,\)"),
        (dict(labels=torch.zeros(4)), "labels must be integers"),
        (dict(alpha=1.5), "alpha"),
        (dict(gamma=-1.0), "gamma"),
        (dict(gamma=torch.ones(4)), r"gamma must have the shape \(3,\)"),
        (dict(weight=torch.ones(4)), r"weight must have the shape \(3,\)"),
        (dict(positive_weight=torch.ones(4)), r"positive_weight must have the shape \(3,\)"),
        (dict(negative_weight=torch.ones(1, 3)), "negative_weight"),
        (dict(background_weight=torch.ones(2)), "background_weight"),
        (dict(bin_weight=torch.ones(0)), "bin_weight"),
        (dict(bin_weight=torch.ones(2, 2)), "bin_weight"),
        (dict(scale=torch.ones(2)), "scale"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(logits=torch.zeros(4, 3), labels=torch.zeros(4, dtype=torch.long)) | change
    with pytest.raises(InputError, match=message):
        ops.sigmoid_loss(**arguments)


def test_histogram_without_bins_is_refused():
    with pytest.raises(InputError, match="bins"):
        ops.gradient_histogram(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), 0)


def test_implementation_is_chosen_by_name(monkeypatch):
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with (
        pytest.raises(InputError, match="known are: auto, reference, triton"),
        ops.implementation("numba"),
    ):
        pass
    monkeypatch.setattr(choice, "_choice", "fast")  # As BALANCED_DET_OPS=fast leaves it.
    with pytest.raises(InputError, match="BALANCED_DET_OPS is 'fast'"):
        ops.sigmoid_loss(logits, labels)
    monkeypatch.setattr(choice, "_choice", "triton")
    with pytest.raises(InputError, match="float64"):
        ops.sigmoid_loss(logits.double(), labels)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="cannot run on cpu"):
        ops.sigmoid_loss(logits, labels)


@given(divisor=st.integers(1, 2**30), quotient=st.integers(0, 2**31), below=st.booleans())
def test_division_by_multiplication_is_exact(divisor, quotient, below):
    kernels = pytest.importorskip("balanced_det.ops.triton_kernels", exc_type=ImportError)
    # The hard numerators are the multiples of the divisor and those just below.
    n = max(0, min(quotient * divisor, 2**31 - 1) - below)
    multiplier, shift = kernels._reciprocal(divisor)
    assert -(2**31) <= multiplier < 2**31
    assert ((n * (multiplier % 2**32) >> 32) + n) >> shift == n // divisor


@pytest.fixture
def wide_kernels(implementation, monkeypatch):
    """Make the kernels count elements in 64 bits, as they do for more than 2**31."""
    if implementation == "cuda" or INTERPRETED:
        kernels = pytest.importorskip("balanced_det.ops.triton_kernels")
        monkeypatch.setattr(kernels, "_NARROW", 0)
        kernels._layout.cache_clear()
        yield
        kernels._layout.cache_clear()
    else:
        pytest.skip("the reference has one way to count")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_counting_changes_nothing(implementation, wide_kernels, layout):
    torch.manual_seed(0)
    logits = make_logits(layout, 20, 37)  # Several programs, whose starts fall amid a row.
    labels = make_labels("mixed", logits.shape[:-1], 37)
    loss, gradient, x = run(implementation, logits, labels, alpha=0.25, gamma=2.0)
    assert_matches(loss, gradient, *one_hot_loss(logits, labels, alpha=0.25, gamma=2.0))
    counts = ops.gradient_histogram(x, labels.to(implementation), 1)
    assert counts.item() == (labels >= 0).sum() * 37


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 12 << 30,
    reason="needs 12 GiB of GPU memory",
)
def test_more_elements_than_32_bits_count():
    rows, num_classes = (1 << 31) // 64 + 3, 64
    torch.manual_seed(0)
    x = torch.randn(rows, num_classes, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.full((rows,), num_classes, device="cuda")
    labels[-5:] = torch.tensor([0, -1, 63, 64, 7])
    counts = ops.gradient_histogram(x, labels, 4)
    loss = ops.sigmoid_loss(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    assert counts.sum() == (rows - 1) * num_classes
    tail_loss, tail_gradient, _ = run("cuda", x[-5:].cpu(), labels[-5:].cpu())
    assert torch.equal(gradient[-5:], tail_gradient)
    # The last bits of 2**31 float32 terms summed by halves.
    expected = sum(F.softplus(part.double()).sum() for part in x[:-5].detach().split(1 << 22))
    torch.testing.assert_close(loss.double(), expected + tail_loss, rtol=FLOAT32, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run right here")
def test_kernels_in_the_interpreter():
    run_in_interpreter(__file__)
