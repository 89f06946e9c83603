import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from balanced_det.data.registration import load_detections
from balanced_det.errors import InputError

SCRIPT = Path(__file__).parents[1] / "datasets" / "convert.py"
BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"

_spec = importlib.util.spec_from_file_location("convert", SCRIPT)
convert = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convert)


def voc_file(*objects, size=(40, 30)):
    size_xml = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    objects_xml = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in objects
    )
    return f"<annotation>{size_xml}{objects_xml}</annotation>"


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    annotations = {
        "a": voc_file(("owl", 1, 1, 40, 30), ("cat", 11, 6, 20, 10)),
        "b": voc_file(("owl", 30, 20, 45, 25), ("owl", 41, 5, 50, 9), ("owl", 5, 5, 3, 9)),
        "c": voc_file(size=None),
        "d": voc_file(("bat", 1, 1, 2, 2)),
    }
    for stem, text in annotations.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{stem}.png")
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Main/val.txt").write_text("c 1\n")
    (root / "ImageSets/Main/owl_train.txt").write_text("a 1\nb -1\n")
    return root


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    for split, stems in {"train": "ab", "val": "c"}.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for stem in stems:
            Image.new("RGB", (40, 20)).save(root / "images" / split / f"{stem}.jpg")
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.2\n0 0.1 0.1 0.4 0.1 0.4 0.6\n")
    (root / "labels/val/c.txt").write_text("1 0.9 0.5 0.4 0.5\n\n0 0.5 0.5 0 0.1\n")
    (root / "data.yaml").write_text("train: ../images/train\nval: images/val\nnames: [cat, ant]\n")
    return root


def test_voc_becomes_one_file_a_split_with_all_classes(voc, tmp_path):
    files, content, skipped, image_root = convert.convert(convert.read_voc, voc, tmp_path / "out")
    assert set(files) == {"train", "val"}
    assert content == {split: json.loads(path.read_text()) for split, path in files.items()}
    for part in content.values():
        categories = [(c["id"], c["name"], c["image_count"]) for c in part["categories"]]
        assert categories == [(1, "bat", 0), (2, "cat", 1), (3, "owl", 2)]
    train, val = content["train"], content["val"]
    assert [a["bbox"] for a in train["annotations"]] == [
        [0, 0, 40, 30],
        [10, 5, 10, 5],
        [29, 19, 11, 6],  # cut off at the right edge
    ]
    assert [a["area"] for a in train["annotations"]] == [1200, 50, 66]
    assert [image["neg_category_ids"] for image in train["images"]] == [[1], [1, 2]]
    assert skipped == {"train": 2, "val": 0}
    (image,) = val["images"]  # its size is not in the annotation
    assert (image["file_name"], image["width"], image["height"]) == ("c.png", 40, 30)
    assert image_root == voc / "JPEGImages"


def test_converted_voc_is_what_detectron2_reads(voc, tmp_path):
    (voc / "Annotations/b.xml").write_text(voc_file(("bat", 7, 8, 9, 20)))  # sound boxes only
    files, *_, image_root = convert.convert(convert.read_voc, voc, tmp_path, ["train"])
    ours = load_detections(files["train"], image_root)
    theirs = load_voc_instances(str(voc), "train", ["bat", "cat", "owl"])
    assert len(ours) == len(theirs) == 2
    for image, other in zip(ours, theirs):
        assert (image["width"], image["height"]) == (other["width"], other["height"])
        assert len(image["annotations"]) == len(other["annotations"])
        for annotation, expected in zip(image["annotations"], other["annotations"]):
            assert annotation["category_id"] == expected["category_id"]
            box = BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            assert list(box) == expected["bbox"]


def test_voc_without_image_sets_is_one_split(voc, tmp_path):
    for path in (voc / "ImageSets/Main").iterdir():
        path.unlink()
    (voc / "ImageSets/Main").rmdir()
    files, content, *_ = convert.convert(convert.read_voc, voc, tmp_path / "out")
    assert list(files) == ["all"]
    assert len(content["all"]["images"]) == 4
    assert [c["image_count"] for c in content["all"]["categories"]] == [1, 1, 2]


def test_yolo_boxes_and_polygons(yolo, tmp_path):
    files, content, skipped, image_root = convert.convert(convert.read_yolo, yolo, tmp_path / "out")
    train, val = content["train"], content["val"]
    assert [(c["id"], c["name"]) for c in train["categories"]] == [(1, "cat"), (2, "ant")]
    assert [i["file_name"] for i in train["images"]] == ["images/train/a.jpg", "images/train/b.jpg"]
    box, polygon = train["annotations"]
    # Shares times sizes, in binary fractions: exact to a few units in the last place.
    assert box["bbox"] == pytest.approx([10, 8, 20, 4], rel=1e-12)
    assert box["category_id"] == 2 and "segmentation" not in box
    assert polygon["bbox"] == pytest.approx([4, 2, 12, 10], rel=1e-12)
    assert polygon["segmentation"][0] == pytest.approx([4, 2, 16, 2, 16, 12], rel=1e-12)
    assert polygon["area"] == pytest.approx(60, rel=1e-12)
    assert [a["bbox"] for a in val["annotations"]] == [pytest.approx([28, 5, 12, 10], rel=1e-12)]
    assert skipped == {"train": 0, "val": 1}
    first = load_detections(files["train"], image_root)[0]
    assert first["annotations"][1]["segmentation"] == polygon["segmentation"]


@pytest.mark.parametrize(
    "settings",
    [
        "path: .\ntrain: images/train\nnames: {0: cat, 1: ant}\n",
        "path: /nowhere\ntrain: [images/train]\nnames: [cat, ant]\n",
        "train: list.txt\nnames: [cat, ant]\n",
    ],
)
def test_yolo_files_in_other_forms(yolo, tmp_path, settings):
    (yolo / "list.txt").write_text("./images/train/a.jpg\n./images/train/b.jpg\n")
    (yolo / "other.yaml").write_text(settings)
    _, expected, *_ = convert.convert(convert.read_yolo, yolo, tmp_path / "1", ["train"])
    _, content, *_ = convert.convert(convert.read_yolo, yolo / "other.yaml", tmp_path / "2")
    assert content == expected


def remove(path):
    return lambda root: (root / path).unlink()


def put(path, text):
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    "kind, spoil, message",
    [
        ("voc", remove("JPEGImages/b.png"), "The image of .*b.xml' is missing"),
        ("voc", remove("Annotations/b.xml"), "Split 'train' lists 'b'"),
        ("voc", put("Annotations/a.xml", "<annotation>"), "a.xml' is no sound Pascal VOC"),
        ("voc", put("Annotations/a.xml", "<a><object/></a>"), "a.xml' is no sound Pascal VOC"),
        ("yolo", remove("data.yaml"), "data.yaml' does not exist"),
        ("yolo", put("data.yaml", "train: images/train"), "data.yaml' is no readable YOLO"),
        ("yolo", put("data.yaml", "{train: x, names: [a]}"), "names 'x', which does not exist"),
        ("yolo", put("data.yaml", "names: [a]"), "none of train, val, test"),
        ("yolo", put("labels/train/a.txt", "2 0 0 1 1"), "line 1: class 2 is not one of the 2"),
        ("yolo", put("labels/train/a.txt", "0 0 0 1"), "line 1: 4 numbers are neither"),
        ("yolo", put("labels/train/a.txt", "0 0 0 1 1\nx"), "line 2: 'x' is not a row"),
        ("yolo", put("images/train/a.jpg", "text"), "a.jpg' is missing or unreadable"),
    ],
)
def test_bad_data_is_explained_and_nothing_is_written(request, tmp_path, kind, spoil, message):
    root = request.getfixturevalue(kind)
    spoil(root)
    with pytest.raises(InputError, match=message):
        convert.convert(
            {"voc": convert.read_voc, "yolo": convert.read_yolo}[kind], root, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names",
    ["{1: ant, 0: cat}", "{'1': ant, '0': cat}", "{'0': cat, 1: ant}", "['cat', 'ant']"],
)
def test_yolo_names_are_taken_by_their_number(yolo, tmp_path, names):
    (yolo / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
    _, content, *_ = convert.convert(convert.read_yolo, yolo, tmp_path)
    assert [(c["id"], c["name"]) for c in content["train"]["categories"]] == [
        (1, "cat"),
        (2, "ant"),
    ]


@pytest.mark.parametrize(
    "names, message",
    [
        ("{0: cat, 2: ant}", "2 classes, but not number 1"),
        ("{1: cat, 2: ant}", "2 classes, but not number 0"),
        ("{0: cat, '0': ant}", "class number 0 twice"),
        ("{0: cat, 0: ant}", "stands twice"),
        ("{cat: 0, ant: 1}", "'cat' of 'names' is no class number"),
        ("{true: cat, 0: ant}", "True of 'names' is no class number"),
        ("{0.0: cat, 1: ant}", "0.0 of 'names' is no class number"),
        ("cat ant", "must be a list or a mapping"),
        ("[]", "must be a list or a mapping"),
        ("[cat, no]", "name of class 1 as False, not as a text: quote it"),
        ("[cat, 1.5]", "name of class 1 as 1.5"),
        ("[cat, 2020-01-01]", "name of class 1 as datetime.date"),
        ("[cat, ]]", "no readable YAML"),
        ("[cat, [ant]]", "name of class 1 as"),
        ("[cat, cat]", "'cat' twice"),
        ("[cat, '']", "class name '' is empty"),
        ('["cat", "\\e[31mant"]', "control character"),
        ("&a [cat, ant]\nnc: *a", "aliases"),
    ],
)
def test_yolo_names_that_would_shift_or_change_are_refused(yolo, tmp_path, names, message):
    (yolo / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
    with pytest.raises(InputError, match=re.escape(message) if "[" in message else message):
        convert.convert(convert.read_yolo, yolo, tmp_path / "out")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_sizes_are_those_of_the_turned_photograph(request, tmp_path, kind, orientation):
    root = request.getfixturevalue(kind)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = (40, 30) if kind == "voc" else (40, 20)
    stored = upright if orientation < 5 else upright[::-1]
    path = root / {"voc": "JPEGImages/c.png", "yolo": "images/val/c.jpg"}[kind]
    Image.new("RGB", stored).save(path, exif=exif)
    reader = {"voc": convert.read_voc, "yolo": convert.read_yolo}[kind]
    _, content, *_ = convert.convert(reader, root, tmp_path / "out")
    (image,) = content["val"]["images"]
    assert (image["width"], image["height"]) == upright


def test_voc_size_of_another_picture_is_refused(voc, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages/a.png", exif=exif)
    with pytest.raises(InputError, match="40 x 30 pixels, but .* has 30 x 40 as its EXIF data"):
        convert.convert(convert.read_voc, voc, tmp_path)


def test_images_of_a_list_may_lie_anywhere_but_never_leave_the_image_root(yolo, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "images"
    elsewhere.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(elsewhere / "z.jpg")
    (yolo / "list.txt").write_text(f"images/train/a.jpg\n{elsewhere / 'z.jpg'}\n")
    (yolo / "data.yaml").write_text("train: list.txt\nnames: [cat, ant]\n")
    _, content, _, root = convert.convert(convert.read_yolo, yolo, tmp_path / "out")
    names = [image["file_name"] for image in content["train"]["images"]]
    assert names == ["yolo/images/train/a.jpg", "elsewhere/images/z.jpg"]
    assert root == tmp_path


def deep_image(root):
    Image.fromarray(np.full((20, 40), 40_000, np.uint16)).save(root / "images/train/a.png")
    (root / "images/train/a.jpg").unlink()


def pipe(path):
    def spoil(root):
        (root / path).unlink()
        os.mkfifo(root / path)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (put("data.yaml", "[" * 5000), "no readable YAML"),
        (put("data.yaml", "names: [a]\ntrain: {a: 1}\n"), "'train' must be a path"),
        (put("data.yaml", "names: [a]\ntrain: 7\n"), "'train' must be a path"),
        (put("data.yaml", "? [1]\n: 2\nnames: [a]\n"), "no text or number"),
        (put("labels/train/a.txt", "0 nan 0 1 1"), "not finite"),
        (put("labels/train/a.txt", "inf 0 0 1 1"), "class inf is not one of"),
        (lambda root: (root / "labels/train/a.txt").write_bytes(b"\xff\xfe0"), "no text in UTF-8"),
        (pipe("labels/train/a.txt"), "is no file"),
        (pipe("images/train/a.jpg"), "is no file"),
        (pipe("data.yaml"), "is no file"),
        (deep_image, "more than 8 bits a channel"),
    ],
)
def test_hostile_files_are_refused_in_a_sentence(yolo, tmp_path, spoil, message):
    spoil(yolo)
    with pytest.raises(InputError, match=message):
        convert.convert(convert.read_yolo, yolo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=300))
def test_any_bytes_as_a_file_are_converted_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        (root / "labels").mkdir()
        Image.new("RGB", (4, 4)).save(root / "images/a.png")
        (root / "data.yaml").write_text("train: images\nnames: [a]\n")
        (root / "labels/a.txt").write_bytes(text)
        (root / "Annotations").mkdir()
        (root / "JPEGImages").mkdir()
        (root / "Annotations/a.xml").write_bytes(text)
        (root / "JPEGImages/a.png").write_bytes(text)
        (root / "other.yaml").write_bytes(text)
        for reader, path in (
            (convert.read_yolo, root / "data.yaml"),
            (convert.read_yolo, root / "other.yaml"),
            (convert.read_voc, root),
        ):
            with contextlib.suppress(InputError):
                convert.to_lvis(*reader(path)[:2])


def test_existing_files_are_replaced_only_when_asked_for(voc, tmp_path):
    (tmp_path / "val.json").write_text("mine")
    with pytest.raises(InputError, match="val.json' exists"):
        convert.convert(convert.read_voc, voc, tmp_path)
    assert (tmp_path / "val.json").read_text() == "mine"
    assert not (tmp_path / "train.json").exists()
    convert.convert(convert.read_voc, voc, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "val.json").read_text())["images"]


@pytest.mark.data("bccd")
def test_command_line_makes_real_photos_usable(tmp_path):
    command = [sys.executable, str(SCRIPT), "voc", "--root", str(BCCD), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f'["{tmp_path.name}_train", "{tmp_path}/train.json", ' in run.stdout
    images, objects = {}, {}
    for split in ("train", "val", "test"):
        records = load_detections(tmp_path / f"{split}.json", BCCD / "JPEGImages")
        images[split] = len(records)
        objects[split] = [
            sum(a["category_id"] == c for r in records for a in r["annotations"]) for c in range(3)
        ]
    # 361 platelets, 4,155 red and 372 white blood cells are in the 364 XML files.
    assert images == {"train": 205, "val": 87, "test": 72}
    assert [sum(counts) for counts in zip(*objects.values())] == [361, 4155, 372]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
