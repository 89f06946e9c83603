"""Matching a batch gives each image what Detectron2 gives it alone, to the bit."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FASTER, NUM_CLASSES, batch, config

from balanced_det.detectors import matching
from balanced_det.detectors.matching import Objects, match, match_points
from balanced_det.detectors.proposals import top_proposals

MATCHERS = {
    "RPN": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
    "RetinaNet": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
    "region head": Matcher([0.5], [0, 1], allow_low_quality_matches=False),
    "ignoring": Matcher([0.1, 0.5], [-1, 0, 1], allow_low_quality_matches=False),
}
each_matcher = pytest.mark.parametrize("matcher", MATCHERS.values(), ids=MATCHERS)


def boxes(count, generator, size=40):
    """Boxes on a coarse grid, so that IoUs are often equal, and some boxes far from all others."""
    corner = torch.randint(0, 12, (count, 2), generator=generator) * 8.0
    side = torch.randint(1, size // 8 + 1, (count, 2), generator=generator) * 8.0
    far = (torch.rand(count, 1, generator=generator) < 0.05) * 1000.0
    return torch.cat([corner + far, corner + far + side], dim=1)


def instances(counts, generator):
    """One ``Instances`` an image, with that many objects."""
    return [
        Instances(
            (96, 128),
            gt_boxes=Boxes(boxes(count, generator)),
            gt_classes=torch.randint(NUM_CLASSES, (count,), generator=generator),
        )
        for count in counts
    ]


def class_labels(matched, kind, image):
    """Labels by class as Detectron2 makes them, in RetinaNet and in region heads."""
    if len(image) == 0:
        return torch.full_like(matched, NUM_CLASSES)
    labels = image.gt_classes[matched]
    labels[kind == 0] = NUM_CLASSES
    labels[kind == -1] = -1
    return labels


@each_matcher
@pytest.mark.parametrize("most_pairs", [2**24, 300, 1])
@settings(deadline=None, max_examples=15)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 30]), min_size=1, max_size=4),
    num_rows=st.integers(1, 60),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_batch_is_matched_as_detectron2_matches_each_image(
    matcher, most_pairs, counts, num_rows, shared, seed
):
    generator = torch.Generator().manual_seed(seed)
    images = instances(counts, generator)
    rows = [boxes(num_rows, generator) for _ in ([0] if shared else counts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_MOST_PAIRS", most_pairs)
        objects = Objects.of(images)
        found = match(objects, rows[0] if shared else torch.stack(rows), matcher)
    labelled = found.rows(objects, NUM_CLASSES)
    for index, image in enumerate(images):
        ious = pairwise_iou(image.gt_boxes, Boxes(rows[0 if shared else index]))
        matched, kind = matcher(ious)
        assert torch.equal(found.matched[index], matched)
        assert torch.equal(found.kind[index], kind)
        expected = ious.amax(dim=0) if len(image) else torch.zeros(num_rows)
        assert torch.equal(found.ious[index], expected)
        assert torch.equal(labelled.labels[index], class_labels(matched, kind, image))
        objectness = torch.where(kind >= 0, 1 - kind, kind).long()
        assert torch.equal(found.objectness_rows().labels[index], objectness)


@pytest.mark.parametrize("most_pairs", [2**24, 500])
@settings(deadline=None, max_examples=15)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 30]), min_size=1, max_size=4),
    radius=st.sampled_from([0.5, 1.5]),
    seed=st.integers(0, 2**31),
)
def test_points_are_matched_as_detectron2_matches_each_image(most_pairs, counts, radius, seed):
    generator = torch.Generator().manual_seed(seed)
    images = instances(counts, generator)
    anchors = []
    for stride in (8, 16, 32):
        x, y = torch.arange(0, 128, stride), torch.arange(0, 96, stride)
        centre = torch.cartesian_prod(y, x).flip(1).float()
        anchors.append(Boxes(torch.cat([centre - stride / 2, centre + stride / 2], dim=1)))

    class Stock:
        """What Detectron2's functions read of an FCOS."""

        num_classes, center_sampling_radius = NUM_CLASSES, radius
        _match_anchors = FCOS._match_anchors

    labels, matched_boxes = FCOS.label_anchors(Stock(), anchors, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_MOST_PAIRS", most_pairs)
        objects = Objects.of(images)
        rows = match_points(objects, [a.tensor for a in anchors], radius).rows(objects, NUM_CLASSES)
    for index, image in enumerate(images):
        assert torch.equal(rows.labels[index], labels[index])
        if len(image):
            is_foreground = rows.foreground[index]
            ours = image.gt_boxes.tensor[rows.matched[index]]
            assert torch.equal(ours[is_foreground], matched_boxes[index][is_foreground])


def predictions(num_images, generator, dtype=torch.float32):
    """Anchors, logits and deltas of three levels; many logits are equal."""
    anchors = [Boxes(boxes(count, generator)) for count in (150, 40, 7)]
    logits = [
        torch.randint(-6, 7, (num_images, len(a)), generator=generator).to(dtype) for a in anchors
    ]
    deltas = [0.4 * torch.randn(num_images, len(a), 4, generator=generator) for a in anchors]
    return anchors, logits, deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after_nms", [5, 60, 1000])
@pytest.mark.parametrize("min_size", [0, 12])
def test_proposals_are_detectron2s_in_order(dtype, after_nms, min_size):
    rpn = build_model(config(FASTER)).proposal_generator
    rpn.min_box_size = min_size
    rpn.pre_nms_topk = {True: 50, False: 100}
    rpn.post_nms_topk = {True: after_nms, False: after_nms}
    generator = torch.Generator().manual_seed(after_nms)
    sizes = [(96, 128), (40, 1100), (64, 64)]
    for training in (True, False):
        rpn.train(training)
        anchors, logits, deltas = predictions(len(sizes), generator, dtype)
        if not training:  # what is not finite is dropped at inference
            logits[0][0, 3], deltas[1][2, 5, 1] = torch.nan, torch.inf
        ours = rpn.predict_proposals(anchors, logits, deltas, sizes)
        # Outside of autocast torchvision refuses scores of another type than boxes.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            theirs = RPN.predict_proposals(rpn, anchors, logits, deltas, sizes)
        assert len(ours) == len(theirs) == len(sizes)
        for a, b in zip(ours, theirs, strict=True):
            assert a.image_size == b.image_size
            assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
            assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_training_that_diverged_is_told():
    anchors, logits, deltas = predictions(1, torch.Generator().manual_seed(0))
    logits[0][0, 3] = torch.nan
    rpn = config(FASTER).MODEL.RPN
    with pytest.raises(FloatingPointError, match="diverged"):
        top_proposals(
            anchors,
            logits,
            deltas,
            [(96, 128)],
            transform=Box2BoxTransform(rpn.BBOX_REG_WEIGHTS),
            nms_threshold=0.7,
            before_nms=50,
            after_nms=50,
            min_size=0,
            refuse_infinite=True,
        )


def test_sampled_proposals_carry_the_targets_of_the_objects_they_are_matched_to():
    torch.manual_seed(0)
    heads = build_model(config(FASTER)).roi_heads
    generator = torch.Generator().manual_seed(1)
    inputs = [x["instances"] for x in batch((3, 0, 500))]
    proposals = [
        Instances(
            (96, 128), proposal_boxes=Boxes(boxes(n, generator)), objectness_logits=torch.zeros(n)
        )
        for n in (200, 10, 1)
    ]
    with EventStorage():
        sampled = heads.label_and_sample_proposals(proposals, inputs)
    for found, image, given_ in zip(sampled, inputs, proposals, strict=True):
        assert len(found) <= heads.batch_size_per_image
        labels = found.gt_classes
        is_foreground = (labels >= 0) & (labels < NUM_CLASSES)
        candidates = torch.cat([given_.proposal_boxes.tensor, image.gt_boxes.tensor])
        for box in found.proposal_boxes.tensor:
            assert (candidates == box).all(dim=1).any()
        if len(image) == 0:
            assert (labels == NUM_CLASSES).all()
            assert not found.has("gt_masks")
            continue
        ious = pairwise_iou(image.gt_boxes, found.proposal_boxes)
        best, matched = ious.max(dim=0)
        assert torch.equal(is_foreground, best >= 0.5)
        assert torch.equal(labels[is_foreground], image.gt_classes[matched][is_foreground])
        assert torch.equal(found.gt_boxes.tensor, image.gt_boxes.tensor[matched])
        assert torch.equal(found.gt_masks.matched, matched)
