import contextlib
import copy
import csv
import gc
import json
import logging
import math
import sys
import types
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from distributed import run_workers
from pycocotools import mask as masks

from balanced_det.data import columns, shapes
from balanced_det.data.annotations import read_annotations
from balanced_det.data.registration import register_datasets
from balanced_det.data.run_lengths import counts_of
from balanced_det.engine import Trainer
from balanced_det.errors import InputError
from balanced_det.evaluation import (
    METRICS,
    BalancedLVISEvaluator,
    Matcher,
    build_evaluator,
    detections,
    evaluate_lvis,
    fixed_result,
    lvis_result,
)
from balanced_det.evaluation.__main__ import main as evaluate_files
from balanced_det.evaluation.detections import read_detections, texts_of
from balanced_det.evaluation.per_class import class_rows, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_scaling

LVIS_FILE = Path(__file__).parents[2] / "shared/data/lvis_v0.5_val_100.json"

# Both sides average the same numbers of float64 in another order; 1e-9 is far above that rounding
# and far below one detection more or less among them (1 / (10 * 101 * 1230) = 8e-7).
SAME = 1e-9


def box_object(number, image_id, category_id, bbox, **more):
    x, y, w, h = bbox
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        **more,
    }


def box_detection(image_id, category_id, bbox, score):
    x, y, w, h = bbox
    mask = np.zeros((200, 200), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = masks.encode(mask)
    rle["counts"] = rle["counts"].decode()
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(value) for value in bbox],
        "score": score,
        "segmentation": rle,
    }


def hand_made():
    """Three classes, one a group; class 7 is rare and small, 9 common and medium, 12 large."""
    return {
        "images": [
            {"id": i, "height": 200, "width": 200, "file_name": f"{i}.png"}
            | {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            for i in (1, 2, 3)
        ],
        "annotations": [
            box_object(1, 1, 7, (10, 10, 20, 20)),
            box_object(2, 2, 7, (50, 50, 20, 20)),
            box_object(3, 1, 9, (60, 60, 50, 50)),
            box_object(4, 2, 12, (0, 0, 150, 150)),
        ],
        "categories": [
            {"id": 12, "name": "plenty", "frequency": "f"},
            {"id": 7, "name": "rarity", "frequency": "r"},
            {"id": 9, "name": "usual", "frequency": "c"},
        ],
    }


PERFECT = [
    box_detection(1, 7, (10, 10, 20, 20), 0.9),
    box_detection(2, 7, (50, 50, 20, 20), 0.8),
    box_detection(1, 9, (60, 60, 50, 50), 0.7),
    box_detection(2, 12, (0, 0, 150, 150), 0.6),
]


def without(dictionary, *keys):
    return {key: value for key, value in dictionary.items() if key not in keys}


def coco_format(lvis):
    """The same annotations with what LVIS adds to COCO taken away."""
    return {
        "images": [
            without(image, "neg_category_ids", "not_exhaustive_category_ids")
            for image in lvis["images"]
        ],
        "annotations": lvis["annotations"],
        "categories": [without(category, "frequency") for category in lvis["categories"]],
    }


def noisy_detections(lvis, seed):
    """Objects found a little off, twice or not at all, some as another class, amid false alarms."""
    generator = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in lvis["images"]}
    classes = [category["id"] for category in lvis["categories"]]
    present = sorted({annotation["category_id"] for annotation in lvis["annotations"]})
    boxes = []
    for annotation in lvis["annotations"]:
        for _ in range(generator.integers(0, 3)):
            category = annotation["category_id"]
            if generator.random() < 0.1:
                category = int(generator.choice(present))
            noise = generator.normal(0, 0.06, 4) * np.tile(annotation["bbox"][2:], 2)
            boxes.append((annotation["image_id"], category, np.add(annotation["bbox"], noise)))
    for image_id, (height, width) in sizes.items():
        # 320 more in one image of eight, so that the limit of 300 an image is reached.
        for _ in range(320 if generator.random() < 0.125 else 20):
            corner = generator.random(2) * (width, height) * 0.8
            extent = 2 + generator.random(2) * (width, height) * 0.2
            pool = present if generator.random() < 0.5 else classes
            boxes.append((image_id, int(generator.choice(pool)), [*corner, *extent]))
    detections = []
    for image_id, category, box in boxes:
        height, width = sizes[image_id]
        x, y, w, h = (float(value) for value in box)
        w, h = max(w, 1.0), max(h, 1.0)
        rle = masks.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], height, width)[0]
        detections.append(
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": [x, y, w, h],
                # Rounded, so that equal scores occur and their order matters.
                "score": round(float(generator.random()), 2),
                "segmentation": {**rle, "counts": rle["counts"].decode()},
            }
        )
    return detections


def as_ours(theirs):
    """The package's AR@300, ARs@300, ... under our names."""
    return {name.partition("@")[0]: value for name, value in theirs.items()}


@pytest.fixture
def lvis_package(monkeypatch):
    # The package still uses an alias that numpy has dropped.
    monkeypatch.setattr(np, "float", float, raising=False)
    import lvis

    return lvis


@pytest.mark.data(LVIS_FILE.name)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_annotations_give_the_numbers_of_the_lvis_package_from_lists_and_from_files(
    iou_type, lvis_package, tmp_path
):
    annotations = json.loads(LVIS_FILE.read_text())
    detections = noisy_detections(annotations, seed=0)
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(detections))
    ours = evaluate_lvis(str(LVIS_FILE), detections, iou_type)

    shape = "bbox" if iou_type == "bbox" else "segmentation"
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "score", shape)} for row in detections
    ]
    truth = lvis_package.LVIS(str(LVIS_FILE))
    oracle = lvis_package.LVISEval(truth, lvis_package.LVISResults(truth, rows), iou_type)
    oracle.run()
    theirs = as_ours(oracle.get_results())

    assert 0.05 < ours["AP"] < 0.95
    for metric in METRICS:
        assert ours[metric] == pytest.approx(theirs[metric], abs=SAME), metric

    out = ["--out", str(tmp_path / "out")]
    assert evaluate_files([str(LVIS_FILE), str(file), "--tasks", iou_type, *out]) == 0
    written = json.loads((tmp_path / "out/lvis_results.json").read_text())[iou_type]
    assert {metric: written[metric] for metric in METRICS} == {
        metric: 100 * value for metric, value in ours.items()
    }


def rectangle(x, y, w, h, size=(60, 80)):
    """Run lengths of a rectangle; one without a side is empty."""
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return masks.encode(mask)


def random_case(generator):
    """A few images, classes and objects with everything that LVIS's protocol knows, and detections.

    Coordinates are whole and scores are tenths, so that equal overlaps and scores occur.
    """
    classes = (generator.permutation(9)[: generator.integers(1, 5)] + 1).tolist()
    images = [
        {
            "id": int(i),
            "height": 60,
            "width": 80,
            "neg_category_ids": generator.permutation(classes)[: generator.integers(3)].tolist(),
            "not_exhaustive_category_ids": [c for c in classes if generator.random() < 0.2],
        }
        for i in generator.permutation(20)[: generator.integers(1, 6)]
    ]

    def box(near=None):
        if near is not None:
            corner, side = np.split(np.array(near) + generator.integers(-2, 3, 4), 2)
        else:
            corner, side = generator.integers(0, 40, 2), generator.integers(1, 45, 2)
        corner = np.clip(corner, 0, 50)
        side = np.clip(side, 0 if generator.random() < 0.1 else 1, 60 - corner.max())
        return [*map(int, corner), *map(int, side)]

    annotations, detections = [], []
    for image in images:
        for _ in range(generator.integers(0, 7)):
            x, y, w, h = sides = box()
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(generator.choice(classes)),
                    "bbox": sides,
                    # At times that of another object, so that sizes and boxes differ.
                    "area": float(w * h if generator.random() < 0.8 else generator.integers(3000)),
                    "segmentation": [corners] if generator.random() < 0.7 else rectangle(*sides),
                    "ignore": int(generator.random() < 0.1),
                }
            )
        for _ in range(generator.integers(0, 12)):
            here = [a for a in annotations if a["image_id"] == image["id"]]
            near = here[generator.integers(len(here))] if here and generator.random() < 0.8 else {}
            sides = box(near.get("bbox"))
            same = near and generator.random() < 0.9
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": near["category_id"] if same else int(generator.choice(classes)),
                    "bbox": sides,
                    "score": round(float(generator.integers(1, 10)) / 10, 1),
                    "segmentation": rectangle(*sides),
                }
            )
    categories = [
        {"id": c, "name": f"class {c}", "frequency": str(generator.choice(list("rcf")))}
        for c in classes
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return content, detections


def lvis_numbers(package, content, detections, iou_type, max_dets=300):
    """What the `lvis` package says, under our names."""
    truth = package.LVIS.__new__(package.LVIS)
    truth.logger = logging.getLogger("lvis")
    truth.dataset = copy.deepcopy(content)
    truth._create_index()
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", shape)
    rows = [{key: row[key] for key in keys} for row in copy.deepcopy(detections)]
    oracle = package.LVISEval(truth, package.LVISResults(truth, rows, max_dets), iou_type)
    oracle.run()
    return as_ours(oracle.get_results())


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_random_cases_give_the_numbers_of_the_lvis_package(iou_type, lvis_package):
    compared = 0
    for seed in range(130):
        generator = np.random.default_rng(seed)
        content, detections = random_case(generator)
        if not detections:
            continue  # the package fails
        max_dets = int(generator.choice([3, 300]))
        ours = evaluate_lvis(content, detections, iou_type, max_dets)
        theirs = lvis_numbers(lvis_package, content, detections, iou_type, max_dets)
        for metric in METRICS:
            assert ours[metric] == pytest.approx(theirs[metric], abs=SAME), (seed, metric)
        compared += 0 < ours["AP"] < 1
    assert compared > 60  # most cases have something to compare


def test_many_detections_of_an_image_count_where_they_may(lvis_package):
    content = hand_made()
    generator = np.random.default_rng(0)
    alarms = [
        box_detection(1, 9, [*generator.integers(0, 100, 2).tolist(), 30, 30], 0.99)
        for _ in range(350)
    ]
    found = [*alarms, *PERFECT]
    for max_dets in (300, 400):
        ours = evaluate_lvis(content, found, "bbox", max_dets)
        theirs = lvis_numbers(lvis_package, content, found, "bbox", max_dets)
        assert ours == pytest.approx({metric: theirs[metric] for metric in METRICS}, abs=SAME)
    assert evaluate_lvis(content, found, "bbox", 300)["APr"] < 1
    assert evaluate_lvis(content, found, "bbox", 400)["APr"] == 1


def test_empty_masks_are_left_out_after_the_limit_of_an_image(lvis_package):
    content = hand_made()
    content["annotations"].append(box_object(9, 1, 9, (0, 0, 0, 0)))
    nothing = {**box_detection(1, 9, (0, 0, 30, 30), 0.95), "segmentation": rectangle(0, 0, 0, 0)}
    nothing["segmentation"]["size"] = [200, 200]
    nothing["segmentation"]["counts"] = masks.encode(
        np.zeros((200, 200), dtype=np.uint8, order="F")
    )["counts"]
    found = [nothing, *PERFECT]
    assert evaluate_lvis(content, found, "segm")["AP"] == 1.0
    # It takes a place among the best of its image all the same.
    for max_dets in (1, 2, 300):
        ours = evaluate_lvis(content, found, "segm", max_dets)
        theirs = lvis_numbers(lvis_package, content, found, "segm", max_dets)
        assert ours == pytest.approx({metric: theirs[metric] for metric in METRICS}, abs=SAME)
    assert evaluate_lvis(content, found, "segm", 2)["APc"] == 0.0


def test_fixed_ap_counts_the_best_of_each_class_in_any_image():
    alarms = [box_detection(1, 9, (5, 5, 30, 30), 0.99) for _ in range(3)]
    truth = read_annotations(hand_made())
    found = read_detections([*alarms, *PERFECT], truth, "bbox")

    # Three false alarms take all places of the image: nothing else in it is found.
    assert evaluate_lvis(hand_made(), [*alarms, *PERFECT], max_dets=3)["APr"] < 1
    fixed = fixed_result(truth, found, per_class=3)
    assert fixed.metrics["APr"] == fixed.metrics["APf"] == 1.0
    assert fixed.metrics["APc"] == 0.0  # the object is the fourth of its class
    assert fixed_result(truth, found, per_class=4).metrics["APc"] == pytest.approx(0.25, abs=SAME)
    assert fixed.protocol["max_dets_per_class"] == 3


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections_give_one(iou_type):
    assert evaluate_lvis(hand_made(), PERFECT, iou_type) == {metric: 1.0 for metric in METRICS}


def test_a_missed_object_and_a_loose_box_give_the_values_worked_out_by_hand():
    detections = [
        PERFECT[0],  # one of two rare objects: precision 1 up to recall 0.5, 51 of 101 points
        box_detection(1, 9, (60, 60, 50, 40), 0.7),  # IoU 0.8: matches at 7 of the 10 thresholds
    ]
    numbers = evaluate_lvis(hand_made(), detections)
    half = 51 / 101
    assert numbers == pytest.approx(
        {
            "AP": (half + 0.7 + 0) / 3,
            "AP50": (half + 1 + 0) / 3,
            "AP75": (half + 1 + 0) / 3,
            "APs": half,
            "APm": 0.7,
            "APl": 0.0,
            "APr": half,
            "APc": 0.7,
            "APf": 0.0,
            "AR": (0.5 + 0.7 + 0) / 3,
            "ARs": 0.5,
            "ARm": 0.7,
            "ARl": 0.0,
        },
        abs=SAME,
    )


def test_each_class_has_its_own_result():
    result = lvis_result(hand_made(), PERFECT[:2])
    assert [(row.category_id, row.name, row.group, row.ap) for row in result.classes] == [
        (7, "rarity", "r", 1.0),
        (9, "usual", "c", 0.0),
        (12, "plenty", "f", 0.0),
    ]


def test_no_detections_give_zero():
    assert evaluate_lvis(hand_made(), []) == {metric: 0.0 for metric in METRICS}


def test_a_class_without_objects_takes_part_in_no_average():
    annotations = hand_made()
    annotations["categories"].append({"id": 20, "name": "unseen", "frequency": "r"})
    result = lvis_result(annotations, PERFECT)
    assert result.metrics["APr"] == 1.0
    assert result.classes[-1].ap == -1.0


def test_a_group_or_size_without_objects_is_minus_one():
    annotations = hand_made()
    annotations["annotations"] = annotations["annotations"][:2]
    numbers = evaluate_lvis(annotations, [])
    assert (numbers["APr"], numbers["APs"]) == (0.0, 0.0)
    assert [numbers[metric] for metric in ("APc", "APf", "APm", "APl")] == [-1.0] * 4


@pytest.mark.parametrize(
    ("negative", "not_exhaustive", "expected"),
    [([], [], 1.0), ([9], [], 0.5), ([9], [9], 1.0)],
    ids=["not looked for", "known to be absent", "not exhaustive"],
)
def test_a_false_alarm_counts_only_where_the_class_was_looked_for(
    negative, not_exhaustive, expected
):
    annotations = hand_made()
    annotations["images"][2].update(
        neg_category_ids=negative, not_exhaustive_category_ids=not_exhaustive
    )
    false_alarm = box_detection(3, 9, (5, 5, 30, 30), 0.99)
    numbers = evaluate_lvis(annotations, [*PERFECT, false_alarm])
    assert numbers["APc"] == pytest.approx(expected, abs=SAME)


def test_a_mask_in_an_image_without_objects_is_no_problem():
    false_alarm = box_detection(3, 9, (5, 5, 30, 30), 0.99)
    assert evaluate_lvis(hand_made(), [*PERFECT, false_alarm], "segm")["AP"] == 1.0


def test_a_false_alarm_in_coco_format_always_counts():
    false_alarm = box_detection(3, 9, (5, 5, 30, 30), 0.99)
    result = lvis_result(coco_format(hand_made()), [*PERFECT, false_alarm])
    assert [row.ap for row in result.classes] == pytest.approx([1.0, 0.5, 1.0], abs=SAME)


def test_coco_format_has_groups_only_where_they_are_given():
    annotations = coco_format(hand_made())
    unknown = evaluate_lvis(annotations, PERFECT)
    assert unknown["AP"] == 1.0
    assert [unknown[f"AP{group}"] for group in "rcf"] == [-1.0] * 3
    given = evaluate_lvis(annotations, PERFECT[:2], class_groups={7: "r", 9: "c", 12: "c"})
    assert [given[f"AP{group}"] for group in "rcf"] == [1.0, 0.0, -1.0]


def test_the_frequency_of_the_annotations_outranks_the_groups_given():
    numbers = evaluate_lvis(hand_made(), PERFECT[:2], class_groups={7: "f", 9: "f", 12: "f"})
    assert [numbers[f"AP{group}"] for group in "rcf"] == [1.0, 0.0, 0.0]


def test_crowds_of_coco_format_are_ignored():
    annotations = coco_format(hand_made())
    annotations["annotations"].append(box_object(5, 3, 9, (0, 0, 150, 150), iscrowd=1))
    within_the_crowd = box_detection(3, 9, (5, 5, 30, 30), 0.99)
    assert evaluate_lvis(annotations, [*PERFECT, within_the_crowd])["AP"] == 1.0


def test_only_the_best_detections_of_an_image_count():
    # The image's best detection is of another class: with one an image, class 9 is not found.
    assert evaluate_lvis(hand_made(), PERFECT, max_dets=1)["APc"] == 0.0
    assert evaluate_lvis(hand_made(), PERFECT, max_dets=2)["APc"] == 1.0


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_input_is_left_as_it_was(iou_type):
    annotations, detections = hand_made(), copy.deepcopy(PERFECT)
    evaluate_lvis(annotations, detections, iou_type)
    assert annotations == hand_made()
    assert detections == PERFECT


def test_objects_may_be_numbered_from_zero():
    annotations = hand_made()
    for annotation in annotations["annotations"]:
        annotation["id"] -= 1
    assert evaluate_lvis(annotations, PERFECT)["AP"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, d: a.pop("categories"), "no list 'categories'"),
        (lambda a, d: a.update(categories=[]), "an empty list 'categories'"),
        (lambda a, d: a["images"][0].update(id="one"), "the image id 'one' is not an integer"),
        (
            lambda a, d: a["annotations"][1].update(category_id=99),
            "annotation 2 uses category id 99",
        ),
        (lambda a, d: a["annotations"][1].update(image_id=99), "annotation 2 uses image id 99"),
        (
            lambda a, d: a["annotations"][1].update(bbox=[1, 2]),
            "'bbox' of annotation 2 is not four numbers",
        ),
        (lambda a, d: a["categories"][0].update(frequency="x"), "category 12 has frequency 'x'"),
        (lambda a, d: d[2].update(image_id=99), "Detection 2 has image_id 99"),
        (lambda a, d: d[2].update(category_id=0), "Detection 2 has category_id 0"),
        (lambda a, d: d[2].update(score=math.nan), "Detection 2 has no finite `score`"),
        (lambda a, d: d[2].update(bbox=[0, 0, math.inf, 1]), "Detection 2 has no `bbox`"),
    ],
)
def test_bad_input_is_named(change, message):
    annotations, detections = hand_made(), copy.deepcopy(PERFECT)
    change(annotations, detections)
    with pytest.raises(InputError, match=message):
        evaluate_lvis(annotations, detections)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_other_forms_of_the_same_detections_are_accepted(iou_type):
    annotations, changed = hand_made(), copy.deepcopy(PERFECT[1:])
    expected = evaluate_lvis(annotations, changed, iou_type)
    for row in changed:
        row.update(image_id=float(row["image_id"]), category_id=np.int64(row["category_id"]))
        row["bbox"] = np.array(row["bbox"], dtype=np.float32)
        row["score"] = np.float64(row["score"])
        row["segmentation"] = {
            "size": np.array(row["segmentation"]["size"]),
            "counts": counts_of(row["segmentation"]["counts"]).tolist(),  # uncompressed
        }
        if iou_type == "segm":
            del row["bbox"]
    for row in annotations["annotations"]:
        row.update(bbox=np.array(row["bbox"]), area=np.float64(row["area"]))
    assert evaluate_lvis(annotations, iter(changed), iou_type) == expected


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [3, 3], "counts": [9]}, r"image 1 has size \[3, 3\], not \[200, 200\]"),
        ({"size": [200, 200], "counts": "~~"}, "Detection 0 .* no run lengths"),
        ({"size": [200, 200], "counts": "oo"}, "image 1 is broken"),
        ({"size": [200, 200], "counts": [0, 50_000]}, "image 1 is broken"),
        ({"size": [200, 200], "counts": None}, "image 1 is broken"),
        ({"size": [200], "counts": []}, "Detection 0 has a `segmentation` without height"),
        ("mask", "Detection 0 has no `segmentation`"),
    ],
)
def test_broken_masks_are_refused_before_they_are_compared(mask, message):
    row = {"image_id": 1, "category_id": 9, "score": 0.5, "segmentation": mask}
    with pytest.raises(InputError, match=message):
        evaluate_lvis(hand_made(), [row], "segm")


@pytest.mark.parametrize(("category_id", "max_dets"), [(9, 1), (7, 300)])
def test_a_broken_mask_is_refused_also_where_it_does_not_count(category_id, max_dets):
    content = hand_made()
    content["images"][0]["neg_category_ids"] = []
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]
    evaluate_lvis(content, PERFECT, "segm", max_dets)
    mask = {"size": [200, 200], "counts": "oo"}
    row = {"image_id": 1, "category_id": category_id, "score": 0.1, "segmentation": mask}
    with pytest.raises(InputError, match="image 1 is broken"):
        evaluate_lvis(content, [*PERFECT, row], "segm", max_dets)


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_an_evaluation_as_before_it(collects, tmp_path):
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([*PERFECT, {}]))
    truth = read_annotations(hand_made())
    before = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        evaluate_lvis(hand_made(), PERFECT)
        assert gc.isenabled() == collects
        with pytest.raises(InputError, match="Detection 4"):
            evaluate_lvis(hand_made(), [*PERFECT, {}])
        assert gc.isenabled() == collects
        with pytest.raises(InputError, match="Detection 4"):
            detections.read_detection_files([file], truth, "bbox")
        assert gc.isenabled() == collects
    finally:
        gc.enable() if before else gc.disable()


def test_masks_need_masks():
    annotations = hand_made()
    annotations["annotations"][2]["segmentation"] = []
    with pytest.raises(InputError, match="annotation 3 has no mask"):
        evaluate_lvis(annotations, PERFECT, "segm")
    with pytest.raises(InputError, match="Detection 0 has no `segmentation`"):
        evaluate_lvis(hand_made(), [without(PERFECT[0], "segmentation")], "segm")


def test_unreadable_files_are_named(tmp_path):
    truncated = tmp_path / "truncated.json"
    truncated.write_text('{"images": [')
    with pytest.raises(InputError, match="truncated.json' is no valid JSON"):
        evaluate_lvis(truncated, [])
    with pytest.raises(InputError, match="absent.json' does not exist"):
        evaluate_lvis(tmp_path / "absent.json", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"iou_type": "keypoints"}, "iou_type is 'keypoints'"), ({"max_dets": 0}, "max_dets is 0")],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate_lvis(hand_made(), [], **arguments)


@pytest.fixture
def register(tmp_path):
    """Register annotations under a name of Detectron2's catalogue, for one test."""
    names = []

    def register(annotations, evaluator_type="lvis"):
        path = tmp_path / f"annotations_{len(names)}.json"
        path.write_text(json.dumps(annotations))
        names.append(f"evaluation_test_{len(names)}")
        classes = sorted(annotations["categories"], key=lambda category: category["id"])
        MetadataCatalog.get(names[-1]).set(
            json_file=str(path),
            evaluator_type=evaluator_type,
            thing_classes=[category["name"] for category in classes],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(classes)},
        )
        return names[-1]

    yield register
    for name in names:
        MetadataCatalog.remove(name)


def predictions(detections, with_masks=False):
    """The model's side of Detectron2's loop: XYXY boxes and contiguous class ids, an image each."""
    contiguous = {7: 0, 9: 1, 12: 2}
    inputs, outputs = [], []
    for image_id in (1, 2, 3):
        rows = [row for row in detections if row["image_id"] == image_id]
        boxes = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((200, 200), pred_boxes=Boxes(boxes))
        instances.scores = torch.tensor([row["score"] for row in rows])
        instances.pred_classes = torch.tensor(
            [contiguous[row["category_id"]] for row in rows], dtype=torch.int64
        )
        if with_masks:
            instances.pred_masks = torch.zeros(len(rows), 200, 200, dtype=torch.bool)
            for index, row in enumerate(rows):
                mask = masks.decode(row["segmentation"])
                instances.pred_masks[index] = torch.from_numpy(mask).bool()
        inputs.append({"image_id": image_id})
        outputs.append({"instances": instances})
    return inputs, outputs


def test_the_evaluator_reports_percent_and_writes_both_files(register, tmp_path, caplog):
    statistics = types.SimpleNamespace(
        group=["f", "f", "f"], image_count=torch.tensor([2, 50, 900])
    )
    evaluator = BalancedLVISEvaluator(
        register(hand_made()), tmp_path / "out", train_statistics=statistics
    )
    evaluator.reset()
    evaluator.process(*predictions(PERFECT[:2], with_masks=True))
    with caplog.at_level("INFO"):
        results = evaluator.evaluate()

    expected = {"AP": 100 / 3, "AP50": 100 / 3, "AP75": 100 / 3, "APs": 100.0, "APm": 0.0}
    expected |= {"APl": 0.0, "APr": 100.0, "APc": 0.0, "APf": 0.0}
    expected |= {"AR": 100 / 3, "ARs": 100.0, "ARm": 0.0, "ARl": 0.0}
    # No limit was met, so fixed AP is AP.
    expected |= {f"{name}fixed": expected[name] for name in ("AP", "APr", "APc", "APf")}
    assert list(results) == ["bbox", "segm"]
    for numbers in results.values():
        assert numbers == pytest.approx(expected, abs=100 * SAME)

    written = json.loads((tmp_path / "out/lvis_results.json").read_text())
    assert written["bbox"] == results["bbox"]
    facts = [("rarity", "r", 2, 2), ("usual", "c", 50, 1), ("plenty", "f", 900, 1)]
    named = [
        dict(zip(("name", "group", "train_images", "test_objects"), of_class)) for of_class in facts
    ]
    assert written["classes"] == [
        {**of_class, "bbox": ap, "segm": ap} for of_class, ap in zip(named, (100.0, 0.0, 0.0))
    ]
    rows = json.loads((tmp_path / "out/lvis_instances_results.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(1, 7), (2, 7)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lvis_classes.csv",
        "lvis_classes.json",
        "lvis_instances_results.json",
        "lvis_results.json",
        "operating_points.json",
    ]
    assert "| rarity | r | 2 | 2 | 100.000 |" in " ".join(caplog.text.split())


def test_the_evaluator_takes_groups_from_the_training_set_where_annotations_have_none(register):
    name = register(coco_format(hand_made()))
    statistics = types.SimpleNamespace(group=["r", "c", "c"], image_count=torch.tensor([2, 50, 60]))
    for given, expected in ((statistics, [100.0, 0.0, math.nan]), (None, [math.nan] * 3)):
        evaluator = BalancedLVISEvaluator(name, train_statistics=given)
        evaluator.process(*predictions(PERFECT[:2]))
        numbers = evaluator.evaluate()["bbox"]
        assert [numbers[f"AP{group}"] for group in "rcf"] == pytest.approx(expected, nan_ok=True)


def test_the_evaluator_writes_absent_numbers_as_null(register, tmp_path):
    evaluator = BalancedLVISEvaluator(register(coco_format(hand_made())), tmp_path)
    evaluator.process(*predictions([]))
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0
    written = json.loads((tmp_path / "lvis_results.json").read_text())
    assert written["bbox"]["APr"] is None
    assert written["classes"][0]["train_images"] is None


def test_the_evaluator_drops_rows_that_are_not_finite_and_counts_them(register, caplog):
    broken = [dict(PERFECT[2], score=math.nan), dict(PERFECT[3], bbox=[0.0, 0.0, math.inf, 1.0])]
    evaluator = BalancedLVISEvaluator(register(hand_made()))
    evaluator.process(*predictions([*PERFECT[:2], *broken]))
    results = evaluator.evaluate()
    assert results["bbox"]["APr"] == 100.0
    assert results["bbox"]["APc"] == 0.0
    assert "Dropped 2 detections" in caplog.text


def test_the_evaluator_forgets_at_reset(register):
    evaluator = BalancedLVISEvaluator(register(hand_made()))
    evaluator.process(*predictions(PERFECT))
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_annotations_without_objects_are_not_evaluated(register, tmp_path):
    evaluator = BalancedLVISEvaluator(register(dict(hand_made(), annotations=[])), tmp_path)
    evaluator.process(*predictions(PERFECT))
    assert evaluator.evaluate() == {}
    assert len(json.loads((tmp_path / "lvis_instances_results.json").read_text())) == len(PERFECT)


def test_statistics_of_another_number_of_classes_are_refused(register):
    statistics = types.SimpleNamespace(group=["r"], image_count=torch.tensor([2]))
    with pytest.raises(InputError, match="have 1 classes but data set .* has 3"):
        BalancedLVISEvaluator(register(hand_made()), train_statistics=statistics)


def test_the_evaluator_fits_the_data_set(register):
    cfg = get_cfg()
    lvis, coco = register(hand_made()), register(hand_made(), "coco")
    assert isinstance(build_evaluator(cfg, lvis), BalancedLVISEvaluator)
    assert isinstance(build_evaluator(cfg, coco), COCOEvaluator)
    voc = register(hand_made(), "pascal_voc")
    with pytest.raises(InputError, match=f"'{voc}' has evaluator_type 'pascal_voc'"):
        build_evaluator(cfg, voc)


# --- Beside Detectron2's evaluator, with several workers, and interrupted -------------------------


def larger_case(seed=3, images=7):
    """Random images in one file, with the detections of each as the model gives them."""
    generator = np.random.default_rng(seed)
    categories = [
        {"id": c, "name": f"class {c}", "frequency": group} for c, group in zip((2, 5, 9), "rcf")
    ]
    content = {"categories": categories, "images": [], "annotations": []}
    for image_id in range(1, images + 1):
        content["images"].append(
            {
                "id": image_id,
                "height": 60,
                "width": 80,
                "neg_category_ids": [2, 5],
                "not_exhaustive_category_ids": [9] if image_id % 2 else [],
            }
        )
        for _ in range(4):
            x, y = generator.integers(0, 40, 2).tolist()
            number = len(content["annotations"]) + 1
            category = int(generator.choice([2, 5, 9]))
            content["annotations"].append(box_object(number, image_id, category, (x, y, 15, 12)))
    inputs, outputs = [], []
    for image in content["images"]:
        inputs.append({"image_id": image["id"]})
        outputs.append({"instances": some_instances(content, image["id"], generator)})
    return content, inputs, outputs


def some_instances(content, image_id, generator):
    """Each object of an image, some off, some twice, and one detection of an empty mask."""
    near = [a for a in content["annotations"] if a["image_id"] == image_id] * 2
    corners = np.array([a["bbox"][:2] for a in near]) + generator.integers(0, 4, (len(near), 2))
    boxes = np.concatenate([corners, corners + (15, 12)], axis=1)
    instances = Instances((60, 80), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.scores = torch.from_numpy(generator.random(len(near), dtype=np.float32))
    instances.pred_classes = torch.tensor([[2, 5, 9].index(a["category_id"]) for a in near])
    instances.pred_masks = torch.zeros(len(near), 60, 80, dtype=torch.bool)
    for index, (x1, y1, x2, y2) in enumerate(boxes[:-1]):  # the last mask is empty
        instances.pred_masks[index, y1:y2, x1:x2] = True
    return instances


def test_detectron2s_own_evaluator_says_the_same(register, lvis_package):
    content, inputs, outputs = larger_case()
    results = []
    for evaluator in (
        LVISEvaluator(register(content), distributed=False),
        BalancedLVISEvaluator(register(content), distributed=False),
    ):
        evaluator.reset()
        evaluator.process(inputs, outputs)
        results.append(evaluator.evaluate())
    theirs, ours = results
    for task in ("bbox", "segm"):
        assert 1 < ours[task]["AP"] < 99
        for metric, value in theirs[task].items():
            # The boxes of the file are shortened to what a float32 holds; those here are whole.
            expected = math.nan if value == -100 else value
            assert ours[task][metric] == pytest.approx(expected, abs=100 * SAME, nan_ok=True)


def register_here(name, json_file):
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        evaluator_type="lvis",
        thing_dataset_id_to_contiguous_id={2: 0, 5: 1, 9: 2},
    )


def evaluate_a_share(rank, json_file, out, num_workers):
    register_here("evaluation_of_workers", json_file)
    _, inputs, outputs = larger_case()
    share = np.array_split(np.arange(len(inputs)), num_workers)[rank]
    evaluator = BalancedLVISEvaluator("evaluation_of_workers", out)
    evaluator.reset()
    for index in share:
        evaluator.process([inputs[index]], [outputs[index]])
    sent = [
        part.nbytes if isinstance(part, np.ndarray) else len(part)
        for matcher in evaluator._matchers.values()
        for part in matcher.to_bytes()
    ]
    with recorded_log("balanced_det.evaluation.evaluator") as messages:
        results = evaluator.evaluate()
    return results, sum(sent), [m for m in messages if m.startswith("Gathered")]


@contextlib.contextmanager
def recorded_log(name):
    """Yield the list that messages of a logger go to."""
    messages = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def test_one_and_three_workers_write_the_same_bytes(tmp_path):
    json_file = tmp_path / "annotations.json"
    json_file.write_text(json.dumps(larger_case()[0]))
    alone, _, nothing_gathered = evaluate_a_share(0, json_file, tmp_path / "1", 1)
    MetadataCatalog.remove("evaluation_of_workers")
    workers = run_workers(evaluate_a_share, json_file, tmp_path / "3", 3, num_workers=3)
    together, sent, (told, *silent) = zip(*workers, strict=True)
    assert together[1:] == (None, None)
    assert nothing_gathered == [] and silent == [[], []]
    assert told[0].startswith(f"Gathered {sum(sent[1:])} bytes of matches from 2 other workers")
    written = [
        {path.name: path.read_bytes() for path in (tmp_path / number).iterdir()} for number in "13"
    ]
    assert sorted(written[0]) == [
        "lvis_classes.csv",
        "lvis_classes.json",
        "lvis_instances_results.json",
        "lvis_results.json",
        "operating_points.json",
    ]
    assert written[0] == written[1]
    assert repr(alone) == repr(together[0])  # NaN included
    assert 1 < alone["segm"]["AP"] < 99

    # What the benchmarks of several GPUs make of that log and of these files.
    (tmp_path / "log.txt").write_text(told[0])
    assert bench_scaling.gathered(tmp_path)["bytes_gathered"] == sum(sent[1:])
    same = bench_scaling.compare_results(tmp_path / "1", tmp_path / "3")
    assert (same["equal_files"], same["other_files"]) == (sorted(written[0]), [])
    file = tmp_path / "3" / bench_scaling.DETECTIONS
    first, *others = json.loads(file.read_text())
    file.write_text(json.dumps([*others, {**first, "score": first["score"] / 2}]))
    other = bench_scaling.compare_results(tmp_path / "1", tmp_path / "3")
    assert (other["other_files"], other["other_detections"]) == ([file.name], 1)


@pytest.fixture
def interrupted(register, tmp_path):
    """What a run leaves that was stopped after four of seven images, and its annotations."""
    content, inputs, outputs = larger_case()
    name = register(content)
    evaluator = BalancedLVISEvaluator(name, tmp_path / "out")
    for index in range(4):
        evaluator.process([inputs[index]], [outputs[index]])
    (partial,) = (tmp_path / "out").iterdir()
    return MetadataCatalog.get(name).json_file, partial, evaluator, inputs, outputs


def test_what_was_written_until_an_interrupt_is_usable(interrupted, tmp_path, capsys):
    json_file, partial, *_ = interrupted
    assert partial.name == "lvis_instances_results.partial-0.json"
    assert {row["image_id"] for row in json.loads(partial.read_text())} == {1, 2, 3, 4}
    assert evaluate_files([json_file, str(partial), "--out", str(tmp_path / "again")]) == 0
    assert "APrfixed" in capsys.readouterr().out
    assert json.loads((tmp_path / "again/lvis_results.json").read_text())["segm"]["AP"] > 1


def test_a_detection_file_cut_short_is_refused_with_the_byte(interrupted, tmp_path, capsys):
    json_file, partial, *_ = interrupted
    whole = partial.read_bytes()
    cut = tmp_path / "cut.json"
    for length in (len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert evaluate_files([json_file, str(cut)]) == 2
        message = capsys.readouterr().err
        assert f"cut.json' is no valid JSON, it is cut short at byte {length}" in message
        assert message.count("\n") == 1


def test_the_file_gives_the_numbers_of_the_run(interrupted, tmp_path, capsys):
    json_file, partial, evaluator, inputs, outputs = interrupted
    evaluator.process(inputs[4:], outputs[4:])
    results = evaluator.evaluate()
    assert not partial.exists()
    detections = partial.with_name("lvis_instances_results.json")
    assert evaluate_files([json_file, str(detections), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again/lvis_results.json").read_text())
    for task, numbers in results.items():
        for metric, value in numbers.items():
            # To the bit: what is written is what was matched.
            assert again[task][metric] == (None if math.isnan(value) else value)
    for name in ("lvis_classes.csv", "lvis_classes.json", "lvis_results.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_detections_read_by_column_are_those_read_one_by_one(iou_type):
    content, rows = random_case(np.random.default_rng(5))
    truth = read_annotations(content)
    rows = [*rows, {**rows[0], "bbox": [1, 2.5, 3, 4]}]
    fast = detections._plain_columns(rows, truth, iou_type)
    plain = detections._checked_columns(rows, truth, iou_type)
    assert vars(fast).keys() == vars(plain).keys()
    for name, column in vars(plain).items():
        np.testing.assert_array_equal(getattr(fast, name), column)


def outcome_of(read, *arguments):
    """The columns that a reader returns, or the sentence with which it refuses."""
    try:
        return {name: np.array(column) for name, column in vars(read(*arguments)).items()}
    except InputError as error:
        return str(error)


NOT_PLAIN = (True, np.True_, None, "1", "1.0", 1.0, 1.5, np.float32(1), np.int64(1), 1j, {}, [1])
NOT_PLAIN += (Decimal(1), Fraction(1), 10**400, 2**63, -1, math.nan, -math.inf, b"1", np.ones(1))
NOT_PLAIN_BOXES = (
    *((1, 2, 3, 4), [1, 2, 3], [1, 2, 3, 4, 5], "1234", {1: 1, 2: 2, 3: 3, 4: 4}, None, 3),
    *([1, 2, 3, x] for x in NOT_PLAIN),
    *(np.ones(4), np.ones((4, 1)), [[1], [2], [3], [4]], range(4)),
)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_one_value_that_is_not_plain_is_read_or_refused_as_if_it_stood_alone(iou_type, monkeypatch):
    monkeypatch.setattr(columns, "PART", 2)
    truth = read_annotations(hand_made())
    shape = {"bbox": NOT_PLAIN_BOXES}
    changes = dict.fromkeys(("image_id", "category_id", "score"), NOT_PLAIN) | shape
    refused = 0
    for key, values in changes.items():
        for value in values:
            rows = [*PERFECT[:3], {**PERFECT[3], key: value}]
            found = outcome_of(read_detections, rows, truth, iou_type)
            expected = outcome_of(detections._checked_columns, rows, truth, iou_type)
            np.testing.assert_equal(found, expected)
            refused += isinstance(found, str)
        rows = [*PERFECT[:3], without(PERFECT[3], key)]
        found = outcome_of(read_detections, rows, truth, iou_type)
        np.testing.assert_equal(
            found, outcome_of(detections._checked_columns, rows, truth, iou_type)
        )
    assert refused > 30


def test_equal_scores_count_in_the_order_of_the_list(lvis_package):
    # Far more of one class and score than a sort leaves in order by chance.
    content = hand_made()
    generator = np.random.default_rng(3)
    found = []
    for _ in range(900):
        box = np.add((60, 60, 50, 50), generator.integers(-15, 15, 4)).tolist()
        score = round(float(generator.integers(1, 4)) / 10, 1)
        found.append(box_detection(int(generator.integers(1, 4)), 9, box, score))
    for max_dets in (100, 300, 1000):
        ours = evaluate_lvis(content, found, "bbox", max_dets)
        theirs = lvis_numbers(lvis_package, content, found, "bbox", max_dets)
        assert ours == pytest.approx({metric: theirs[metric] for metric in METRICS}, abs=SAME)
        assert 0 < ours["APc"] < 1


@pytest.mark.parametrize("content", [hand_made(), coco_format(hand_made())], ids=["LVIS", "COCO"])
def test_a_class_of_the_model_that_the_annotations_lack_is_left_out(content):
    matcher = Matcher(read_annotations(content))
    box = np.array([[10.0, 10.0, 20.0, 20.0]])
    matcher.update(0, np.array([-1, 0]), np.array([0.9, 0.8]), np.repeat(box, 2, axis=0))
    # One of two objects is found by a detection that nothing stands before: 51 of 101 points.
    assert matcher.result().classes[0].ap == pytest.approx(51 / 101, abs=SAME)


def test_an_image_is_evaluated_once_however_it_is_given():
    truth = read_annotations(hand_made())
    matcher = Matcher(truth)
    none = np.zeros(0, dtype=np.int64)
    matcher.update(1, none, np.zeros(0), np.zeros((0, 4)))
    with pytest.raises(InputError, match="Image 2 is evaluated twice"):
        matcher.update(1, none, np.zeros(0), np.zeros((0, 4)))
    with pytest.raises(InputError, match="Image 2 is evaluated twice"):
        matcher.update_all(read_detections(PERFECT, truth, "bbox"))


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_files_read_in_parts_are_those_read_at_once(iou_type, interrupted, tmp_path, monkeypatch):
    json_file, ours, *_ = interrupted
    rows = json.loads(ours.read_text())
    others = tmp_path / "others.json"
    others.write_text(json.dumps(rows, indent=1))
    split = tmp_path / "split.json"  # begins and ends as ours, but not in lines of its own
    split.write_text(ours.read_text().replace('"score"', '\n"score"'))
    monkeypatch.setattr(detections, "_PART", 300)
    assert detections._is_as_we_write_it(ours) and not detections._is_as_we_write_it(others)
    truth = read_annotations(json_file)
    expected = read_detections(rows, truth, iou_type)
    for path in (ours, others, split):
        found = detections.read_detection_files([path], truth, iou_type)
        for name, column in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), column)
    bad = tmp_path / "bad.json"
    bad.write_text(ours.read_text().replace('"image_id":4', '"image_id":44'))
    first_bad = next(i for i, row in enumerate(rows) if row["image_id"] == 4)
    with pytest.raises(InputError, match=f"Detection {first_bad} has image_id 44"):
        detections.read_detection_files([bad], truth, iou_type)


def test_scores_and_boxes_survive_the_file_to_the_bit():
    generator = np.random.default_rng(0)
    numbers = np.exp(generator.uniform(-20, 8, 10_000)).astype(np.float32)
    assert np.array_equal(np.array(texts_of(numbers), dtype=np.float32), numbers)
    assert texts_of(np.array([0.5, 100.0, 1 / 3], dtype=np.float32)) == [
        "0.5",
        "100",
        "0.333333343",
    ]


def test_the_limits_of_fixed_ap_are_those_of_the_file(register, tmp_path, monkeypatch):
    content, inputs, outputs = larger_case()
    name = register(content)
    monkeypatch.setattr("balanced_det.evaluation.evaluator.FIXED_MAX_DETS", 6)
    evaluator = BalancedLVISEvaluator(name, tmp_path / "out", max_dets_per_image=5)
    evaluator.process(inputs, outputs)
    results = evaluator.evaluate()
    truth = read_annotations(content)
    rows = json.loads((tmp_path / "out/lvis_instances_results.json").read_text())
    for task in ("bbox", "segm"):
        expected = fixed_result(truth, read_detections(rows, truth, task), task, per_class=6)
        assert results[task]["APfixed"] == pytest.approx(100 * expected.metrics["AP"], abs=SAME)
        assert results[task]["APfixed"] != pytest.approx(results[task]["AP"])


def test_files_of_interrupted_runs_go_when_a_run_is_complete(interrupted, register, tmp_path):
    _, partial, evaluator, inputs, outputs = interrupted
    left = partial.with_name("lvis_instances_results.partial-5.json")
    left.write_text("[]")
    evaluator.reset()
    evaluator.process(inputs, outputs)
    evaluator.evaluate()
    assert not left.exists() and not partial.exists()
    rows = json.loads(partial.with_name("lvis_instances_results.json").read_text())
    assert len(rows) == sum(len(output["instances"]) for output in outputs)


def test_an_image_is_evaluated_once(register):
    content, inputs, outputs = larger_case()
    evaluator = BalancedLVISEvaluator(register(content))
    evaluator.process(inputs, outputs)
    with pytest.raises(InputError, match="Image 1 is evaluated twice"):
        evaluator.process(inputs[:1], outputs[:1])
    with pytest.raises(InputError, match="given image 99, which .* does not list"):
        evaluator.process([{"image_id": 99}], outputs[:1])


def test_one_object_without_a_mask_is_told_and_boxes_are_evaluated(register, caplog):
    content, inputs, outputs = larger_case()
    del content["annotations"][1]["segmentation"]
    evaluator = BalancedLVISEvaluator(register(content))
    evaluator.process(inputs, outputs)
    assert list(evaluator.evaluate()) == ["bbox"]
    assert "annotation 2 has none" in caplog.text


def test_masks_may_come_as_run_lengths(register, tmp_path):
    content, inputs, outputs = larger_case()
    outputs[0]["instances"].scores[1] = math.nan  # dropped, with its mask
    written = []
    for form in ("masks", "run lengths"):
        if form == "run lengths":
            for output in outputs:
                pasted = output["instances"].pred_masks.permute(1, 2, 0).numpy().astype(np.uint8)
                output["instances"].remove("pred_masks")
                rles = masks.encode(np.asfortranarray(pasted))
                output["instances"].pred_masks_rle = rles
        name = register(content)
        evaluator = BalancedLVISEvaluator(name, tmp_path / form)
        evaluator.process(inputs, copy.deepcopy(outputs))
        evaluator.evaluate()
        written.append(
            {
                # But for the data set's name, which one file has.
                path.name: path.read_bytes().replace(f'"data": "{name}"'.encode(), b"")
                for path in (tmp_path / form).iterdir()
            }
        )
    assert written[0] == written[1]
    assert b'"segm"' in written[0]["lvis_results.json"]


def test_a_mask_rcnn_is_evaluated_by_run_lengths_as_by_pasted_masks(tmp_path):
    torch.manual_seed(0)
    paths = shapes.generate(
        tmp_path / "shapes", classes=models.NUM_CLASSES, train=4, val=3, size=64
    )
    name = str(paths.val_json)  # a name not used before
    cfg = models.config(models.MASK)
    cfg.BALANCE.DATASETS = [[name, name, str(paths.image_root)]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    # A network that has learnt nothing still finds something to compare.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    register_datasets(cfg)
    model = Trainer.build_model(cfg)
    ours = Trainer.test(cfg, model)

    evaluator = Trainer.build_evaluator(cfg, name, str(tmp_path / "pasted"))
    loader = Trainer.build_test_loader(cfg, name)
    pasted = inference_on_dataset(model, loader, evaluator)
    assert set(ours) == {"bbox", "segm"}
    assert repr(ours) == repr(pasted)
    for path in (tmp_path / "pasted").iterdir():
        assert path.read_bytes() == (tmp_path / "out/inference" / path.name).read_bytes()
    assert len(json.loads((tmp_path / "pasted/lvis_instances_results.json").read_text())) > 100
    assert model.training  # as it was before


def test_each_of_several_test_sets_has_its_folder_and_own_data_its_limit(register):
    cfg = get_cfg()
    first, second = register(hand_made()), register(hand_made())
    cfg.OUTPUT_DIR, cfg.TEST.DETECTIONS_PER_IMAGE = "out", 500
    for names, folders in (
        ([first], ["out/inference"]),
        ([first, second], [f"out/inference/{first}", f"out/inference/{second}"]),
    ):
        cfg.DATASETS.TEST = tuple(names)
        evaluators = [build_evaluator(cfg, name) for name in names]
        assert [evaluator._output_dir for evaluator in evaluators] == folders
        assert [evaluator._max_dets for evaluator in evaluators] == [500] * len(names)


def test_what_is_no_object_to_find_is_not_counted_as_one():
    content = hand_made()
    crowd = box_object(5, 3, 7, (10, 10, 20, 20)) | {"iscrowd": 1}
    ignored = box_object(6, 3, 9, (10, 10, 20, 20)) | {"ignore": 1}
    empty = box_object(7, 3, 12, (10, 10, 20, 20)) | {"area": 0}
    content["annotations"] += [crowd, ignored, empty]
    found = lvis_result(content, PERFECT)
    assert [(c.category_id, c.objects) for c in found.classes] == [(7, 2), (9, 1), (12, 1)]


def test_class_tables_hold_numbers_groups_and_the_protocol(tmp_path):
    content = hand_made()
    content["categories"][1]["name"] = "rar\x1b[31mity\n"
    results = {"bbox": lvis_result(content, PERFECT[1:])}
    rows = class_rows(results, {7: 2})
    write_results({"bbox": results["bbox"].metrics}, rows, results, tmp_path)
    written = json.loads((tmp_path / "lvis_classes.json").read_text())
    assert written["protocol"]["bbox"]["max_dets_per_image"] == 300
    rare, _, plenty = written["classes"]
    # Half of the rare objects are found, at score 0.8: F1 is 2 * 1 * 0.5 / 1.5.
    assert rare["name"] == r"rar\x1b[31mity\n"
    assert (rare["group"], rare["train_images"], rare["test_objects"]) == ("r", 2, 2)
    assert rare["bbox"]["AR"] == pytest.approx(50)
    assert rare["bbox"]["F1"] == pytest.approx(200 / 3)
    assert rare["bbox"]["threshold"] == 0.8
    assert plenty["bbox"]["threshold"] == 0.6
    with open(tmp_path / "lvis_classes.csv", newline="") as file:
        header, *lines = csv.reader(file)
    facts = ["category_id", "name", "group", "train_images", "test_objects"]
    assert header[:6] == [*facts, "bbox_AP"]
    assert lines[0][:5] == ["7", r"rar\x1b[31mity\n", "r", "2", "2"]
    assert lines[0][-1].startswith("LVIS: iou_type bbox, ")
    assert "max_dets_per_image 300" in lines[0][-1]
    unfound = class_rows({"bbox": lvis_result(content, [])})
    assert unfound[0]["bbox"]["F1"] == 0.0
    assert math.isnan(unfound[0]["bbox"]["threshold"])
