"""The command line: training, evaluation, resuming, several processes, and bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from distributed import run_command
from runs import options, run_keys

from balanced_det.config import load_config, parse_args
from balanced_det.data import shapes
from balanced_det.engine import Trainer, check_run, num_processes
from balanced_det.errors import InputError
from balanced_det.train import main

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"
CLASSES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # Data sets are named by their paths, so that no name is used twice.
    return shapes.generate(
        tmp_path_factory.mktemp("data") / "shapes", classes=CLASSES, train=40, val=16, size=64
    )


def small(data, out, **changes):
    """Return the quickstart on this data as KEY VALUE pairs, small enough for seconds."""
    changes = {"MODEL__ROI_HEADS__NUM_CLASSES": CLASSES, "SOLVER__MAX_ITER": 6, **changes}
    return options(run_keys(data, out, **changes))


def train_net(*arguments):
    """Run the command as a person does; returns its exit code and outputs."""
    return subprocess.run(
        [sys.executable, "train_net.py", "--config-file", QUICKSTART, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def succeed(*arguments):
    done = train_net(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(*arguments):
    """Run it without a Python of its own, which takes seconds to import everything again."""
    run_command(main, ["--config-file", QUICKSTART, *map(str, arguments)], ROOT)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return the output folder and the standard output of a training."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, succeed(*small(data, out)).stdout


def read(path):
    return json.loads(path.read_text())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def checkpoint(out):
    return torch.load(out / "model_final.pth", weights_only=False)


def differing(state, other):
    """Return the names of the tensors, parameters and buffers, that are not equal bit for bit."""
    assert state.keys() == other.keys()
    return {name for name in state if not torch.equal(state[name], other[name])}


FREQUENCY = "roi_heads.box_predictor.criterion.classification_loss.tail.class_frequency"


# --- Training and evaluation ----------------------------------------------------------------------


def test_training_writes_its_results(trained):
    out, _ = trained
    step, evaluation = metrics(out)
    assert step["iteration"] == 5
    assert step["total_loss"] > 0
    results = read(out / "inference" / "lvis_results.json")
    assert results["bbox"]["AP"] > 0
    assert evaluation["bbox/AP"] == results["bbox"]["AP"]
    assert len(results["classes"]) == CLASSES
    assert checkpoint(out)["iteration"] == 5


def test_training_prints_a_table_and_where_it_wrote(trained):
    out, stdout = trained
    *_, header, _, row, _, written = stdout.rstrip().splitlines()
    assert header.replace("|", " ").split() == ["AP", "AP50", "AP75", "APr", "APc", "APf"]
    assert row.split("|")[1].strip() == "bbox"
    assert written == f"Written to {out}"


def test_log_file_holds_the_projects_own_messages(trained):
    out, _ = trained
    log = (out / "log.txt").read_text()
    assert "balanced_det.evaluation" in log
    assert "train images" in log  # the table of classes
    assert "EqualizationLoss: tail_threshold 0.1 makes" in log


def test_class_frequencies_are_counted_in_the_training_set(trained, data):
    content = read(data.train_json)
    holders = {c["id"]: set() for c in content["categories"]}
    for annotation in content["annotations"]:
        holders[annotation["category_id"]].add(annotation["image_id"])
    with_objects = len(set.union(*holders.values()))  # the others are filtered out
    expected = torch.tensor([len(holders[i]) / with_objects for i in sorted(holders)])
    torch.testing.assert_close(checkpoint(trained[0])["model"][FREQUENCY], expected)


def test_evaluation_needs_no_training_set(trained, data, tmp_path):
    without = dataclasses.replace(data, train_json=tmp_path / "gone.json")
    weights = str(trained[0] / "model_final.pth")
    run("--eval-only", *small(without, tmp_path / "out", MODEL__WEIGHTS=weights))

    before, after = (out / "inference" for out in (trained[0], tmp_path / "out"))
    detections = read(after / "lvis_instances_results.json")
    assert detections
    assert detections == read(before / "lvis_instances_results.json")
    results = [read(folder / "lvis_results.json")["bbox"] for folder in (before, after)]
    assert results[0] == results[1]


def test_resuming_goes_on_where_it_stopped(trained, data, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "out")
    # Frequencies are part of what was trained: those of other data must not replace them.
    other = dataclasses.replace(data, train_json=data.val_json)
    run("--resume", *small(other, out, SOLVER__MAX_ITER=8))

    assert [line["iteration"] for line in metrics(out) if "total_loss" in line] == [5, 7]
    assert "Starting training from iteration 6" in (out / "log.txt").read_text()
    first, second = checkpoint(trained[0]), checkpoint(out)
    assert second["iteration"] == 7
    changed = differing(first["model"], second["model"])
    assert "roi_heads.box_predictor.cls_score.weight" in changed
    assert FREQUENCY not in changed


def test_second_phase_trains_the_classifier_alone(trained, data, tmp_path):
    classifier = "roi_heads.box_predictor.cls_score"
    keys = small(
        data,
        tmp_path / "out",
        MODEL__WEIGHTS=trained[0] / "model_final.pth",
        BALANCE__TRAIN_ONLY=[classifier],
        SOLVER__MAX_ITER=4,
        TEST__EVAL_PERIOD=2,  # an evaluation switches the model to training afterwards
    )
    run(*keys)
    before, after = (checkpoint(out)["model"] for out in (trained[0], tmp_path / "out"))
    # Running statistics of batch normalization are among the tensors that must not differ.
    assert any(name.endswith("running_mean") for name in before)
    assert differing(before, after) == {f"{classifier}.weight", f"{classifier}.bias"}


# --- Several processes ----------------------------------------------------------------------------


def train_and_save_state(options, folder):
    torch.set_num_threads(1)
    cfg = load_config(str(ROOT / QUICKSTART), options)
    torch.manual_seed(comm.get_rank())  # Detectron2 seeds each process differently, too
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    model = trainer.model.module
    torch.save((trainer.iter, model.state_dict()), folder / f"{comm.get_rank()}.pth")


@pytest.mark.slow
def test_two_processes_train_one_model(data, tmp_path):
    keys = small(data, tmp_path / "out", SOLVER__MAX_ITER=20, SOLVER__IMS_PER_BATCH=4)
    launch(train_and_save_state, 2, dist_url="auto", args=(keys, tmp_path))
    (steps, first), (_, second) = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert steps == 20
    assert first["backbone.bottom_up.stem.conv1.norm.running_mean"].abs().sum() > 0
    assert differing(first, second) == set()


# --- Bad input ------------------------------------------------------------------------------------


def check(arguments):
    """Do what the command does before it launches anything."""
    args = parse_args(arguments)
    cfg = load_config(args.config_file, args.opts, fragments=args.fragments)
    check_run(cfg, num_workers=args.num_gpus)


def refuse(arguments, out, *mentioned):
    """Check that a command line is refused in one line that mentions what is wrong."""
    with pytest.raises(InputError) as caught:
        check(arguments)
    message = str(caught.value)
    for words in mentioned:
        assert str(words) in message
    assert "\n" not in message
    assert not out.exists()


def broken(path, folder, change):
    """Write a changed copy of an annotation file; ``change`` may return the new text."""
    content = read(path)
    text = change(content)
    copy = folder / path.name
    copy.write_text(text if isinstance(text, str) else json.dumps(content))
    return copy


def test_sound_command_line_is_not_refused(data, tmp_path):
    check(["--config-file", QUICKSTART, *small(data, tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["train_json", "val_json"])
@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (lambda content: json.dumps(content)[:1000], "cut off"),
        (lambda content: content.pop("categories"), "'categories'"),
        (lambda content: content["annotations"][0].update(category_id=77), "category id 77"),
        (lambda content: content["images"][0].update(file_name="no.jpg", coco_url=""), "no.jpg"),
    ],
    ids=["truncated", "no_categories", "unknown_category", "no_image"],
)
def test_broken_data_is_refused(data, tmp_path, which, change, mentioned):
    path = broken(getattr(data, which), tmp_path, change)
    bad = dataclasses.replace(data, **{which: path})
    arguments = ["--config-file", QUICKSTART, *small(bad, tmp_path / "out")]
    refuse(arguments, tmp_path / "out", path, mentioned)


@pytest.mark.parametrize("which", ["train_json", "val_json"])
def test_missing_data_is_refused(data, tmp_path, which):
    bad = dataclasses.replace(data, **{which: tmp_path / "no.json"})
    arguments = ["--config-file", QUICKSTART, *small(bad, tmp_path / "out")]
    refuse(arguments, tmp_path / "out", tmp_path / "no.json", "does not exist")


@pytest.mark.parametrize(
    ("key", "value", "mentioned"),
    [
        ("BALANCE.ROI_HEADS.CLASSIFICATION_LOSS", "FocalLos", ["'FocalLos'", "FocalLoss, GHM"]),
        ("BALANCE.RPN.BOX_LOSS", "L1", ["'L1'", "GIoULoss, SmoothL1Loss"]),
        ("BALANCE.RPN.SAMPLER", "Randm", ["'Randm'", "OHEMSampler, RandomSampler"]),
        ("BALANCE.RPN.CLASSIFICATION_LOSS", "EqualizationLoss", ["objectness"]),
        ("BALANCE.TRAIN_ONLY", "['roi_head.']", ["'roi_head.'"]),
        ("SOLVER.BASE_LRR", "0.1", ["Non-existent key", "nearest is SOLVER.BASE_LR."]),
        ("BALANCE.XYZ", "0.1", ["Non-existent key: BALANCE.XYZ."]),
        ("SOLVER.BASE_LR.X", "0.1", []),
        ("SOLVER.BASE_LR", "fast", ["fast", "float"]),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "9", ["9", "has 8 classes"]),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "0.5", ["BALANCE.SmoothL1Loss.BETA"]),
        ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True", ["BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"]),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", ["BALANCE.RPN.BOX_LOSS"]),
        ("MODEL.WEIGHTS", "no_such_model.pth", ["no_such_model.pth", "does not exist"]),
        ("DATASETS.TRAIN", "('shapes_trian',)", ["shapes_trian"]),
        ("SOLVER.IMS_PER_BATCH", "0", ["is 0"]),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactor", ["'RepeatFactor'", "RepeatFactorTraining"]),
        ("MODEL.RESNETS.DEPTH", "19", ["is 19", "18, 34, 50"]),
        ("OUTPUT_DIR", f"{__file__}/out", [__file__]),
    ],
)
def test_bad_value_is_refused(data, tmp_path, key, value, mentioned):
    arguments = ["--config-file", QUICKSTART, *small(data, tmp_path / "out"), key, value]
    refuse(arguments, tmp_path / "out", key, *mentioned)


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"^--num-gpus is 8, but GPUs here are 2\.$"):
        num_processes(parse_args(["--num-gpus", "8"]))
    assert num_processes(parse_args(["--num-gpus", "2"])) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert num_processes(parse_args(["--num-gpus", "8"])) == 8  # on its CPU


def test_batch_that_workers_cannot_share_is_refused(data, tmp_path):
    keys = small(data, tmp_path / "out", **{"SOLVER.IMS_PER_BATCH": 3})
    arguments = ["--config-file", QUICKSTART, "--num-gpus", "2", *keys]
    refuse(arguments, tmp_path / "out", "SOLVER.IMS_PER_BATCH is 3", "workers, 2")


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("META_ARCHITECTURE", "META_ARCH"),
        ("BACKBONE.NAME", "BACKBONE"),
        ("RPN.HEAD_NAME", "RPN_HEAD"),
    ],
)
def test_name_that_detectron2_does_not_know_is_refused(data, tmp_path, key, registry):
    keys = small(data, tmp_path / "out", **{f"MODEL.{key}": "Nobody"})
    refuse(["--config-file", QUICKSTART, *keys], tmp_path / "out", "'Nobody'", f"'{registry}'")


def test_key_without_value_is_refused(data, tmp_path):
    arguments = ["--config-file", QUICKSTART, *small(data, tmp_path / "out"), "SEED"]
    refuse(arguments, tmp_path / "out", "KEY VALUE", "SEED")


def test_a_word_that_is_no_pair_is_told_what_it_lacks(tmp_path):
    out = tmp_path / "out"
    refuse([], out, "No config file is given: --config-file")
    refuse([QUICKSTART], out, "KEY VALUE", QUICKSTART, "follows --config-file.")
    refuse(["--config-file", QUICKSTART, "SEED=1"], out, "SEED=1", "space stands between")


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        ("VERSION: 2\nMODEL: {MASK_ONN: True}\n", "MODEL.MASK_ONN"),
        ("VERSION: 2\nMODEL: {MASK_ON: 'yes'}\n", "MODEL.MASK_ON"),
        ("VERSION: 2\nMODEL: {MASK_ON: [\n", "YAML"),
        ("_BASE_: no_base.yaml\n", "no_base.yaml"),
        ("", "holds no 'KEY: value'"),
        ("just words\n", "holds no 'KEY: value'"),
    ],
    ids=["typo", "type", "yaml", "base", "empty", "text"],
)
def test_bad_config_file_is_refused(data, tmp_path, content, mentioned):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    arguments = ["--config-file", str(path), *small(data, tmp_path / "out")]
    refuse(arguments, tmp_path / "out", path, mentioned)


def test_command_prints_one_sentence_for_a_missing_config_file(tmp_path):
    check_printed(["--config-file", "no.yaml", "OUTPUT_DIR", str(tmp_path / "out")], "'no.yaml'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_command_prints_one_sentence_for_an_unknown_loss(data, tmp_path, processes):
    key = "BALANCE__ROI_HEADS__CLASSIFICATION_LOSS"
    keys = small(data, tmp_path / "out", **{key: "FocalLos"})
    check_printed(["--num-gpus", processes, *keys], "'FocalLos'")
    assert not (tmp_path / "out").exists()


def check_printed(arguments, mentioned):
    done = train_net(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("train_net.py: ")
    assert mentioned in sentence


# --- Without Detectron2 ---------------------------------------------------------------------------

# Python's own way to make a module impossible to import.
BLOCK = "import runpy, sys; sys.modules['detectron2'] = None; "


def python(code):
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True
    )


def test_importing_detectors_without_detectron2_says_what_to_run():
    done = python("import balanced_det.detectors")
    assert done.returncode == 1
    assert "make .venv" in done.stderr.splitlines()[-1]


def test_command_without_detectron2_says_what_to_run():
    done = python("runpy.run_path('train_net.py', run_name='__main__')")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "make .venv" in done.stderr


def test_methods_need_no_detectron2():
    done = python(
        "from balanced_det import calibration, cosine, criterion, losses, ops, priors, samplers"
    )
    assert done.returncode == 0, done.stderr
