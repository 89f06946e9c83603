"""What is counted of a data set, and the settings that follow, against plain counting."""

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from models import FASTER, FCOS, NUM_CLASSES, RETINANET, config
from records import make_records

from balanced_det.data import advice as rules
from balanced_det.data import survey
from balanced_det.data.statistics import dataset_statistics, frequency_group, objects
from balanced_det.data.training_samplers import (
    ClassAwareTrainingSampler,
    instance_aware_repeat_factors,
)
from balanced_det.detectors.anchor_fit import fit_anchors
from balanced_det.errors import InputError

RECORDS = make_records(60)
DATA = survey.columns(RECORDS)


# --- Counting -------------------------------------------------------------------------------------


def test_columns_are_the_objects_without_crowds():
    flat = [(i, a) for i, record in enumerate(RECORDS) for a in objects(record["annotations"])]
    assert DATA.image.tolist() == [i for i, _ in flat]
    assert DATA.category.tolist() == [a["category_id"] for _, a in flat]
    assert DATA.box.tolist() == [list(a["bbox"]) for _, a in flat]
    assert DATA.image_size.tolist() == [[r["width"], r["height"]] for r in RECORDS]


def test_columns_read_boxes_by_their_corners():
    record = {
        "width": 9,
        "height": 9,
        "annotations": [{"category_id": 0, "bbox": [1, 2, 4, 8], "bbox_mode": BoxMode.XYXY_ABS}],
    }
    assert survey.columns([record]).box.tolist() == [[1, 2, 3, 6]]


@pytest.mark.parametrize("image", [[], [0], [0, 0], [0, 1, 1, 1, 4, 4], [2] * 5 + [3] + [7] * 3])
def test_pairs_are_those_of_each_image(image):
    found = [
        pair
        for i, j in survey.pairs_of_an_image(np.array(image, dtype=int))
        for pair in zip(i.tolist(), j.tolist())
    ]
    wanted = [
        (i, j) for i, j in itertools.combinations(range(len(image)), 2) if image[i] == image[j]
    ]
    assert sorted(found) == wanted


def test_co_occurrence_counts_images_of_both_classes():
    held = [{a["category_id"] for a in objects(r["annotations"])} for r in RECORDS]
    wanted = [[sum({i, j} <= classes for classes in held) for j in range(5)] for i in range(5)]
    assert survey.co_occurrence(DATA, NUM_CLASSES).tolist() == wanted


def test_near_duplicates_are_found_in_one_image_alone():
    box, near, far = [10, 10, 50, 50], [10, 11, 50, 50], [10, 20, 50, 50]
    image = [(0, box), (0, near), (2, near), (0, far)]  # IoU 0.96 and 0.67 with the first

    def record(entries):
        annotations = [
            {"category_id": c, "bbox": b, "bbox_mode": BoxMode.XYWH_ABS} for c, b in entries
        ]
        return {"width": 99, "height": 99, "annotations": annotations}

    found = survey.near_duplicates(survey.columns([record(image), record([(0, box)])]))
    # The two nearly equal boxes of class 0, and each of them with that of class 2.
    assert (found.same_class, found.other_class) == (1, 2)
    assert found.class_pairs == {(0, 2): 2}


def test_iou_is_detectron2s():
    rng = np.random.RandomState(0)
    a, b = (rng.uniform(0, 50, (2, 200, 4)) + [0, 0, 1, 1]).astype(np.float32)
    corners = [Boxes(torch.from_numpy(np.hstack([x[:, :2], x[:, :2] + x[:, 2:]]))) for x in (a, b)]
    expected = pairwise_iou(*corners).diagonal().numpy()
    # Detectron2 computes in float32: areas up to 2,500 of sides with an error of 1e-6 relative.
    np.testing.assert_allclose(
        survey.box_iou(a.astype(float), b.astype(float)), expected, atol=1e-5
    )


@pytest.mark.parametrize("threshold", [0.001, 0.3, 0.9])
def test_repeats_are_detectron2s(threshold):
    records = [{**r, "annotations": objects(r["annotations"])} for r in copy.deepcopy(RECORDS)]
    # A class held by few images.
    for annotation in (a for r in records[5:] for a in r["annotations"] if a["category_id"] == 4):
        annotation["category_id"] = 0
    statistics = dataset_statistics(records, NUM_CLASSES)
    repeats = survey.class_repeats(statistics.frequency.numpy(), threshold)
    found = survey.image_repeats(survey.columns(records), repeats)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, threshold
    )
    # Ours from float32 frequencies: relative error 6e-8 under the square root.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.001, 0.3, 0.9])
def test_irfs_repeats_are_those_of_its_sampler(threshold):
    statistics = dataset_statistics(RECORDS, NUM_CLASSES)
    share = statistics.instance_count / statistics.instance_count.sum()
    repeats = survey.class_repeats((statistics.frequency * share).sqrt().numpy(), threshold)
    found = survey.image_repeats(DATA, repeats)
    expected = instance_aware_repeat_factors(RECORDS, threshold)
    # Ours from float32 frequencies: relative error 6e-8 under the square roots.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_class_aware_draws_are_those_of_its_sampler():
    number = 200_000
    stream = itertools.islice(ClassAwareTrainingSampler(RECORDS, seed=0), number)
    drawn = np.bincount(list(stream), minlength=len(RECORDS)) / number
    expected = survey.class_aware_draws(DATA) / len(RECORDS)
    assert expected.sum() == pytest.approx(1)
    # Five standard deviations of a share of so many draws.
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected / number)).all()
    assert np.ptp(expected) > 0.01  # not the same for all images


def test_groups_are_those_of_lvis_at_its_limits():
    counts = np.array([0, 1, 10, 11, 100, 101, 10**6])
    found = survey.group_names(counts, (10, 100))
    assert [name[0] for name in found] == [frequency_group(count) for count in counts]
    assert survey.group_names(np.array([3, 4, 9, 10]), (3, 9)) == [
        "rare",
        "common",
        "common",
        "frequent",
    ]


# --- Anchors --------------------------------------------------------------------------------------


def test_anchors_are_labelled_as_detectron2s_retinanet_labels_them():
    cfg = config(RETINANET)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    fit = fit_anchors(cfg, RECORDS[:12])
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    model = build_model(cfg)
    counts = Counter()
    for record in RECORDS[:12]:
        scale = min(
            96 / min(record["width"], record["height"]),
            160 / max(record["width"], record["height"]),
        )
        height, width = (int(record[k] * scale + 0.5) for k in ("height", "width"))
        instances = Instances((height, width))
        ratio = torch.tensor([width / record["width"], height / record["height"]] * 2)
        boxes = [
            BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            for a in objects(record["annotations"])
        ]
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32) * ratio)
        instances.gt_classes = torch.tensor(
            [a["category_id"] for a in objects(record["annotations"])]
        )
        padded = [math.ceil(n / 32) * 32 for n in (height, width)]
        features = [
            torch.empty(1, 0, *(math.ceil(n / stride) for n in padded))
            for stride in (8, 16, 32, 64, 128)
        ]
        (labels,), _ = model.label_anchors(model.anchor_generator(features), [instances])
        counts["foreground"] += int(((labels >= 0) & (labels < NUM_CLASSES)).sum())
        counts["background"] += int((labels == NUM_CLASSES).sum())
        counts["ignored"] += int((labels == -1).sum())
    assert (fit.num_foreground, fit.num_background, fit.num_ignored) == (
        counts["foreground"],
        counts["background"],
        counts["ignored"],
    )
    assert counts["foreground"] and counts["ignored"]
    assert sum(fit.background_iou) == fit.num_background
    # RetinaNet's background ends at an IoU of 0.4.
    assert fit.background_iou[0] > 0 and fit.background_iou[8:] == (0, 0)


def test_objects_that_no_anchor_meets_are_counted():
    record = {
        "width": 128,
        "height": 128,
        "annotations": [
            {"category_id": 0, "bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
            for box in ([0, 0, 128, 4], [48, 48, 32, 32])  # a thin line, an anchor's size
        ],
    }
    cfg = config(FASTER)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (128,), 128
    fit = fit_anchors(cfg, [record])
    assert (fit.num_images, fit.num_objects, fit.missed) == (1, 2, 1)


def test_a_detector_without_anchors_is_named():
    with pytest.raises(InputError, match="'BalancedFCOS' has no anchors"):
        fit_anchors(config(FCOS), RECORDS)
    with pytest.raises(InputError, match="'res4' is no level of a pyramid"):
        fit_anchors(config(FASTER, {"MODEL.RPN.IN_FEATURES": ["res4"]}), RECORDS)


# --- Settings -------------------------------------------------------------------------------------


def advice(num_images=1000, image_count=(900, 500, 80, 5), **choices):
    return rules.advise(DATA, num_images, np.array(image_count), **choices)


def test_a_threshold_keeps_its_number_of_images_on_data_of_another_size():
    # LVIS: 100 of 100,000 images, the published threshold of repeat-factor sampling.
    assert advice(num_images=100_000).frequency_limit == rules.LVIS_REPEAT_THRESHOLD
    assert advice(num_images=1000).frequency_limit == 0.1
    assert advice().num_small == 2
    # Half of the images is never few.
    assert advice(num_images=20, image_count=(20, 11, 9)).frequency_limit == 0.5
    assert advice(num_images=20, image_count=(20, 11, 9)).num_small == 1


def test_small_data_is_seen_as_often_as_its_schedule_was_tried():
    assert rules.iterations(300, 8) == 1800
    assert rules.iterations(300, 2) == 7200  # the same number of images
    assert rules.iterations(5000, 8) == 7500  # 12 epochs
    assert rules.iterations(10**6, 8) == 90_000


def test_the_schedule_falls_where_the_tried_one_did():
    assert advice(num_images=300).max_iter == 1800
    first, second = advice(num_images=300).steps
    assert abs(first - 1150) <= 5 and abs(second - 1500) <= 10


def test_images_are_never_enlarged_to_train():
    # The records' images are 80 to 179 pixels: their median, up to a multiple of 32, 128 at least.
    longest = float(np.median(DATA.image_size.max(axis=1)))
    assert rules.training_size(DATA) == max(128, math.ceil(longest / 32) * 32)


def test_small_objects_ask_for_larger_images():
    def photo(side):
        annotations = [{"category_id": 0, "bbox": [0, 0, side, side], "bbox_mode": 1}]
        return survey.columns([{"width": 2000, "height": 1500, "annotations": annotations}])

    assert rules.training_size(photo(500)) == 416
    assert rules.training_size(photo(40)) == 608  # 12 pixels, up to a multiple of 32
    assert rules.training_size(photo(2)) == 800


@pytest.mark.parametrize("sides", [[1] * 9, [50] * 9, [900] * 9, [4, 8, 20, 60, 300]])
def test_anchors_follow_objects_within_what_a_level_can_see(sides):
    sizes = rules.anchor_sizes(np.array(sides, dtype=float))
    for size, stride in zip(sizes, (4, 8, 16, 32, 64)):
        assert 2 * stride <= size <= 8 * stride
    assert list(sizes) == sorted(sizes)


def test_anchors_of_the_objects_own_size_are_among_them():
    assert 50 in rules.anchor_sizes(np.full(9, 50.0))


def test_long_boxes_get_long_anchors():
    def boxes(width, height):
        annotations = [{"category_id": 0, "bbox": [0, 0, width, height], "bbox_mode": 1}]
        return survey.columns([{"width": 99, "height": 99, "annotations": annotations}])

    assert rules.aspect_ratios(boxes(10, 10)) == (0.67, 1.0, 1.5)
    assert rules.aspect_ratios(boxes(10, 30)) == (0.33, 1.0, 3.0)
    assert rules.aspect_ratios(boxes(30, 10)) == (0.33, 1.0, 3.0)
    assert rules.aspect_ratios(boxes(90, 1)) == (0.25, 1.0, 4.0)


@pytest.mark.parametrize(
    "choices, message",
    [({"batch": 0}, "at least one image, not 0"), ({"size": 10}, "10 does not")],
)
def test_settings_that_cannot_be_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        advice(**choices)


def test_data_without_an_object_is_refused():
    with pytest.raises(InputError, match="no object to train on"):
        rules.advise(survey.columns([]), 0, np.zeros(3, dtype=int))
