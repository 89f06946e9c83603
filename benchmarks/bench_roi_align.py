#!/usr/bin/env python
"""Time of pooling the regions of a batch: BatchedROIPooler beside Detectron2's ROIPooler.

    python benchmarks/bench_roi_align.py [--device cuda|cpu] [--repeats 10] [--rounds 2]

The batch has 8 images of 800 x 1216 with levels p2 to p5 of 256 channels, and 4,096 boxes for a box
head or 512 for a mask head (on the CPU, one image of 192 x 256, 32 channels, 64 and 8 boxes). Their
sides are log-uniform from 16 to 640 pixels, and they are clipped to the image. Each row has both
poolers on the same features, which take turns; a time is the median over rounds of the median from
call to result, and a ratio is ours to Detectron2's. Forward is what training runs, and records the
graph. bf16 is autocast, with features as a convolution leaves them.
"""

import argparse
import statistics

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from timing import milliseconds

from balanced_det.detectors.pooler import BatchedROIPooler

STRIDES = (4, 8, 16, 32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    images, height, width = (8, 800, 1216) if on_cuda else (1, 192, 256)
    channels = 256 if on_cuda else 32
    heads = {"box": (7, 512 if on_cuda else 64), "mask": (14, 64 if on_cuda else 8)}

    print(torch.cuda.get_device_name() if on_cuda else "CPU", "torch", torch.__version__)
    print("| head | features | arithmetic | step | Detectron2 | batched | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for head, (bins, boxes) in heads.items():
        box_lists = [_boxes(boxes, height, width, args.device, seed) for seed in range(images)]
        for layout, memory_format in LAYOUTS.items():
            for dtype in (torch.float32, torch.bfloat16):
                features = [
                    torch.randn(images, channels, height // s, width // s, device=args.device)
                    .to(dtype, memory_format=memory_format)
                    .requires_grad_()
                    for s in STRIDES
                ]
                poolers = [
                    pooler(bins, [1 / s for s in STRIDES], 0, "ROIAlignV2")
                    for pooler in (ROIPooler, BatchedROIPooler)
                ]
                for step in ("forward", "forward and backward"):
                    runs = [_run(pooler, features, box_lists, step) for pooler in poolers]
                    times = [[], []]
                    for _ in range(args.rounds):
                        for run, found in zip(runs, times):
                            found.append(milliseconds(run, args.device, args.repeats))
                    theirs, ours = map(statistics.median, times)
                    cells = [f"{head}, {boxes * images:,} of {bins} x {bins}", layout]
                    cells += ["bf16" if dtype == torch.bfloat16 else "float32", step]
                    cells += [f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{ours / theirs:.2f}"]
                    print("| " + " | ".join(cells) + " |", flush=True)


def _run(pooler, features, box_lists, step):
    """Return a function that pools, and brings gradients to the features where asked to."""
    dtype = features[0].dtype

    def forward():
        with torch.autocast(features[0].device.type, torch.bfloat16, dtype == torch.bfloat16):
            return pooler(features, box_lists)

    if step == "forward":
        return forward
    incoming = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), features, incoming)


def _boxes(count, height, width, device, seed):
    """Return boxes as a region proposal network leaves them in one image."""
    generator = torch.Generator().manual_seed(seed)
    side = 16 * 40 ** torch.rand(count, 2, generator=generator)
    center = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    boxes = Boxes(torch.cat([center - side / 2, center + side / 2], dim=1).to(device))
    boxes.clip((height, width))
    return boxes


if __name__ == "__main__":
    main()
