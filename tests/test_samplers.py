import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_det.errors import InputError
from balanced_det.rows import nonzero
from balanced_det.samplers import SAMPLERS, IoUBalancedSampler, OHEMSampler
from balanced_det.samplers.draw import take, take_of_one
from balanced_det.samplers.hard_examples import hard_examples
from balanced_det.samplers.iou_balanced import iou_balanced_sample as balanced_of_one
from balanced_det.samplers.random import random_sample
from balanced_det.selection import Quota, Rows

BG = 5  # five classes; the label 5 is background
fast = settings(deadline=None, max_examples=40)


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def rows_of(labels, **more):
    """The rows of a batch of one image."""
    more = {name: value.unsqueeze(0) for name, value in more.items() if value is not None}
    return Rows(labels.unsqueeze(0), BG, **more)


def draw(sampler, rows, quota, generator=None):
    """The foreground and the background rows that a sampler takes of a batch of one image."""
    (mask,) = sampler(rows, quota, generator)
    is_foreground, is_background = rows.foreground[0], rows.background[0]
    assert not (mask & ~is_foreground & ~is_background).any()
    return (mask & is_foreground).nonzero().squeeze(1), (mask & is_background).nonzero().squeeze(1)


def iou_balanced_sample(labels, ious, num, fraction, num_bins=3, *parameters, generator=None):
    sampler = IoUBalancedSampler(num_bins, *parameters)
    return draw(sampler, rows_of(labels, ious=ious), Quota(num, fraction), generator)


def instance_balanced_positives(labels, matched, num, generator=None):
    sampler = IoUBalancedSampler(instance_balanced=True)
    rows = rows_of(labels, ious=torch.zeros(len(labels)), matched=matched)
    return draw(sampler, rows, Quota(num, 1.0), generator)[0]


def hard_example_sample(labels, losses, num, fraction):
    return draw(OHEMSampler(), rows_of(labels, losses=losses), Quota(num, fraction))


@st.composite
def images(draw):
    """Labels, IoUs, matched objects and the sampling settings of one image."""
    size = draw(st.integers(1, 80))
    labels = draw(
        st.lists(st.sampled_from([-1, 0, 1, 4, BG, BG, BG]), min_size=size, max_size=size)
    )
    # Few distinct values, so that ties and IoUs of exactly 0 occur.
    ious = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
    matched = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "ious": torch.tensor(ious, dtype=torch.float32) / 20,
        "matched_idxs": torch.tensor(matched, dtype=torch.int64),
        "num_samples": draw(st.integers(0, 40)),
        "positive_fraction": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    }


def call(sampler, image, generator=None):
    rows = rows_of(
        image["labels"],
        ious=image["ious"],
        matched=image["matched_idxs"],
        losses=image["ious"].flip(0),
    )
    return draw(sampler, rows, Quota(image["num_samples"], image["positive_fraction"]), generator)


def background(counts, num_bins, lower=0.0, upper=0.6):
    """Background rows, ``counts[b]`` of them in the middle of range b, one of IoU ``upper``."""
    width = (upper - lower) / num_bins
    ious = [
        lower + (index + 0.5) * width for index, count in enumerate(counts) for _ in range(count)
    ]
    ious[-1] = upper
    return torch.full((len(ious),), BG), torch.tensor(ious)


def taken_per_bin(counts, negative_idx):
    bins = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return bins[negative_idx].bincount(minlength=len(counts)).tolist()


def shares_of_bins(counts, num_samples, seed):
    """The rows taken from each bin when one of ``counts[b]`` rows is a range of its own."""
    labels, ious = background(counts, len(counts))
    _, negative = iou_balanced_sample(
        labels, ious, num_samples, 0.5, len(counts), generator=seeded(seed)
    )
    return taken_per_bin(counts, negative)


# Of samplers with parameters; the others are tried as they come.
SETTINGS = {
    "IoUBalancedSampler": [
        {},
        {"num_bins": 1},
        {"num_bins": 7, "instance_balanced": True},
        {"floor_threshold": 0.0, "floor_fraction": 0.5},
        {"floor_threshold": 0.3, "floor_fraction": 0.3},
        {"floor_threshold": 0.3},
        {"floor_threshold": 0.9, "floor_fraction": 1.0},
        {"floor_fraction": 0.4},
        {"as_published": True, "instance_balanced": True},
        {"as_published": True, "floor_threshold": 0.0},
    ],
}
CONFIGURED = [
    pytest.param(name, parameters, id=f"{name}({parameters})")
    for name in SAMPLERS.names()
    for parameters in SETTINGS.get(name, [{}])
]
COUNTED = [parameters for parameters in CONFIGURED if parameters.values[0] != "AllSampler"]


@pytest.mark.parametrize(("name", "parameters"), COUNTED)
@fast
@given(image=images())
def test_counts_are_those_of_random_sampling(name, parameters, image):
    sampling = pytest.importorskip("detectron2.modeling.sampling")
    ours = call(SAMPLERS.get(name)(**parameters), image)
    theirs = sampling.subsample_labels(
        image["labels"], image["num_samples"], image["positive_fraction"], BG
    )
    assert [len(rows) for rows in ours] == [len(rows) for rows in theirs]


@pytest.mark.parametrize(("name", "parameters"), CONFIGURED)
@fast
@given(image=images())
def test_rows_are_distinct_and_of_their_kind(name, parameters, image):
    positive, negative = call(SAMPLERS.get(name)(**parameters), image)
    for rows in (positive, negative):
        assert rows.dtype == torch.int64
        assert rows.ndim == 1
        assert len(rows.unique()) == len(rows)
    labels = image["labels"]
    assert ((labels[positive] >= 0) & (labels[positive] < BG)).all()
    assert (labels[negative] == BG).all()


@pytest.mark.parametrize(("name", "parameters"), CONFIGURED)
@fast
@given(image=images())
def test_the_generator_decides_the_draw_and_nothing_passed_in_changes(name, parameters, image):
    sampler = SAMPLERS.get(name)(**parameters)
    before = {key: image[key].clone() for key in ("labels", "ious", "matched_idxs")}
    first = call(sampler, image, generator=seeded(3))
    call(sampler, image, generator=seeded(4))
    again = call(sampler, image, generator=seeded(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(before[key], image[key]) for key in before)
    assert vars(sampler) == vars(SAMPLERS.get(name)(**parameters))


@pytest.mark.parametrize("name", ["RandomSampler", "IoUBalancedSampler"])
def test_without_a_generator_the_seed_of_torch_decides(name):
    labels, ious = background([200, 200, 200], 3)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(draw(SAMPLERS.get(name)(), rows_of(labels, ious=ious), Quota(20, 0.5))[1])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@fast
@given(image=images())
def test_all_takes_every_row_that_is_not_ignored(image):
    rows = torch.cat(call(SAMPLERS.get("AllSampler")(), image)).sort().values
    assert torch.equal(rows, (image["labels"] != -1).nonzero().squeeze(1))


@fast
@given(
    batch=st.lists(images(), min_size=1, max_size=4),
    name=st.sampled_from(SAMPLERS.names()),
)
def test_the_rows_of_an_image_do_not_depend_on_what_it_is_batched_with(batch, name):
    """Numbers and, where nothing is drawn, the rows themselves."""
    size = max(len(image["labels"]) for image in batch)

    def padded(key, value):
        parts = [image[key] for image in batch]
        return torch.stack([F.pad(x, (0, size - len(x)), value=value) for x in parts])

    ious = padded("ious", 0.0)
    rows = Rows(padded("labels", -1), BG, ious, padded("matched_idxs", 0), 1 - ious)
    quota = Quota(batch[0]["num_samples"], batch[0]["positive_fraction"])
    together = SAMPLERS.get(name)()(rows, quota)
    for index in range(len(batch)):
        alone = Rows(
            *(x[index : index + 1] for x in (rows.labels,)),
            BG,
            *(x[index : index + 1] for x in (rows.ious, rows.matched, rows.losses)),
        )
        taken = SAMPLERS.get(name)()(alone, quota)
        for kind in (alone.foreground, alone.background):
            assert (taken & kind).sum() == (together[index] & kind).sum()
        if name == "AllSampler":
            assert torch.equal(taken[0], together[index])


@fast
@given(
    size=st.integers(1, 30),
    number=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_taking_in_a_batch_takes_what_is_taken_of_each(size, number, seed):
    generator = seeded(seed)
    kind = torch.rand(3, 2, size, generator=generator) < 0.6
    priority = torch.rand(3, 1, size, generator=generator)
    numbers = torch.randint(0, number + 1, (3, 2), generator=generator)
    taken = take(kind, priority, numbers, number)
    for image in range(3):
        for k in range(2):
            expected = take_of_one(kind[image, k], priority[image, 0], numbers[image, k])
            assert torch.equal(taken[image, k], expected)


@fast
@given(mask=st.lists(st.booleans(), max_size=40), columns=st.integers(1, 4))
def test_indices_of_a_mask_of_known_count_are_those_of_nonzero(mask, columns):
    mask = torch.tensor(mask[: len(mask) // columns * columns], dtype=torch.bool).view(-1, columns)
    found = nonzero(mask, int(mask.sum()))
    for ours, theirs in zip(found, mask.nonzero(as_tuple=True), strict=True):
        assert torch.equal(ours, theirs)


def frequencies(draws, num_rows):
    """How often each row is taken, given one (positive, negative) pair of lists a draw."""
    counts = torch.zeros(num_rows, dtype=torch.float64)
    for positive, negative in draws:
        counts[positive] += 1
        counts[negative] += 1
    return counts


IMAGE = {
    # Of 50 rows 14 are foreground, of three objects that have 10, 3 and 1; 4 are ignored; the IoUs
    # of the background crowd at 0, as they do.
    "labels": torch.tensor([0] * 10 + [4] * 3 + [1] + [BG] * 32 + [-1] * 4),
    "matched": torch.tensor([0] * 10 + [1] * 3 + [2] + [0, 1, 2, 0] * 9),
    "ious": torch.tensor(
        [0.7] * 14 + [0.0] * 12 + [0.05, 0.1, 0.12, 0.2] * 3 + [0.35] * 6 + [0.4, 0.45] + [0.9] * 4
    ),
}


# What draws of an image at random, by its plain form, which a sampler has in its own file.
DRAWN = ("RandomSampler", "IoUBalancedSampler")


@pytest.mark.parametrize(("name", "parameters"), [p for p in CONFIGURED if p.values[0] in DRAWN])
@pytest.mark.parametrize("quota", [Quota(24, 0.25), Quota(30, 0.5), Quota(9, 1.0)], ids=str)
def test_a_batch_is_drawn_as_the_plain_form_draws_each_image(name, parameters, quota):
    repeats = 2000
    sampler = SAMPLERS.get(name)(**parameters)
    labels, matched, ious = (IMAGE[key] for key in ("labels", "matched", "ious"))
    rows = Rows(
        *(x.expand(repeats, -1) if x is not BG else BG for x in (labels, BG, ious, matched))
    )
    taken = sampler(rows, quota, seeded(1)).double().sum(dim=0)  # (50,)

    positive = ((labels >= 0) & (labels < BG)).nonzero().flatten().tolist()
    negative = (labels == BG).nonzero().flatten().tolist()
    generator = seeded(2)
    if name == "RandomSampler":
        plain = [random_sample(positive, negative, quota, generator) for _ in range(repeats)]
    else:
        of_image = (positive, negative, ious.tolist(), matched.tolist(), quota, sampler)
        plain = [balanced_of_one(*of_image, generator) for _ in range(repeats)]
    expected = frequencies(plain, len(labels))
    assert taken.sum() == expected.sum()
    # Two binomial counts of equal chance p differ by sqrt(2 p (1 - p) n) = 32 at most; 5 of them
    # for 50 rows, in 21 tests.
    difference = (taken - expected).abs()
    chance = (taken + expected) / (2 * repeats)
    assert (difference <= 5 * (2 * chance * (1 - chance) * repeats).sqrt() + 1).all(), difference


@fast
@given(image=images())
def test_hard_examples_are_those_of_the_plain_form(image):
    losses = image["ious"].flip(0)
    ours = call(OHEMSampler(), image)
    positive = ((image["labels"] >= 0) & (image["labels"] < BG)).nonzero().flatten().tolist()
    negative = (image["labels"] == BG).nonzero().flatten().tolist()
    quota = Quota(image["num_samples"], image["positive_fraction"])
    plain = hard_examples(positive, negative, losses.tolist(), quota)
    for rows, expected in zip(ours, plain, strict=True):
        # Of equal losses any may be taken.
        assert sorted(losses[rows].tolist(), reverse=True) == [losses[i].item() for i in expected]


@fast
@given(
    counts=st.lists(st.integers(30, 50), min_size=1, max_size=6),
    num_samples=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_shares_are_within_one_of_equal_when_candidates_suffice(counts, num_samples, seed):
    shares = shares_of_bins(counts, num_samples, seed)
    assert sum(shares) == num_samples
    assert max(shares) - min(shares) <= 1


@fast
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    num_samples=st.integers(0, 60),
    seed=st.integers(0, 2**31),
)
def test_a_bin_gives_its_share_or_all_it_has_and_others_fill_up(counts, num_samples, seed):
    shares = shares_of_bins(counts, num_samples, seed)
    wanted = min(num_samples, sum(counts))
    assert sum(shares) == wanted
    for share, count in zip(shares, counts):
        assert share >= min(count, wanted // len(counts))


def test_what_a_bin_is_short_of_is_drawn_from_the_rest():
    counts = [900, 90, 1]
    labels, ious = background(counts, 3)
    shares = []
    for seed in range(200):
        _, negative = iou_balanced_sample(labels, ious, 90, 0.5, generator=seeded(seed))
        shares.append(taken_per_bin(counts, negative))
    mean = torch.tensor(shares, dtype=torch.float64).mean(dim=0)
    # 30 from each of two bins, 1 from the third; 29 missing, of 870 and 60 rows left: 27.1 and 1.9
    # on average. Hypergeometric, of variance 1.7 at most: five standard errors are 0.46.
    expected = torch.tensor([30 + 29 * 870 / 930, 30 + 29 * 60 / 930, 1], dtype=torch.float64)
    assert torch.allclose(mean, expected, atol=0.46, rtol=0)
    assert all(share[2] == 1 and sum(share) == 90 for share in shares)


def test_a_uniform_draw_reaches_every_row_of_a_bin_alike():
    counts = [10, 40]
    labels, ious = background(counts, 2)
    hits = torch.zeros(50)
    repeats = 2000
    for seed in range(repeats):
        _, negative = iou_balanced_sample(labels, ious, 10, 0.5, 2, generator=seeded(seed))
        hits[negative] += 1
    expected = torch.tensor([5 / 10] * 10 + [5 / 40] * 40)
    # Binomial, at most sqrt(0.25 / 2000) = 0.011; five of them for 50 rows.
    assert torch.allclose(hits / repeats, expected, atol=0.056, rtol=0)


@pytest.mark.parametrize("iou", [0.0, 0.3])
@pytest.mark.parametrize("floor_threshold", [None, 0.0, 0.3, 0.5])
def test_equal_ious_give_full_counts(iou, floor_threshold):
    labels = torch.full((100,), BG)
    positive, negative = iou_balanced_sample(
        labels, torch.full((100,), iou), 64, 0.25, 3, floor_threshold, 0.5
    )
    assert (len(positive), len(negative)) == (0, 64)
    assert len(negative.unique()) == 64


def test_the_ranges_end_at_the_largest_background_iou():
    """A foreground row of IoU 1 would leave the upper ranges empty, were it counted."""
    labels, ious = background([40, 40, 40], 3, upper=0.3)
    labels = torch.cat((labels, torch.tensor([0])))
    ious = torch.cat((ious, torch.tensor([1.0])))
    _, negative = iou_balanced_sample(labels, ious, 31, 0.25)
    assert taken_per_bin([40, 40, 40], negative) == [10, 10, 10]


@pytest.mark.parametrize(
    ("below", "above", "expected_below"),
    [
        (200, [100, 100, 100], 30),  # int(100 * (1 - 0.3)) = 70 from the ranges
        (20, [100, 100, 100], 20),  # too few below: the ranges fill up
        (200, [20, 20, 20], 40),  # too few in the ranges: below fills up
        (10, [20, 20, 20], 10),  # too few in all
    ],
)
@pytest.mark.parametrize("floor_threshold", [0.0, 0.1])
def test_the_floor_fraction_comes_from_below_the_floor(
    below, above, expected_below, floor_threshold
):
    labels, ious = background(above, 3, lower=floor_threshold)
    labels = torch.cat((torch.full((below,), BG), labels))
    ious = torch.cat((torch.full((below,), floor_threshold / 2), ious))
    for seed in range(5):
        _, negative = iou_balanced_sample(
            labels, ious, 100, 0.25, 3, floor_threshold, 0.3, generator=seeded(seed)
        )
        assert (negative < below).sum() == expected_below
        assert len(negative) == min(100, len(labels))
        if min(above) >= 100:
            shares = taken_per_bin(above, negative[negative >= below] - below)
            assert max(shares) - min(shares) <= 1 or expected_below == 20


def test_a_short_range_is_filled_from_the_ranges_before_the_floor():
    labels, ious = background([100, 100, 2], 3, lower=0.1)
    labels = torch.cat((torch.full((50,), BG), labels))
    ious = torch.cat((torch.zeros(50), ious))
    _, negative = iou_balanced_sample(labels, ious, 60, 0.25, 3, 0.1, 0.5)
    assert (negative < 50).sum() == 30
    assert taken_per_bin([100, 100, 2], negative[negative >= 50] - 50)[2] == 2


def test_no_bins_of_a_floor_but_no_fraction_leaves_the_floor_for_last():
    labels, ious = background([5, 5, 5], 3, lower=0.2)
    labels = torch.cat((torch.full((50,), BG), labels))
    ious = torch.cat((torch.zeros(50), ious))
    _, negative = iou_balanced_sample(labels, ious, 20, 0.25, 3, 0.2)
    assert (negative >= 50).sum() == 15


@pytest.mark.parametrize("floor_threshold", [0.1, 0.3, 0.7])
def test_a_row_at_the_floor_is_in_the_ranges(floor_threshold):
    ious = torch.tensor([floor_threshold - 0.01, floor_threshold, floor_threshold + 0.2])
    labels = torch.full((3 * 10,), BG)
    _, negative = iou_balanced_sample(labels, ious.repeat(10), 20, 0.5, 3, floor_threshold)
    assert sorted((negative % 3).tolist()) == [1] * 10 + [2] * 10


class Operations(TorchDispatchMode):
    """The names of the operations of torch that do more than view a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view and "empty" not in operation.name():
            self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "parameters"), CONFIGURED)
def test_a_batch_takes_as_few_kernels_as_an_image_and_no_copy_to_the_host(name, parameters):
    labels, ious = background([300, 200, 2], 3)
    labels[:100] = 1  # more foreground rows than wanted, and a range that is short
    sampler = SAMPLERS.get(name)(**parameters)
    launched = []
    for num_images in (1, 8):
        batch = [x.expand(num_images, -1) for x in (labels, ious, labels, ious)]
        with Operations() as operations:
            sampler(Rows(batch[0], BG, *batch[1:]), Quota(64, 0.25))
        launched.append(operations.names)
    assert launched[0] == launched[1]
    # Operations that wait for the device.
    assert not {"aten::nonzero", "aten::_local_scalar_dense"} & set(launched[0])


@fast
@given(
    counts=st.lists(st.integers(0, 15), min_size=1, max_size=6),
    num=st.integers(0, 60),
    seed=st.integers(0, 2**31),
)
def test_objects_give_equal_shares_as_far_as_they_have_rows(counts, num, seed):
    matched = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = torch.randint(0, BG, matched.shape, generator=seeded(seed))
    # Background and ignored rows are matched to objects too and must not count for them.
    labels = torch.cat((labels, torch.tensor([BG, -1]).repeat(10)))
    matched = torch.cat((matched, torch.zeros(20, dtype=torch.int64)))
    rows = instance_balanced_positives(labels, matched, num, generator=seeded(seed))
    assert len(rows) == min(num, sum(counts))
    assert len(rows.unique()) == len(rows)
    shares = matched[rows].bincount(minlength=len(counts)).tolist()
    largest = max(shares)
    for share, count in zip(shares, counts):
        assert share == count or share >= largest - 1


def test_the_object_that_gives_one_more_is_drawn_at_random():
    matched = torch.tensor([0] * 900 + [1] * 3)
    labels = torch.zeros_like(matched)
    more = 0
    repeats = 400
    for seed in range(repeats):
        rows = instance_balanced_positives(labels, matched, 3, generator=seeded(seed))
        more += int((matched[rows] == 0).sum() == 2)
    # Binomial with 1/2: five standard deviations of the mean are 5 * 0.5 / sqrt(400) = 0.125.
    assert more / repeats == pytest.approx(0.5, abs=0.125)


def test_the_sampler_balances_objects_where_it_is_told_to():
    labels = torch.tensor([0] * 90 + [1] * 10 + [BG] * 50)
    matched = torch.tensor([0] * 90 + [1] * 10 + [0] * 50)
    ious = torch.linspace(0, 0.4, 150)
    for balanced, low, high in ((True, 8, 8), (False, 0, 6)):
        sampler = IoUBalancedSampler(instance_balanced=balanced)
        rows = rows_of(labels, ious=ious, matched=matched)
        positive, _ = draw(sampler, rows, Quota(64, 0.25), seeded(0))
        assert len(positive) == 16
        assert low <= matched[positive].sum() <= high


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_do_not_mix_rows_of_different_kinds(value):
    labels = torch.tensor([0, BG, BG, -1, BG, 1])
    losses = torch.full((6,), value)
    positive, negative = hard_example_sample(labels, losses, 5, 0.4)
    assert sorted(positive.tolist()) == [0, 5]
    assert sorted(negative.tolist()) == [1, 2, 4]


def test_the_largest_loss_is_the_one_that_is_not_a_number():
    labels = torch.full((4,), BG)
    losses = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    assert hard_example_sample(labels, losses, 2, 0.5)[1].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_will_do(dtype):
    labels, ious = background([40, 40, 40], 3)
    labels[:5] = 1
    positive, negative = iou_balanced_sample(labels.to(dtype), ious, 20, 0.5)
    assert (len(positive), len(negative)) == (5, 15)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_bins": 0}, "num_bins is 0"),
        ({"floor_threshold": -0.5}, "floor_threshold is -0.5"),
        ({"floor_threshold": -1.0}, r"is -1.0; it must be in \[0, 1\), or None for no floor"),
        ({"floor_threshold": 1.0}, "floor_threshold is 1.0"),
        ({"floor_fraction": 1.5}, "floor_fraction is 1.5"),
    ],
)
def test_parameters_that_cannot_work_are_refused(parameters, message):
    with pytest.raises(InputError, match=message):
        IoUBalancedSampler(**parameters)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [((-1, 0.5), "rows_per_image is -1"), ((10, 7), "positive_fraction is 7")],
)
def test_a_quota_that_cannot_be_is_refused(settings_, message):
    with pytest.raises(InputError, match=message):
        Quota(*settings_)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "parameters"), COUNTED)
def test_cuda_and_cpu_agree_in_counts_and_in_distribution(name, parameters):
    generator = seeded(0)
    ious = torch.rand(4000, generator=generator) ** 3
    labels = torch.where(ious > 0.5, torch.randint(0, BG, (4000,), generator=generator), BG)
    matched = torch.randint(0, 6, (4000,), generator=generator)
    sampler = SAMPLERS.get(name)(**parameters)
    means = {}
    for device in ("cpu", "cuda"):
        batch = [x.expand(40, -1).to(device) for x in (labels, ious, matched, ious)]
        rows = Rows(batch[0], BG, *batch[1:])
        taken = sampler(rows, Quota(256, 0.25), seeded(3, device))
        assert taken.device.type == device
        assert ((taken & rows.foreground).sum(dim=1) == 64).all()
        assert ((taken & rows.background).sum(dim=1) == 192).all()
        means[device] = (rows.ious * (taken & rows.background)).sum() / (40 * 192)
    # IoUs of background rows are below 0.5, so a mean of 192 varies by at most 0.5 / sqrt(4 * 192),
    # and one of 40 such means by 0.0029; five standard errors of a difference of two are 0.02.
    assert means["cpu"].item() == pytest.approx(means["cuda"].item(), abs=0.02)


def test_what_rows_came_without_is_named():
    labels = torch.tensor([[0, BG]])
    with pytest.raises(InputError, match="without their ious"):
        IoUBalancedSampler()(Rows(labels, BG), Quota(2, 0.5))
    with pytest.raises(InputError, match="without their losses"):
        OHEMSampler()(Rows(labels, BG), Quota(2, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "parameters"), CONFIGURED)
def test_the_host_never_waits_for_the_device(name, parameters, recwarn):
    labels, ious = (x.cuda().expand(4, -1) for x in background([400, 400, 400], 3))
    rows = Rows(labels, BG, ious, torch.zeros_like(labels), ious)
    sampler = SAMPLERS.get(name)(**parameters)
    sampler(rows, Quota(64, 0.25))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        recwarn.clear()
        sampler(rows, Quota(64, 0.25))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [w for w in recwarn if "synchronizing" in str(w.message)]
