"""A checkpoint used alone: classes, config, thresholds, pictures, videos, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.structures import Boxes, Instances
from PIL import Image
from runs import CLASSES, make_data, run_config, train

from balanced_det import predict
from balanced_det.errors import InputError
from balanced_det.evaluation.operating_points import RECALLS, OperatingPoints, with_fallback
from balanced_det.report.pictures import class_color, draw_objects

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return the folder of a short run that was evaluated at its end."""
    return train(run_config(data, tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "model_final.pth"


@pytest.fixture(scope="module")
def images(data):
    names = [image["file_name"] for image in json.loads(data.val_json.read_text())["images"]]
    return [data.image_root / name for name in names]


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return predict.Predictor(predict.serve(checkpoint))


def altered(checkpoint, path, **changes):
    """Write a copy of a checkpoint with other entries; None leaves one out."""
    content = {**torch.load(checkpoint), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


# --- What a checkpoint brings ---------------------------------------------------------------------


def test_a_checkpoint_serves_alone_in_a_folder_of_its_own(checkpoint, images, data, tmp_path):
    shutil.copy(checkpoint, tmp_path / "model.pth")
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    shutil.copy(images[0], tmp_path / "photos" / "one.jpg")
    shutil.copy(images[1], tmp_path / "photos" / "inner" / "one.jpg")
    done = subprocess.run(
        [sys.executable, "-m", "balanced_det.predict", "model.pth", "photos", "--out", "out"]
        + ["--threshold", "0", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    categories = json.loads(data.train_json.read_text())["categories"]
    expected = {category["id"]: category["name"] for category in categories}
    assert {c["id"]: c["name"] for c in found["categories"]} == expected
    assert [image["file_name"] for image in found["images"]] == ["inner/one.jpg", "one.jpg"]
    assert found["annotations"]
    for entry in found["annotations"]:
        assert entry["category_id"] in expected and 0 <= entry["score"] <= 1
        assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3], abs=1.0)
    for name in ("inner/one.jpg", "one.jpg"):
        drawn = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB")).astype(int)
        plain = Image.open(tmp_path / "photos" / name).convert("RGB")
        plain = np.asarray(plain.resize((drawn.shape[1], drawn.shape[0]))).astype(int)
        # JPEG and the larger size change pixels by some levels; boxes by far more.
        assert (np.abs(drawn - plain).max(axis=2) > 100).mean() > 0.01


def test_the_checkpoint_brings_what_the_evaluation_measured(checkpoint, run):
    served = predict.serve(checkpoint)
    rows = json.loads((run / "inference" / "lvis_classes.json").read_text())["classes"]
    assert served.names == [row["name"] for row in rows]
    assert served.ids == [row["category_id"] for row in rows]
    expected = [
        np.nan if row["bbox"]["threshold"] is None else row["bbox"]["threshold"] for row in rows
    ]
    # The checkpoint has float32.
    np.testing.assert_allclose(served.points.of_best_f1(), expected, rtol=1e-6)
    file = predict.read_points(run / "inference" / "operating_points.json", served)
    np.testing.assert_allclose(file.precision, served.points.precision, atol=1e-6)


def test_the_served_model_is_the_trained_one(predictor, checkpoint):
    saved = torch.load(checkpoint)["model"]
    state = predictor.model.state_dict()
    assert state.keys() == saved.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)


def test_detectron2s_predictor_finds_the_same_and_names_the_classes(predictor, checkpoint, images):
    theirs = DefaultPredictor(predict.predictor_config(checkpoint))
    assert theirs.metadata.thing_classes == predictor.served.names
    image = predict.read_image(images[0])
    ours, found = predictor(image), theirs(image[:, :, ::-1])["instances"].to("cpu")
    assert len(ours) == len(found) > 0
    torch.testing.assert_close(ours.scores, found.scores, rtol=0, atol=0)
    torch.testing.assert_close(ours.pred_boxes.tensor, found.pred_boxes.tensor, rtol=0, atol=0)


def test_the_served_model_can_be_traced(predictor, images):
    image = torch.from_numpy(predict.read_image(images[0]).transpose(2, 0, 1).astype("float32"))

    def inference(model, pixels):
        inputs = [{"image": pixels, "height": pixels.shape[1], "width": pixels.shape[2]}]
        return model.inference(inputs)[0]["instances"]

    wrapper = TracingAdapter(predictor.model, image, inference).eval()
    with torch.no_grad(), patch_builtin_len():
        traced = torch.jit.trace(wrapper, (image,), check_trace=False)
    with torch.no_grad():
        expected = inference(predictor.model, image)
        found = wrapper.outputs_schema(traced(image))
    assert len(found) == len(expected) > 0
    # Fused and single operations of float32 differ by some 1e-6 of boxes of 64 pixels.
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-4
    )


def test_code_that_a_checkpoint_names_is_not_run(checkpoint, tmp_path):
    marker = tmp_path / "it ran"
    module = tmp_path / "stranger.py"
    module.write_text(f"open({str(marker)!r}, 'w')")
    text = torch.load(checkpoint)["config"]
    changed = text.replace("IMPORTS: []", f"IMPORTS: ['{module}']")
    assert changed != text
    path = altered(checkpoint, tmp_path / "model.pth", config=changed)
    assert predict.serve(path).cfg.BALANCE.IMPORTS == []
    assert not marker.exists()
    predict.serve(path, imports=[str(module)])
    assert marker.exists()


def test_what_a_checkpoint_lacks_is_told_in_a_sentence(checkpoint, tmp_path):
    path = altered(checkpoint, tmp_path / "a.pth", config=None)
    with pytest.raises(InputError, match="brings no config.*--config-file"):
        predict.serve(path)
    path = altered(checkpoint, tmp_path / "b.pth", config="MODEL: {NO_SUCH_KEY: 1}")
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        predict.serve(path)
    path = altered(checkpoint, tmp_path / "c.pth", classes=None)
    with pytest.raises(InputError, match="does not tell its classes"):
        predict.serve(path)
    path = altered(checkpoint, tmp_path / "d.pth", operating_points=None)
    with pytest.raises(InputError, match="no operating points.*--points"):
        predict.choose_thresholds(predict.serve(path), "best-f1")
    weights = torch.load(checkpoint)["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    path = altered(
        checkpoint, tmp_path / "e.pth", model={k: v for k, v in weights.items() if k != name}
    )
    with pytest.raises(InputError, match=f"lacks 1 of.*{name}"):
        predict.Predictor(predict.serve(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth", "{images}"], "'missing.pth' does not exist"),
        (["{broken}", "{images}"], "broken.pth"),
        (["{checkpoint}", "nowhere"], "'nowhere' does not exist"),
        (["{checkpoint}", "{empty}"], "holds no image or video"),
        (["{checkpoint}", "{checkpoint}"], "is no image or video"),
        (["{checkpoint}", "{images}", "--threshold", "2"], "--threshold is '2'"),
        (["{checkpoint}", "{images}", "--threshold", "precision=x"], "precision is 'x'"),
        (["{checkpoint}", "{images}", "--threshold", "precision=0"], "above 0"),
        (["{checkpoint}", "{images}", "--points", "{broken}"], "broken.pth"),
        (["{checkpoint}", "{images}", "--imports", "no_such_module_x"], "no_such_module_x"),
        (["{checkpoint}", "{images}", "--out", "{images}"], "would be replaced"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, images, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    (tmp_path / "images").mkdir()
    shutil.copy(images[0], tmp_path / "images")
    places = {
        "checkpoint": checkpoint,
        "images": tmp_path / "images",
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken.pth",
    }
    before = (tmp_path / "images" / images[0].name).read_bytes()
    given = [text.format(**places) for text in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert predict.main(given) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "images" / images[0].name).read_bytes() == before


# --- Thresholds -----------------------------------------------------------------------------------


def points_of(scores, is_right, num_objects):
    """The curves of one class, by the definition: at each recall the best precision from there."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    right = np.asarray(is_right)[order].cumsum()
    precision = right / np.arange(1, len(right) + 1)
    at = [np.flatnonzero(right >= r * num_objects - 1e-9) for r in RECALLS]
    best = [precision[i[0] :].max() if len(i) else 0.0 for i in at]
    score = [np.asarray(scores)[order][i[0]] if len(i) else 0.0 for i in at]
    return np.array(best), np.array(score)


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8, 1.0])
def test_the_threshold_of_a_precision_is_the_lowest_that_has_it(wanted):
    rng = np.random.RandomState(0)
    scores = rng.permutation(200) / 200
    is_right = (rng.rand(200) < scores) & (np.arange(200) < 200)
    objects = int(is_right.sum()) + 3
    assert objects <= 100  # so that each object has a recall of its own
    precision, score = points_of(scores, is_right, objects)
    points = OperatingPoints("bbox", "", precision[:, None], score[:, None])
    threshold = points.of_precision(wanted)[0]
    own = [is_right[scores >= s].mean() for s in scores]
    reaching = [s for s, p, right in zip(scores, own, is_right) if right and p >= wanted]
    assert threshold == min(reaching)
    assert is_right[scores >= threshold].mean() >= wanted


def test_classes_of_which_nothing_is_known_get_the_median_and_unreached_ones_are_not_shown(
    checkpoint,
):
    served = predict.serve(checkpoint)
    precision = np.full((101, CLASSES), -1.0)
    scores = np.zeros((101, CLASSES))
    for c, (best, score) in enumerate([(1.0, 0.4), (1.0, 0.6), (0.5, 0.2)]):
        precision[:51, c], scores[:51, c] = best, score
        precision[51:, c] = 0
    points = OperatingPoints("bbox", "", precision, scores)
    thresholds = predict.choose_thresholds(served, "precision=0.9", points)
    np.testing.assert_allclose(thresholds[:2], [0.4, 0.6])
    assert np.isinf(thresholds[2])
    np.testing.assert_allclose(thresholds[3:], 0.5)  # the median of 0.4 and 0.6
    best_f1 = predict.choose_thresholds(served, "best-f1", points)
    np.testing.assert_allclose(best_f1, [0.4, 0.6, 0.2, *[0.4] * (CLASSES - 3)])
    np.testing.assert_allclose(with_fallback(np.array([np.nan])), 0.5)


def test_nothing_below_a_classs_threshold_is_found(predictor, images):
    image = predict.read_image(images[0])
    everything = predictor(image)
    classes, scores = everything.pred_classes, everything.scores
    # Of every other class, only the better half.
    limits = np.where(np.arange(CLASSES) % 2, float(scores.median()), 0.0)
    found = predict.Predictor(predictor.served, limits)(image)
    expected = everything[scores >= torch.tensor(limits).float()[classes]]
    assert 0 < len(expected) < len(everything)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


# --- Images and videos ----------------------------------------------------------------------------


def test_a_threshold_that_nothing_reaches_is_told(checkpoint, images, tmp_path, capsys):
    arguments = [str(checkpoint), str(images[0]), "--out", str(tmp_path / "out")]
    assert predict.main([*arguments, "--threshold", "1.0"]) == 0
    assert "0 objects in 1 files" in (shown := capsys.readouterr().out)
    assert "a lower --threshold shows" in shown
    assert predict.main([*arguments, "--threshold", "0.0"]) == 0
    assert "a lower --threshold" not in capsys.readouterr().out


def test_broken_images_are_left_out_and_told(checkpoint, images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    shutil.copy(images[0], tmp_path / "in" / "a.jpg")
    cut = images[0].read_bytes()
    (tmp_path / "in" / "b.jpg").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "in" / "c.png").write_text("no picture")
    out = tmp_path / "out"
    assert predict.main([str(checkpoint), str(tmp_path / "in"), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert [line.split("'")[1][-5:] for line in shown.err.splitlines() if "left out" in line] == [
        "b.jpg",
        "c.png",
    ]
    assert "in 1 files" in shown.out
    content = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg"]
    alone = [str(checkpoint), str(tmp_path / "in" / "c.png"), "--out", str(tmp_path / "other")]
    assert predict.main(alone) == 2


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # red on the left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = predict.read_image(tmp_path / "turned.png")
    assert image.shape == (40, 20, 3)
    assert (image[:20, :, 0] == 255).all() and (image[20:] == 0).all()


def video(path, images):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for image in images:
        writer.write(cv2.imread(str(image)))
    writer.release()
    return path


def test_every_frame_of_a_video_is_looked_at(checkpoint, images, tmp_path):
    source = video(tmp_path / "clip.avi", images[:3])
    out = tmp_path / "out"
    assert predict.main([str(checkpoint), str(source), "--out", str(out)]) == 0
    content = json.loads((out / "predictions.json").read_text())
    assert [image["frame"] for image in content["images"]] == [0, 1, 2]
    frames = list(predict.read_frames(out / "clip.avi.mp4"))
    assert len(frames) == 3 and min(frames[0].shape[:2]) >= 64
    (tmp_path / "none.mp4").write_bytes(b"no video")
    assert predict.main([str(checkpoint), str(tmp_path / "none.mp4"), "--out", str(out)]) == 2


def test_an_interrupted_video_leaves_no_half(checkpoint, images, tmp_path):
    source = video(tmp_path / "clip.avi", images[:3])
    predictor = predict.Predictor(predict.serve(checkpoint))
    handle = predictor.model.register_forward_pre_hook(interrupt_at(2))
    with pytest.raises(KeyboardInterrupt):
        predict.predict_files(predictor, [source], tmp_path / "out")
    handle.remove()
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def interrupt_at(number):
    calls = []

    def hook(module, inputs):
        calls.append(inputs)
        if len(calls) == number:
            raise KeyboardInterrupt

    return hook


NAMES = ["$x_1$ <b>", "emoji 😀, comma/slash", "y" * 80, "line\nbreak", "\ud800", ""]


def test_any_name_can_be_drawn_and_written(tmp_path):
    image = np.full((60, 80, 3), 128, np.uint8)
    boxes = [[5.0 * k, 4.0, 5.0 * k + 20, 40.0] for k in range(len(NAMES))]
    picture = draw_objects(image, boxes, NAMES, [class_color(k) for k in range(len(NAMES))])
    assert (np.asarray(picture) != 128).any()
    assert (image == 128).all()
    found = Instances((60, 80))
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.scores = torch.linspace(1, 0.5, len(NAMES))
    found.pred_classes = torch.arange(len(NAMES))
    found.pred_masks = torch.ones(len(NAMES), 60, 80, dtype=torch.bool)
    predictions = predict.Predictions(NAMES, list(range(10, 16)))
    predictions.add("a.jpg", (60, 80), found)
    predictions.write(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert [c["name"] for c in content["categories"]] == [
        name.encode("utf-8", "replace").decode() for name in NAMES
    ]
    assert content["annotations"][3]["area"] == 60 * 80
    assert content["annotations"][3]["segmentation"]["size"] == [60, 80]
