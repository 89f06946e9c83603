#!/usr/bin/env python
"""What it costs that a training step looks at every loss and gradient before it keeps anything.

    python benchmarks/bench_step_checks.py [--device cuda|cpu] [--batch 8] [--json FILE]

One detector trains by three steps that take turns, on one batch of random images (of 800 x 1216 on
CUDA): this project's `TrainStep`; the same without its look at numbers and its copy of the buffers;
and Detectron2's own (`SimpleTrainer`, with mixed precision `AMPTrainer`). Times are the median over
the steps, each waited for, and ratios those of this run.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from bench_detectors import DETECTORS, batch, build
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from timing import synchronize

from balanced_det.engine.step import TrainStep

ARITHMETIC = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class UncheckedStep(TrainStep):
    """The step without what is measured here."""

    def _look(self, losses, num_broken, check_gradients):
        return False, 0

    def _copy_buffers(self, target, source):
        pass


def steps_of(model, inputs, dtype):
    """Return {name: trainer} of one model, each with an optimizer of its own."""

    def parts():
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9
        )
        return model, itertools.repeat(inputs), optimizer

    trainers = {
        "checked": TrainStep(*parts(), dtype=dtype),
        "unchecked": UncheckedStep(*parts(), dtype=dtype),
    }
    if dtype is None:
        trainers["Detectron2"] = SimpleTrainer(*parts())
    elif model.device.type == "cuda":
        trainers["Detectron2"] = AMPTrainer(*parts(), precision=dtype)
    return trainers


def measure(trainers, steps, device):
    """Return {name: seconds of each step} of trainers that take turns, after three to warm up."""
    times = {name: [] for name in trainers}
    with EventStorage():
        for number in range(steps + 3):
            for name, trainer in trainers.items():
                trainer.iter = number
                synchronize(device)
                # On CPU a machine's other work must not count.
                clock = time.perf_counter if device == "cuda" else time.process_time
                start = clock()
                trainer.run_step()
                synchronize(device)
                times[name].append(clock() - start)
    return {name: found[3:] for name, found in times.items()}


def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default=["EQL", "RetinaNet R-50, 80"], nargs="+")
    parser.add_argument("--batch", type=int, help="images; 8 on CUDA, else 1")
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    size = (800, 1216) if on_cuda else (192, 256)
    arithmetic = args.arithmetic or (list(ARITHMETIC) if on_cuda else ["float32"])
    rows = []
    print("| training step | arithmetic | checked | unchecked | Detectron2 | checked : unchecked |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (config, num_classes, own, _) in DETECTORS.items():
        if not any(part.lower() in name.lower() for part in args.only):
            continue
        inputs = batch(args.batch or (8 if on_cuda else 1), *size, num_classes, args.device)
        model = build(config, args.device, own, stock=False)
        for kind in arithmetic:
            found = measure(steps_of(model, inputs, ARITHMETIC[kind]), args.steps, args.device)
            row = {"detector": name, "arithmetic": kind, "batch": len(inputs)}
            row.update({side: statistics.median(seconds) for side, seconds in found.items()})
            # Of turns beside each other, so that a card that grows warm changes both.
            ratios = [a / b for a, b in zip(found["checked"], found["unchecked"])]
            row["ratio"] = statistics.median(ratios)
            rows.append(row)
            cells = [
                f"{1000 * row[side]:.1f} ms" if side in row else "-"
                for side in ("checked", "unchecked", "Detectron2")
            ]
            print(f"| {name} | {kind} | {' | '.join(cells)} | {row['ratio']:.3f} |", flush=True)
    if args.json:
        card = torch.cuda.get_device_name() if on_cuda else "CPU"
        report = {"torch": torch.__version__, "device": card, "image": size, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
