import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from balanced_det.data import shapes
from balanced_det.errors import InputError

# Long-tailed with all three groups, and yet drawn in a second.
SMALL = dict(classes=12, train=160, val=48, size=64, seed=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shapes.generate(tmp_path_factory.mktemp("shapes") / "small", **SMALL)


def read(path):
    return json.loads(path.read_text())


def images_by_class(content):
    images = {category["id"]: set() for category in content["categories"]}
    for annotation in content["annotations"]:
        images[annotation["category_id"]].add(annotation["image_id"])
    return images


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@settings(deadline=None)
@given(st.integers(150, 3000).flatmap(lambda n: st.tuples(st.integers(3, n // 5), st.just(n))))
def test_every_group_exists_in_the_plan(sizes):
    classes, train = sizes
    counts = shapes.class_image_counts(classes, train)
    assert len(counts) == classes
    assert (np.diff(counts) <= 0).all()
    assert 1 <= counts.min() <= 10
    assert 100 < counts.max() <= shapes.MAX_IMAGE_SHARE * train
    assert ((counts > 10) & (counts <= 100)).any()
    assert counts.sum() <= shapes.CLASSES_PER_IMAGE * train


@settings(deadline=None)
@given(classes=st.integers(1, 400), train=st.integers(1, 2000))
def test_plan_fits_into_the_images(classes, train):
    assume(classes <= shapes.CLASSES_PER_IMAGE * train)
    counts = shapes.class_image_counts(classes, train)
    assert counts.min() >= 1
    assert counts.max() <= max(1, shapes.MAX_IMAGE_SHARE * train)
    assert counts.sum() <= shapes.CLASSES_PER_IMAGE * train


def test_default_training_counts_follow_zipfs_law():
    counts = shapes.class_image_counts(20, 600)
    exponent = np.log(counts[0] / counts[-1]) / np.log(20)
    # On log-log axes a power law is a line; rounding to whole images moves its points.
    line = np.log(counts[0]) - exponent * np.log(np.arange(1, 21))
    assert np.abs(np.exp(line) - counts).max() <= 0.5


@settings(deadline=None, max_examples=30)
@given(
    classes=st.integers(1, 60),
    images=st.integers(30, 200),
    spread=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_assignment_keeps_every_planned_count(classes, images, spread, seed):
    counts = shapes.class_image_counts(classes, images)
    assigned = shapes.assign_classes(counts, images, spread, np.random.default_rng(seed))
    assert len(assigned) == images
    occurrences = Counter(c for classes_of_image in assigned for c in classes_of_image)
    assert [occurrences[c] for c in range(classes)] == counts.tolist()
    for classes_of_image in assigned:
        assert len(classes_of_image) == len(set(classes_of_image)) <= shapes.MAX_OBJECTS
    if spread <= 1:
        sizes = [len(classes_of_image) for classes_of_image in assigned]
        assert max(sizes) - min(sizes) <= 1


def test_training_set_has_rare_common_and_frequent_classes(small):
    content = read(small.train_json)
    images = images_by_class(content)
    assert {c["frequency"] for c in content["categories"]} == {"r", "c", "f"}
    for category in content["categories"]:
        assert category["image_count"] == len(images[category["id"]])
        assert category["instance_count"] == sum(
            a["category_id"] == category["id"] for a in content["annotations"]
        )
    planned = shapes.class_image_counts(SMALL["classes"], SMALL["train"])
    counted = sorted((len(i) for i in images.values()), reverse=True)
    assert counted[1:] == planned[1:].tolist()
    assert counted[0] >= planned[0]


def test_validation_set_is_balanced_and_carries_the_training_counts(small):
    content = read(small.val_json)
    assert len({len(images) for images in images_by_class(content).values()}) == 1
    assert content["categories"] == read(small.train_json)["categories"]


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_files_are_lvis_v1(small, split):
    content = read(small.train_json if split == "train" else small.val_json)
    side = SMALL["size"]
    assert [c["id"] for c in content["categories"]] == list(range(1, SMALL["classes"] + 1))
    assert len({c["name"] for c in content["categories"]}) == SMALL["classes"]
    assert all(c["synset"] for c in content["categories"])

    present = {image["id"]: set() for image in content["images"]}
    assert len(present) == SMALL[split]
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    for annotation in content["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
        assert annotation["iscrowd"] == 0
        (polygon,) = annotation["segmentation"]
        x, y = np.array(polygon).reshape(-1, 2).T
        left, top, width, height = annotation["bbox"]
        # Both are written in hundredths of a pixel.
        assert np.allclose([left, top], [x.min(), y.min()], atol=0.005)
        assert np.allclose([left + width, top + height], [x.max(), y.max()], atol=0.011)
        assert x.min() >= 0 and y.min() >= 0 and x.max() <= side and y.max() <= side

    for image in content["images"]:
        assert 1 <= len(present[image["id"]]) <= shapes.MAX_OBJECTS
        assert not present[image["id"]] & set(image["neg_category_ids"])
        assert image["not_exhaustive_category_ids"] == []
        assert (image["height"], image["width"]) == (side, side)
        assert image["coco_url"].split("/")[-2:] == image["file_name"].split("/")
        with Image.open(small.image_root / image["file_name"]) as picture:
            assert picture.size == (side, side)


def test_area_is_that_of_the_mask(small):
    for annotation in read(small.val_json)["annotations"]:
        (polygon,) = annotation["segmentation"]
        rle = mask_util.frPyObjects([polygon], SMALL["size"], SMALL["size"])
        corners = np.array(polygon).reshape(-1, 2)
        perimeter = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).sum()
        # A pixel mask is off by up to half a pixel along the outline.
        assert abs(mask_util.area(rle)[0] - annotation["area"]) <= perimeter / 2


def test_objects_are_drawn_where_their_polygons_are(small):
    content = read(small.val_json)
    side = SMALL["size"]
    masks = {image["id"]: np.zeros((side, side), dtype=bool) for image in content["images"]}
    for annotation in content["annotations"]:
        rle = mask_util.frPyObjects(annotation["segmentation"], side, side)
        masks[annotation["image_id"]] |= mask_util.decode(rle)[..., 0].astype(bool)
    for image in content["images"]:
        picture = Image.open(small.image_root / image["file_name"]).convert("HSV")
        saturation = np.asarray(picture)[..., 1] / 255
        mask = masks[image["id"]]
        # The colours have a saturation of 0.4 and more, the background is nearly grey.
        assert saturation[mask].mean() > 0.4 > 0.25 > saturation[~mask].mean()


def test_same_seed_gives_the_same_bytes(small, tmp_path):
    again = shapes.generate(tmp_path / "again", **SMALL)
    assert files_of(again.image_root.parent) == files_of(small.image_root.parent)


def test_training_images_do_not_depend_on_the_validation_set(small, tmp_path):
    other = shapes.generate(tmp_path / "other", **{**SMALL, "val": 3})
    assert files_of(other.image_root / "train") == files_of(small.image_root / "train")


def test_other_seed_gives_another_data_set(small, tmp_path):
    other = shapes.generate(tmp_path / "other", **{**SMALL, "seed": 4})
    mine, theirs = files_of(small.image_root), files_of(other.image_root)
    assert mine.keys() == theirs.keys()
    assert all(mine[name] != theirs[name] for name in mine)


def test_all_classes_look_different_and_can_be_drawn():
    looks = [shapes.class_look(i) for i in range(shapes.MAX_CLASSES)]
    assert len(set(looks)) == len({look.name for look in looks}) == shapes.MAX_CLASSES
    assert all(look.colour != look.second_colour for look in looks)
    for index in range(0, shapes.MAX_CLASSES, 997):
        image, _ = shapes.draw_image([index], 48, np.random.default_rng(index))
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8


def test_equal_data_set_is_kept(small):
    stamp = small.train_json.stat().st_mtime_ns
    assert shapes.generate(small.train_json.parent, **SMALL) == small
    assert small.train_json.stat().st_mtime_ns == stamp


def test_other_parameters_need_overwrite(tmp_path):
    tiny = dict(classes=2, train=2, val=2, size=32)
    out = tmp_path / "data"
    shapes.generate(out, **tiny, seed=0)
    with pytest.raises(InputError, match="other parameters.*--overwrite"):
        shapes.generate(out, **tiny, seed=1)
    before = files_of(out)
    shapes.generate(out, **tiny, seed=1, overwrite=True)
    assert files_of(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_foreign_folder_is_left_alone_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="no generated data set"):
        shapes.generate(tmp_path, classes=2, train=2, val=2, size=32, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    draw, drawn = shapes.draw_image, []

    def fail_at_the_third(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(shapes, "draw_image", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / "data", classes=2, train=4, val=4, size=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(classes=0), "--classes is 0"),
        (dict(classes=10**6, train=10**6, val=10**6), "--classes is 1000000, but at most"),
        (dict(train=9), "--train is 9, but must be at least 10"),
        (dict(val=4), "--val is 4, but must be at least 5"),
        (dict(size=8), "--size is 8"),
        (dict(seed=-1), "--seed is -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        shapes.generate(tmp_path / "data", **{**dict(classes=20, train=60, val=20), **bad})
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "balanced_det.data.shapes", "--out", str(tmp_path / "d")]
    command += ["--classes", "2", "--train", "3", "--val", "2", "--size", "32"]
    good = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train.json" in good.stdout
    assert len(read(tmp_path / "d" / "train.json")["images"]) == 3
    bad = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
