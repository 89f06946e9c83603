"""Grouped NMS against torchvision's nms, called for one group at a time. Every equality is exact.

As in test_ops, tests that take ``implementation`` run on all that this machine has, and the kernels
run in Triton's interpreter where there is no CUDA.
"""

import sys

import pytest
import torch
import torchvision
from interpreter import run_in_interpreter
from test_ops import IMPLEMENTATIONS, INTERPRETED

from balanced_det import ops
from balanced_det.errors import InputError
from balanced_det.ops.nms import nms, nms_mask

# Sizes around the kernels' blocks of 64 rows, with groups that begin and end anywhere in a block:
# (boxes, groups).
SIZES = [(2, 1), (63, 2), (64, 1), (65, 1), (129, 2), (200, 5), (300, 150), (400, 1)]


@pytest.fixture(params=IMPLEMENTATIONS, ids="-".join)
def implementation(request):
    """Switch to an implementation; the value is the device to test it on."""
    name, device = request.param
    with ops.implementation(name):
        yield device


def one_group_at_a_time(boxes, scores, groups, threshold):
    """The kept, by decreasing score, the smaller index first among equal scores."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        order = scores[rows]
        if boxes.is_cuda:
            # torchvision's sort of up to 32 equal scores is not stable there: spell the order out.
            rows = rows[order.sort(descending=True, stable=True).indices]
            order = torch.arange(len(rows), 0, -1, device=boxes.device).to(boxes)
        keep[rows[torchvision.ops.nms(boxes[rows], order, threshold)]] = True
    kept = keep.nonzero().squeeze(1)
    return kept[scores[kept].sort(descending=True, stable=True).indices]


def crowded(count, num_groups, device, lattice):
    """Boxes of which many overlap; on a lattice many scores are equal and many IoUs are simple."""
    corner, size = 60 * torch.rand(count, 2), 5 + 40 * torch.rand(count, 2)
    scores = torch.rand(count)
    if lattice:
        corner, size = torch.randint(0, 6, (count, 2)), torch.randint(0, 5, (count, 2))
        scores = torch.randint(0, 9, (count,)) / 8
    groups = torch.randint(-(num_groups // 2), num_groups - num_groups // 2, (count,))
    boxes = torch.cat([corner, corner + size], dim=1).float()
    return boxes.to(device), scores.to(device), groups.to(device)


@pytest.mark.parametrize("count, num_groups", SIZES)
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.1, 0.0])
@pytest.mark.parametrize("lattice", [False, True])
def test_every_group_is_torchvisions(implementation, count, num_groups, threshold, lattice):
    torch.manual_seed(count)
    boxes, scores, groups = crowded(count, num_groups, implementation, lattice)
    expected = one_group_at_a_time(boxes, scores, groups, threshold)
    kept = nms(boxes, scores, groups, threshold)
    assert kept.dtype == torch.int64 and torch.equal(kept, expected)
    mask = nms_mask(boxes, scores, groups, threshold)
    assert torch.equal(mask.nonzero().squeeze(1), expected.sort().values)


def test_overlap_at_the_threshold_itself_is_allowed(implementation):
    # IoU 1/2 exactly; and 1/10, whose float32 is above the number 0.1 that the CPU compares with.
    boxes = torch.tensor([[0, 0, 2, 1], [0, 0, 1, 1], [0, 5, 10, 6], [9, 5, 10, 6]]).float()
    boxes, scores = boxes.to(implementation), torch.tensor([4.0, 3, 2, 1], device=implementation)
    groups = torch.zeros(4, dtype=torch.long, device=implementation)
    assert nms(boxes, scores, groups, 0.5).tolist() == [0, 1, 2, 3]
    assert nms(boxes, scores, groups, 0.499).tolist() == [0, 2, 3]
    expected = one_group_at_a_time(boxes, scores, groups, 0.1)
    assert torch.equal(nms(boxes, scores, groups, 0.1), expected)


def test_coordinates_of_any_size_are_compared_as_they_are(implementation):
    torch.manual_seed(0)
    # At 1e5, float32 steps are 1/128: groups told apart by offsets would round to a whole pixel.
    boxes, scores, groups = crowded(150, 40, implementation, lattice=False)
    boxes = boxes / 16 + 1e5
    expected = one_group_at_a_time(boxes, scores, groups * 10**15, 0.5)
    assert torch.equal(nms(boxes, scores, groups * 10**15, 0.5), expected)
    mixed = boxes * torch.where(groups > 0, 1e-3, -1e3)[:, None]
    mixed = torch.cat([mixed[:, :2].minimum(mixed[:, 2:]), mixed[:, :2].maximum(mixed[:, 2:])], 1)
    expected = one_group_at_a_time(mixed, scores, groups, 0.5)
    assert torch.equal(nms(mixed, scores, groups, 0.5), expected)


def test_degenerate_boxes(implementation):
    # Lines, points and boxes turned inside out, each several times over.
    boxes = torch.tensor([[1, 1, 1, 5], [3, 3, 3, 3], [5, 5, 2, 9], [4, 4, 1, 1], [0, 0, 9, 9]])
    boxes = boxes.repeat(6, 1).float().to(implementation)
    scores = torch.linspace(0, 1, 30, device=implementation)
    groups = torch.arange(30, device=implementation) % 2
    for threshold in (0.5, 0.0):
        expected = one_group_at_a_time(boxes, scores, groups, threshold)
        assert torch.equal(nms(boxes, scores, groups, threshold), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_groups_of_any_integer_type(implementation, dtype):
    torch.manual_seed(0)
    boxes, scores, groups = crowded(100, 9, implementation, lattice=True)
    expected = one_group_at_a_time(boxes, scores, groups, 0.5)
    assert torch.equal(nms(boxes, scores, groups.to(dtype), 0.5), expected)


def test_scores_and_boxes_of_other_types(implementation):
    torch.manual_seed(0)
    boxes, scores, groups = crowded(100, 3, implementation, lattice=True)
    expected = one_group_at_a_time(boxes, scores, groups, 0.5)
    # The lattice is exact in 16 bits.
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(nms(boxes.to(dtype), scores.double(), groups, 0.5), expected)
        assert torch.equal(nms(boxes, scores.to(dtype), groups, 0.5), expected)


def test_one_box_and_none(implementation):
    box, one = torch.ones(1, 4, device=implementation), torch.ones(1, device=implementation)
    assert nms(box, one, one.long(), 0.5).tolist() == [0]
    assert nms_mask(box, one, one.long(), 0.5).tolist() == [True]
    assert nms(box[:0], one[:0], one[:0].long(), 0.5).shape == (0,)
    assert nms_mask(box[:0], one[:0], one[:0].long(), 0.5, max_group_size=0).dtype == torch.bool


@pytest.mark.parametrize("count, num_groups", SIZES)
def test_rows_that_are_not_valid_take_no_part(implementation, count, num_groups):
    torch.manual_seed(count)
    boxes, scores, groups = crowded(count, num_groups, implementation, lattice=True)
    valid = torch.rand(count, device=implementation) < 0.7
    boxes[~valid & (groups > 0)] = torch.nan
    scores[~valid & (groups > 0)] = torch.nan
    rows = valid.nonzero().squeeze(1)
    expected = rows[one_group_at_a_time(boxes[rows], scores[rows], groups[rows], 0.5)]
    mask = nms_mask(boxes, scores, groups, 0.5, valid=valid, max_group_size=count)
    assert torch.equal(mask.nonzero().squeeze(1), expected.sort().values)


@pytest.mark.parametrize("count, num_groups", SIZES)
def test_a_known_size_of_the_largest_group_changes_nothing(
    implementation,
    monkeypatch,
    count,
    num_groups,
):
    torch.manual_seed(count)
    boxes, scores, groups = crowded(count, num_groups, implementation, lattice=True)
    expected = nms_mask(boxes, scores, groups, 0.5)
    largest = groups.unique(return_counts=True)[1].max().item()
    for size in (largest, largest + 70):
        mask = nms_mask(boxes, scores, groups, 0.5, max_group_size=size)
        assert torch.equal(mask, expected)
    # As with more rows than are taken for one group unasked.
    monkeypatch.setattr(sys.modules["balanced_det.ops.nms"], "_ONE_GROUP", 0)
    assert torch.equal(nms_mask(boxes, scores, groups, 0.5), expected)


def test_a_group_larger_than_promised_is_an_error():
    boxes, scores, groups = crowded(50, 2, "cpu", lattice=True)
    with pytest.raises(RuntimeError, match="max_group_size = 9"):
        nms_mask(boxes, scores, groups, 0.5, max_group_size=9)


@pytest.mark.gpu
def test_nothing_waits_for_the_device_where_sizes_are_known():
    boxes, scores, groups = crowded(20_000, 40, "cuda", lattice=False)
    expected = one_group_at_a_time(boxes, scores, groups, 0.7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = nms_mask(boxes, scores, groups, 0.7, max_group_size=1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.nonzero().squeeze(1), expected.sort().values)


@pytest.mark.gpu
@pytest.mark.parametrize("count, num_groups", [(10_000, 1), (80_000, 40), (20_000, 1203 * 8)])
@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7])
def test_groups_of_the_size_of_detectors(count, num_groups, threshold):
    torch.manual_seed(count)
    boxes, scores, groups = crowded(count, num_groups, "cuda", lattice=False)
    boxes = boxes * torch.tensor([20, 13, 20, 13], device="cuda")
    expected = one_group_at_a_time(boxes, scores, groups, threshold)
    assert torch.equal(nms(boxes, scores, groups, threshold), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(boxes=torch.zeros(3, 5)), r"boxes must be floating point of shape \(R, 4\)"),
        (dict(boxes=torch.zeros(3, 4).long()), "boxes must be floating point"),
        (dict(scores=torch.zeros(4)), r"scores must have the shape \(3,\)"),
        (dict(groups=torch.zeros(3, 1).long()), r"groups must have the shape \(3,\)"),
        (dict(groups=torch.zeros(3)), "groups must be integers"),
        (dict(valid=torch.zeros(3)), "valid must be bool"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(
        boxes=torch.zeros(3, 4), scores=torch.zeros(3), groups=torch.zeros(3, dtype=torch.long)
    )
    with pytest.raises(InputError, match=message):
        nms_mask(**arguments | change, iou_threshold=0.5)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run right here")
def test_kernels_in_the_interpreter():
    run_in_interpreter(__file__)
