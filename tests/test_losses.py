"""What every registered classification loss keeps, and the formulas of those that are not GHM."""

import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from balanced_det import losses
from balanced_det.errors import InputError
from balanced_det.losses import (
    BOX_LOSSES,
    CLASSIFICATION_LOSSES,
    EqualizationLoss,
    FocalLoss,
    SeesawLoss,
    SigmoidLoss,
    SoftmaxEqualizationLoss,
)

DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
K = 5
FREQUENCY = [0.5, 0.0, 0.3, 0.001, 0.9]  # classes 1 and 3 are tail at the default threshold
TAIL = torch.tensor([False, True, False, True, False])

# What a loss may declare that it needs.
STATISTICS = {
    "class_frequency": torch.tensor(FREQUENCY),
    "class_counts": torch.tensor([500.0, 0.0, 300.0, 1.0, 900.0]),
}

each_loss = pytest.mark.parametrize("name", CLASSIFICATION_LOSSES.names())
LOSSES = dict(CLASSIFICATION_LOSSES)
each_neutral = pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if loss.neutral is not None]
)
each_counting = pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.needs])


def build(name, num_classes=K, **options):
    """A loss with statistics of K classes and, unless told otherwise, nothing left to chance."""
    loss = LOSSES[name]
    statistics = {need: STATISTICS[need][:num_classes] for need in loss.needs}
    return loss(num_classes, **{**statistics, **loss.example, **options})


def plain_cross_entropies(loss, logits, labels):
    """The unweighted cross entropy of each row by the definition of its family, from one-hots."""
    if isinstance(loss, SigmoidLoss):
        target = F.one_hot(labels, K + 1)[:, : loss.num_logits].to(logits.dtype)
        terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return terms.sum(dim=1)
    if isinstance(loss, SeesawLoss):
        is_object = labels < K
        terms = F.cross_entropy(logits[:, K:], (~is_object).long(), reduction="none")
        of_class = F.cross_entropy(logits[is_object, :K], labels[is_object], reduction="none")
        return terms.index_add(0, is_object.nonzero().squeeze(1), of_class)
    return F.cross_entropy(logits, labels, reduction="none")


def make_rows(loss, num_rows=24, seed=0, dtype=torch.float32):
    """Rows of every kind: each class, background and ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, loss.num_logits, generator=generator, dtype=torch.float64) * 2
    labels = torch.arange(num_rows) % (K + 2) - 1  # -1, 0 … K-1, K
    return logits.to(dtype), labels


def seeded(loss, *batch, **options):
    """Call a loss; what a method draws is drawn again in each call."""
    torch.manual_seed(0)
    return loss(*batch, **options)


def loss_and_gradient(loss, logits, labels, normalizer=3.0):
    logits = logits.detach().requires_grad_()
    value = seeded(loss, logits, labels, normalizer)
    value.backward()
    return value.detach(), logits.grad


@each_neutral
def test_neutral_settings_equal_cross_entropy(name):
    loss = build(name, **LOSSES[name].neutral)
    logits, labels = make_rows(loss, dtype=torch.float64)
    valid = labels >= 0
    x, y = logits[valid].requires_grad_(), labels[valid]
    # GHM divides by the count of terms itself, so its mean is what all can be compared by.
    count = x.numel() if isinstance(loss, SigmoidLoss) else len(x)
    expected = plain_cross_entropies(loss, x, y).sum() / count
    expected.backward()
    value, gradient = loss_and_gradient(loss, logits, labels, count)
    # Float64 rounding of sums of about 100 terms.
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[valid], x.grad, rtol=1e-12, atol=1e-15)


@each_loss
def test_row_losses_are_the_plain_cross_entropies(name):
    loss = build(name)
    logits, labels = make_rows(loss)
    losses = loss.row_losses(2 * logits.requires_grad_(), labels)
    assert losses.shape == labels.shape and not losses.requires_grad
    valid = labels >= 0
    assert (losses[~valid] == 0).all()
    expected = plain_cross_entropies(loss, 2 * logits.detach()[valid].double(), labels[valid])
    # Float32 rounding of sums of numbers up to about 15.
    torch.testing.assert_close(losses[valid].double(), expected, rtol=1e-5, atol=1e-5)


@each_loss
def test_labels_outside_the_contract_are_refused_on_the_cpu(name):
    loss = build(name)
    for label in (-2, K + 1):
        labels = torch.tensor([0, label, K])
        with pytest.raises(InputError, match=f"{name} got the label {label};"):
            loss(torch.zeros(3, loss.num_logits), labels, 1)


@each_loss
def test_predicted_class_is_that_of_the_highest_score_or_background(name):
    loss = build(name)
    logits, _ = make_rows(loss, num_rows=200)
    predicted = loss.predicted_class(logits)
    assert predicted.shape == (200,) and predicted.dtype == torch.long
    scores = loss.scores(logits)
    is_object = predicted < K
    assert 0 < is_object.sum() < 200
    assert torch.equal(predicted[is_object], scores.argmax(dim=1)[is_object])
    # Whatever background is, a class that is more likely than not goes before it, and one below
    # 1 / (K + 1) does not.
    best = scores.amax(dim=1)
    assert is_object[best > 0.5].all()
    assert best[is_object].min() >= 1 / (K + 1)


@each_loss
def test_class_weights_multiply_the_terms_of_a_rows_own_class(name):
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5])
    weighted = build(name).weigh_classes(weights).eval()
    logits, labels = make_rows(weighted, dtype=torch.float64)
    _, gradient = loss_and_gradient(build(name).eval(), logits, labels)
    _, got = loss_and_gradient(weighted, logits, labels)
    factor = F.pad(weights.double(), (0, 1), value=1)[labels.clamp(min=0)].unsqueeze(1)
    if isinstance(weighted, SigmoidLoss):  # y = 1 alone
        own = F.one_hot(labels.clamp(min=0), K + 1)[:, : weighted.num_logits].bool()
        factor = torch.where(own, factor, 1.0)
    elif isinstance(weighted, SeesawLoss):  # which has no class in its objectness
        factor = torch.cat([factor.expand(-1, K), torch.ones(len(factor), 2)], dim=1)
    # One more float64 rounding.
    torch.testing.assert_close(got, gradient * factor, rtol=1e-12, atol=1e-15)


@each_loss
@pytest.mark.parametrize(
    "weights, message",
    [([1.0] * 4, "5 classes"), ([-1.0] * 5, "at least 0"), ([math.nan] * 5, "0")],
)
def test_impossible_class_weights_are_refused(name, weights, message):
    with pytest.raises(InputError, match=message):
        build(name).weigh_classes(weights)


@each_loss
def test_class_weights_come_with_the_checkpoint(name):
    loss = build(name).weigh_classes([0.5, 2.0, 1.0, 0.0, 1.5])
    restored = build(name).weigh_classes(None)
    restored.load_state_dict(loss.state_dict())
    batch = make_rows(loss)
    for got, expected in zip(loss_and_gradient(restored, *batch), loss_and_gradient(loss, *batch)):
        assert torch.equal(got, expected)
    assert not any("class_weight" in key for key in build(name).state_dict())


SATURATED = [0.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf]


@pytest.mark.parametrize(
    "name, options",
    [(name, {}) for name in LOSSES] + [("FocalLoss", {"gamma": g}) for g in (0, 0.5, 1.0, 5.0)],
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_gradient_is_finite_whatever_the_logits(name, options, device, dtype):
    for weights in (None, [0.0, 300.0, 1.0, 1.0, 5.0]):
        loss = build(name, **options)
        if weights is not None:
            loss.weigh_classes(weights)
        loss.to(device)
        columns = loss.num_logits
        # Every value in every column, for rows of every label, beside zeros and beside its like.
        values = torch.tensor(SATURATED).to(dtype)
        alone = torch.zeros(len(values), columns, columns, dtype=dtype)
        alone[:, range(columns), range(columns)] = values.unsqueeze(1)
        alike = values.view(-1, 1, 1).expand(-1, 1, columns)
        drawn = values[torch.randint(len(values), (len(values), 5, columns))]
        rows = torch.cat([alone, alike, drawn], dim=1).flatten(0, 1)
        labels = torch.arange(-1, K + 1)
        logits = rows.repeat(len(labels), 1).to(device)
        labels = labels.repeat_interleave(len(rows)).to(device)
        for _ in range(2):  # the second step has a state
            _, gradient = loss_and_gradient(loss, logits, labels, 1000.0)
            assert gradient.isfinite().all()
            assert (gradient[labels < 0] == 0).all()


@each_loss
@pytest.mark.parametrize("content", [1.0, math.inf, math.nan])
def test_ignored_rows_have_exactly_zero_gradient_and_no_loss(name, content):
    loss = build(name).eval()
    logits, labels = make_rows(loss)
    valid = labels >= 0
    expected, _ = loss_and_gradient(loss, logits[valid], labels[valid])
    logits[~valid] = content
    value, gradient = loss_and_gradient(loss, logits, labels)
    assert (gradient[~valid] == 0).all()
    assert gradient[valid].isfinite().all()
    # Zeros of ignored rows may change the order of float32 additions.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("normalizer", [0, 1.0, torch.tensor(0)])
def test_batch_without_rows_gives_a_zero_that_backpropagates(name, num_rows, normalizer):
    loss = build(name)
    value, gradient = loss_and_gradient(
        loss, torch.randn(num_rows, loss.num_logits), torch.full((num_rows,), -1), normalizer
    )
    assert value == 0
    assert gradient.shape == (num_rows, loss.num_logits)
    assert (gradient == 0).all()


@each_loss
def test_batch_of_background_is_finite(name):
    loss = build(name)
    logits, labels = make_rows(loss)
    value, gradient = loss_and_gradient(loss, logits, torch.full_like(labels, K))
    assert value.isfinite() and value >= 0
    assert gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_extreme_logits_are_finite(name, size):
    loss = build(name)
    logits, labels = make_rows(loss)
    value, gradient = loss_and_gradient(loss, logits.sign() * size, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()


@each_loss
def test_one_class_is_enough(name):
    loss = build(name, num_classes=1)
    logits = torch.zeros(3, loss.num_logits)
    value, gradient = loss_and_gradient(loss, logits, torch.tensor([0, 1, -1]))
    assert value.isfinite() and value > 0
    assert gradient.isfinite().all()


@each_loss
def test_gradient_is_the_derivative(name):
    # Seesaw's compensation depends on the logits but has no gradient, by definition.
    options = {"q": 0.0} if name == "SeesawLoss" else {}
    loss = build(name, **options).eval()  # GHM would count each of gradcheck's evaluations
    logits, labels = make_rows(loss, num_rows=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: seeded(loss, x, labels, 3.0), logits.requires_grad_())


@each_loss
def test_half_precision_is_summed_in_float32(name):
    loss = build(name).eval()
    logits, labels = make_rows(loss)
    features, weight = torch.eye(len(logits)), logits.t().contiguous().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        half = F.linear(features, weight)
        value = seeded(loss, half, labels, 3.0)
    value.backward()
    assert half.dtype == torch.bfloat16 and value.dtype == torch.float32
    # The same float32 arithmetic on the same numbers; only the order of additions may differ.
    torch.testing.assert_close(
        value, seeded(loss, half.detach().float(), labels, 3.0), rtol=1e-6, atol=0
    )
    assert weight.grad.isfinite().all() and weight.grad.any()
    assert loss.scores(half).dtype == torch.float32


@each_loss
def test_checkpoint_continues_bit_for_bit(name):
    loss = build(name)
    for seed in range(2):
        loss(*make_rows(loss, seed=seed), 3.0)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    # A model that is built to load a checkpoint does not know the statistics.
    restored = build(name, **dict.fromkeys(LOSSES[name].needs))
    restored.load_state_dict(torch.load(file))
    batch = make_rows(loss, seed=2)
    for got, expected in zip(loss_and_gradient(restored, *batch), loss_and_gradient(loss, *batch)):
        assert torch.equal(got, expected)
    for key, value in loss.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value)


@each_loss
def test_levels_in_the_head_layout_equal_concatenated_rows(name):
    loss = build(name)
    anchors, channels = 2, loss.num_logits
    maps = [torch.randn(2, anchors * channels, s, s + 1, requires_grad=True) for s in (3, 2)]
    levels = [x.unflatten(1, (anchors, channels)).permute(0, 3, 4, 1, 2) for x in maps]
    labels = [torch.randint(-1, K + 1, x.shape[:-1]) for x in levels]
    expected, gradient = loss_and_gradient(
        build(name),
        torch.cat([x.reshape(-1, channels) for x in levels]),
        torch.cat([y.flatten() for y in labels]),
    )
    value = seeded(loss, levels, labels, 3.0)
    value.backward()
    # Levels are summed one by one: another order of float32 additions.
    torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
    got = [x.grad.unflatten(1, (anchors, channels)).permute(0, 3, 4, 1, 2) for x in maps]
    got = torch.cat([x.reshape(-1, channels) for x in got])
    # The counts are integers, so GHM's weights agree; elements differ by a rounding at most.
    torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-9)


@each_loss
def test_overwriting_the_logits_changes_neither_loss_nor_gradient(name):
    loss = build(name)
    logits, labels = make_rows(loss)
    expected = loss_and_gradient(build(name), logits, labels)
    leaf = logits.clone().requires_grad_()
    value = seeded(loss, leaf + 0, labels, 3.0, overwrite_logits=True)
    value.backward()
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


@each_loss
def test_normalizer_may_live_on_the_device(name):
    loss = build(name).eval()
    logits, labels = make_rows(loss)
    expected = seeded(loss, logits, labels, 7)
    assert expected.dtype == torch.float32
    for normalizer in (torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0).double()):
        value = seeded(loss, logits, labels, normalizer)
        assert value.dtype == torch.float32
        # One rounding, of the reciprocal, may differ.
        torch.testing.assert_close(value, expected, rtol=3e-7, atol=0)


@each_loss
@pytest.mark.parametrize("prior", [0.01, 1e-5])
def test_initial_bias_starts_every_class_at_the_prior(name, prior):
    loss = build(name)
    bias = loss.initial_bias(prior)
    assert bias.shape == (loss.num_logits,)
    # The bias is rounded to float32 at a size of 12: 1e-6 absolute, hence relative in the score.
    torch.testing.assert_close(loss.scores(bias), torch.full((K,), prior), rtol=3e-6, atol=0)
    assert not loss.initial_bias(None).any()


@each_loss
@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1])
def test_impossible_prior_is_refused(name, prior):
    with pytest.raises(InputError, match=str(prior)):
        build(name).initial_bias(prior)


@each_loss
def test_scores_are_probabilities_of_object_classes(name):
    loss = build(name)
    logits = torch.randn(2, 3, loss.num_logits)
    scores = loss.scores(logits)
    assert scores.shape == (2, 3, K)
    assert ((scores > 0) & (scores < 1)).all()
    if loss.scores_are_a_distribution:
        assert (scores.sum(dim=-1) < 1).all()


def test_scores_of_the_plain_families_are_sigmoid_and_softmax():
    logits = torch.randn(2, 3, K + 1)
    assert torch.equal(build("FocalLoss").scores(logits[..., :K]), logits[..., :K].sigmoid())
    assert torch.equal(build("CrossEntropyLoss").scores(logits), logits.softmax(-1)[..., :K])


@each_loss
def test_shapes_that_do_not_fit_are_refused(name):
    loss = build(name)
    with pytest.raises(InputError, match=rf"{name} has {loss.num_logits} logits"):
        loss(torch.zeros(4, loss.num_logits + 2), torch.zeros(4).long(), 1)
    with pytest.raises(InputError, match="labels of shape"):
        loss(torch.zeros(4, loss.num_logits), torch.zeros(3).long(), 1)
    with pytest.raises(InputError, match="1 levels of logits and 2"):
        loss([torch.zeros(4, loss.num_logits)], [torch.zeros(4).long()] * 2, 1)


@pytest.mark.gpu
@each_loss
def test_forward_never_waits_for_the_device(name):
    loss = build(name).cuda()
    logits, labels = (x.cuda() for x in make_rows(loss))
    loss(logits, labels, 3.0)  # compiles what needs compiling
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(logits, labels, labels.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_focal_loss_follows_its_formula():
    loss = FocalLoss(K, alpha=0.3, gamma=1.5)
    logits, labels = make_rows(loss, dtype=torch.float64)
    expected = 0.0
    for row, label in zip(logits.sigmoid().tolist(), labels.tolist()):
        for j, p in enumerate(row):
            p_t, alpha_t = (p, 0.3) if j == label else (1 - p, 0.7)
            if label >= 0:
                expected -= alpha_t * (1 - p_t) ** 1.5 * math.log(p_t)
    # Float64 rounding of a sum of about 100 terms.
    assert loss(logits, labels, 2).item() == pytest.approx(expected / 2, rel=1e-12)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -1}, {"gamma": -0.1}])
def test_focal_loss_refuses_impossible_parameters(options):
    with pytest.raises(InputError, match=next(iter(options))):
        FocalLoss(K, **options)


def test_equalization_loss_follows_its_formula():
    loss = EqualizationLoss(K, FREQUENCY)
    logits, labels = make_rows(loss, dtype=torch.float64)
    expected = 0.0
    for row, label in zip(logits.sigmoid().tolist(), labels.tolist()):
        for j, p in enumerate(row):
            is_foreground, is_tail, y = 0 <= label < K, FREQUENCY[j] < 0.00177, int(j == label)
            w = 1 - is_foreground * is_tail * (1 - y)
            if label >= 0:
                expected -= w * math.log(p if y else 1 - p)
    # Float64 rounding of a sum of about 100 terms.
    assert loss(logits, labels, 24).item() == pytest.approx(expected / 24, rel=1e-12)


def test_equalization_loss_spares_tail_classes_on_foreground_rows_only():
    loss = EqualizationLoss(K, FREQUENCY)
    logits, labels = make_rows(loss)
    _, gradient = loss_and_gradient(loss, logits, labels)
    own = labels.unsqueeze(1) == torch.arange(K)
    foreground = ((labels >= 0) & (labels < K)).unsqueeze(1)
    valid = (labels >= 0).unsqueeze(1)
    assert torch.equal(gradient != 0, valid & ~(foreground & TAIL & ~own))


def test_softmax_equalization_loss_follows_its_formula():
    loss = SoftmaxEqualizationLoss(K, FREQUENCY, drop_probability=1.0)
    logits, labels = make_rows(loss, dtype=torch.float64)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        if label >= 0:
            weights = [1 - (k < K and FREQUENCY[k] < 0.00177) * (k != label) for k in range(K + 1)]
            total = sum(w * math.exp(z) for w, z in zip(weights, row))
            expected -= math.log(math.exp(row[label]) / total)
    # Float64 rounding of a sum of about 20 terms.
    assert loss(logits, labels, 2).item() == pytest.approx(expected / 2, rel=1e-12)


def test_softmax_equalization_loss_draws_beta_for_every_row_and_class():
    num_rows, keep = 4000, 0.9
    loss = SoftmaxEqualizationLoss(K, FREQUENCY, drop_probability=keep)
    logits, labels = torch.zeros(num_rows, K + 1), torch.zeros(num_rows).long()
    torch.manual_seed(0)
    _, gradient = loss_and_gradient(loss, logits, labels)
    dropped = gradient == 0  # (R, K + 1)
    assert not dropped[:, [0, 2, 4, 5]].any()
    # Five standard deviations of a binomial share.
    tolerance = 5 * math.sqrt(keep * (1 - keep) / num_rows)
    assert dropped[:, [1, 3]].float().mean(0).tolist() == pytest.approx([keep] * 2, abs=tolerance)
    both = (dropped[:, 1] & dropped[:, 3]).float().mean().item()
    assert both == pytest.approx(keep**2, abs=tolerance)  # drawn independently
    torch.manual_seed(0)
    assert torch.equal(loss_and_gradient(loss, logits, labels)[1], gradient)


each_equalization = pytest.mark.parametrize(
    "name", [n for n, loss in LOSSES.items() if "class_frequency" in loss.needs]
)


@each_equalization
def test_class_at_the_threshold_is_not_tail(name):
    loss = build(name, class_frequency=[0.1, 0.2, 0.05, 0.1, 0.3], tail_threshold=0.1)
    assert loss.tail.mask().tolist() == [False, False, True, False, False]


@each_equalization
def test_tail_share_takes_the_rarest_classes_in_index_order(name):
    loss = build(name, class_frequency=[0.2, 0.1, 0.2, 0.9, 0.2], tail_share=0.6)
    assert loss.tail.mask().tolist() == [True, True, True, False, False]
    with pytest.raises(InputError, match="tail_share"):
        build(name, tail_share=1.0)


@each_equalization
@pytest.mark.parametrize(
    "options, count", [({"tail_threshold": 0.0}, 0), ({"tail_threshold": 1.0}, K - 1)]
)
def test_tail_of_none_or_all_is_one_warning(name, options, count, caplog):
    loss = build(name, **options)
    loss(*make_rows(loss), 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    # One class has no training image.
    assert f"{count} of the {K - 1} classes that occur" in caplog.text


@each_equalization
@pytest.mark.parametrize("num_tail, warns", [(4, True), (5, False), (95, False), (96, True)])
def test_tail_of_fewer_than_5_or_more_than_95_percent_is_told_with_the_key(
    name, num_tail, warns, caplog
):
    # Of 100 classes that occur, and 100 that do not, which are tail whatever the threshold is.
    frequency = torch.cat([torch.arange(1, 101) / 1000, torch.zeros(100)])
    options = {"class_frequency": frequency, "tail_threshold": num_tail / 1000 + 0.0005}
    CLASSIFICATION_LOSSES.get(name)(200, **options)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    for message in messages:
        assert f"tail_threshold {num_tail / 1000 + 0.0005} makes {num_tail} of the 100" in message
        assert f"change BALANCE.{name}.TAIL_THRESHOLD or set BALANCE.{name}.TAIL_SHARE" in message


@each_equalization
@pytest.mark.parametrize(
    "frequency, message",
    [([0.1, 0.2], "5 classes"), ([0.1, 0.2, 0.3, 0.4, 1.5], "fraction"), ([math.nan] * K, "fract")],
)
def test_impossible_class_frequency_is_refused(name, frequency, message):
    with pytest.raises(InputError, match=message):
        build(name, class_frequency=frequency)


@each_counting
def test_training_without_its_statistic_is_refused(name):
    (need,) = LOSSES[name].needs
    loss = build(name, **{need: None})
    assert getattr(loss, need).isnan().all()
    with pytest.raises(InputError, match=need):
        loss(*make_rows(loss), 1)


@each_counting
def test_statistic_of_other_classes_is_refused(name):
    (need,) = LOSSES[name].needs
    with pytest.raises(InputError, match=f"{need} has shape .*5 classes"):
        build(name, **{need: [0.1, 0.2]})
    with pytest.raises(InputError, match=need):
        build(name, **{need: [-1.0] * K})


def test_every_file_of_the_folder_is_imported_and_every_loss_a_name_of_the_package():
    folder = Path(losses.__file__).parent
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        assert name == "__init__" or f"balanced_det.losses.{name}" in sys.modules
    for name, method in (*CLASSIFICATION_LOSSES, *BOX_LOSSES):
        assert getattr(losses, name) is method and name in losses.__all__


def test_number_of_classes_must_be_positive():
    with pytest.raises(InputError, match="at least one class"):
        FocalLoss(0)


def test_unknown_loss_lists_the_known_ones():
    with pytest.raises(InputError, match="FocalLos'.*BinaryCrossEntropyLoss.*SoftmaxGHMLoss"):
        CLASSIFICATION_LOSSES.get("FocalLos")
