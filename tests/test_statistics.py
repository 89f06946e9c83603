import random

import pytest
import torch

from balanced_det.data.statistics import add_counts, dataset_statistics, frequency_group
from balanced_det.errors import InputError


def image(*category_ids, crowd=()):
    return {
        "file_name": "some/photo.jpg",
        "annotations": [{"category_id": c} for c in category_ids]
        + [{"category_id": c, "iscrowd": 1} for c in crowd],
    }


def test_counts_images_once_and_objects_each():
    statistics = dataset_statistics([image(0, 0, 2), image(2), image()], num_classes=4)
    assert statistics.num_images == 3
    assert statistics.image_count.tolist() == [1, 0, 2, 0]
    assert statistics.instance_count.tolist() == [2, 0, 2, 0]
    assert statistics.image_count.dtype == statistics.instance_count.dtype == torch.long
    assert torch.equal(statistics.frequency, torch.tensor([1, 0, 2, 0]) / 3)


def test_agrees_with_counting_one_by_one():
    rng = random.Random(0)
    dicts = [image(*rng.choices(range(7), k=rng.randrange(6))) for _ in range(200)]
    statistics = dataset_statistics(dicts, 7)
    for c in range(7):
        of_class = [sum(a["category_id"] == c for a in d["annotations"]) for d in dicts]
        assert statistics.instance_count[c] == sum(of_class)
        assert statistics.image_count[c] == sum(n > 0 for n in of_class)


def test_crowds_are_not_counted():
    statistics = dataset_statistics([image(1, crowd=[0, 1])], num_classes=2)
    assert statistics.image_count.tolist() == [0, 1]
    assert statistics.instance_count.tolist() == [0, 1]


@pytest.mark.parametrize(
    "image_count, group",
    [(0, "r"), (1, "r"), (10, "r"), (11, "c"), (100, "c"), (101, "f"), (10**6, "f")],
)
def test_groups_have_the_bounds_of_lvis(image_count, group):
    assert frequency_group(image_count) == group
    dicts = [image(0)] * min(image_count, 101)
    assert dataset_statistics(dicts, 1).group == [group]


def test_no_image_gives_zero_frequency():
    statistics = dataset_statistics([], num_classes=3)
    assert statistics.num_images == 0
    assert statistics.frequency.tolist() == [0, 0, 0]
    assert statistics.group == ["r", "r", "r"]


@pytest.mark.parametrize("bad", [-1, 3])
def test_category_id_outside_the_classes_is_named(bad):
    with pytest.raises(InputError, match=rf"'some/photo.jpg'.* id {bad}, .*K = 3 classes") as error:
        dataset_statistics([image(0), image(1, bad)], num_classes=3)
    assert str(error.value).count(".") == 2  # one sentence: the file name's dot and the full stop


def test_text_names_the_group_sizes():
    statistics = dataset_statistics([image(0)] * 101 + [image(1)] * 11 + [image(2)], 4)
    assert str(statistics) == (
        "113 images, 113 objects, 4 classes: 2 rare, 1 common, 1 frequent; 1 without an object"
    )


def test_lvis_categories_get_counts_and_group():
    annotations = [{"image_id": i, "category_id": 5} for i in range(11)]
    annotations += [{"image_id": 3, "category_id": 5}, {"image_id": 1, "category_id": 9}]
    annotations += [{"image_id": 2, "category_id": 9, "iscrowd": 1}]
    categories = [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}, {"id": 11, "name": "c"}]
    counted = add_counts(categories, annotations)
    assert [c["image_count"] for c in counted] == [11, 1, 0]
    assert [c["instance_count"] for c in counted] == [12, 1, 0]
    assert [c["frequency"] for c in counted] == ["c", "r", "r"]
    assert "image_count" not in categories[0]
