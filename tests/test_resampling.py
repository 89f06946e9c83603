"""AP of weighted images: the evaluation's own at weights of 1, else that of real copies."""

from pathlib import Path

import numpy as np
import pytest
from federated import CLASSES, copied, federated
from pycocotools import mask as masks

from balanced_det.data.annotations import read_annotations
from balanced_det.evaluation import evaluate_lvis, lvis_result, resampling
from balanced_det.evaluation.detections import read_detections
from balanced_det.evaluation.resampling import (
    average_precision,
    draw_images,
    match_records,
    plain_average_precision,
)

LVIS_FILE = Path(__file__).parents[2] / "shared/data/lvis_v0.5_val_100.json"
# Fractions up to 1 in float32, whose rounding is 6e-8 of them; one detection more or less among the
# few hundred here moves a class's AP at one IoU by 1 / 101, and the mean of 10 IoUs by 1e-3.
FLOAT32 = 5e-7


def records_of(truth, detections, **options):
    read = read_annotations(truth)
    return match_records(read, read_detections(detections, read, "bbox"), "bbox", **options)


def class_ap(truth, detections, **options):
    """(K,) of the evaluation itself, NaN for its -1."""
    classes = lvis_result(truth, detections, **options).classes
    return np.array([np.nan if c.ap == -1 else c.ap for c in classes])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("max_dets", [300, 10])
def test_images_as_they_are_give_the_ap_of_the_evaluation(ties, max_dets):
    truth, detections = federated(0, ties=ties)
    records = records_of(truth, detections, max_dets=max_dets)
    found = average_precision(records, draw_images(12, 0))
    assert found.shape == (10, CLASSES, 1)
    expected = class_ap(truth, detections, max_dets=max_dets)
    assert np.isnan(expected[-1]) and (expected[:-1] > 0).all()
    np.testing.assert_allclose(found.mean(axis=0)[:, 0], expected, rtol=0, atol=FLOAT32)
    at_50 = np.nanmean(found[0])
    assert at_50 == pytest.approx(
        evaluate_lvis(truth, detections, max_dets=max_dets)["AP50"], abs=FLOAT32
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_is_that_many_copies_of_an_image(seed):
    truth, detections = federated(seed)
    weights = draw_images(12, 6, seed)
    assert (weights[:, 1:].sum(axis=0) == 12).all() and weights.max() > 2 and weights.min() == 0
    found = average_precision(records_of(truth, detections), weights).mean(axis=0)
    for draw in range(weights.shape[1]):
        expected = class_ap(*copied(truth, detections, weights[:, draw]))
        np.testing.assert_allclose(found[:, draw], expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("elements", [1 << 21, 300, 1])
def test_the_fast_form_gives_what_the_plain_one_says(monkeypatch, elements):
    # All draws at once, a few at a time, and one at a time; with ties, where copies of an image
    # stand together in both forms.
    monkeypatch.setattr(resampling, "_MAX_ELEMENTS", elements)
    truth, detections = federated(5, images=30, ties=True)
    records, weights = records_of(truth, detections), draw_images(30, 8)
    found = average_precision(records, weights)
    for draw in range(weights.shape[1]):
        expected = plain_average_precision(records, weights[:, draw])
        np.testing.assert_allclose(found[..., draw], expected, rtol=0, atol=FLOAT32)


def test_a_class_without_an_object_in_a_draw_has_no_ap_there():
    truth, detections = federated(1, images=4)
    records = records_of(truth, detections)
    nothing = np.zeros((4, 1), dtype=np.float32)
    assert np.isnan(average_precision(records, nothing)).all()
    assert np.isnan(plain_average_precision(records, nothing[:, 0])).all()
    only_first = np.eye(4, 1, dtype=np.float32)
    found = average_precision(records, only_first)[0, :, 0]
    objects = records.object_category[records.object_image == 0]
    assert np.flatnonzero(~np.isnan(found)).tolist() == sorted(set(objects.tolist()))


def test_no_detection_gives_zero_where_there_are_objects():
    truth, _ = federated(2)
    found = average_precision(records_of(truth, []), draw_images(12, 3))
    assert set(found[~np.isnan(found)].tolist()) == {0.0}
    assert not np.isnan(found[:, :-1, 0]).any()


@pytest.mark.data(LVIS_FILE.name)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_true_lvis_annotations_give_the_ap_of_the_evaluation(iou_type):
    truth = read_annotations(LVIS_FILE)
    rng = np.random.default_rng(0)
    detections = []
    for index in rng.choice(len(truth), 1500):
        image = truth.images[truth.image[index]]
        box = truth.boxes[index] + rng.normal(0, 3, 4)
        x, y = np.clip(box[:2], 0, [image.width - 2, image.height - 2]).astype(int)
        w, h = np.maximum(box[2:].astype(int), 1)
        w, h = min(w, image.width - x), min(h, image.height - y)
        mask = np.zeros((image.height, image.width), dtype=np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        detections.append(
            {
                "image_id": image.id,
                "category_id": truth.categories[truth.category[index]].id,
                "bbox": [float(x), float(y), float(w), float(h)],
                "score": round(float(rng.random()), 2),
                "segmentation": masks.encode(mask),
            }
        )
    records = match_records(truth, read_detections(detections, truth, iou_type), iou_type)
    found = average_precision(records, draw_images(len(truth.images), 0)).mean(axis=0)[:, 0]
    expected = class_ap(truth, detections, iou_type=iou_type)
    assert np.nanmean(expected) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32)
