#!/usr/bin/env python
"""Images a second of ``train_net.py`` on one GPU and on several: training, loading, evaluation.

    python benchmarks/bench_scaling.py [--gpus 1 2] [--batch 2 8] [--iterations 80] [--out FILE]

Data of LVIS's form and paths (:mod:`lvis_like`) are generated once. Each run is a real one, in
bf16 with 4 loader workers a GPU, from weights that are random but keep activations in bounds.
Reported are the medians of Detectron2's own ``time`` and ``data_time`` over the iterations after
the first 20, images a second, efficiency against the first number of GPUs with the same images a
GPU, and for ``--eval-only`` the images a second of inference with matching, and of the whole call,
the bytes that workers sent to the first, and whether all files are those of the first number of
GPUs. That statistics and gradients do not depend on the number is for :mod:`bench_workers` to show.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DETECTIONS = "lvis_instances_results.json"
# A file of ``configs``, and fragments after a "+" each.
CONFIGS = {
    "Mask R-CNN R-50 with EQL": "lvis_v1/mask_rcnn_R_50_FPN_1x_eql.yaml",
    "RetinaNet R-50 with GHM": "lvis_v1/retinanet_R_50_FPN_1x.yaml+ghmc_ghmr",
}


def options(folder, config):
    """Return the keys that every run of a config has."""
    return [
        *("SOLVER.AMP.ENABLED", "True", "BALANCE.AMP_DTYPE", "bfloat16"),
        *("DATALOADER.NUM_WORKERS", "4", "BALANCE.OVERWRITE", "True"),
        *("INPUT.MIN_SIZE_TRAIN", "(480,)", "INPUT.MIN_SIZE_TEST", "480"),
        *("SOLVER.BASE_LR", "1e-6", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"),
        *("MODEL.WEIGHTS", str(folder / f"{Path(config).stem}.pth")),
    ]


def train_net(config, gpus, *arguments, **environment):
    """Run ``train_net.py`` on a config with its fragments; return its seconds."""
    file, *fragments = config.split("+")
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file"]
    command += [str(ROOT / "configs" / file), "--num-gpus", str(gpus), "--dist-url", "auto"]
    command += ["--with", *fragments] if fragments else []
    command += arguments
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def run(folder, config, gpus, *arguments):
    """Run a config on the data in a folder; return (its seconds, its output folder)."""
    output = folder / f"output_{gpus}"
    keys = [*options(folder, config), "OUTPUT_DIR", str(output)]
    seconds = train_net(config, gpus, *arguments, *keys, DETECTRON2_DATASETS=str(folder))
    return seconds, output


def training(folder, config, gpus, batch, iterations):
    """Return what a training of ``batch`` images a GPU measures."""
    metrics = folder / f"output_{gpus}" / "metrics.json"
    metrics.unlink(missing_ok=True)
    keys = ["SOLVER.IMS_PER_BATCH", str(gpus * batch), "SOLVER.MAX_ITER", str(iterations)]
    keys += ["SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
    run(folder, config, gpus, *keys)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "time" in line and line["iteration"] > 20]
    seconds = statistics.median(line["time"] for line in lines)
    waiting = statistics.median(line["data_time"] for line in lines)
    return {
        "gpus": gpus,
        "images_per_gpu": batch,
        "seconds_per_iteration": seconds,
        "share_of_data_time": waiting / seconds,
        "images_per_second": gpus * batch / seconds,
    }


def evaluation(folder, config, gpus):
    """Return what ``--eval-only`` measures."""
    seconds, output = run(folder, config, gpus, "--eval-only", "BALANCE.UNTRAINED", "True")
    num_images = len(json.loads((folder / "lvis" / "lvis_v1_val.json").read_text())["images"])
    inference = [line for line in _log(output).splitlines() if "Total inference time" in line]
    return {
        "gpus": gpus,
        "images": num_images,
        "seconds": seconds,
        "images_per_second": num_images / seconds,
        "log": inference[-1].split("]: ")[-1] if inference else None,
        **gathered(output),
    }


def gathered(output):
    """Return what the log of an evaluation in a run's folder says that workers sent."""
    found = re.findall(r"Gathered (\d+) bytes of matches from .* in ([\d.]+) s", _log(output))
    size, seconds = found[-1] if found else (0, 0)
    return {"bytes_gathered": int(size), "seconds_gathering": float(seconds)}


def _log(output):
    return (output / "log.txt").read_text()


def compare_results(one, other):
    """Compare the files of two evaluations, in the folders that have them.

    Returns:
        {"equal_files": names of those that are the same to the byte, "other_files": of the rest,
        "other_detections": how many of the second are not among the first's,
        "largest_difference_of_a_metric": in percent}.
    """
    names = sorted(path.name for path in one.iterdir())
    equal = [n for n in names if (one / n).read_bytes() == (other / n).read_bytes()]
    metrics, other_metrics = (
        json.loads((folder / "lvis_results.json").read_text()) for folder in (one, other)
    )
    differences = [
        abs(value - other_metrics[task][name])
        for task in metrics["protocol"]
        for name, value in metrics[task].items()
        if value is not None
    ]
    return {
        "equal_files": equal,
        "other_files": [name for name in names if name not in equal],
        "other_detections": 0 if DETECTIONS in equal else _other_detections(one, other),
        "largest_difference_of_a_metric": max(differences, default=0.0),
    }


def _other_detections(one, other):
    rows, others = (
        Counter(json.dumps(row, sort_keys=True) for row in json.loads(path.read_text()))
        for path in (folder / DETECTIONS for folder in (one, other))
    )
    return (others - rows).total()


def make_weights(folder):
    """Save a checkpoint of random weights a config, whose activations do not grow with depth."""
    from detectron2.checkpoint import DetectionCheckpointer

    from balanced_det.build import build_model
    from balanced_det.config import load_config

    for config in CONFIGS.values():
        file, *fragments = config.split("+")
        cfg = load_config(str(ROOT / "configs" / file), fragments=fragments, MODEL__DEVICE="cpu")
        torch.manual_seed(0)
        model = build_model(cfg)
        for name, module in model.named_modules():
            if name.endswith("conv3.norm"):
                module.weight.fill_(0.1)
        DetectionCheckpointer(model, str(folder)).save(Path(config).stem)


def main():
    """Generate, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "datasets" / "lvis_like")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="images a GPU")
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--val", type=int, default=2000, help="validation images")
    parser.add_argument("--only", default="", help="part of a config's name")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--skip-evaluation", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["DETECTRON2_DATASETS"] = str(args.folder)
    if not (args.folder / "lvis" / "lvis_v1_val.json").exists():
        command = [sys.executable, str(ROOT / "benchmarks" / "lvis_like.py"), str(args.folder)]
        subprocess.run([*command, "--train", str(args.train), "--val", str(args.val)], check=True)
    make_weights(args.folder)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"torch": torch.__version__, "card": card, "training": [], "evaluation": []}

    def add(kind, row):
        print(row, flush=True)
        report[kind].append(row)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))

    for name, config in CONFIGS.items():
        if args.only.lower() not in name.lower():
            continue
        base = {}
        for gpus in [] if args.skip_training else args.gpus:
            for batch in args.batch:
                row = training(args.folder, config, gpus, batch, args.iterations)
                base.setdefault(batch, row["images_per_second"] / gpus)
                row["efficiency"] = row["images_per_second"] / gpus / base[batch]
                add("training", {"detector": name, **row})
        if not args.skip_evaluation:
            for gpus in args.gpus:
                row = evaluation(args.folder, config, gpus)
                folders = (args.folder / f"output_{n}" / "inference" for n in (args.gpus[0], gpus))
                row["results"] = compare_results(*folders)
                add("evaluation", {"detector": name, **row})


if __name__ == "__main__":
    main()
