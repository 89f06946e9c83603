"""GHM against a brute-force implementation in float64, on one and on two workers."""

import io
import math

import pytest
import torch
from distributed import run_workers

from balanced_det.errors import InputError
from balanced_det.losses import (
    GHMClassificationLoss,
    GHMRegressionLoss,
    GradientDensity,
    SoftmaxGHMLoss,
)

K = 4
MU = 0.02
BUILD = {
    "sigmoid": lambda **options: GHMClassificationLoss(K, **options),
    "softmax": lambda **options: SoftmaxGHMLoss(K, **options),
    "regression": lambda **options: GHMRegressionLoss(MU, **options),
}
OPTIONS = {"bins": 10, "momentum": 0.75}

each_form = pytest.mark.parametrize("form", BUILD)
each_correction = pytest.mark.parametrize("bias_correction", [True, False])


class BruteForceDensity:
    """The moving average as the paper and the published code tell it, a Python number at a time."""

    def __init__(self, bins, momentum, bias_correction):
        self.bins, self.momentum, self.bias_correction = bins, momentum, bias_correction
        self.average = [0.0] * bins
        self.updates = [0] * bins

    def weights(self, lengths):
        """Return the weight N / (n S_b) of each element; a mean over N is still to be taken."""
        index = [min(int(g * self.bins), self.bins - 1) for g in lengths]
        density = {}
        for b in set(index):
            self.average[b] *= self.momentum
            self.average[b] += (1 - self.momentum) * index.count(b)
            self.updates[b] += 1
            density[b] = self.average[b]
            if self.bias_correction:
                density[b] /= 1 - self.momentum ** self.updates[b]
        return [len(index) / (len(density) * density[b]) for b in index]


def brute_force(form, density, x, y, of_batch=None):
    """Return the loss (a float) and its gradient with respect to ``x`` (nested lists).

    ``of_batch`` are the labels that decide whether there is foreground, where they are not ``y``.
    """
    of_batch = y if of_batch is None else of_batch
    terms = []  # (position in x, gradient length, loss, {position: gradient})
    for i, row in enumerate(x.tolist()):
        if form == "regression":
            for j, (a, b) in enumerate(zip(row, y[i].tolist())):
                root = math.sqrt((a - b) ** 2 + MU**2)
                terms.append((abs(a - b) / root, root - MU, {(i, j): (a - b) / root}))
        elif y[i] < 0:
            continue
        elif form == "sigmoid":
            for j, z in enumerate(row):
                p, target = 1 / (1 + math.exp(-z)), int(j == y[i])
                loss = -math.log(p if target else 1 - p)
                terms.append((abs(p - target), loss, {(i, j): p - target}))
        else:
            total = sum(map(math.exp, row))
            p = [math.exp(z) / total for z in row]
            slope = {(i, j): p[j] - int(j == y[i]) for j in range(len(row))}
            terms.append((1 - p[y[i]], -math.log(p[y[i]]), slope))
    gradient = torch.zeros_like(x)
    if form != "regression" and not ((of_batch >= 0) & (of_batch < K)).any() or not terms:
        return 0.0, gradient
    value = 0.0
    for weight, (_, loss, slope) in zip(density.weights([t[0] for t in terms]), terms):
        value += weight * loss / len(terms)
        for position, slope_there in slope.items():
            gradient[position] += weight * slope_there / len(terms)
    return value, gradient


def make_batches(form, dtype=torch.float64):
    """Batches of (x, y) of different sizes, one of background or of no row at all among them."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for step, num_rows in enumerate([9, 14, 0, 30, 5, 21]):
        if form == "regression":
            x = torch.randn(num_rows, 4, generator=generator, dtype=torch.float64) * 0.05
            y = torch.randn(num_rows, 4, generator=generator, dtype=torch.float64) * 0.05
            batches.append((x.to(dtype), y.to(dtype)))
        else:
            num_logits = K + (form == "softmax")
            # A model that becomes confident: bins are occupied late, and left again.
            x = torch.randn(num_rows, num_logits, generator=generator, dtype=torch.float64)
            y = torch.randint(-1, K + 1, (num_rows,), generator=generator)
            if step == 4:
                y = y.clamp(min=K)
            batches.append((x.to(dtype) * (step + 1), y))
    return batches


def step(loss, x, y):
    x = x.detach().clone().requires_grad_()
    value = loss(x, y, 1)
    value.backward()
    return value.detach(), x.grad


@each_form
@each_correction
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_sequence_of_batches_equals_brute_force(form, bias_correction, momentum):
    options = {"bins": 10, "momentum": momentum, "bias_correction": bias_correction}
    loss, oracle = BUILD[form](**options), BruteForceDensity(**options)
    for x, y in make_batches(form):
        value, gradient = step(loss, x, y)
        expected_value, expected_gradient = brute_force(form, oracle, x, y)
        # Float64 rounding of sums of about 100 terms, and of root - mu in the brute force, which
        # loses two digits.
        assert value.item() == pytest.approx(expected_value, rel=1e-11)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("form", ["sigmoid", "regression"])
def test_levels_one_by_one_are_one_average_asked_once_a_level(form):
    """The published code calls its loss for each level, and adds what comes."""
    options = {"bins": 10, "momentum": 0.75, "bias_correction": False}
    loss, oracle = BUILD[form](**options, per_level=True), BruteForceDensity(**options)
    without_foreground = 0
    for x, y in make_batches(form):
        sizes = [len(x) - len(x) // 3 - len(x) // 5, len(x) // 3, len(x) // 5]  # fine to coarse
        x = x.requires_grad_()
        if form == "sigmoid":
            value = loss(x.split(sizes), y.split(sizes), 1)
            without_foreground += sum(bool((part >= K).all()) for part in y.split(sizes))
        else:
            level = torch.arange(3).repeat_interleave(torch.tensor(sizes))
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
            masks = level[order] == torch.arange(3).unsqueeze(1)  # rows of levels are mixed
            value = loss(x[order], y[order], 1, masks)
        value.backward()
        parts = [
            brute_force(form, oracle, a.detach(), b, y)
            for a, b in zip(x.split(sizes), y.split(sizes))
        ]
        # Float64 rounding, as for one level.
        assert value.item() == pytest.approx(sum(value for value, _ in parts), rel=1e-11)
        expected = torch.cat([gradient for _, gradient in parts])
        torch.testing.assert_close(x.grad, expected, rtol=1e-11, atol=1e-15)
    # Such a level counts where the batch has foreground elsewhere, as it does as published.
    assert without_foreground or form == "regression"


@pytest.mark.parametrize("form", ["sigmoid", "regression"])
def test_levels_one_by_one_weigh_as_much_as_batches(form):
    x, y = make_batches(form)[3]
    levels = torch.ones(1, len(x), dtype=torch.bool).repeat(5, 1)  # five times the same rows
    together, apart = BUILD[form](), BUILD[form](per_level=True)
    if form == "sigmoid":
        once, five = together([x] * 5, [y] * 5, 1), apart([x] * 5, [y] * 5, 1)
    else:
        once, five = together(x, y), apart(x, y, 1, levels)
    # The average of equal counts is that count, so each level is the loss of its rows alone.
    # Float64 rounding of sums of 120 terms.
    assert five.item() == pytest.approx(5 * once.item(), rel=1e-13)


def test_a_level_sees_the_average_that_the_finer_ones_left():
    loss = GHMClassificationLoss(1, bins=2, momentum=0.5, bias_correction=False, per_level=True)
    zero = torch.zeros(4, 1, dtype=torch.float64)  # p = 1/2: all in the upper bin
    value = loss([zero, zero[:2]], [torch.tensor([0, 1, 1, 1]), torch.tensor([1, 1])], 1)
    # Averages 0.5 x 4 = 2, then 0.5 x 2 + 0.5 x 2 = 2; n = 1: 4 ln 2 / 2 + 2 ln 2 / 2.
    assert value.item() == pytest.approx(3 * math.log(2), rel=1e-14)


@each_form
def test_float32_equals_brute_force(form):
    loss, oracle = BUILD[form](**OPTIONS), BruteForceDensity(**OPTIONS, bias_correction=True)
    for x, y in make_batches(form, torch.float32):
        value, gradient = step(loss, x, y)
        expected_value, expected_gradient = brute_force(form, oracle, x.double(), y)
        # Float32 rounding of the elements: an error of 6e-8 in p is 1e-5 of a gradient of 0.006.
        assert value.item() == pytest.approx(expected_value, rel=1e-5)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@each_form
@each_correction
def test_saving_and_loading_in_the_middle_changes_no_bit(form, bias_correction):
    batches = make_batches(form, torch.float32)
    loss = BUILD[form](**OPTIONS, bias_correction=bias_correction)
    for x, y in batches[:3]:
        step(loss, x, y)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    restored = BUILD[form](**OPTIONS, bias_correction=bias_correction)
    restored.load_state_dict(torch.load(file))
    for x, y in batches[3:]:
        for got, expected in zip(step(restored, x, y), step(loss, x, y)):
            assert torch.equal(got, expected)


def run_shares(rank):
    """Train every form on this worker's share of each batch."""
    results = {}
    for form, build in BUILD.items():
        loss = build(**OPTIONS)
        # The first worker gets rows 0 to 9, so the second has none of the smallest batches.
        shares = [
            (x[:10], y[:10]) if rank == 0 else (x[10:], y[10:]) for x, y in make_batches(form)
        ]
        results[form] = [step(loss, x, y) for x, y in shares], loss.state_dict()
    return results


@pytest.fixture(scope="module")
def two_workers():
    return run_workers(run_shares)


@each_form
def test_two_workers_give_the_result_of_one(form, two_workers):
    loss = BUILD[form](**OPTIONS)
    (first, first_state), (second, second_state) = (worker[form] for worker in two_workers)
    for (x, y), one, two in zip(make_batches(form), first, second):
        value, gradient = step(loss, x, y)
        # Distributed training averages over workers. Only the order of float64 additions differs.
        torch.testing.assert_close((one[0] + two[0]) / 2, value, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat([one[1], two[1]]) / 2, gradient, rtol=1e-13, atol=0)
    for key, expected in loss.state_dict().items():
        assert torch.equal(first_state[key], expected)
        assert torch.equal(second_state[key], expected)


@each_form
def test_published_start_makes_first_weights_too_large(form):
    batch = make_batches(form)[0]
    corrected, _ = step(BUILD[form](**OPTIONS), *batch)
    published, _ = step(BUILD[form](**OPTIONS, bias_correction=False), *batch)
    # 1 / (1 - momentum), exact but for float64 rounding.
    assert (published / corrected).item() == pytest.approx(4, rel=1e-14)


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_batch_without_foreground_gives_zero_and_keeps_the_statistics(form):
    loss = BUILD[form](**OPTIONS)
    x, y = make_batches(form)[1]
    step(loss, x, y)
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    for labels in (torch.full_like(y, K), torch.full_like(y, -1), y[:0]):
        value, gradient = step(loss, x[: len(labels)], labels)
        assert value == 0 and not gradient.any()
        for key, expected in state.items():
            assert torch.equal(loss.state_dict()[key], expected)


def test_regression_without_rows_gives_zero_and_keeps_the_statistics():
    loss = GHMRegressionLoss()
    step(loss, *make_batches("regression")[0])
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    value, gradient = step(loss, torch.zeros(0, 4), torch.zeros(0, 4))
    assert value == 0 and gradient.shape == (0, 4)
    for key, expected in state.items():
        assert torch.equal(loss.state_dict()[key], expected)


@each_form
def test_evaluation_gives_the_training_loss_but_stores_nothing(form):
    loss = BUILD[form](**OPTIONS)
    (first, second, *_) = make_batches(form)
    step(loss, *first)
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    evaluated, _ = step(loss.eval(), *second)
    for key, expected in state.items():
        assert torch.equal(loss.state_dict()[key], expected)
    trained, _ = step(loss.train(), *second)
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize("bins", [1, 4, 30])
def test_uniform_gradient_lengths_give_the_mean(bins):
    # One class; row i is background with g = p at the centre of bin i, but the last is foreground
    # with g = 1 - p. Every bin is occupied once, so the paper's factor B / n is 1.
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    labels = torch.ones(bins).long()
    labels[-1] = 0
    p = torch.where(labels == 0, 1 - centres, centres)
    loss = GHMClassificationLoss(1, bins=bins)
    value, gradient = step(loss, torch.logit(p).unsqueeze(1), labels)
    # Float64 rounding of at most 30 terms.
    assert value.item() == pytest.approx(-torch.log1p(-centres).mean().item(), rel=1e-13)
    expected = torch.where(labels == 0, -centres, centres).unsqueeze(1) / bins
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


@each_form
def test_every_occupied_bin_gets_the_same_total_weight(form):
    options = {"bins": 30, "momentum": 0.75}
    loss = BUILD[form](**options)
    density = loss.gradient_density
    step(loss, *make_batches(form)[3])
    counts = density.counts
    occupied = counts > 0
    assert 1 < occupied.sum() < density.bins and counts.max() > counts[occupied].min()
    weights = GradientDensity(**options, bias_correction=True).weights(counts, counts.sum())
    share = 1 / occupied.sum().double()
    # Float64 rounding of one quotient.
    torch.testing.assert_close(
        weights * counts, torch.where(occupied, share, 0.0), rtol=1e-15, atol=0
    )


def test_gradient_totals_are_flat_after_harmonizing():
    density = GradientDensity(bins=4, momentum=0.5, bias_correction=True)
    density.weights(torch.tensor([90, 0, 9, 1]), torch.tensor(1))
    before, after = density.gradient_totals()
    # Worked out by hand; float64 rounding. Centres are 1/8, 3/8, 5/8 and 7/8.
    assert before.tolist() == pytest.approx([90 / 800, 0, 45 / 800, 7 / 800], rel=1e-14)
    assert after.tolist() == pytest.approx([1 / 24, 0, 5 / 24, 7 / 24], rel=1e-14)
    assert density.density.tolist() == pytest.approx([90, 0, 9, 1], rel=1e-14)


def test_bin_first_seen_late_is_corrected_for_itself():
    density = GradientDensity(bins=2, momentum=0.75, bias_correction=True)
    for counts in ([8, 0], [8, 0], [8, 2]):
        weights = density.weights(torch.tensor(counts), torch.tensor(1))
    assert density.density.tolist() == pytest.approx([8, 2], rel=1e-14)
    # Both bins have total weight 1/2. Float64 rounding.
    assert weights.tolist() == pytest.approx([1 / 16, 1 / 4], rel=1e-14)


@pytest.mark.parametrize(
    "options, message",
    [({"bins": 0}, "at least one bin"), ({"momentum": 1.0}, "momentum"), ({"momentum": -1}, "mom")],
)
def test_impossible_parameters_are_refused(options, message):
    for build in BUILD.values():
        with pytest.raises(InputError, match=message):
            build(**options)
    with pytest.raises(InputError, match="mu"):
        GHMRegressionLoss(mu=0)
