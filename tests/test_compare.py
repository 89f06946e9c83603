"""Comparing setups: what is trained, what is read, and what may be said of it."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_page
from federated import CLASSES, copied, federated
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from balanced_det import compare, runs
from balanced_det.cli import main as balanced_det
from balanced_det.config import load_config
from balanced_det.data import shapes
from balanced_det.engine import locked
from balanced_det.errors import InputError
from balanced_det.evaluation import evaluate_lvis
from balanced_det.evaluation.__main__ import evaluate_files
from balanced_det.evaluation.resampling import draw_images

ROOT = Path(__file__).parents[1]
HARD_NAMES = [
    "<b>bold</b>",
    "</script><script>document.title='taken'</script>",
    "comma, and / slash",
    "emoji 😀",
    "x" * 80,
    "=1+1",
    'quote "',
]


# --- Finished runs, without a training ------------------------------------------------------------


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def finished_run(folder, annotations, detections, seed=0, device="cpu", **keys):
    """Write what a run leaves: its config, its detections, and their evaluation."""
    name = str(annotations)
    cfg = load_config(
        "configs/quickstart.yaml",
        BALANCE__DATASETS=[[name, name, ""]],
        DATASETS__TRAIN=(name,),
        DATASETS__TEST=(name,),
        SEED=seed,
        **keys,
    )
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.DEVICE = device  # of the machine that trained, which need not be ours
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    found = write_json(folder / "inference/lvis_instances_results.json", detections)
    evaluate_files(str(annotations), [str(found)], max_dets=100, out=str(folder / "inference"))
    return folder


def changed(detections, seed, noise=10.0):
    """The detections of a worse detector, another with each seed."""
    rng = np.random.default_rng(seed)
    return [{**d, "bbox": (d["bbox"] + rng.normal(0, noise, 4)).tolist()} for d in detections]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Annotations, and the folders of a good run and of a bad one."""
    folder = tmp_path_factory.mktemp("two")
    truth, detections = federated(0, images=20)
    annotations = write_json(folder / "val.json", truth)
    good = finished_run(folder / "good", annotations, detections)
    bad = finished_run(folder / "bad", annotations, changed(detections, 1))
    return truth, annotations, good, bad


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def comparison(*folders, draws=200, jobs=1):
    return compare.compare_runs(
        [(folder.name, [runs.read_run(folder)], []) for folder in folders], draws=draws, jobs=jobs
    )


# --- The numbers ----------------------------------------------------------------------------------


def test_runs_that_are_evaluated_side_by_side_have_the_same_numbers(two):
    _, _, good, bad = two
    alone, together = comparison(bad, good, bad), comparison(bad, good, bad, jobs=2)
    for first, second in zip(alone.entries, together.entries, strict=True):
        np.testing.assert_array_equal(first.metrics, second.metrics)
        np.testing.assert_array_equal(first.classes, second.classes)


def test_intervals_are_those_of_evaluating_each_draw_of_images(two):
    truth, _, good, bad = two
    draws = 25
    c = comparison(good, bad, draws=draws)
    found = c.difference(c.entries[1])
    weights = draw_images(20, draws)
    read = [json.loads((f / "inference/lvis_instances_results.json").read_text()) for f in two[2:]]
    for index, metric in enumerate(compare.METRICS):
        values = []  # of each draw: the second's less the first's, in percent
        for draw in range(draws + 1):
            first, second = (
                evaluate_lvis(*copied(truth, d, weights[:, draw]), max_dets=100)[metric]
                for d in read
            )
            values.append(100 * (second - first))
        deviation = np.array(values[1:]) - np.mean(values[1:])
        # Rounded to float32 as percents: 4e-6 a number, of which differences are taken.
        assert found.value[index] == pytest.approx(values[0], abs=5e-5)
        low, high = values[0] + np.quantile(deviation, [0.025, 0.975])
        assert found.low[index] == pytest.approx(low, abs=5e-5)
        assert found.high[index] == pytest.approx(high, abs=5e-5)


def test_what_makes_images_hard_for_both_cancels_in_a_difference(two):
    _, _, good, bad = two
    c = comparison(good, bad)
    width = [c.mean(entry).high - c.mean(entry).low for entry in c.entries]
    difference = c.difference(c.entries[1])
    # Of two independent numbers the widths would add as squares do.
    assert difference.high[0] - difference.low[0] < 0.9 * math.hypot(width[0][0], width[1][0])


def test_a_verdict_is_given_only_where_the_interval_excludes_zero(two):
    _, _, good, bad = two
    c = comparison(good, bad)
    assert c.difference(c.entries[1]).high[0] < 0
    text, numbers, kind = compare.verdict(c, c.entries[1])
    assert text.startswith("bad has AP ") and "lower" in text and kind == "warn"
    assert f"AP {c.difference(c.entries[1]).value[0]:+.1f} (" in numbers
    # One against itself: every difference is zero, and so is every interval.
    c = comparison(good, good)
    same = c.difference(c.entries[1])
    assert set(same.value.tolist()) == set(same.low.tolist()) == {0.0}
    assert not same.shown().any()
    assert compare.verdict(c, c.entries[1])[0] == "good: no difference from good is shown."


def test_seeds_alone_seem_to_differ_in_one_of_twenty_comparisons():
    """Three runs of two setups that differ by chance alone, again and again, without images' part.

    1,000 comparisons find 50 in the mean, with a standard deviation of 7: 4 of them are allowed.
    """
    rng, count = np.random.default_rng(0), 1000
    values = rng.normal(20.0, 1.0, (2, 3, count, 1)).repeat(1 + 400, axis=3)
    entries = [compare.Entry(str(i), [None] * 3, [], values[i], values[i]) for i in range(2)]
    holding = {"metrics": np.full(count, 100)}
    c = compare.Comparison(entries, None, "", [], {}, holding, 400, "bbox")
    assert c.seeds_freedom == 4
    found = int(np.abs(c.difference(entries[1]).shown()).sum())
    assert 22 <= found <= 78
    # What images alone would say of them: nothing varies, so each difference would be one.
    difference = c.difference(entries[1])
    assert (difference.images_low == difference.images_high).all()


def test_a_class_that_some_draws_lack_takes_part_where_it_is(tmp_path):
    truth, detections = federated(3, images=6)
    rare = truth["annotations"][0]["category_id"]
    kept = [a for a in truth["annotations"] if a["category_id"] != rare or a["image_id"] == 1]
    annotations = write_json(tmp_path / "val.json", {**truth, "annotations": kept})
    first = finished_run(tmp_path / "first", annotations, detections)
    c = comparison(first, first)
    classes = c.first.classes[0]
    absent = np.isnan(classes[rare - 1])
    assert not absent[0] and 0.2 < absent[1:].mean() < 0.5  # (5/6)^6 = 0.33
    # One image tells nothing of others, though each draw that has it may say the same.
    mean, difference = c.mean(c.first, "classes"), c.difference(c.first, "classes")
    assert np.isfinite(mean.value[rare - 1]) and np.isnan(mean.high[rare - 1])
    assert not difference.shown()[rare - 1]
    images = {a["image_id"] for a in kept if not (a["iscrowd"] or a["ignore"])}
    assert c.holding["metrics"][0] == len(images) == 6 and c.holding["classes"][rare - 1] == 1
    assert np.isfinite(mean.high).sum() == (c.holding["classes"] >= 6).sum()
    assert np.isnan(c.mean(c.first, "classes").value[CLASSES - 1])  # it never occurs


# --- Finished runs --------------------------------------------------------------------------------


def test_two_finished_runs_are_compared_by_one_command(two, tmp_path, capsys):
    truth, annotations, good, bad = two
    out = tmp_path / "out"
    assert balanced_det(["compare", str(good), str(bad), "--draws", "50", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| good |" in printed and printed.rstrip().endswith(f"Written to {out}/compare.html")
    recorded = json.loads((bad / "inference/lvis_results.json").read_text())["bbox"]
    rows = {(row["setup"], row["metric"]): row for row in read_jsonl(out / "comparison.jsonl")}
    for metric in compare.METRICS:
        assert rows["bad", metric]["mean"] == pytest.approx(recorded[metric], abs=1e-3)
    row = rows["bad", "AP"]
    assert row["low"] <= row["mean"] <= row["high"] and row["against"] == "good"
    assert row["protocol"]["max_dets_per_image"] == 100 and row["seeds_freedom"] == 0
    assert {"command", "commit", "card", "annotations_sha256"} <= row.keys()
    assert rows["good", "AP"]["difference"] is None
    classes = read_csv(out / "classes.csv")
    assert len(classes) == 2 * (CLASSES - 1)  # the last never occurs
    objects = [a for a in truth["annotations"] if not (a["iscrowd"] or a["ignore"])]
    for line in classes:
        category = int(line["class"].split()[1])
        assert int(line["test objects"]) == sum(a["category_id"] == category for a in objects)
        assert line["group"] == {"r": "rare", "c": "common", "f": "frequent"}["rcf"[category % 3]]
    page = (out / "compare.html").read_text()
    assert "nothing is known of seeds" in page and str(annotations) in page
    assert read_csv(out / "comparison.csv")[0]["setup"] == "good"
    assert {row["setup"] for row in read_jsonl(out / "runs.jsonl")} == {"good", "bad"}


def test_folders_that_differ_in_their_seed_alone_are_runs_of_one_setup(tmp_path):
    truth, detections = federated(0)
    annotations = write_json(tmp_path / "val.json", truth)
    folders = [
        finished_run(tmp_path / f"{name}_seed{s}", annotations, changed(detections, s), s, **keys)
        for name, keys in (("plain", {}), ("long", {"SOLVER__MAX_ITER": 500}))
        for s in (0, 1)
    ]
    out = tmp_path / "out"
    assert compare.main([*map(str, folders), "--draws", "50", "--out", str(out)]) == 0
    rows = [row for row in read_jsonl(out / "comparison.jsonl") if row["metric"] == "AP"]
    assert [(row["setup"], row["runs"]) for row in rows] == [("plain", 2), ("long", 2)]
    assert rows[0]["seeds_freedom"] == 2
    of_runs = [row["AP"] for row in read_jsonl(out / "runs.jsonl") if row["setup"] == "plain"]
    assert rows[0]["mean"] == pytest.approx(np.mean(of_runs), abs=1e-3)
    assert rows[0]["standard_deviation"] == pytest.approx(np.std(of_runs, ddof=1), abs=1e-3)
    page = (out / "compare.html").read_text()
    assert "SOLVER.MAX_ITER" in page and "nothing is known of seeds" not in page
    # Of other settings, the name alone does not make them one.
    renamed = tmp_path / "again" / "plain_seed7"
    finished_run(renamed, annotations, detections, 7, SOLVER__MAX_ITER=7)
    found = compare._of_one_setup([runs.read_run(f) for f in (folders[0], renamed)])
    assert list(found) == ["plain", str(renamed)]


def test_runs_that_begin_with_the_weights_of_their_own_seed_are_of_one_setup(tmp_path):
    def began_with(seed, seed_of_weights):
        name = tmp_path / f"second_seed{seed}"
        weights = f"out/first_seed{seed_of_weights}/model_final.pth"
        finished_run(name, tmp_path / "val.json", [], seed, MODEL__WEIGHTS=weights)
        return runs.read_run(name)

    write_json(tmp_path / "val.json", federated(0)[0])
    first, second, other = began_with(0, 0), began_with(1, 1), began_with(2, 1)
    assert compare._of_one_setup([first, second, other]) == {
        "second": [first, second],
        str(other.folder): [other],
    }


def test_cost_and_card_are_those_of_the_runs_own_files(two, tmp_path):
    _, annotations, _, _ = two
    folder = finished_run(tmp_path / "run", annotations, [], device="cuda:1", SOLVER__MAX_ITER=100)
    (folder / "log.txt").write_text(
        "GPU available                    Yes\n"
        "GPU 0                            Some Card 80GB (arch=9.0)\n"
        "GPU 0,1                          NVIDIA H100 80GB HBM3 (arch=9.0)\n"  # resumed elsewhere
        "[11/25 14:10:49] d2.utils.events INFO:  iter: 19  lr: 0.03  max_mem: 2101M\n"
        "[11/25 14:10:59] d2.utils.events INFO:  iter: 39  lr: 0.03  max_mem: 2345M\n"
    )
    rows = [{"iteration": i, "time": t} for i, t in ((19, 0.5), (59, 0.2), (99, 0.3))]
    (folder / "metrics.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_json(folder / "run.json", {"commit": "abc", "command": "python x", "jobs": 3})
    run = runs.read_run(folder)
    assert run.cost() == {
        "seconds_per_iteration": 0.3,
        "training_seconds": pytest.approx(30.0),
        "gpu_memory_mb": 2345,
        "host_memory_mb": None,
        "side_by_side": 3,
    }
    assert run.provenance()["card"] == "NVIDIA H100 80GB HBM3"
    assert run.provenance()["commit"] == "abc" and run.provenance()["command"] == "python x"


def test_a_groups_share_of_the_gradient_is_the_mean_of_what_was_logged(two, tmp_path):
    _, annotations, good, _ = two
    folder = finished_run(tmp_path / "run", annotations, [])
    parts = [f"roi_heads.box_predictor.{part}/gradient_share" for part in (0, 1)]
    logged = [
        {f"{part}_{g}": v for part in parts for g, v in zip("rcf", shares)}
        for shares in ((0.1, 0.6, 0.3), (0.3, 0.5, 0.2))
    ]
    logged[1][f"{parts[1]}_r"] = 0.5  # a part of its own
    (folder / "metrics.json").write_text("".join(f"{json.dumps(row)}\n" for row in logged))
    compared = comparison(folder, good, draws=10)
    first, second = compare.run_rows(compared)[:2]
    assert [first[f"gradient_share_{g}"] for g in "rcf"] == [25.0, 55.0, 25.0]
    assert second["gradient_share_r"] is None
    page = str(compare.make_page(compared))
    assert "Whose gradient it is" in page and "rare, percent" in page
    assert "Whose gradient it is" not in str(compare.make_page(comparison(good, draws=10)))


def test_runs_of_different_commits_are_told_so(two, tmp_path):
    _, annotations, good, _ = two
    folder = finished_run(tmp_path / "run", annotations, [])
    write_json(folder / "run.json", {"commit": "abc"})
    page = str(compare.make_page(comparison(good, folder, draws=10)))
    assert "different commits" in page and "unknown, abc." in page
    assert "different commits" not in str(compare.make_page(comparison(good, good, draws=10)))


@pytest.mark.browser
def test_names_are_data_and_never_markup(tmp_path):
    truth, detections = federated(0)
    for category, name in zip(truth["categories"], HARD_NAMES, strict=True):
        category["name"] = name
    annotations = write_json(tmp_path / "val.json", truth)
    folders = [
        finished_run(tmp_path / name, annotations, changed(detections, i))
        for i, name in enumerate(("<i>a</i>", "b, 'c' & </script>".replace("/", "⁄"), "😀=1"))
    ]
    out = tmp_path / "out"
    assert compare.main([*map(str, folders), "--draws", "20", "--out", str(out)]) == 0
    named = {row["class"].removeprefix("'") for row in read_csv(out / "classes.csv")}
    assert named == set(HARD_NAMES[:-1])  # the last class never occurs
    text = (out / "compare.html").read_text()
    assert "<b>bold</b>" not in text and "<i>a</i>" not in text and "<script>document" not in text
    drawn, width, messages = open_page(out / "compare.html", tmp_path, width=390)
    assert drawn == text.count('class="figure"') == 4 + 2 and width <= 390
    assert messages == []


def break_classes(folder, annotations):
    truth = json.loads(annotations.read_text())
    truth["categories"][0]["name"] = "another"
    other = write_json(folder.parent / "classes.json", truth)
    finished_run(folder, other, [])


def break_data(folder, annotations):
    truth = json.loads(annotations.read_text())
    other = write_json(folder.parent / "data.json", {**truth, "images": truth["images"]})
    other.write_text(other.read_text() + "\n")
    finished_run(folder, other, [])


def break_results(folder, annotations):
    finished_run(folder, annotations, [])
    (folder / "inference/lvis_instances_results.json").unlink()


def break_training(folder, annotations):
    finished_run(folder, annotations, [], SOLVER__MAX_ITER=100)
    (folder / "metrics.json").write_text('{"iteration": 59, "total_loss": 1.0}\n{"bbox/AP"')


def break_annotations(folder, annotations):
    finished_run(folder, annotations, [])
    path = folder / "inference/lvis_results.json"
    content = json.loads(path.read_text())
    content["bbox"]["AP"] = 12.0
    write_json(path, content)


def break_folder(folder, annotations):
    folder.mkdir()


def break_config(folder, annotations):
    finished_run(folder, annotations, [])
    (folder / "config.yaml").write_text("[1, 2")


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        (break_classes, "have other classes"),
        (break_data, "are evaluated on other data"),
        (break_results, "holds no results"),
        (break_training, "was stopped at iteration 60 of 100: resume it first"),
        (break_annotations, "its detections give AP 0.00 on"),
        (break_folder, "is no folder of a run"),
        (break_config, "is no valid YAML"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_told_in_a_sentence(
    two, tmp_path, capsys, breaking, words
):
    _, annotations, good, _ = two
    folder, out = tmp_path / "broken", tmp_path / "out"
    breaking(folder, annotations)
    capsys.readouterr()
    assert compare.main([str(good), str(folder), "--out", str(out)]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: '") and words in error and str(folder) in error
    assert not out.exists()


def test_runs_of_the_coco_evaluation_are_compared_too(tmp_path, monkeypatch):
    truth, detections = federated(0)
    plain = {
        "images": [{k: im[k] for k in ("id", "height", "width")} for im in truth["images"]],
        "annotations": [{**a, "ignore": 0, "iscrowd": 0} for a in truth["annotations"]],
        "categories": truth["categories"],
    }
    monkeypatch.chdir(tmp_path)
    annotations = write_json(Path("datasets/coco/annotations/instances_val2017.json"), plain)
    coco = COCO(str(annotations))
    recorded = []
    for name, found in (("a", detections), ("b", changed(detections, 0))):
        folder = Path(name)
        write_json(folder / "inference/coco_instances_results.json", found)
        (folder / "config.yaml").write_text("DATASETS: {TEST: [coco_2017_val]}\nSEED: 1\n")
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        recorded.append(100 * evaluation.stats[0])
        write_json(folder / "metrics.json", {"bbox/AP": recorded[-1]})
    assert compare.main(["a", "b", "--draws", "20", "--out", "out"]) == 0
    rows = [row for row in read_jsonl(Path("out/comparison.jsonl")) if row["metric"] == "AP"]
    # COCO's own numbers: rounded to 4 digits in the file.
    assert [row["mean"] for row in rows] == pytest.approx(recorded, abs=1e-4)
    assert rows[0]["protocol"]["protocol"] == "COCO"


# --- Setups ---------------------------------------------------------------------------------------


def test_a_setup_is_a_config_with_fragments_and_keys_of_its_own():
    text = "configs/quickstart_softmax.yaml+eql+SOLVER.BASE_LR=1e-3+DATASETS.TEST=()"
    setup = runs.parse_setup(text)
    assert setup.config_file == "configs/quickstart_softmax.yaml"
    assert setup.fragments == ("eql",)
    assert setup.opts == ("SOLVER.BASE_LR", "1e-3", "DATASETS.TEST", "()")
    assert setup.name == "quickstart_softmax+eql+SOLVER.BASE_LR=1e-3+DATASETS.TEST=()"
    planned = runs.plan(setup, 3, Path("out"), ["SOLVER.MAX_ITER", "7", "SOLVER.BASE_LR", "1"])
    assert planned.settings["SOLVER.BASE_LR"] == 1e-3  # its own key wins
    assert planned.settings["SOLVER.MAX_ITER"] == 7 and planned.settings["SEED"] == 3
    assert planned.settings["BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"] == "EqualizationLoss"
    assert planned.folder.parent == Path("out") and "(" not in planned.folder.name
    assert planned.folder.name.endswith("_seed3")


def test_signs_of_numbers_do_not_part_a_setup():
    setup = runs.parse_setup("configs/quickstart.yaml+SOLVER.WEIGHT_DECAY=1e+2")
    assert setup.opts == ("SOLVER.WEIGHT_DECAY", "1e+2")


def test_a_run_can_begin_with_the_weights_of_another_of_its_seed(tmp_path):
    first = runs.parse_setup("configs/quickstart_softmax.yaml")
    text = "configs/quickstart_softmax.yaml+decoupled+MODEL.WEIGHTS={out}/%s/model_final.pth"
    second = runs.parse_setup(text % "quickstart_softmax_seed{seed}")
    for seed in (0, 2):
        planned = runs.plan(second, seed, tmp_path, [])
        begins_with = runs.plan(first, seed, tmp_path, []).folder / "model_final.pth"
        assert planned.settings["MODEL.WEIGHTS"] == str(begins_with)
        assert str(begins_with) in planned.command
    assert not {"{", "}", "/"} & set(planned.folder.name)


def test_a_python_config_takes_its_own_words(tmp_path):
    setup = runs.parse_setup("configs/lazy/mask_rcnn_R_50_FPN.py+train.max_iter=7")
    planned = runs.plan(setup, 2, tmp_path / "it's", ["optimizer.lr=0.1"])
    assert planned.settings["SEED"] == 2 and planned.settings["SOLVER.MAX_ITER"] == 7
    assert planned.settings["OUTPUT_DIR"] == str(planned.folder)
    # Its tree is not among the settings: a digest tells runs of another version apart.
    planned.folder.mkdir(parents=True)
    write_json(planned.folder / "run.json", {"exit": 0, "source": "another"})
    with pytest.raises(InputError, match="another version of 'configs/lazy"):
        runs.is_finished(planned)


def test_configs_of_one_name_are_told_apart_by_their_folders():
    setups = [
        runs.parse_setup(f"configs/{folder}/retinanet_R_50_FPN_1x.yaml")
        for folder in ("coco", "lvis_v1")
    ]
    names = [setup.name for setup in runs.distinct_names(setups)]
    assert names == [f"{f}-retinanet_R_50_FPN_1x" for f in ("coco", "lvis_v1")]
    with pytest.raises(InputError, match="listed twice"):
        runs.distinct_names([setups[0], setups[0]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/nowhere.yaml"], "'configs/nowhere.yaml' is neither a config file nor"),
        (["configs/quickstart.yaml", "SOLVER.MAX_ITERS", "3"], "SOLVER.MAX_ITERS"),
        (["configs/quickstart.yaml+nothing"], "--with nothing: unknown"),
        (["configs/quickstart.yaml", "configs/quickstart.yaml"], "'quickstart' is listed twice"),
        (["SOLVER.MAX_ITER", "3"], "There is no config and no run to compare"),
    ],
)
def test_a_command_that_cannot_work_trains_nothing(tmp_path, capsys, arguments, words):
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_is_seen_before_anything_is_trained(two, tmp_path, capsys):
    truth, annotations, _, _ = two
    other = write_json(tmp_path / "other.json", {**truth, "images": truth["images"] + [{"id": 99}]})
    paths = []
    for index, path in enumerate((annotations, other)):
        keys = {"DATASETS": [[f"{path}", f"{path}", ""]]}
        content = {"_BASE_": str(ROOT / "configs/quickstart.yaml"), "BALANCE": keys}
        content["DATASETS"] = {"TRAIN": [str(path)], "TEST": [str(path)]}
        paths.append(str(write_json(tmp_path / f"{index}.yaml", content)))
    out = str(tmp_path / "out")
    assert compare.main([*paths, "--out", out]) == 2
    assert "'1' and '0' are evaluated on other data" in capsys.readouterr().err
    assert compare.main([paths[0], "--out", out, "DATASETS.TEST", "()"]) == 2
    assert "'0': DATASETS.TEST is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_told_to_have_more_iterations_than_it_has(tmp_path):
    setup = runs.parse_setup("configs/quickstart.yaml")
    run = runs.plan(setup, 0, tmp_path, ["SOLVER.MAX_ITER", "1500", "SOLVER.STEPS", "(1000,)"])
    told = "  quickstart_seed0 ({} of 1,500 iterations)"
    assert runs._status([run]) == told.format("0")
    run.folder.mkdir()
    metrics = run.folder / "metrics.json"
    metrics.write_text('{"iteration": 1199, "loss_cls": 1.0}\n')
    assert runs._status([run]) == told.format("1,200")
    with metrics.open("a") as file:
        file.write('{"iteration": 1500, "bbox/AP": 1.0}\n')  # the evaluation after the training
    assert runs._status([run]) == told.format("1,500")


def test_a_file_may_hold_the_arguments(tmp_path, capsys):
    matrix = tmp_path / "matrix.txt"
    matrix.write_text("# the baseline first\nconfigs/nowhere 1.yaml\n\n--seeds\n2\n")
    assert compare.main([f"@{matrix}"]) == 2
    assert "'configs/nowhere 1.yaml' is neither" in capsys.readouterr().err


def test_the_commit_is_gits_or_else_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("BALANCED_DET_COMMIT", "told")
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert runs.commit().removesuffix("-dirty") == (head or "told")
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    assert runs.commit() == "told"
    monkeypatch.delenv("BALANCED_DET_COMMIT")
    assert runs.commit().startswith("balanced_det ")


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the path of a config that trains in seconds on generated shapes."""
    folder = tmp_path_factory.mktemp("tiny")
    data = shapes.generate(folder / "drawn", classes=6, train=20, val=12, size=64)
    sets = [[str(p), str(p), str(data.image_root)] for p in (data.train_json, data.val_json)]
    keys = {
        "_BASE_": str(ROOT / "configs/shapes/faster_rcnn.yaml"),
        "BALANCE": {"DATASETS": sets},
        "DATASETS": {"TRAIN": [sets[0][0]], "TEST": [sets[1][0]]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "MODEL": {
            "DEVICE": "cpu",
            "FPN": {"OUT_CHANNELS": 16},
            # A network that has hardly learnt anything still finds something to compare.
            "ROI_HEADS": {"NUM_CLASSES": "auto", "SCORE_THRESH_TEST": 0.0},
            "ROI_BOX_HEAD": {"FC_DIM": 32},
        },
        "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 4, "STEPS": [], "CHECKPOINT_PERIOD": 2},
    }
    return write_json(folder / "tiny.yaml", keys)  # JSON is YAML


def run_compare(*arguments, **options):
    """Start the command as a person does."""
    return subprocess.Popen(
        [sys.executable, "-m", "balanced_det.compare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_configs_are_trained_compared_and_not_trained_again(tiny, tmp_path):
    out = tmp_path / "out"
    setups = [tiny, f"{tiny}+eql", f"{tiny}+MODEL.WEIGHTS=/nowhere.pth"]
    arguments = [*setups, "--seeds", "1", "--jobs", "2", "--draws", "50", "--out", out]
    # Long enough for an AP that is not zero, whatever images are flipped.
    opts = ["SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "24"]
    process = run_compare(*arguments, *opts)
    stdout, stderr = process.communicate(timeout=300)
    # The third cannot be trained; the others are compared all the same.
    assert process.returncode == 1, stderr
    assert "| tiny |" in stdout and "| tiny+eql |" in stdout
    assert "MODEL.WEIGHTS: the file '/nowhere.pth' does not exist" in stderr
    page = (out / "compare.html").read_text()
    assert "does not exist" in page and "CLASSIFICATION_LOSS" in page
    first, second = read_jsonl(out / "runs.jsonl")
    recorded = json.loads((out / "tiny_seed0/inference/lvis_results.json").read_text())["bbox"]
    assert first["AP"] == pytest.approx(recorded["AP"], abs=1e-3) and first["AP"] > 0
    assert f"--config-file {tiny} {' '.join(opts)} OUTPUT_DIR" in first["command"]
    assert "--with eql" in second["command"]
    assert first["commit"] == runs.commit() and first["card"] == runs.processor()
    assert first["seconds_per_iteration"] > 0 and first["host_memory_mb"] > 100
    assert first["side_by_side"] == 2 and first["protocol"]["protocol"] == "LVIS"
    # Again, in this process: nothing is trained, and other settings are refused.
    final = out / "tiny_seed0/model_final.pth"
    written = final.stat().st_mtime_ns
    again = [*map(str, arguments), *opts]
    (out / "compare.html").unlink()
    assert compare.main([str(tiny), f"{tiny}+eql", *again[3:]]) == 0
    assert final.stat().st_mtime_ns == written and (out / "compare.html").is_file()
    opts[1] = "0.02"
    planned = runs.plan(runs.parse_setup(str(tiny)), 0, out, opts)
    with pytest.raises(InputError, match=r"another SOLVER.BASE_LR, 0.01 instead of 0.02"):
        runs.train_all([planned], 1)


@pytest.mark.slow
def test_a_second_phase_waits_for_the_first_whose_weights_it_begins_with(tiny, tmp_path):
    setups = [
        runs.parse_setup(f"{tiny}{added}")
        for added in ("", "+MODEL.WEIGHTS={out}/tiny_seed{seed}/model_final.pth", "+eql")
    ]
    first, second, other = (runs.plan(setup, 0, tmp_path, []) for setup in setups)
    # As many at a time as there are: without order the second would not find its weights.
    assert runs.train_all([first, second, other], 3) == {}
    ends = [run.folder.joinpath("model_final.pth").stat().st_mtime_ns for run in (first, second)]
    assert ends[0] < second.folder.joinpath("config.yaml").stat().st_mtime_ns < ends[1]
    # The first failed: its weights are not there.
    keys = {"_BASE_": str(tiny), "MODEL": {"WEIGHTS": "/nowhere.pth"}}
    file = write_json(tmp_path / "broken.yaml", keys)
    text = f"{tiny}+MODEL.WEIGHTS={{out}}/broken_seed{{seed}}/model_final.pth"
    broken, after = (
        runs.plan(runs.parse_setup(words), 0, tmp_path, []) for words in (str(file), text)
    )
    failures = runs.train_all([broken, after], 2)
    assert set(failures) == {broken, after} and "does not exist" in failures[after]


@pytest.mark.slow
def test_what_was_interrupted_goes_on_where_it_stopped(tiny, tmp_path):
    out = tmp_path / "out"
    arguments = [tiny, "--seeds", "1", "--draws", "20", "--out", out, "SOLVER.MAX_ITER", "16"]
    process = run_compare(*arguments)
    folder = out / "tiny_seed0"
    limit = time.monotonic() + 120
    while not (folder / "model_0000003.pth").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in stderr
    with locked(str(folder)):  # the training has ended too: nothing holds its folder
        pass
    assert not (folder / "model_final.pth").exists()
    assert not runs.is_finished(
        runs.plan(runs.parse_setup(str(tiny)), 0, out, ["SOLVER.MAX_ITER", "16"])
    )
    assert compare.main(list(map(str, arguments))) == 0
    log = (folder / "log.txt").read_text()
    started = [int(s.split()[0]) for s in log.split("Starting training from iteration ")[1:]]
    assert started[0] == 0 and started[1] >= 4
    assert torch.load(folder / "model_final.pth", weights_only=False)["iteration"] == 15
    assert json.loads((folder / "run.json").read_text())["exit"] == 0
