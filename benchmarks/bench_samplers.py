"""Time of the samplers a batch, beside their plain forms, which work image by image on the host.

    python benchmarks/bench_samplers.py [--device cuda|cpu] [--repeats 200] [--json FILE]

Batches of 8 images of two sizes: the 2,000 proposals of a region head (512 rows taken, a quarter
foreground) and 200,000 anchors of a region proposal network (256 rows, half). The plain forms are
those that stand beside the samplers and that the tests compare them with; what they read is copied
to the host within their time. A time is the median of wall-clock times from call to result, with
the device idle before and waited for after.
"""

import argparse
import json
from functools import partial

import torch
from timing import milliseconds

from balanced_det.samplers import IoUBalancedSampler, OHEMSampler, RandomSampler
from balanced_det.samplers.hard_examples import hard_examples
from balanced_det.samplers.random import random_sample
from balanced_det.selection import Quota, Rows

NUM_CLASSES, NUM_IMAGES = 80, 8


def make_rows(rows, foreground, device, objects=20):
    """Make up a batch: IoUs crowd at 0, and foreground rows are those above 0.5."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_IMAGES, rows)
    ious = 0.5 * torch.rand(shape, generator=generator) ** 6
    ious[:, :foreground] = 0.5 + 0.5 * torch.rand(NUM_IMAGES, foreground, generator=generator)
    ious = ious[:, torch.randperm(rows, generator=generator)]
    classes = torch.randint(NUM_CLASSES, shape, generator=generator)
    return Rows(
        torch.where(ious >= 0.5, classes, NUM_CLASSES).to(device),
        NUM_CLASSES,
        ious.to(device),
        torch.randint(objects, shape, generator=generator).to(device),
        torch.rand(shape, generator=generator).to(device),
    )


def kinds(rows):
    """Return the foreground and the background rows of each image, as lists of indices."""
    masks = zip(rows.foreground.cpu(), rows.background.cpu())
    return [[mask.nonzero().flatten().tolist() for mask in pair] for pair in masks]


def plain_random(rows, quota):
    """Draw image by image as :func:`random_sample` says."""
    return [random_sample(*pair, quota) for pair in kinds(rows)]


def plain_hard(rows, quota):
    """Take image by image what :func:`hard_examples` says."""
    losses = rows.losses.tolist()
    return [hard_examples(*pair, of_image, quota) for pair, of_image in zip(kinds(rows), losses)]


def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", default="bench_samplers.json", help="file to write")
    args = parser.parse_args()

    batches = [
        ("proposals", make_rows(2_000, 200, args.device), Quota(512, 0.25)),
        ("anchors", make_rows(200_000, 300, args.device), Quota(256, 0.5)),
    ]
    samplers = [
        ("random", RandomSampler(), plain_random),
        ("hardest (OHEM)", OHEMSampler(), plain_hard),
        ("IoU-balanced", IoUBalancedSampler(), None),
        ("IoU- and object-balanced", IoUBalancedSampler(instance_balanced=True), None),
    ]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}; milliseconds a batch of {NUM_IMAGES} images\n")
    print("| rows of an image | sampler | ours | plain form |")
    print("| --- | --- | --- | --- |")
    table = []
    for of_what, rows, quota in batches:
        for sampler_name, ours, plain in samplers:
            row = {"rows": rows.labels.shape[1], "sampler": sampler_name}
            row["ours_ms"] = milliseconds(partial(ours, rows, quota), args.device, args.repeats)
            if plain is not None:
                row["plain_ms"] = milliseconds(partial(plain, rows, quota), args.device, 3)
            table.append(row)
            cell = f"{row['plain_ms']:.1f}" if plain is not None else "-"
            print(f"| {row['rows']:,} {of_what} | {sampler_name} | {row['ours_ms']:.3f} | {cell} |")
    with open(args.json, "w") as file:
        json.dump({"torch": torch.__version__, "device": name, "rows": table}, file, indent=1)
    print(f"\nWritten to {args.json}")


if __name__ == "__main__":
    main()
