#!/usr/bin/env python
"""Draw the unscaled classification loss of several runs into one figure.

    python benchmarks/plot_losses.py output/compare/*_seed0 --out docs/losses.png
    python benchmarks/plot_losses.py output/compare/photos_long_seed* --every 600

A guided classification loss has the value of the box loss at every step, so it is the loss before
the scale that tells how the classification learns. Curves are labelled by the run's folder.

``--every N`` prints its mean over each N iterations, as a Markdown table of a row a run: whether a
schedule is long enough for a loss to be flat before the learning rate falls.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KEYS = ("dense/loss_cls_unscaled", "loss_cls")


def main():
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.json")
    parser.add_argument("--out", type=Path, help="the figure to draw")
    parser.add_argument("--every", type=int, help="print means over so many iterations")
    args = parser.parse_args()
    if not (args.every or args.out):
        parser.error("there is nothing to do without --out or --every")
    if args.every:
        print_means(args.runs, args.every)
    if args.out:
        draw(args.runs, args.out)


def print_means(runs, every):
    """Print the mean loss over each ``every`` iterations of each run."""
    means = {run.name: means_of(read_curve(run / "metrics.json"), every) for run in runs}
    ends = sorted({end for of_run in means.values() for end in of_run})
    print(f"| iterations up to | {' | '.join(map(str, ends))} |")
    print(f"| --- {'| --- ' * len(ends)}|")
    for name, of_run in means.items():
        cells = (f"{of_run[end]:.3f}" if end in of_run else "-" for end in ends)
        print(f"| {name} | {' | '.join(cells)} |")


def means_of(curve, every):
    """Return {last iteration: mean loss} of each ``every`` iterations of a curve."""
    losses = {}
    for iteration, loss in zip(*curve):
        losses.setdefault(math.ceil(iteration / every) * every, []).append(loss)
    return {end: sum(found) / len(found) for end, found in losses.items()}


def draw(runs, out):
    """Draw the curves of the runs into one figure."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for index, run in enumerate(runs):
        iterations, losses = read_curve(run / "metrics.json")
        label = run.name.removesuffix("_seed0").replace("_", " ")
        line = ("-", "--", ":")[index // 7]
        axes.plot(iterations, losses, line, label=label, color=f"C{index % 7}", linewidth=1.4)
    axes.set(xlabel="iteration", ylabel="classification loss, unscaled", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    print(f"Written to {out}")


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
