#!/usr/bin/env python
"""Time and peak memory of a training step, ours beside Detectron2's own detector, in one run.

    python benchmarks/bench_detectors.py [--device cuda|cpu] [--json FILE] [--only retinanet]

A step is forward, backward and SGD on one batch of random images (8 of 800 x 1216 on CUDA) with 12
objects each. Ours and Detectron2's take turns; the time is the median over steps, each waited for,
and memory is the allocator's peak.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from timing import synchronize

import balanced_det.detectors  # noqa: F401  (registers them)
from balanced_det.build import build_model
from balanced_det.config import add_balanced_det_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GIB = 2**30

PYRAMID = ["MODEL.BACKBONE.NAME", "build_balanced_pyramid_backbone"]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0]
FASTER_RCNN = ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]

# name: (config, number of classes, our keys, keys that make it Detectron2's own detector)
DETECTORS = {
    "RetinaNet R-50, 1203 classes": (
        "lvis_v1/Base-RetinaNet.yaml",
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
    "Faster R-CNN R-50 with EQL, 1203 classes": (
        "lvis_v1/faster_rcnn_R_50_FPN_1x_eql.yaml",
        1203,
        [],
        FASTER_RCNN,
    ),
    "Faster R-CNN R-50 with balanced pyramid, 80 classes": (
        "Base-RCNN-FPN.yaml",
        80,
        PYRAMID,
        FASTER_RCNN,
    ),
}


def build(config, device, opts):
    """Return a detector in training mode; its class frequencies are random."""
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.merge_from_file(str(CONFIGS / config), allow_unsafe=False)
    cfg.MODEL.DEVICE = device
    cfg.merge_from_list(opts)
    torch.manual_seed(0)
    model = build_model(cfg, count=False).train()
    for name, module in model.named_modules():
        if name.endswith("conv3.norm"):
            # Untrained, frozen batch normalization lets activations grow from block to block.
            module.weight.fill_(0.1)
    state = model.state_dict()
    unknown = [name for name in state if name.endswith("class_frequency")]
    for name in unknown:
        state[name] = torch.logspace(-4.5, -0.5, len(state[name]))
    if unknown:
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
        image = 255 * torch.rand(3, height, width, generator=generator)
        inputs.append({"image": image.to(device), "instances": instances.to(device)})
    return inputs


def measure(model, inputs, amp, device, steps):
    """Return (the seconds of each training step, peak GiB or None)."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    on_cuda = device == "cuda"
    times = []
    with EventStorage():
        for _ in range(steps + 3):
            synchronize(device)
            if on_cuda and len(times) == 2:  # the peak of warm steps
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss = sum(model(inputs).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            synchronize(device)
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if on_cuda else None
    return times[3:], peak


def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of a detector's name")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="times to build and measure each")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="as CUDNN_BENCHMARK does")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    size = (8, 800, 1216) if args.device == "cuda" else (1, 192, 256)

    rows = []
    for name, (config, num_classes, own, stock) in DETECTORS.items():
        if args.only.lower() not in name.lower():
            continue
        inputs = batch(*size, num_classes, args.device)
        for amp in (False, True):
            sides = {"ours": own, "Detectron2": stock}
            runs = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side, opts in sides.items():
                    runs[side].append(_run(config, opts, inputs, amp, args))
            row = {"detector": name, "arithmetic": "bf16 autocast" if amp else "float32"}
            row.update({side: _median(results) for side, results in runs.items()})
            rows.append(row)
            print(row, flush=True)
    print(_table(rows))
    if args.json:
        args.json.write_text(json.dumps({"batch": size, "rows": rows}, indent=1))


def _run(config, opts, inputs, amp, args):
    """Return what :func:`measure` says of a detector built anew; None if memory is too small."""
    try:
        return measure(build(config, args.device, opts), inputs, amp, args.device, args.steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def _median(results):
    """Return (median seconds, peak GiB) over the steps of all rounds, None if any has none."""
    if None in results:
        return None
    return statistics.median(sum((times for times, _ in results), [])), results[-1][1]


def _table(rows):
    lines = [
        "| training step | arithmetic | ours | Detectron2 | ratio | peak, ours | Detectron2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, theirs = row["ours"], row["Detectron2"]
        ratio = f"{ours[0] / theirs[0]:.2f}" if ours and theirs else "-"
        cells = [row["detector"], row["arithmetic"], _ms(ours), _ms(theirs), ratio]
        lines.append("| " + " | ".join([*cells, _gib(ours), _gib(theirs)]) + " |")
    return "\n".join(lines)


def _ms(result):
    return f"{1000 * result[0]:.0f} ms" if result else "out of memory"


def _gib(result):
    return f"{result[1]:.1f} GiB" if result and result[1] is not None else "-"


if __name__ == "__main__":
    main()
