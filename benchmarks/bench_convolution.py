#!/usr/bin/env python
"""Time of the weight gradient of RetinaNet's last layer: WideConv2d beside torch's convolution.

    python benchmarks/bench_convolution.py [--device cuda|cpu] [--repeats 10]

The layer is that of 3 x 3 anchors' classes on 256 channels, for a batch of 8 images of 800 x 1216
(on the CPU, one of 192 x 256), at the finest level p3 and at p4. Arithmetic is torch's default for
convolutions: TF32 for float32 on GPUs that have it.
"""

import argparse
import statistics
import time

import torch
from torch.nn.grad import conv2d_weight

from balanced_det.detectors.wide_conv import weight_gradient

CHANNELS, ANCHORS = 256, 9


def milliseconds(function, x, shape, gradient, repeats):
    """Return the median time of a call of ``conv2d_weight`` or ``weight_gradient``."""
    times = []
    for _ in range(repeats + 2):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(x, shape, gradient, padding=1)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main():
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    images, height, width = (8, 800, 1216) if on_cuda else (1, 192, 256)

    print("| classes | arithmetic | level | torch | WideConv2d | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for classes in (365, 1203):
        for dtype in (torch.float32, torch.bfloat16):
            for level, stride in (("p3", 8), ("p4", 16)):
                size = (images, -1, height // stride, width // stride)
                shape = (ANCHORS * classes, CHANNELS, 3, 3)
                x = _random(CHANNELS, size, dtype, args.device)
                gradient = _random(ANCHORS * classes, size, dtype, args.device)
                case = (x, shape, gradient, args.repeats)
                theirs = milliseconds(conv2d_weight, *case)
                ours = milliseconds(weight_gradient, *case)
                cells = [f"{classes:,}", str(dtype)[6:], level, f"{theirs:.2f} ms"]
                cells += [f"{ours:.2f} ms", f"{ours / theirs:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def _random(channels, size, dtype, device):
    n, _, height, width = size
    return torch.randn(n, channels, height, width, dtype=dtype, device=device)


if __name__ == "__main__":
    main()
