"""Time of the samplers an image, beside a straightforward implementation on the host.

    python benchmarks/bench_samplers.py [--device cuda|cpu] [--repeats 200] [--json FILE]

Two sizes: the 2,000 proposals of a region head (512 rows taken, a quarter foreground) and 200,000
anchors of a region proposal network (256 rows, half). The host side copies labels and IoUs to numpy
and works through ranges and objects one by one. A time is the median of wall-clock times from call
to result, with the device idle before and waited for after.
"""

import argparse
import dataclasses
import json

import numpy as np
import torch
from timing import milliseconds

from balanced_det.samplers import IoUBalancedSampler, OHEMSampler, RandomSampler

BACKGROUND, NUM_BINS = 80, 3


@dataclasses.dataclass
class Image:
    """What a sampler is given for one image, see :mod:`balanced_det.samplers`."""

    name: str
    labels: torch.Tensor
    ious: torch.Tensor
    matched_idxs: torch.Tensor
    losses: torch.Tensor
    num_samples: int
    positive_fraction: float

    def sample(self, sampler):
        """Return what ``sampler`` takes of this image."""
        return sampler(
            self.labels,
            self.ious,
            self.num_samples,
            self.positive_fraction,
            BACKGROUND,
            matched_idxs=self.matched_idxs,
            losses=self.losses,
        )


def make_image(name, rows, foreground, num_samples, positive_fraction, device, objects=20):
    """Make up an image: IoUs crowd at 0, and foreground rows are those above 0.5."""
    generator = torch.Generator().manual_seed(0)
    ious = 0.5 * torch.rand(rows, generator=generator) ** 6
    ious[:foreground] = 0.5 + 0.5 * torch.rand(foreground, generator=generator)
    ious = ious[torch.randperm(rows, generator=generator)]
    classes = torch.randint(BACKGROUND, (rows,), generator=generator)
    return Image(
        name,
        torch.where(ious >= 0.5, classes, BACKGROUND).to(device),
        ious.to(device),
        torch.randint(objects, (rows,), generator=generator).to(device),
        torch.rand(rows, generator=generator).to(device),
        num_samples,
        positive_fraction,
    )


class HostSampler:
    """IoU-balanced background and object-balanced foreground rows, in numpy and loops."""

    def __init__(self, instance_balanced):
        self.instance_balanced = instance_balanced
        self.random = np.random.default_rng(0)

    def __call__(
        self, labels, ious, num_samples, positive_fraction, bg_label, *, matched_idxs, losses
    ):
        """Return (positive_idx, negative_idx) on the device of the labels."""
        on_host = labels.cpu().numpy()
        positive = np.nonzero((on_host != -1) & (on_host != bg_label))[0]
        negative = np.nonzero(on_host == bg_label)[0]
        num_positive = min(len(positive), int(num_samples * positive_fraction))
        num_negative = min(len(negative), num_samples - num_positive)
        groups = np.zeros(len(positive), dtype=int)
        if self.instance_balanced:
            groups = matched_idxs.cpu().numpy()[positive]
        positive = self._equal_shares(positive, groups, num_positive)

        of_negative = ious.cpu().numpy()[negative]
        bins = of_negative / max(of_negative.max(initial=0), 1e-12) * NUM_BINS
        bins = np.minimum(bins.astype(int), NUM_BINS - 1)
        negative = self._equal_shares(negative, bins, num_negative)
        return tuple(torch.from_numpy(rows).to(labels.device) for rows in (positive, negative))

    def _equal_shares(self, rows, groups, count):
        present = np.unique(groups)
        chosen = []
        for group in present:
            candidates = rows[groups == group]
            share = min(len(candidates), count // len(present))
            chosen.append(self.random.choice(candidates, share, replace=False))
        chosen = np.concatenate([*chosen, np.empty(0, dtype=rows.dtype)])
        rest = np.setdiff1d(rows, chosen)
        missing = self.random.choice(rest, count - len(chosen), replace=False)
        return np.concatenate([chosen, missing])


def _milliseconds(image, sampler, args):
    return milliseconds(lambda: image.sample(sampler), args.device, args.repeats)


def main():
    """Measure, print a Markdown table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", default="bench_samplers.json", help="file to write")
    args = parser.parse_args()

    images = [
        make_image("proposals", 2_000, 200, 512, 0.25, args.device),
        make_image("anchors", 200_000, 300, 256, 0.5, args.device),
    ]
    samplers = [
        ("IoU-balanced", IoUBalancedSampler(NUM_BINS), HostSampler(False)),
        (
            "IoU- and object-balanced",
            IoUBalancedSampler(NUM_BINS, instance_balanced=True),
            HostSampler(True),
        ),
        ("random", RandomSampler(), None),
        ("hardest (OHEM)", OHEMSampler(), None),
    ]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}; milliseconds an image\n")
    print("| rows | sampler | ours | on the host |")
    print("| --- | --- | --- | --- |")
    table = []
    for image in images:
        for sampler_name, ours, host in samplers:
            row = {"rows": len(image.labels), "sampler": sampler_name}
            row["ours_ms"] = _milliseconds(image, ours, args)
            row["host_ms"] = None
            if host is not None:
                row["host_ms"] = _milliseconds(image, host, args)
            table.append(row)
            theirs = "-" if host is None else f"{row['host_ms']:.3f}"
            print(
                f"| {len(image.labels):,} {image.name} | {sampler_name} | {row['ours_ms']:.3f} | "
                f"{theirs} |"
            )
    with open(args.json, "w") as file:
        json.dump({"torch": torch.__version__, "device": name, "rows": table}, file, indent=1)
    print(f"\nWritten to {args.json}")


if __name__ == "__main__":
    main()
