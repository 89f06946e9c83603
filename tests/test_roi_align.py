"""RoIAlign of a batch against torchvision's roi_align, called for one box at a time.

As in test_ops, tests that take ``implementation`` run on all that this machine has, and the kernels
run in Triton's interpreter where there is no CUDA.
"""

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import run_in_interpreter
from test_ops import IMPLEMENTATIONS, INTERPRETED

from balanced_det import ops
from balanced_det.errors import InputError
from balanced_det.ops.choice import uses_triton
from balanced_det.ops.roi_align import roi_align

# Samples lie at the same places, and the same terms are summed in another order: each weight is off
# by 2**-24, and a sum of a hundred terms by less than 100 * 2**-24 = 6e-6 of the largest one.
FLOAT32 = 1e-5
# One rounding step: a float32 result that is off by little may be rounded to the other side.
STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}

SIZES, SCALES = [(12, 16), (6, 8), (3, 4)], [1 / 4, 1 / 8, 1 / 16]  # An image of 48 x 64.


@pytest.fixture(params=IMPLEMENTATIONS, ids="-".join)
def implementation(request):
    """Switch to an implementation; the value is the device to test it on."""
    name, device = request.param
    with ops.implementation(name):
        yield device


def pyramid(device, channels=5, layout=torch.channels_last, dtype=torch.float32):
    """Features of three levels of two images."""
    return [
        torch.randn(2, channels, *size).to(device, dtype, memory_format=layout).requires_grad_()
        for size in SIZES
    ]


def scattered(count, device):
    """Boxes of any level and image, some of them partly outside; (boxes, image, level)."""
    corner = torch.rand(count, 2) * torch.tensor([80.0, 60]) - 16
    boxes = torch.cat([corner, corner + 3 + 40 * torch.rand(count, 2)], dim=1)
    index = torch.arange(count)
    return boxes.to(device), (index % 2).to(device), (index % 3).to(device)


def one_box_at_a_time(features, boxes, image, level, scales, *options):
    regions = [
        torchvision.ops.roi_align(features[at][i : i + 1], [box.unsqueeze(0)], size, scales[at], *o)
        for size, *o in [options]
        for box, i, at in zip(boxes, image.tolist(), level.tolist())
    ]
    return torch.cat(regions)


def assert_close(found, expected, share=FLOAT32):
    """Compare, as a share of the largest element and of each."""
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=share, atol=FLOAT32 * scale)


def assert_is_torchvisions(features, boxes, image, level, scales, *options):
    """Compare regions and gradients."""
    expected = one_box_at_a_time(features, boxes, image, level, scales, *options)
    found = roi_align(features, boxes, image, level, scales, *options)
    assert_close(found, expected)
    incoming = torch.randn(expected.shape, device=expected.device)
    for a, b in zip(
        torch.autograd.grad(found, features, incoming),
        torch.autograd.grad(expected, features, incoming, materialize_grads=True),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_regions_and_gradients_are_torchvisions(implementation, sampling_ratio, aligned):
    torch.manual_seed(0)
    features, boxes = pyramid(implementation), scattered(4, implementation)
    assert_is_torchvisions(features, *boxes, SCALES, 3, sampling_ratio, aligned)


@pytest.mark.parametrize("channels", [1, 16, 300])
def test_any_number_of_channels(implementation, channels):
    # 300 are more than one program of the kernels has.
    torch.manual_seed(channels)
    features, boxes = pyramid(implementation, channels), scattered(3, implementation)
    assert_is_torchvisions(features, *boxes, SCALES, 2, 0, True)


@pytest.mark.parametrize("bins", [1, 7, (2, 3)])
def test_any_number_of_bins(implementation, bins):
    torch.manual_seed(0)
    features, boxes = pyramid(implementation), scattered(2, implementation)
    assert_is_torchvisions(features, *boxes, SCALES, bins, 0, True)


def test_one_level(implementation):
    torch.manual_seed(0)
    features, (boxes, image, level) = pyramid(implementation)[:1], scattered(4, implementation)
    assert_is_torchvisions(features, boxes, image, level * 0, SCALES[:1], 2, 0, True)


# Halves of a pixel of the finest level and its edges, where a rounding step decides whether a
# sample counts: outside, on the edge and inside.
COORDINATE = st.integers(-16, 40).map(lambda i: 2.0 * i)
SIDE = st.integers(0, 24).map(lambda i: 2.0 * i)
BOX = st.tuples(COORDINATE, COORDINATE, SIDE, SIDE).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(
    max_examples=5 if INTERPRETED else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    boxes=st.lists(BOX, min_size=1, max_size=3),
    sampling_ratio=st.sampled_from([0, 2, 3]),
    aligned=st.booleans(),
)
def test_boxes_partly_and_wholly_outside(implementation, boxes, sampling_ratio, aligned):
    torch.manual_seed(len(boxes))
    boxes = torch.tensor(boxes, device=implementation)
    index = torch.arange(len(boxes), device=implementation)
    features = pyramid(implementation, channels=3)
    assert_is_torchvisions(
        features, boxes, index % 2, index % 3, SCALES, 2, sampling_ratio, aligned
    )


def test_a_sample_on_the_outermost_edge_counts_and_one_beyond_it_does_not(implementation):
    # One sample a box, in its middle. The finest level has 12 x 16 pixels of 4 x 4 image pixels;
    # samples count from -1 to 12 and to 16.
    middles = torch.tensor([[20.0, 48], [64, 20], [20, -4], [-4, 20]])
    beyond = torch.tensor([[20.0, 48.5], [64.5, 20], [20, -4.5], [-4.5, 20]])
    middles = torch.cat([middles, beyond]).to(implementation)
    boxes = torch.cat([middles - 8, middles + 8], dim=1)
    level = torch.zeros(len(boxes), dtype=torch.int64, device=implementation)
    torch.manual_seed(0)
    features = pyramid(implementation)
    assert_is_torchvisions(features, boxes, level, level, SCALES, 1, 1, False)
    counts = (roi_align(features, boxes, level, level, SCALES, 1, 1, False) != 0).all(dim=1)
    assert counts.flatten().tolist() == [True] * 4 + [False] * 4


def test_boxes_of_no_size_and_inside_out(implementation):
    torch.manual_seed(0)
    boxes = [[8, 8, 8, 8], [8, 8, 8, 30], [10, 4, 30, 4], [0, 0, 0, 0], [64, 48, 64, 48]]
    boxes = torch.tensor(boxes, device=implementation).float()
    level = torch.zeros(len(boxes), dtype=torch.int64, device=implementation)
    features = pyramid(implementation)
    for sampling_ratio, aligned in ((0, True), (2, False)):
        assert_is_torchvisions(features, boxes, level, level, SCALES, 2, sampling_ratio, aligned)
    # torchvision's adaptive sampling fails for these on a CPU.
    assert_is_torchvisions(features, boxes[:, [2, 3, 0, 1]], level, level, SCALES, 2, 2, True)


def test_features_of_an_unknown_level_are_zero(implementation):
    torch.manual_seed(0)
    features, (boxes, image, level) = pyramid(implementation), scattered(3, implementation)
    level[1:] = torch.tensor([-1, 3])
    for sampling_ratio in (0, 2):
        found = roi_align(features, boxes, image, level, SCALES, 2, sampling_ratio)
        expected = one_box_at_a_time(
            features, boxes[:1], image[:1], level[:1], SCALES, 2, sampling_ratio, True
        )
        assert_close(found[:1], expected)
        assert (found[1:] == 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), features))


def test_no_boxes(implementation):
    features, (boxes, image, level) = pyramid(implementation), scattered(0, implementation)
    found = roi_align(features, boxes, image, level, SCALES, 3)
    assert found.shape == (0, 5, 3, 3)
    assert all((g == 0).all() for g in torch.autograd.grad(found.sum(), features))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_regions_and_the_kernels_gradients_have_the_features_layout(implementation, layout):
    torch.manual_seed(0)
    features, boxes = pyramid(implementation, layout=layout), scattered(3, implementation)
    assert_is_torchvisions(features, *boxes, SCALES, 2, 0, True)
    found = roi_align(features, *boxes, SCALES, 2)
    assert found.is_contiguous(memory_format=layout)
    if uses_triton(features[0]):
        for gradient in torch.autograd.grad(found.sum(), features):
            assert gradient.is_contiguous(memory_format=layout)


def test_views_with_gaps(implementation):
    torch.manual_seed(0)
    features = [x.detach()[:, 1:4].requires_grad_() for x in pyramid(implementation)]
    assert_is_torchvisions(features, *scattered(3, implementation), SCALES, 2, 0, True)


@pytest.mark.parametrize("dtype", STEP)
def test_sums_in_float32_are_rounded_once(implementation, dtype):
    torch.manual_seed(0)
    features, boxes = pyramid(implementation, dtype=dtype), scattered(3, implementation)
    exact = [x.detach().float().requires_grad_() for x in features]
    expected = one_box_at_a_time(exact, *boxes, SCALES, 3, 0, True)
    found = roi_align(features, *boxes, SCALES, 3)
    assert found.dtype == dtype
    assert_close(found, expected.to(dtype), STEP[dtype])
    incoming = torch.randn(found.shape, device=found.device).to(dtype)
    expected = torch.autograd.grad(expected, exact, incoming.float())
    for a, b in zip(torch.autograd.grad(found, features, incoming), expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, b.to(dtype), STEP[dtype])


def test_float64_is_computed_in_float64():
    torch.manual_seed(0)
    features = [x.detach().double().requires_grad_() for x in pyramid("cpu", channels=2)]
    boxes, image, level = scattered(3, "cpu")
    expected = one_box_at_a_time(features, boxes.double(), image, level, SCALES, 2, 0, True)
    assert torch.equal(roi_align(features, boxes, image, level, SCALES, 2), expected)


def test_gradients_of_boxes_that_overlap_add_up(implementation):
    torch.manual_seed(0)
    features, (boxes, image, level) = pyramid(implementation), scattered(1, implementation)
    many = [x.expand(3, *x.shape[1:]) for x in (boxes, image, level)]
    incoming = torch.randn(1, 5, 2, 2, device=implementation)
    one = roi_align(features, boxes, image, level, SCALES, 2)
    one = torch.autograd.grad(one, features, 3 * incoming)
    found = roi_align(features, *many, SCALES, 2)
    for a, b in zip(torch.autograd.grad(found, features, incoming.expand(3, -1, -1, -1)), one):
        assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=[torch.zeros(2, 3, 4)]), r"features must be floating point of shape"),
        (dict(features=[torch.zeros(2, 3, 4, 4).long()]), "features must be floating point"),
        (dict(scales=[1, 2]), "1 levels of features and 2 scales"),
        (
            dict(features=[torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)], scales=[1, 2]),
            "the same images, channels, type and device",
        ),
        (dict(boxes=torch.zeros(3, 5)), r"boxes must be floating point of shape \(T, 4\)"),
        (dict(image=torch.zeros(3)), r"image must be int64 of shape \(3,\)"),
        (dict(level=torch.zeros(2).long()), r"level must be int64 of shape \(3,\)"),
        (dict(output_size=0), "output_size must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(
        features=[torch.zeros(2, 3, 4, 4)],
        boxes=torch.zeros(3, 4),
        image=torch.zeros(3).long(),
        level=torch.zeros(3).long(),
        scales=[1],
        output_size=2,
    )
    with pytest.raises(InputError, match=message):
        roi_align(**arguments | change)


@pytest.mark.gpu
@pytest.mark.parametrize("bins, count", [(7, 2048), (14, 256)])
def test_regions_of_the_size_of_detectors(bins, count):
    torch.manual_seed(0)
    sizes = [(200, 304), (100, 152), (50, 76), (25, 38)]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [
        torch.randn(2, 256, *s, device="cuda").requires_grad_() for s in sizes
    ]  # two images of 800 x 1216
    side = 16 * 40 ** torch.rand(count, 2, device="cuda")
    corner = torch.rand(count, 2, device="cuda") * torch.tensor([1216.0, 800], device="cuda")
    boxes = torch.cat([corner - side / 2, corner + side / 2], dim=1)
    image, level = torch.randint(2, (count,)).cuda(), torch.randint(4, (count,)).cuda()
    arguments = (features, boxes, image, level, scales, bins)
    with ops.implementation("reference"):
        expected = roi_align(*arguments)
    found = roi_align(*arguments)
    assert_close(found, expected)
    incoming = torch.randn_like(found)
    pairs = (torch.autograd.grad(x, features, incoming) for x in (found, expected))
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    features, boxes = pyramid("cuda"), scattered(30, "cuda")
    roi_align(features, *boxes, SCALES, 3).sum().backward()  # Compiling and loading may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        roi_align(features, *boxes, SCALES, 3).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run right here")
def test_kernels_in_the_interpreter():
    run_in_interpreter(__file__)
