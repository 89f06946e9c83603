"""The page of a run: what it shows, of any data and of any rest of a run, and that it ends none."""

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_page
from distributed import run_command
from runs import make_data, options, run_config, run_keys, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balanced_det import run_report
from balanced_det.data.annotations import read_annotations
from balanced_det.evaluation import lvis_result
from balanced_det.evaluation.detections import read_detections
from balanced_det.evaluation.errors import analyse_errors
from balanced_det.evaluation.evaluator import DETECTIONS, POINTS
from balanced_det.evaluation.operating_points import OperatingPoints
from balanced_det.evaluation.per_class import class_rows, percent, write_json, write_results
from balanced_det.run_files import class_biases, read_run
from balanced_det.train import main

ROOT = Path(__file__).parents[1]
NAMES = [
    "a, b",
    "<b>&amp;</b>",
    "</script><script>document.title='taken'</script>",
    "emoji 😀/ü",
    "x" * 80,
    "=1+1",
    "line\nbreak",
    "a, b",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return the folder of a guided training with two evaluations."""
    cfg = run_config(
        data,
        tmp_path_factory.mktemp("run") / "out",
        TEST__EVAL_PERIOD=2,
        SOLVER__CHECKPOINT_PERIOD=2,
        BALANCE__ROI_HEADS__GUIDED_LOSS=True,
        BALANCE__ROI_HEADS__CLASSIFICATION_WEIGHT=1.0,
        BALANCE__ROI_HEADS__CLASSIFICATION_LOSS="EqualizationLossV2",
        BALANCE__EqualizationLoss__TAIL_THRESHOLD=0.00177,
    )
    return train(cfg)


def page_of(folder):
    assert run_report.main([str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def figures_of(page):
    start = page.index('id="figures">') + len('id="figures">')
    return json.loads(page[start : page.index("</script>", start)])


def evaluated_folder(folder, names, per_image, seed=0):
    """Write what an evaluation of made-up detections leaves, and the config that names its data.

    Args:
        folder: of the run.
        names: of the classes.
        per_image: objects in each of six images, without pixels.
    """
    rng = np.random.RandomState(seed)
    objects, detections = [], []
    for image in range(6):
        for k in range(per_image):
            c = (image * per_image + k) % len(names)
            box = [*rng.randint(0, 60, 2).tolist(), *rng.randint(10, 40, 2).tolist()]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": c + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
            found = (c + int(rng.rand() < 0.3)) % len(names)
            detections.append(
                {
                    "image_id": image,
                    "category_id": found + 1,
                    "bbox": box,
                    "score": round(float(rng.rand()), 3),
                }
            )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(6)
        ],
        "categories": [{"id": c + 1, "name": name} for c, name in enumerate(names)],
        "annotations": objects,
    }
    folder.mkdir()
    truth_path = folder / "val.json"
    truth_path.write_text(json.dumps(content))
    place = folder / "inference"
    result = lvis_result(content, detections)
    rows = class_rows({"bbox": result}, {c + 1: 3 ** (c % 6) for c in range(len(names))})
    percents = {"bbox": {key: percent(value) for key, value in result.metrics.items()}}
    write_results(percents, rows, {"bbox": result}, place)
    points = OperatingPoints("bbox", str(truth_path), result.precision, result.scores)
    write_json(points.to_json(), place, POINTS)
    (place / DETECTIONS).write_text(json.dumps(detections))
    (folder / "config.yaml").write_text(
        f"BALANCE: {{DATASETS: [['{truth_path}', '{truth_path}', '{folder}']]}}\n"
        f"DATASETS: {{TEST: ['{truth_path}']}}\n"
    )
    return folder


# --- What it shows --------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_page_shows_every_part_of_a_run(run, tmp_path):
    page = page_of(run)
    for section in (
        "Average precision",
        "Precision and recall",
        "Errors",
        "Images",
        "Training",
        "Learned and counted state",
        "Settings",
        "Protocol and versions",
    ):
        assert f">{section}</h2>" in page
    for text in (
        "raw and as it is guided",
        "Share of the classification gradient",
        "Positive over negative gradient",
        "AP of each evaluation",
        "TIDE",
        "expected calibration error",
        "truth: ",
        "found: ",
        "ROI_HEADS.GUIDED_LOSS",
        f"torch</td><td>{torch.__version__}",
    ):
        assert text in page, text
    assert "http://" not in page.split("<script>")[0]
    for width in (390, 1200):
        drawn, content, messages = open_page(run / "report.html", tmp_path, width)
        assert drawn == len(figures_of(page)) >= 10
        assert content <= width
        assert messages == []


def test_the_numbers_beside_the_page_are_those_of_the_evaluation(run):
    page_of(run)
    numbers = json.loads((run / "report.json").read_text())
    results = json.loads((run / "inference" / "lvis_results.json").read_text())
    assert numbers["evaluations"][0]["metrics"]["bbox"] == results["bbox"]
    with (run / "report_classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [row["name"] for row in results["classes"]]
    found = [float(row["AP"]) if row["AP"] else None for row in rows]
    assert found == [row["bbox"] for row in results["classes"]]


def test_curves_are_what_was_logged(run):
    steps = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    expected = {step["iteration"]: step["total_loss"] for step in steps if "total_loss" in step}
    rows = next(
        figure["data"]["values"]
        for figure in figures_of(page_of(run))
        if any(row.get("what") == "total_loss" for row in figure["data"]["values"])
    )
    found = {r["iteration"]: r["loss"] for r in rows if r["what"] == "total_loss"}
    assert found == {i: float(f"{value:.6g}") for i, value in expected.items()}


def test_classes_and_groups_reach_tensorboard(run):
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    rows = json.loads((run / "inference" / "lvis_classes.json").read_text())["classes"]
    for row in rows:
        tag = f"AP of class, bbox/{row['name']} ({row['category_id']})"
        if row["bbox"]["AP"] is None:
            assert tag not in tags
        else:
            # TensorBoard has float32.
            assert events.Scalars(tag)[-1].value == pytest.approx(row["bbox"]["AP"], rel=1e-6)
    shares = [f"roi_heads.box_predictor/gradient_share_{group}" for group in "rcf"]
    total = sum(events.Scalars(tag)[-1].value for tag in shares)
    assert total == pytest.approx(1, abs=1e-6)


# --- Errors ---------------------------------------------------------------------------------------


def box_row(image, c, box, score):
    return {"image_id": image, "category_id": c, "bbox": box, "score": score}


def test_each_kind_of_error_is_counted_once_and_federated_classes_are_left_out():
    where = [[10.0, 10, 20, 20], [50.0, 50, 20, 20], [10.0, 60, 20, 20], [60.0, 10, 20, 20]]
    content = {
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 3)],
        "images": [
            {
                "id": 1,
                "height": 100,
                "width": 100,
                "neg_category_ids": [2],
                "not_exhaustive_category_ids": [],
            },
        ],
        "annotations": [
            {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 400.0, "iscrowd": 0}
            for k, box in enumerate(where)
        ],
    }
    truth = read_annotations(content)
    rows = [
        box_row(1, 1, where[0], 0.9),  # right
        box_row(1, 1, where[0], 0.8),  # found twice
        box_row(1, 2, where[1], 0.85),  # wrong class
        box_row(1, 1, [10.0, 72, 20, 20], 0.7),  # box off: IoU 0.25
        box_row(1, 1, [85.0, 85, 10, 10], 0.6),  # nothing there
        box_row(1, 3, where[3], 0.95),  # class 3 was not looked for
    ]
    detections = read_detections(rows, truth, "bbox")
    errors = analyse_errors(truth, detections, np.array([0.0, 0.0, 0.0]))
    counts = {kind: count for kind, (count, _) in errors.types.items()}
    assert counts == {
        "wrong class": 1,
        "box off": 1,
        "wrong class and box off": 0,
        "found twice": 1,
        "nothing there": 1,
        "missed": 1,
    }
    assert errors.confused == [(0, 1, 1)]
    assert analyse_errors(truth, detections, np.array([0.0, 0.9, 0.0])).confused == []
    assert sum(count for *_, count in errors.bins) == 5
    best = errors.bins[-1]
    assert best[1:] == (0.9, 1.0, 1)


def test_errors_of_many_images_are_those_of_some_at_equal_distances(tmp_path):
    folder = evaluated_folder(tmp_path / "run", ["a", "b"], 4)
    truth = read_annotations(folder / "val.json")
    rows = json.loads((folder / "inference" / DETECTIONS).read_text())
    detections = read_detections(rows, truth, "bbox")
    some = analyse_errors(truth, detections, np.zeros(2), max_images=2)
    assert some.num_images == 2
    kept = [row for row in rows if row["image_id"] in (0, 5)]
    own = {**json.loads((folder / "val.json").read_text())}
    own["images"] = [image for image in own["images"] if image["id"] in (0, 5)]
    own["annotations"] = [a for a in own["annotations"] if a["image_id"] in (0, 5)]
    alone = read_annotations(own)
    expected = analyse_errors(alone, read_detections(kept, alone, "bbox"), np.zeros(2))
    assert some.types == expected.types and some.bins == expected.bins


# --- Any data, any rest of a run ------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize(
    "names",
    [["only"], NAMES, [f"class {c}" for c in range(1203)]],
    ids=["one class", "hostile names", "1203 classes"],
)
def test_any_classes_give_a_page_that_draws(names, tmp_path):
    folder = evaluated_folder(tmp_path / "run", names, 5)
    page = page_of(folder)
    assert "<b>&amp;</b>" not in page.split("<script")[0]
    drawn, width, messages = open_page(folder / "report.html", tmp_path, 390)
    assert drawn == len(figures_of(page)) > 0
    assert width <= 390 and messages == []
    with (folder / "report_classes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names)
    assert not any(row["class"].startswith("=") for row in rows)


def test_data_without_an_object_gives_a_page(tmp_path):
    folder = evaluated_folder(tmp_path / "run", ["a", "b"], 0)
    assert "No class has an object to find." in page_of(folder)


def test_a_folder_without_results_gives_a_page_that_says_so(tmp_path):
    assert "There are no results of an evaluation" in page_of(tmp_path)
    assert run_report.main([str(tmp_path / "nowhere")]) == 2


def cut_metrics(folder):
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 9, "total_lo')


def cut_results(folder):
    path = folder / "inference" / "lvis_classes.json"
    path.write_text(path.read_text()[:50])


def cut_detections(folder):
    path = folder / "inference" / DETECTIONS
    path.write_text(path.read_text()[:-40])


def cut_checkpoint(folder):
    path = folder / "model_final.pth"
    path.write_bytes(path.read_bytes()[:1000])


def cut_config(folder):
    (folder / "config.yaml").write_text("MODEL: [")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_metrics, "1 lines of"),
        (cut_results, "lvis_classes.json"),
        (cut_detections, "Errors are not analysed"),
        (cut_checkpoint, "model_final.pth"),
        (cut_config, "config.yaml"),
    ],
)
def test_a_damaged_file_is_told_and_the_rest_is_shown(run, tmp_path, damage, said):
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("model_0*", "report*"))
    damage(folder)
    page = page_of(folder)
    assert said in page
    assert "<h2" in page and page.endswith("</html>\n")


def test_the_bias_of_each_class_is_found_in_dense_and_region_heads():
    state = {
        "head.cls_score.bias": torch.arange(6.0),  # two anchors, three classes
        "roi_heads.box_predictor.0.cls_score.bias": torch.tensor([1.0, 2.0, 3.0, 9.0]),
        "proposal_generator.rpn_head.cls_score.bias": torch.zeros(3),
        "head.bbox_pred.bias": torch.zeros(3),
    }
    found = class_biases(state, 3)
    assert {name: bias.tolist() for name, bias in found.items()} == {
        "head.cls_score": [1.5, 2.5, 3.5],
        "roi_heads.box_predictor.0.cls_score": [1.0, 2.0, 3.0],
    }


def test_of_repeated_iterations_the_later_line_counts(tmp_path):
    lines = [{"iteration": i, "total_loss": loss} for i, loss in ((0, 3.0), (1, 2.0), (1, 1.0))]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert read_run(tmp_path, {}).series("total_loss") == [(0, 3.0), (1, 1.0)]


# --- The end of a run -----------------------------------------------------------------------------


def train_net(*arguments):
    arguments = ["--config-file", "configs/quickstart.yaml", *map(str, arguments)]
    run_command(main, arguments, ROOT)


def test_a_command_ends_with_the_page_unless_told(data, tmp_path):
    out = tmp_path / "out"
    keys = options(run_keys(data, out, SOLVER__MAX_ITER=2))
    train_net(*keys)
    page = (out / "report.html").read_text()
    assert "What this run changes against the configs that it is based on" in page
    assert "<td>the command line</td>" in page and "<td>configs/quickstart.yaml</td>" in page
    for name in ("report.html", "report.json", "report_classes.csv"):
        (out / name).unlink()
    evaluate = ["--eval-only", *keys, "MODEL.WEIGHTS", out / "model_final.pth"]
    train_net(*evaluate, "BALANCE.REPORT", "False")
    assert not (out / "report.html").exists()


def test_after_an_evaluation_the_page_is_of_the_weights_that_were_evaluated(data, run, tmp_path):
    cfg = run_config(data, tmp_path / "out")
    shutil.copytree(run / "inference", tmp_path / "out" / "inference")
    page = run_report.report_run(cfg, weights=str(run / "model_0000001.pth"))
    text = page.read_text()
    assert f"Of {run / 'model_0000001.pth'}." in text
    assert ">Training</h2>" not in text  # there was none in this folder


def test_a_page_that_cannot_be_written_is_one_warning(data, run, tmp_path, caplog):
    cfg = run_config(data, tmp_path / "out")
    shutil.copytree(run / "inference", tmp_path / "out" / "inference")
    (tmp_path / "out" / "report.html").mkdir()  # where the page should be
    with caplog.at_level(logging.WARNING, "balanced_det"):
        assert run_report.report_run(cfg) is None
    told = [record for record in caplog.records if "report" in record.getMessage()]
    assert len(told) == 1 and "report.html" in told[0].getMessage()
    assert not list((tmp_path / "out").glob(".report*"))
