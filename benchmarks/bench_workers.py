#!/usr/bin/env python
"""What one total batch gives on one worker and on several: statistics, losses, gradients, results.

    python benchmarks/bench_workers.py [--gpus 1 2] [--parts statistics resume evaluation]
        [--batch 8] [--size 256] [--iterations 80] [--only ghm] [--dtypes float32 bfloat16]
        [--device cuda] [--folder DIR] [--out FILE.json]

The first of ``--gpus`` is what the others are compared with. All parts on two GPUs take some four
minutes. On a CPU (``--device cpu --size 64 --iterations 40 --dtypes float32``) processes talk by
gloo. The data are generated shapes of one size.

* statistics: five steps of eight detectors, see :mod:`worker_steps`.
* resume: a RetinaNet with GHM-C trains on one worker; from its checkpoint in the middle it goes on
  with ``--resume`` on several. Compared with the run that was left alone: the loss after the
  middle, and the statistics at the end.
* evaluation: ``--eval-only`` of that model: seconds, bytes gathered, and the files that it writes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_scaling import compare_results, gathered, train_net
from worker_steps import STEPS, compared_steps, keys_of, make_data, relative

ROOT = Path(__file__).resolve().parent.parent


def run_retinanet(keys, workers, *flags):
    """Run ``train_net.py`` on a RetinaNet with GHM-C; return its seconds."""
    words = [str(item) for pair in keys.items() for item in pair]
    return train_net("shapes/retinanet.yaml+ghmc", workers, *flags, *words)


def losses(folder):
    """Return {iteration: total loss, the median of the last 20} as the run wrote it."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def statistics_of(path):
    """Return (last iteration, {name: statistic}) of a checkpoint."""
    content = torch.load(path, map_location="cpu")
    kept = ("criterion.", "selection.")
    return content["iteration"], {
        name: value.double()
        for name, value in content["model"].items()
        if name.startswith(kept) and value.is_floating_point()
    }


def resume_part(args, keys, whole):
    """Return a row a number of workers; the run on one worker is left in the folder ``whole``."""
    half = args.iterations // 2
    keys = {**keys, "SOLVER.MAX_ITER": args.iterations, "SOLVER.CHECKPOINT_PERIOD": half}
    keys.update({"DATASETS.TEST": (), "BALANCE.OVERWRITE": True})
    # At the rate of the config another order of sums grows tenfold a step, on one worker too.
    keys.update({"SOLVER.BASE_LR": 1e-4})
    run_retinanet({**keys, "OUTPUT_DIR": whole}, args.gpus[0])
    middle = whole / f"model_{half - 1:07d}.pth"
    iteration, at_middle = statistics_of(middle)
    end, expected = statistics_of(whole / "model_final.pth")
    rows = []
    for workers in args.gpus[1:]:
        folder = args.folder / f"resumed_{workers}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(middle, folder)
        (folder / "last_checkpoint").write_text(middle.name)
        run_retinanet({**keys, "OUTPUT_DIR": folder}, workers, "--resume")
        resumed_end, found = statistics_of(folder / "model_final.pth")
        curve, resumed_curve = losses(whole), losses(folder)
        rows.append(
            {
                "workers_before": args.gpus[0],
                "workers_after": workers,
                "last_iteration_before": iteration,
                "last_iteration": resumed_end,
                "last_iteration_left_alone": end,
                "first_logged_after_resuming": min(resumed_curve),
                "loss_before": {i: loss for i, loss in curve.items() if i < half},
                "loss_after": resumed_curve,
                "loss_left_alone": {i: loss for i, loss in curve.items() if i >= half},
                "statistics": {
                    name: {
                        "difference_at_end": relative(value, found[name]),
                        "moved_since_middle": relative(value, at_middle[name]),
                    }
                    for name, value in expected.items()
                },
            }
        )
    return rows


def evaluation_part(args, keys, weights):
    """Return a row a number of workers, of ``--eval-only`` of a checkpoint."""
    rows = []
    for workers in args.gpus:
        folder = args.folder / f"evaluation_{workers}"
        keys_here = {**keys, "OUTPUT_DIR": folder, "MODEL.WEIGHTS": weights}
        seconds = run_retinanet(keys_here, workers, "--eval-only")
        row = {"workers": workers, "seconds": seconds, **gathered(folder)}
        first = args.folder / f"evaluation_{args.gpus[0]}"
        metrics = json.loads((folder / "inference" / "lvis_results.json").read_text())
        row["AP"] = metrics["bbox"]["AP"]
        rows.append({**row, **compare_results(first / "inference", folder / "inference")})
    return rows


def print_statistics(rows):
    """Print the largest difference of each kind of number, and every one that is too large."""
    largest = {}
    for row in rows:
        key = row["workers"], row["dtype"], row["detector"], row["what"].split(":")[0]
        if row["largest_difference"] >= largest.get(key, row)["largest_difference"]:
            largest[key] = row
    for (workers, dtype, detector, kind), row in largest.items():
        step = STEPS.index(row["in_step"])
        print(
            f"{workers} workers, {dtype:8}, {detector:27}: {kind:10} {row['on_one'][step]:10.5g} "
            f"{row['on_several'][step]:10.5g}, differ by {row['largest_difference']:.1e}, "
            f"on one in reverse order by {max(row['difference_of_reverse_order']):.1e}"
        )
    for row in rows:
        if not row["within_noise"] or not row["workers_agree"]:
            print("NOT EQUAL:", json.dumps(row))


def text_of(report):
    """Return the report as JSON, with a line for every row of a part."""
    parts = []
    for name, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    """Generate, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="or processes on a CPU")
    parts = ["statistics", "resume", "evaluation"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--batch", type=int, default=8, help="images a step, on all workers")
    parser.add_argument("--size", type=int, default=256, help="pixels an image")
    parser.add_argument("--iterations", type=int, default=80, help="of the part resume")
    parser.add_argument("--only", default="", help="part of a detector's name")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="of data and runs; default: a temporary one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.folder.mkdir(parents=True, exist_ok=True)
        report = run(args)
    print(json.dumps({name: report[name] for name in report if name != "statistics"}, indent=1))


def run(args):
    """Return the report, {part: rows} and what it is of."""
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    report = {"torch": torch.__version__, "card": card, "command": command, "seconds": {}}
    data, steps_json = make_data(args.folder, args.size, args.batch)
    keys = keys_of(data, data.train_json, args.size, args.device, args.batch)
    whole = args.folder / "whole"

    def add(name, function, *arguments):
        start = time.perf_counter()
        report[name] = function(*arguments)
        report["seconds"][name] = time.perf_counter() - start
        if args.out:
            args.out.write_text(text_of(report))

    if "statistics" in args.parts:
        keys_of_steps = keys_of(data, steps_json, args.size, args.device, args.batch)
        add("statistics", compared_steps, args, keys_of_steps)
        print_statistics(report["statistics"])
    if "resume" in args.parts:
        add("resume", resume_part, args, keys, whole)
    if "evaluation" in args.parts:
        add("evaluation", evaluation_part, args, keys, whole / "model_final.pth")
    return report


if __name__ == "__main__":
    main()
