#!/usr/bin/env python
"""Train configs on the generated shapes with several seeds and tabulate AP: mean and spread.

    python -m balanced_det.data.shapes --out datasets/shapes
    python benchmarks/bench_shapes.py configs/quickstart*.yaml --seeds 3 --jobs 1
    python benchmarks/bench_shapes.py configs/shapes/retinanet_*.yaml --seeds 3 --jobs 12 \
        --opts SOLVER.MAX_ITER 1000

Each run is a `train_net.py` of its own; a run whose results are there already is not repeated.
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

METRICS = ("AP", "APr", "APc", "APf")
ROOT = Path(__file__).resolve().parent.parent


def main():
    """Run what the command line asks for, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--out", type=Path, default=Path("output/bench_shapes"))
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(config, seed) for seed in range(args.seeds) for config in args.configs]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {run: pool.submit(_train, *run, i, args) for i, run in enumerate(runs)}
        results = {run: future.result() for run, future in futures.items()}

    rows = []
    for config in args.configs:
        of_seeds = [results[config, seed] for seed in range(args.seeds)]
        rows.append({"config": str(config), "runs": of_seeds})
    print(_table(rows))
    path = args.out / "results.json"
    path.write_text(json.dumps({"opts": args.opts, "rows": rows}, indent=1))
    print(f"\nWritten to {path}")


def _train(config, seed, index, args):
    """Train one config with one seed, on one GPU where there are several; return its metrics."""
    out = args.out / f"{config.stem}_seed{seed}"
    done = out / "run.json"
    if done.exists():
        return json.loads(done.read_text())
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_net.py")]
    command += ["--config-file", str(config), "OUTPUT_DIR", str(out), "SEED", str(seed), *args.opts]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // args.jobs, 1)),
        "CUDA_VISIBLE_DEVICES": str(index % max(torch.cuda.device_count(), 1)),
    }
    start = time.time()
    with open(out / "stdout.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    result = {"seed": seed, "seconds": round(time.time() - start, 1), "exit": code}
    evaluated = out / "inference" / "lvis_results.json"
    if code == 0 and evaluated.exists():
        metrics = json.loads(evaluated.read_text())
        result.update({name: metrics["bbox"][name] for name in METRICS})
    done.write_text(json.dumps(result))
    print(f"{out.name}: {result}", flush=True)
    return result


def _table(rows):
    lines = ["| config | " + " | ".join(METRICS) + " |", "| --- |" + " --- |" * len(METRICS)]
    for row in rows:
        cells = []
        for name in METRICS:
            values = [r[name] for r in row["runs"] if r.get(name) is not None]
            values = [v for v in values if not math.isnan(v)]
            failed = len(row["runs"]) - len(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cell = f"{statistics.mean(values):.1f} ± {spread:.1f}" if values else "-"
            cells.append(cell + (f" ({failed} failed)" if failed else ""))
        lines.append(f"| {Path(row['config']).stem} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
