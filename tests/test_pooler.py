"""The batched pooler against Detectron2's ROIPooler."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from models import CASCADE, MASK, config
from test_roi_align import FLOAT32, assert_close, implementation  # noqa: F401  (a fixture)

from balanced_det.detectors.pooler import BatchedROIPooler

SIZES = [(16, 24), (8, 12), (4, 6), (2, 3)]  # p2 to p5 of an image of 64 x 96
PYRAMID = dict(
    output_size=3,
    scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
    sampling_ratio=0,
    pooler_type="ROIAlignV2",
    canonical_box_size=32,
)


def features_of(images, device="cpu", sizes=SIZES, channels=4):
    torch.manual_seed(0)
    return [torch.randn(images, channels, *s, device=device).requires_grad_() for s in sizes]


def boxes_of(counts, device="cpu"):
    """Boxes of all levels; every third has the very size at which levels change, or none at all."""
    torch.manual_seed(1)
    lists = []
    for count in counts:
        side = 3 * 20 ** torch.rand(count, 2)
        edges = torch.tensor([4.0, 8, 16, 32, 64, 0])
        side[::3] = edges.repeat(count)[: len(side[::3]), None]
        corner = torch.rand(count, 2) * torch.tensor([96.0, 64]) - side / 2
        lists.append(Boxes(torch.cat([corner, corner + side], dim=1).to(device)))
    return lists


def assert_pools_like_detectron2(features, box_lists, **options):
    ours, theirs = BatchedROIPooler(**options), ROIPooler(**options)
    found, expected = ours(features, box_lists), theirs(features, box_lists)
    assert found.dtype == expected.dtype
    assert_close(found, expected)
    incoming = torch.randn(expected.shape, device=expected.device)
    pairs = (
        torch.autograd.grad(x, features, incoming, materialize_grads=True)
        for x in (found, expected)
    )
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_regions_and_gradients_are_detectron2s(implementation, pooler_type, sampling_ratio):  # noqa: F811
    assert_pools_like_detectron2(
        features_of(2, implementation),
        boxes_of((7, 5), implementation),
        **PYRAMID | dict(pooler_type=pooler_type, sampling_ratio=sampling_ratio),
    )


@pytest.mark.parametrize("counts", [(0, 3), (3, 0, 2), (0, 0), (0,)])
def test_images_without_boxes(implementation, counts):  # noqa: F811
    assert_pools_like_detectron2(
        features_of(len(counts), implementation), boxes_of(counts, implementation), **PYRAMID
    )


def test_one_level(implementation):  # noqa: F811
    assert_pools_like_detectron2(
        features_of(2, implementation, SIZES[2:3]),
        boxes_of((3, 2), implementation),
        **PYRAMID | dict(scales=[1 / 16], output_size=(2, 3)),
    )


def test_no_images():
    pooler = BatchedROIPooler(**PYRAMID)
    assert pooler(features_of(0), []).shape == (0, 4, 3, 3)


def test_other_poolings_are_detectron2s():
    options = PYRAMID | dict(pooler_type="ROIPool")
    assert_pools_like_detectron2(features_of(2), boxes_of((4, 3)), **options)
    pooler = ROIPooler(**options)
    assert BatchedROIPooler.of(pooler) is pooler


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
def test_the_batched_form_of_a_pooler_has_all_its_options(pooler_type):
    options = dict(output_size=2, scales=[1 / 8, 1 / 16], sampling_ratio=3)
    pooler = ROIPooler(**options, pooler_type=pooler_type, canonical_box_size=48, canonical_level=3)
    batched = BatchedROIPooler.of(pooler)
    assert repr(batched.level_poolers) == repr(pooler.level_poolers)
    for name in ("output_size", "min_level", "max_level", "canonical_box_size", "canonical_level"):
        assert getattr(batched, name) == getattr(pooler, name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_trace_serves_other_boxes():
    features, (first, second) = [x.detach() for x in features_of(1)], boxes_of((4, 9))

    def pool(boxes):
        return BatchedROIPooler(**PYRAMID)(features, [Boxes(boxes)])

    traced = torch.jit.trace(pool, first.tensor)
    assert_close(traced(second.tensor), pool(second.tensor))


def test_scripting_compiles_detectron2s_code():
    ours, theirs = (torch.jit.script(x(**PYRAMID)) for x in (BatchedROIPooler, ROIPooler))
    assert ours.code == theirs.code


@pytest.mark.parametrize("keys", [MASK, CASCADE], ids=["mask", "cascade"])
def test_heads_pool_all_levels_at_once(keys):
    heads = build_model(config(keys, {"MODEL.MASK_ON": True})).roi_heads
    assert type(heads.box_pooler) is type(heads.mask_pooler) is BatchedROIPooler


@pytest.mark.gpu
def test_boxes_stay_float32_under_autocast():
    # In bfloat16 these corners would move by a pixel.
    boxes = [Boxes(torch.tensor([[301.0, 203, 391, 275]], device="cuda"))]
    torch.manual_seed(0)
    features = [torch.randn(1, 8, 400 // s, 480 // s, device="cuda") for s in (4, 8, 16, 32)]
    features = [x.bfloat16() for x in features]
    expected = ROIPooler(**PYRAMID)([x.float() for x in features], boxes).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        found = BatchedROIPooler(**PYRAMID)(features, boxes)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, 2**-7)  # One rounding step.


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    features, boxes = features_of(2, "cuda"), boxes_of((40, 30), "cuda")
    pooler = BatchedROIPooler(**PYRAMID)
    pooler(features, boxes).sum().backward()  # Compiling and loading may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        pooler(features, boxes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
