"""The remedies that weigh classes by data or by gradients, each against its formula.

Every oracle is written from the formula with float64 numbers and loops over rows and classes; it
keeps what the method keeps between batches, so that whole sequences are compared.
"""

import copy
import math

import models
import pytest
import torch
from detectron2.utils.events import EventStorage
from distributed import run_workers
from torch import nn
from torch.nn import functional as F

from balanced_det.build import build_model
from balanced_det.cosine import CosineLinear
from balanced_det.errors import InputError
from balanced_det.losses import (
    CLASSIFICATION_LOSSES,
    DropLoss,
    EffectiveClassMarginLoss,
    EqualizationLossV2,
    EqualizedFocalLoss,
    FederatedLoss,
    SeesawLoss,
)
from balanced_det.priors import class_weights

COUNTS = [500.0, 3.0, 120.0, 1.0, 0.0]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


class GradientBalance:
    """EQLv2 and EFL: the gradients that each class has had, a Python number each."""

    def __init__(self, num_classes):
        self.positive = [0.0] * num_classes
        self.negative = [0.0] * num_classes

    def ratio(self, j, initial):
        if self.positive[j] == self.negative[j] == 0:
            return initial
        return self.positive[j] / (self.negative[j] + 1e-10)

    def __call__(self, x, y, normalizer):
        """Return the loss and the (R, C) gradient of a batch, and count it."""
        gradient = torch.zeros_like(x)
        loss = 0.0
        gradients = []
        for i, (row, label) in enumerate(zip(x.tolist(), y.tolist())):
            for j, z in enumerate(row):
                if label >= 0:
                    value, slope = self.term(j, z, j == label)
                    loss += value / normalizer
                    gradient[i, j] = slope / normalizer
                    gradients.append((j, j == label, abs(slope)))
        for j, is_positive, size in gradients:
            if j < len(self.positive):
                sums = self.positive if is_positive else self.negative
                sums[j] += self.counted(size, normalizer)
        return loss, gradient

    def counted(self, size, normalizer):
        return size


class PlainEQLv2(GradientBalance):
    gamma, mu, alpha = 12.0, 0.8, 4.0

    def term(self, j, z, is_positive):
        p = sigmoid(z)
        share = 1.0
        if j < len(self.positive):
            share = 1 / (1 + math.exp(-self.gamma * (self.ratio(j, 100.0) - self.mu)))
        if is_positive:
            weight = 1 + self.alpha * (1 - share)
            return -weight * math.log(p), weight * (p - 1)
        return -share * math.log(1 - p), share * p


class PlainEFL(GradientBalance):
    alpha, base, scale = 0.25, 2.0, 8.0

    def term(self, j, z, is_positive):
        gamma = self.base + self.scale * (1 - min(self.ratio(j, 1.0), 1.0))
        sign = 1 if is_positive else -1
        p_t = sigmoid(sign * z)
        alpha = self.alpha if is_positive else 1 - self.alpha
        weight = alpha * gamma / self.base
        value = -weight * (1 - p_t) ** gamma * math.log(p_t)
        # d/dp of (1 - p)^g log p, times dp/dz = p (1 - p)
        inner = (1 - p_t) ** gamma / p_t - gamma * (1 - p_t) ** (gamma - 1) * math.log(p_t)
        return value, -sign * weight * inner * p_t * (1 - p_t)

    def counted(self, size, normalizer):
        return size / normalizer


class PlainSeesaw:
    p, q = 0.8, 2.0

    def __init__(self, num_classes):
        self.counts = [0] * num_classes

    def __call__(self, x, y, normalizer):
        num_classes = len(self.counts)
        for label in y.tolist():
            if 0 <= label < num_classes:
                self.counts[label] += 1
        m = [max(count, 1) for count in self.counts]
        x = x.detach().clone().requires_grad_()
        loss = 0 * x.sum()
        for row, label in zip(x, y.tolist()):
            if label < 0:
                continue
            objectness = row[num_classes:].softmax(0)
            loss = loss - objectness[int(label == num_classes)].log()
            if label == num_classes:
                continue
            s = row[:num_classes].detach().softmax(0).tolist()
            s_i = max(s[label], 0.01)
            total = 0.0
            for j in range(num_classes):
                mitigation = (m[j] / m[label]) ** self.p if m[j] < m[label] else 1.0
                compensation = (s[j] / s_i) ** self.q if s[j] > s_i else 1.0
                factor = 1.0 if j == label else mitigation * compensation
                total = total + factor * row[j].exp()
            loss = loss - (row[label].exp() / total).log()
        loss = loss / normalizer
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.item(), gradient


class PlainECM:
    def __init__(self, num_classes):
        n = [max(count, 1.0) for count in COUNTS[:num_classes]]
        self.n = [*n, 6.3313 * sum(n)]

    def __call__(self, x, y, normalizer):
        x = x.detach().clone().requires_grad_()
        loss = 0 * x.sum()
        for row, label in zip(x, y.tolist()):
            for j, z in enumerate(row):
                if label < 0:
                    continue
                positive, negative = self.n[j], sum(self.n) - self.n[j]
                both = positive**0.25 + negative**0.25
                a, b = math.log(both / negative**0.25), math.log(both / positive**0.25)
                p = (z + a).exp() / ((z + a).exp() + (b - z).exp())
                r = negative / positive
                weight = r * math.log((1 + r) / r)
                loss = loss - weight * (p if j == label else 1 - p).log()
        loss = loss / normalizer
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.item(), gradient


ORACLES = {
    EqualizationLossV2: PlainEQLv2,
    EqualizedFocalLoss: PlainEFL,
    SeesawLoss: PlainSeesaw,
    EffectiveClassMarginLoss: PlainECM,
}
each_loss = pytest.mark.parametrize("loss", ORACLES, ids=lambda loss: loss.__name__)


def build(loss, num_classes=5):
    statistics = {"class_counts": COUNTS[:num_classes]} if loss.needs else {}
    return loss(num_classes, **statistics)


def make_batches(loss, num_classes=5, dtype=torch.float64):
    """Batches of many sizes; one of background, one ignored and one empty among them."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for step, num_rows in enumerate([11, 7, 0, 40, 5, 5, 23]):
        x = torch.randn(num_rows, loss.num_logits, generator=generator, dtype=torch.float64)
        y = torch.randint(-1, num_classes + 1, (num_rows,), generator=generator)
        if step == 4:
            y.fill_(num_classes)
        if step == 5:
            y.fill_(-1)
        batches.append(((2 * x).to(dtype), y, 3.0 + step))
    return batches


def step(loss, x, y, normalizer):
    x = x.detach().clone().requires_grad_()
    value = loss(x, y, normalizer)
    value.backward()
    return value.detach(), x.grad


@each_loss
@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_sequence_of_batches_follows_the_formula(loss, num_classes):
    ours, oracle = build(loss, num_classes), ORACLES[loss](num_classes)
    for x, y, normalizer in make_batches(ours, num_classes):
        value, gradient = step(ours, x, y, normalizer)
        expected_value, expected_gradient = oracle(x, y, normalizer)
        # Float64 rounding of some hundred terms; float32 tables (margins, counts' logs) are good to
        # 6e-8 of numbers up to 10.
        assert value.item() == pytest.approx(expected_value, rel=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=2e-6, atol=1e-9)


@each_loss
def test_float32_follows_the_formula(loss):
    ours, oracle = build(loss), ORACLES[loss](5)
    for x, y, normalizer in make_batches(ours, dtype=torch.float32):
        value, gradient = step(ours, x, y, normalizer)
        expected_value, expected_gradient = oracle(x.double(), y, normalizer)
        # Float32 rounding, 6e-8 a step, amplified by exponents up to 10 and logits up to 8.
        assert value.item() == pytest.approx(expected_value, rel=1e-5)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=3e-5, atol=1e-6)


def run_shares(rank):
    """Train every loss on this worker's share of each batch."""
    results = {}
    for loss in ORACLES:
        ours = build(loss)
        # A detector's normalizer is that of a worker's part of the batch.
        shares = [
            (x[:6], y[:6], n / 2) if rank == 0 else (x[6:], y[6:], n / 2)
            for x, y, n in make_batches(ours)
        ]
        results[loss.__name__] = [step(ours, *share) for share in shares], ours.state_dict()
    torch.manual_seed(rank)
    for loss in (FederatedLoss(5, COUNTS, num_sampled=3), DropLoss(5, [0.5, 0.0, 0.1, 0.0, 0.9])):
        drawn = []
        for share in range(20):
            labels = torch.tensor([rank, 5 - share % 2 * 4, -1])
            draw = loss.taking_part if isinstance(loss, FederatedLoss) else loss.kept
            drawn.append(draw(labels))
        results[type(loss).__name__] = torch.stack(drawn)
    return results


@pytest.fixture(scope="module")
def two_workers():
    return run_workers(run_shares)


@each_loss
def test_two_workers_give_the_result_of_one(loss, two_workers):
    ours = build(loss)
    (first, first_state), (second, second_state) = (worker[loss.__name__] for worker in two_workers)
    for (x, y, normalizer), one, two in zip(make_batches(ours), first, second):
        value, gradient = step(ours, x, y, normalizer)
        # Distributed training averages over workers. Only the order of float64 additions differs,
        # and logs of counts are float32.
        torch.testing.assert_close((one[0] + two[0]) / 2, value, rtol=1e-6, atol=0)
        both = torch.cat([one[1], two[1]]) / 2
        torch.testing.assert_close(both, gradient, rtol=1e-6, atol=1e-12)
    for key, expected in ours.state_dict().items():
        assert torch.equal(first_state[key], second_state[key])
        torch.testing.assert_close(first_state[key], expected, rtol=1e-12, atol=0)


@each_loss
def test_saving_and_loading_in_the_middle_changes_no_bit(loss):
    ours = build(loss)
    batches = make_batches(ours, dtype=torch.float32)
    for batch in batches[:4]:
        step(ours, *batch)
    restored = loss(5, **dict.fromkeys(loss.needs))
    restored.load_state_dict(copy.deepcopy(ours.state_dict()))
    for batch in batches[4:]:
        for got, expected in zip(step(restored, *batch), step(ours, *batch)):
            assert torch.equal(got, expected)


@each_loss
def test_evaluation_stores_nothing(loss):
    ours = build(loss).eval()
    before = copy.deepcopy(ours.state_dict())
    for batch in make_batches(ours):
        step(ours, *batch)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key])


def test_gradient_balance_of_a_long_training_still_moves():
    # A float32 sum of 1e9 would not notice a gradient below 64.
    loss = EqualizationLossV2(1)
    loss.gradient_ratio.sums.fill_(1e9)
    step(loss, torch.zeros(1, 2), torch.tensor([0]), 1.0)
    assert loss.gradient_ratio.sums[0, 0] > 1e9


def test_equalization_loss_v2_raises_positives_of_suppressed_classes():
    loss = EqualizationLossV2(2)
    x, y = torch.zeros(50, 3), torch.zeros(50, dtype=torch.long)  # class 1 is never positive
    step(loss, x, y, 1.0)
    _, gradient = step(loss, torch.zeros(2, 3), torch.tensor([0, 1]), 1.0)
    f = sigmoid(12 * (0.0 - 0.8))
    # Float32 rounding of products.
    assert gradient[0, 1].item() == pytest.approx(0.5 * f, rel=1e-6)
    assert gradient[1, 1].item() == pytest.approx(-0.5 * (1 + 4 * (1 - f)), rel=1e-6)


def test_equalized_focal_loss_starts_as_focal_loss():
    ours = EqualizedFocalLoss(5)
    focal = CLASSIFICATION_LOSSES.get("FocalLoss")(5)
    batch = make_batches(ours)[0]
    for got, expected in zip(step(ours, *batch), step(focal, *batch)):
        # The exponent is a tensor here and a number there: one float64 rounding of a power.
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_equalized_focal_loss_counts_the_gradients_that_a_detector_trains_with(detector):
    torch.manual_seed(0)
    keys = {"BALANCE.DENSE.CLASSIFICATION_LOSS": "EqualizedFocalLoss"}
    model = build_model(models.config(models.DETECTORS[detector], keys), count=False).train()
    loss = model.criterion.classification_loss
    before, exponents = torch.zeros(2, loss.num_classes, dtype=torch.float64), []
    with EventStorage():
        for seed in range(3):
            exponents.append(loss.pass_options([])["gamma"])
            model.zero_grad()
            losses = model(models.batch(seed=seed))
            sum(value for name, value in losses.items() if "cls" in name).backward()
            positive, negative = loss.gradient_ratio.sums - before
            before = loss.gradient_ratio.sums.clone()
            # The bias gets the sum of all gradients of its class, those of positives below zero.
            bias = model.head.cls_score.bias.grad.double().view(-1, loss.num_classes).sum(dim=0)
            # Sums of some thousand float32 numbers in another order.
            torch.testing.assert_close(negative - positive, bias, rtol=1e-4, atol=1e-7)
            assert positive.any() and negative.all()
    ratio = (before[0] / (before[1] + 1e-10)).clamp(max=1)
    expected = loss.gamma + loss.scale * (1 - ratio)
    torch.testing.assert_close(loss.pass_options([])["gamma"], expected, rtol=0, atol=0)
    assert (exponents[0] == loss.gamma).all()


@pytest.mark.parametrize("loss", [EqualizationLossV2, EqualizedFocalLoss])
def test_gradients_of_a_half_precision_step_are_counted_in_full(loss):
    # The gradient of float16 logits is scaled before it is rounded; the sums must not be.
    states = []
    for dtype in (torch.float16, torch.float32):
        ours = loss(5)
        x, y, normalizer = make_batches(ours, dtype=torch.float16)[0]
        step(ours, x.to(dtype), y, normalizer)
        states.append(ours.gradient_ratio.sums)
    assert states[0].any()
    torch.testing.assert_close(*states, rtol=1e-12, atol=0)


def test_seesaw_compensates_by_the_scores_of_the_rows_themselves():
    # The margin of row and class, from ratios instead of logs.
    loss = SeesawLoss(3, p=0.0, q=2.0)
    z = torch.tensor([[2.0, 0.0, -9.0]])
    s = z.softmax(1)[0]
    margins = loss.margins(z, torch.tensor([2]), torch.zeros(3))[0].exp()
    expected = torch.tensor([(s[0] / 0.01) ** 2, (s[1] / 0.01) ** 2, 1.0])
    torch.testing.assert_close(margins, expected, rtol=1e-5, atol=0)


def test_federated_loss_is_cross_entropy_of_the_classes_that_take_part():
    loss = FederatedLoss(5, COUNTS, num_sampled=3)
    torch.manual_seed(0)
    x = torch.randn(9, 5, dtype=torch.float64)
    y = torch.tensor([1, 1, 5, 5, -1, 5, 1, 5, 5])
    torch.manual_seed(1)
    part = loss.taking_part(y)
    assert part.sum() == 3 and part[1] and not part[4]
    torch.manual_seed(1)
    value, gradient = step(loss, x, y, 8.0)
    target = F.one_hot(y.clamp(min=0), 6)[:, :5].double()
    terms = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    expected = (terms * part)[y >= 0].sum() / 8
    # Float64 rounding of some 30 terms.
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal((gradient != 0).any(dim=0), part)


def test_federated_loss_draws_by_the_power_of_the_counts_without_replacement():
    counts = torch.tensor([400.0, 100.0, 25.0, 1.0, 0.0])
    loss = FederatedLoss(5, counts, num_sampled=2, power=0.5)
    torch.manual_seed(0)
    draws = 20_000
    nothing = torch.tensor([5, -1])
    drawn = torch.stack([loss.taking_part(nothing) for _ in range(draws)])
    assert (drawn.sum(dim=1) == 2).all() and not drawn[:, 4].any()
    p = counts.sqrt() / counts.sqrt().sum()
    # First j, or first another class i and then j of the rest.
    expected = [
        (p[j] + sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j)).item() for j in range(4)
    ]
    # Five standard deviations of a share.
    assert drawn[:, :4].float().mean(dim=0).tolist() == pytest.approx(
        expected, abs=5 * 0.5 / math.sqrt(draws)
    )


def test_federated_loss_takes_all_labels_though_they_are_more_than_it_samples():
    loss = FederatedLoss(5, COUNTS, num_sampled=2)
    assert loss.taking_part(torch.tensor([0, 4, 3, 2, 2, -1])).tolist() == [1, 0, 1, 1, 1]
    # Few classes have images: no more can be drawn than there are.
    few = FederatedLoss(5, [0, 0, 7, 0, 0], num_sampled=4)
    assert few.taking_part(torch.tensor([5, 0])).tolist() == [1, 0, 1, 0, 0]


def test_all_workers_share_one_draw_around_the_labels_of_all(two_workers):
    for name in ("FederatedLoss", "DropLoss"):
        first, second = (worker[name] for worker in two_workers)
        assert torch.equal(first, second)
        assert not (first == first[0]).all()  # though steps differ
    assert two_workers[0]["FederatedLoss"][:, :2].all()  # labels 0 and 1, of either worker


def test_federated_loss_with_a_prior_starts_small():
    loss = FederatedLoss(1203, torch.ones(1203), num_sampled=50)
    labels = torch.full((4,), 1203)
    first = {
        prior: loss(loss.initial_bias(prior).expand(4, -1), labels, 4).item()
        for prior in (None, 0.01)
    }
    # 50 classes of -log(1 - p) a row; float32 rounding of sums of 200 terms.
    assert first[None] == pytest.approx(50 * math.log(2), rel=1e-5)
    assert first[0.01] == pytest.approx(-50 * math.log(0.99), rel=1e-4)


FREQUENCY = [0.5, 0.0, 0.3, 0.001, 0.9]
TAIL = torch.tensor([False, True, False, True, False])


def test_drop_loss_follows_its_formula():
    loss = DropLoss(5, FREQUENCY)
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    y = torch.arange(40) % 7 - 1
    torch.manual_seed(5)
    kept = loss.kept(y)
    torch.manual_seed(5)
    value, gradient = step(loss, x, y, 4.0)
    expected = 0.0
    for row, label in zip(x.tolist(), y.tolist()):
        for j, z in enumerate(row):
            if label < 0:
                continue
            weight = 1.0
            if TAIL[j] and j != label:
                weight = kept[j].item() if label == 5 else 0.0
            expected -= weight * math.log(sigmoid(z) if j == label else 1 - sigmoid(z))
    # Float64 rounding of some hundred terms.
    assert value.item() == pytest.approx(expected / 4, rel=1e-12)


def test_drop_loss_keeps_tail_negatives_by_the_tails_share_of_the_foreground():
    loss = DropLoss(5, FREQUENCY)
    torch.manual_seed(0)
    draws = 4000
    for labels, share in (([1, 0, 0, 2, 5, 5, -1], 0.25), ([1, 3], 1.0), ([5, 5, 0], 0.0)):
        kept = torch.stack([loss.kept(torch.tensor(labels)) for _ in range(draws)])
        # Five standard deviations of a share.
        assert kept.mean(dim=0).tolist() == pytest.approx(
            [share] * 5, abs=5 * math.sqrt(share * (1 - share) / draws)
        )
    assert not loss.kept(torch.tensor([5, -1])).any()


def test_ecm_scores_without_its_margins():
    loss = EffectiveClassMarginLoss(5, COUNTS)
    z = torch.randn(4, 6)
    expected = z[:, :5].sigmoid() * (1 - z[:, 5:].sigmoid())
    torch.testing.assert_close(loss.scores(z), expected)


@pytest.mark.parametrize(
    "build_it, message",
    [
        (lambda: EqualizationLossV2(2, gamma=0), "gamma"),
        (lambda: EqualizationLossV2(2, alpha=-1), "alpha"),
        (lambda: EqualizedFocalLoss(2, gamma=0), "gamma"),
        (lambda: EqualizedFocalLoss(2, alpha=2), "alpha"),
        (lambda: EqualizedFocalLoss(2, scale=-1), "scale"),
        (lambda: SeesawLoss(2, p=-1), "p and q"),
        (lambda: FederatedLoss(2, [1, 1], num_sampled=0), "num_sampled"),
        (lambda: FederatedLoss(2, [1, 1], power=-1), "power"),
        (lambda: DropLoss(2, [0.1, 3.0]), "fractions"),
        (lambda: EffectiveClassMarginLoss(2, [1, math.inf]), "class_counts"),
        (lambda: CosineLinear(2, 2, scale=0), "scale"),
    ],
)
def test_impossible_parameters_are_refused(build_it, message):
    with pytest.raises(InputError, match=message):
        build_it()


def test_cosine_classifier_is_scaled_cosines():
    torch.manual_seed(0)
    layer = CosineLinear(8, 5)
    nn.init.normal_(layer.bias)
    x = 100 * torch.randn(3, 8)
    expected = 20 * F.cosine_similarity(x.unsqueeze(1), layer.weight, dim=-1) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    # A length alone changes nothing, and one that float16 cannot square does no harm.
    torch.testing.assert_close(layer(x / 7), layer(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).isfinite().all()
    assert torch.equal(layer(torch.zeros(1, 8))[0], layer.bias)
    assert layer.state_dict().keys() == nn.Linear(8, 5).state_dict().keys()


def test_class_weights_are_inverse_powers_of_mean_one():
    weights = class_weights([100, 1, 0, 25], "inverse", 0.5)
    expected = torch.tensor([0.1, 1.0, 1.0, 0.2])
    torch.testing.assert_close(weights, expected / expected.mean())
    assert class_weights([3, 9], strength=0).tolist() == [1, 1]
    effective = class_weights([100, 1, 0, 25], "effective_number", 0.9)
    expected = torch.tensor([0.1 / (1 - 0.9**n) for n in (100, 1, 1, 25)])
    torch.testing.assert_close(effective, expected / expected.mean())
    assert class_weights([3, 9], "effective_number", 0.0).tolist() == [1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([-1, 2],), "none negative"),
        (([],), "list of class counts"),
        (([1, 2], "sqrt"), "known are: effective_number, inverse"),
        (([1, 2], "inverse", -1), "beta"),
        (([1, 2], "effective_number", 1.0), r"\[0, 1\)"),
    ],
)
def test_impossible_class_weights_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        class_weights(*arguments)
