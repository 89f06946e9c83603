#!/usr/bin/env python
"""Time of the weight gradient of RetinaNet's last layer: WideConv2d beside torch's convolution.

    python benchmarks/bench_convolution.py [--device cuda|cpu] [--repeats 10]

The layer is that of 3 x 3 anchors' classes on 256 channels, for a batch of 8 images of 800 x 1216
(on the CPU, one of 192 x 256), at the finest level p3 and at p4. Arithmetic is torch's default for
convolutions: TF32 for float32 on GPUs that have it.
"""

import argparse
import functools

import torch
from timing import milliseconds
from torch.nn.grad import conv2d_weight

from balanced_det.detectors.last_layer import weight_gradient

CHANNELS, ANCHORS = 256, 9


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
                theirs, ours = (
                    milliseconds(
                        functools.partial(function, x, shape, gradient, padding=1),
                        args.device,
                        args.repeats,
                    )
                    for function in (conv2d_weight, weight_gradient)
                )
                cells = [f"{classes:,}", str(dtype)[6:], level, f"{theirs:.2f} ms"]
                cells += [f"{ours:.2f} ms", f"{ours / theirs:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def _random(channels, size, dtype, device):
    n, _, height, width = size
    return torch.randn(n, channels, height, width, dtype=dtype, device=device)


if __name__ == "__main__":
    main()
