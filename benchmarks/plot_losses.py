#!/usr/bin/env python
"""Draw the unscaled classification loss of several runs into one figure.

    python benchmarks/plot_losses.py output/compare/*_seed0 --out docs/losses.png

A guided classification loss has the value of the box loss at every step, so it is the loss before
the scale that tells how the classification learns. Curves are labelled by the run's folder.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KEYS = ("dense/loss_cls_unscaled", "loss_cls")


def main():
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for index, run in enumerate(args.runs):
        iterations, losses = read_curve(run / "metrics.json")
        label = run.name.removesuffix("_seed0").replace("_", " ")
        line = ("-", "--", ":")[index // 7]
        axes.plot(iterations, losses, line, label=label, color=f"C{index % 7}", linewidth=1.4)
    axes.set(xlabel="iteration", ylabel="classification loss, unscaled", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"Written to {args.out}")


def read_curve(path):
    """Return the iterations and the unscaled classification losses of a run's metrics.json."""
    points = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        key = next((k for k in KEYS if k in entry), None)
        if key is not None:
            points.append((entry["iteration"] + 1, entry[key]))
    return zip(*points, strict=True)


if __name__ == "__main__":
    main()
