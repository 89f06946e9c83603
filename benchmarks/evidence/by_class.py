"""Compare runs by what is kept of each class, where their detections are not kept.

    python benchmarks/evidence/by_class.py collect RUNS_FOLDER RUNS.jsonl --card NAME --commit HASH
    python benchmarks/evidence/by_class.py compare RUNS.jsonl COMPARISON.jsonl

``collect`` writes a line a run: its numbers, its command, and the AP of each class. ``compare``
makes of them the rows of ``balanced_det.compare``, whose intervals are over images and seeds;
without the detections, images cannot be drawn. Classes are drawn instead, as many as there are,
with replacement, the same for all runs, from each group by itself. A class is measured on its own
images, so how it came out by the chance of its images is part of how the classes differ from each
other: this interval says what would have come of other classes and their images, and is rather
wider than one over the images of these classes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from balanced_det.compare import interval_of, pooled_deviation
from balanced_det.data.annotations import GROUPS
from balanced_det.report import write_json_lines
from balanced_det.runs import read_metrics, read_record, read_settings

METRICS = ("AP", "APr", "APc", "APf")
DRAWS = 1000


def collect(folder, out, card, commit):
    """Write a line a run, by name of its setup and seed."""
    rows = []
    for run in sorted(path.parent for path in Path(folder).glob("*/run.json")):
        content = json.loads((run / "inference/lvis_classes.json").read_text())
        last = next(row for row in reversed(read_metrics(run)) if "bbox/AP" in row)
        record, settings = read_record(run), read_settings(run)
        times = [row["time"] for row in read_metrics(run) if "time" in row]
        rows.append(
            {
                "setup": run.name.rpartition("_seed")[0],
                "seed": settings["SEED"],
                **{name: last.get(f"bbox/{name}") for name in (*METRICS, "AP50", "AP75", "AR")},
                "seconds_per_iteration": round(float(np.median(times)), 4),
                "side_by_side": record["jobs"],
                "command": re.sub(
                    r"OUTPUT_DIR '?\S*/", "OUTPUT_DIR output/compare/", record["command"]
                ),
                "commit": commit,
                "card": card,
                "protocol": content["protocol"]["bbox"],
                "test_set": settings["DATASETS.TEST"][0],
                "groups": "".join(row["group"] for row in content["classes"]),
                "classes": [_rounded(row["bbox"]["AP"]) for row in content["classes"]],
            }
        )
    write_json_lines(out, rows)


def _rounded(value):
    return None if value is None else round(value, 2)


def compare(source, out, first):
    """Write a row a setup and metric: mean, spread, difference from ``first``, intervals."""
    runs = [json.loads(line) for line in Path(source).read_text().splitlines()]
    setups = sorted({run["setup"] for run in runs}, key=lambda name: (name != first, name))
    groups = np.array(list(runs[0]["groups"]))
    weights = _draws(groups)  # (K, 1 + B)
    values = {
        name: np.stack([_averages(run, groups, weights) for run in runs if run["setup"] == name])
        for name in setups
    }  # {setup: (S, M, 1 + B)}
    freedom = sum(len(of_setup) - 1 for of_setup in values.values())
    spread = pooled_deviation([v[..., 0] for v in values.values()])  # (M,)
    rows = []
    for name in setups:
        mean, of_first = values[name].mean(axis=0), values[setups[0]].mean(axis=0)
        own = interval_of(mean, spread / np.sqrt(len(values[name])), freedom, spread >= 0)
        shared = np.sqrt(1 / len(values[name]) + 1 / len(values[setups[0]]))
        difference = interval_of(mean - of_first, spread * shared, freedom, spread >= 0)
        for m, metric in enumerate(METRICS):
            row = {
                "setup": name,
                "metric": metric,
                "runs": len(values[name]),
                "mean": mean[m, 0],
                "standard_deviation": values[name][:, m, 0].std(ddof=1),
                "low": own.low[m],
                "high": own.high[m],
                "against": setups[0],
                **_difference(difference, m, name == setups[0]),
                "draws": DRAWS,
                "drawn": "classes",
                "seeds_freedom": freedom,
            }
            rows.append(
                {k: round(float(v), 4) if isinstance(v, float) else v for k, v in row.items()}
            )
    write_json_lines(out, rows)


def _difference(interval, m, is_first):
    names = ("difference", "difference_low", "difference_high")
    if is_first:
        return {**dict.fromkeys(names), "shown": ""}
    shown = {1: "higher", -1: "lower", 0: ""}[int(interval.shown()[m])]
    values = (interval.value[m], interval.low[m], interval.high[m])
    return {**dict(zip(names, values)), "shown": shown}


def _draws(groups):
    """(K, 1 + B) how often each class counts: once, then as often as each draw holds it."""
    generator = np.random.default_rng(0)
    weights = np.ones((len(groups), 1 + DRAWS))
    for group in GROUPS:
        of_group = np.flatnonzero(groups == group)
        even = np.full(len(of_group), 1 / max(len(of_group), 1))
        weights[of_group, 1:] = generator.multinomial(len(of_group), even, size=DRAWS).T
    return weights


def _averages(run, groups, weights):
    """(M, 1 + B) of one run: AP over all classes and over those of each group."""
    ap = np.array([np.nan if value is None else value for value in run["classes"]], float)
    found = []
    for metric in METRICS:
        counts = ~np.isnan(ap) & ((groups == metric[2:]) if metric[2:] else True)
        found.append(ap[counts] @ weights[counts] / weights[counts].sum(axis=0))
    if abs(found[0][0] - run["AP"]) > 0.01:
        raise SystemExit(
            f"error: {run['setup']}: its classes average {found[0][0]:.2f}, not its AP"
        )
    return np.stack(found)


def main(arguments=None):
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect")
    command.add_argument("folder")
    command.add_argument("out")
    command.add_argument("--card", required=True)
    command.add_argument("--commit", required=True)
    command = commands.add_parser("compare")
    command.add_argument("source")
    command.add_argument("out")
    command.add_argument("--first", required=True, help="setup that the others stand against")
    options = parser.parse_args(arguments)
    if options.command == "collect":
        collect(options.folder, options.out, options.card, options.commit)
    else:
        compare(options.source, options.out, options.first)


if __name__ == "__main__":
    sys.exit(main())
