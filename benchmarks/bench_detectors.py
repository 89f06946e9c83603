#!/usr/bin/env python
"""Time, launches and peak memory of a training step, ours beside Detectron2's own, in one run.

    python benchmarks/bench_detectors.py [--device cuda|cpu] [--json FILE] [--only retinanet]
        [--batch 8 2] [--arithmetic bf16 float32] [--profile FOLDER]

A step is forward, backward and SGD on one batch of random images (of 800 x 1216 on CUDA) with 12
objects each, whose masks are polygons of 24 corners. Ours and Detectron2's take turns; the time is
the median over steps, each waited for, and memory is the allocator's peak. Launches are the kernels
and copies of one step, and busy is the time in which the device works on any of them, both from
PyTorch's profiler; the difference to the time of a step is what the device waits for the host.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model as build_stock_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from timing import synchronize

import balanced_det.detectors  # noqa: F401  (registers them)
from balanced_det.build import build_model
from balanced_det.config import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GIB = 2**30

PYRAMID = ["MODEL.BACKBONE.NAME", "build_balanced_pyramid_backbone"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0]
RCNN = [
    *("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
]
CASCADE = [*RCNN, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]

# name: (config and fragments, number of classes, our keys, keys that make it Detectron2's own)
DETECTORS = {
    "Mask R-CNN R-50 with EQL, 1203 classes": (
        "lvis_v1/mask_rcnn_R_50_FPN_1x_eql.yaml",
        1203,
        [],
        RCNN,
    ),
    "Faster R-CNN R-50 with EQL, 1203 classes": (
        "lvis_v1/faster_rcnn_R_50_FPN_1x.yaml+eql",
        1203,
        [],
        RCNN,
    ),
    "Cascade Mask R-CNN R-50 with EQL, 1203 classes": (
        "lvis_v1/cascade_mask_rcnn_R_50_FPN_1x.yaml+eql",
        1203,
        [],
        CASCADE,
    ),
    "RetinaNet R-50, 1203 classes": (
        "lvis_v1/retinanet_R_50_FPN_1x.yaml",
        1203,
        [],
        RETINANET,
    ),
    "RetinaNet R-50, 80 classes": (
        "Base-RetinaNet.yaml",
        80,
        [],
        RETINANET,
    ),
    "Faster R-CNN R-50 with balanced pyramid, 80 classes": (
        "Base-RCNN-FPN.yaml",
        80,
        PYRAMID,
        RCNN,
    ),
}
# What losses count in a training set: shares of its images, or images of LVIS v1's 100,170.
STATISTICS = {"class_frequency": 1, "class_counts": 100_170}
ARITHMETIC = {"float32": False, "bf16": True}


def build(config, device, opts, stock):
    """Return a detector in training mode; its class frequencies are random.

    Args:
        config: path within ``configs``, and names of fragments after a "+" each.
        device: "cuda" or "cpu".
        opts: keys and values to set.
        stock: build it as Detectron2 does, not as this project.
    """
    file, *fragments = config.split("+")
    cfg = load_config(str(CONFIGS / file), fragments=fragments, MODEL__DEVICE=device)
    cfg.merge_from_list(opts)
    torch.manual_seed(0)
    model = (build_stock_model(cfg) if stock else build_model(cfg, count=False)).train()
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            # Untrained, frozen batch normalization lets activations grow from block to block.
            module.weight.fill_(0.1)
    state = model.state_dict()
    for statistic, num_images in STATISTICS.items():
        for name in (name for name in state if name.endswith(statistic)):
            state[name] = num_images * torch.logspace(-4.5, -0.5, len(state[name]))
    model.load_state_dict(state)
    return model


def batch(num_images, height, width, num_classes, device):
    """Return inputs of a training step: random images, 12 objects of 32 to 400 pixels each."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(num_images):
        size = 32 + 368 * torch.rand(12, 2, generator=generator) ** 2
        corner = torch.rand(12, 2, generator=generator) * (torch.tensor([width, height]) - size)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(num_classes, (12,), generator=generator)
        instances.gt_masks = PolygonMasks(_ellipses(corner.numpy(), size.numpy()))
        image = 255 * torch.rand(3, height, width, generator=generator)
        inputs.append({"image": image.to(device), "instances": instances.to(device)})
    return inputs


def _ellipses(corners, sizes, num_corners=24):
    angle = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) / 2 + 0.5
    return [
        [(corner + size * circle).reshape(-1).astype(np.float64)]
        for corner, size in zip(corners, sizes)
    ]


class Training:
    """A detector with its optimizer, ready for steps."""

    def __init__(self, model, inputs, amp, device):
        self.model, self.inputs, self.amp, self.device = model, inputs, amp, device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)

    def step(self):
        """Train a step and wait for it."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = sum(self.model(self.inputs).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        synchronize(self.device)


def measure(training, steps):
    """Return the seconds of each of ``steps`` training steps after some to warm up, and a peak."""
    on_cuda = training.device == "cuda"
    times = []
    with EventStorage():
        for index in range(steps + 3):
            synchronize(training.device)
            if on_cuda and index == 2:  # the peak of warm steps
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            training.step()
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if on_cuda else None
    return {"seconds": times[3:], "peak_gib": peak}


def profile(training, file=None):
    """Return the launches of a step and the milliseconds in which the device is busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with EventStorage(), torch.profiler.profile(activities=activities) as profiler:
        training.step()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    busy, end = 0.0, 0.0
    for event in events:
        busy += max(event.time_range.end - max(event.time_range.start, end), 0)
        end = max(end, event.time_range.end)
    if file is not None:
        averages = profiler.key_averages()
        table = averages.table(
            sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(table)
    return {"launches": len(events), "busy_ms": busy / 1000}


def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default=[""], nargs="+", help="parts of detectors' names")
    parser.add_argument("--batch", type=int, nargs="+", help="images; default 8 on CUDA, else 1")
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="times to build and measure each")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="as CUDNN_BENCHMARK does")
    parser.add_argument("--opts", nargs="+", default=[], help="keys of ours, KEY VALUE ...")
    parser.add_argument("--profile", type=Path, help="folder for the longest kernels of a step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    size = (800, 1216) if args.device == "cuda" else (192, 256)

    rows = []
    for name, (config, num_classes, own, stock) in DETECTORS.items():
        if not any(part.lower() in name.lower() for part in args.only):
            continue
        for num_images in args.batch or [8 if args.device == "cuda" else 1]:
            inputs = batch(num_images, *size, num_classes, args.device)
            for arithmetic in args.arithmetic:
                sides = {"ours": [*own, *args.opts], "Detectron2": stock}
                runs = {side: [] for side in sides}
                for _ in range(args.rounds):
                    for side, opts in sides.items():
                        label = f"{name} {side} {arithmetic} {num_images}"
                        options = (config, args.device, opts, side == "Detectron2")
                        runs[side].append(_run(options, inputs, arithmetic, args, label))
                row = {"detector": name, "batch": num_images, "arithmetic": arithmetic}
                row.update({side: _median(results) for side, results in runs.items()})
                rows.append(row)
                print(row, flush=True)
    print(_table(rows))
    if args.json:
        card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        report = {"torch": torch.__version__, "device": card, "image": size, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))


def _run(options, inputs, arithmetic, args, label):
    """Return what is measured of a detector built anew; None if memory is too small."""
    try:
        model = build(*options)
        training = Training(model, inputs, ARITHMETIC[arithmetic], args.device)
        result = measure(training, args.steps)
        if args.device == "cuda":
            file = args.profile and args.profile / f"{label.replace(' ', '_').replace(',', '')}.txt"
            result |= profile(training, file)
        return result
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def _median(results):
    """Return the median over the steps of all rounds, None if any has none."""
    if None in results:
        return None
    seconds = statistics.median(sum((result["seconds"] for result in results), []))
    return {**results[-1], "seconds": seconds}


def _table(rows):
    lines = [
        "| training step | batch | arithmetic | ours | Detectron2 | ratio | launches | busy "
        "| peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sides = row["ours"], row["Detectron2"]
        ratio = f"{sides[0]['seconds'] / sides[1]['seconds']:.2f}" if all(sides) else "-"
        cells = [row["detector"], str(row["batch"]), row["arithmetic"]]
        cells += [_cell(side, "seconds", "{:.0f} ms", 1000) for side in sides]
        cells.append(ratio)
        for key, text in (("launches", "{:.0f}"), ("busy_ms", "{:.0f} ms"), ("peak_gib", "{:.1f}")):
            cells.append(", ".join(_cell(side, key, text) for side in sides))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(result, key, text, factor=1):
    if result is None:
        return "out of memory"
    return "-" if result.get(key) is None else text.format(factor * result[key])


if __name__ == "__main__":
    main()
