"""Compare configs or finished runs: ``python -m balanced_det.compare CONFIG... --seeds 3``.

What is missing is trained, what was interrupted goes on; then one page tells how the setups differ
from the first, with intervals, and what each costs. A setup is ``CONFIG``, or
``CONFIG+FRAGMENT+KEY=VALUE``: a config file, fragments as for ``--with``, and keys of its own.

The intervals
    say what would have come of other validation images and other seeds. Images are drawn with
    replacement (:mod:`balanced_det.evaluation.resampling`), the same draws for all runs, so that
    what makes an image hard for all cancels in a difference. A draw has other images twice or not
    at all, which shifts AP by itself, so its deviation from the mean of the draws counts. To that
    comes the seeds' part: their standard deviation is pooled over all setups, since three runs tell
    little of it, and Student's t of as many degrees of freedom as were pooled stands for what is
    not known of it. With one run a setup nothing is known of seeds, and the page says so. What
    fewer than six images hold has no interval: even if all of them agreed, that would come about by
    chance more often than once in twenty times (twice 2^-5; twice 2^-6 is 1 in 32).
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .data.annotations import GROUPS, Annotations, read_annotations
from .errors import InputError
from .evaluation.detections import read_detection_files
from .evaluation.lvis import IOU_TYPES
from .evaluation.resampling import average_precision, draw_images, match_records
from .logs import escape_log_records
from .report import Page, figures, telling, write_csv, write_json_lines
from .runs import (
    PLACE_KEYS,
    Run,
    annotation_file,
    distinct_names,
    parse_setup,
    plan,
    read_run,
    train_all,
)

METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf")
_TOLD = ("AP", "APr", "APc", "APf")  # what a verdict is given of
_QUANTILES = (0.025, 0.975)
_GROUP_NAMES = dict(zip(GROUPS, ("rare", "common", "frequent")))
_MIN_IMAGES = 6  # that hold an object, for an interval
_SAME_AP = 0.01  # percent: the files of detections hold the numbers that were evaluated
_FEW = 8  # figures of classes


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A setup and its finished runs.

    Attributes:
        name: what the page calls it.
        runs: S of them.
        failures: why runs are missing.
        metrics: (S, M, 1 + B) percent: M of :data:`METRICS` with the images as they are, then in
            each draw; NaN where nothing is averaged.
        classes: (S, K, 1 + B), AP of each class, in the same way.
    """

    name: str
    runs: list[Run]
    failures: list[str]
    metrics: np.ndarray
    classes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Numbers and what they might have been; arrays of one shape, NaN where there is no number.

    Attributes:
        value: the mean over runs, or the difference of two means.
        low, high: over other images and seeds, 95%; NaN where too few images hold an object.
        images_low, images_high: over other images alone.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    images_low: np.ndarray
    images_high: np.ndarray

    def shown(self) -> np.ndarray:
        """Return 1 where the interval lies above zero, -1 where below, else 0."""
        return (self.low > 0).astype(int) - (self.high < 0).astype(int)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """All that the page and the files are made of; the first entry is what others stand against.

    Attributes:
        entries: with at least one run each but for those that failed.
        truth: what was evaluated on, and ``digest``, SHA-256 of that file.
        groups: K of "r", "c", "f" or None.
        train_images: {class: training images}.
        holding: images that hold an object: of "metrics" (M,), of "classes" (K,).
        draws: B.
        task: "bbox" or "segm".
    """

    entries: list[Entry]
    truth: Annotations
    digest: str
    groups: list
    train_images: dict
    holding: dict
    draws: int
    task: str

    @property
    def first(self) -> Entry:
        """What the others are compared with."""
        return self.entries[0]

    @property
    def others(self) -> list[Entry]:
        """Those that have runs, without the first."""
        return [entry for entry in self.entries[1:] if entry.runs]

    @property
    def seeds_freedom(self) -> int:
        """The degrees of freedom of the seeds' spread; 0: nothing is known of it."""
        return sum(len(entry.runs) - 1 for entry in self.entries if entry.runs)

    def mean(self, entry: Entry, of: str = "metrics") -> Interval:
        """Return the mean over an entry's runs, of its "metrics" (M,) or "classes" (K,)."""
        values = getattr(entry, of)
        spread = self._spread(of) / np.sqrt(len(values))
        found = self._interval(of, values.mean(axis=0), spread)
        return Interval(*(np.clip(x, 0, 100) for x in dataclasses.astuple(found)))  # percent

    def difference(self, entry: Entry, of: str = "metrics") -> Interval:
        """Return the entry's mean less the first's."""
        ours, theirs = getattr(entry, of), getattr(self.first, of)
        spread = self._spread(of) * np.sqrt(1 / len(ours) + 1 / len(theirs))
        return self._interval(of, ours.mean(axis=0) - theirs.mean(axis=0), spread)

    def _interval(self, of, values, spread):
        enough = self.holding[of] >= _MIN_IMAGES
        return interval_of(values, spread, self.seeds_freedom, enough)

    def _spread(self, of):
        """(M,) or (K,) standard deviation between runs of one entry, pooled over all."""
        return pooled_deviation([getattr(e, of)[..., 0] for e in self.entries if e.runs])


def pooled_deviation(setups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the standard deviation between the runs of one setup, pooled over all, (n,).

    Args:
        setups: (S, n) for each setup, n numbers of its S runs; 0 where none has two.
    """
    squares = sum(((values - values.mean(axis=0)) ** 2).sum(axis=0) for values in setups)
    return np.sqrt(squares / max(sum(len(values) - 1 for values in setups), 1))


def interval_of(
    values: np.ndarray, spread: np.ndarray, freedom: int, enough: np.ndarray
) -> Interval:
    """Return the :class:`Interval` of n numbers.

    Args:
        values: (n, 1 + B) each number and its draws.
        spread: (n,) its standard error over seeds.
        freedom: degrees of freedom of that.
        enough: (n,) bool, whether it has an interval.
    """
    number = values[:, 0]
    draws = np.where(enough[:, None], values[:, 1:], np.nan).astype(np.float64)
    deviation = draws - _mean_of_present(draws, axis=1)[:, None]
    images = _quantiles(deviation)
    if freedom:
        # The same for every number, so that equal data gives equal intervals.
        t = np.random.default_rng(1).standard_t(freedom, draws.shape[1])
        deviation = deviation + spread[:, None] * t
    both = _quantiles(deviation)
    return Interval(number, *(number + both), *(number + images))


def _quantiles(deviation):
    """(2, n) quantiles of (n, B), NaN for a row without a number."""
    result = np.full((2, len(deviation)), np.nan)
    some = ~np.isnan(deviation).all(axis=1)
    if some.any():
        result[:, some] = np.nanquantile(deviation[some], _QUANTILES, axis=1)
    return result


def _mean_of_present(values, axis):
    present = ~np.isnan(values)
    total = np.where(present, values, 0).sum(axis=axis, dtype=np.float64)
    count = present.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# --- Measuring ------------------------------------------------------------------------------------


def compare_runs(
    groups_of_runs: Sequence[tuple[str, Sequence[Run], Sequence[str]]],
    *,
    draws: int = 1000,
    task: str = "bbox",
    jobs: int = 1,
) -> Comparison:
    """Evaluate the detections of finished runs on their images and on draws of them.

    Args:
        groups_of_runs: (name, runs, failures) of each setup, the first to compare with.
        draws: B, draws of images.
        task: "bbox" or "segm".
        jobs: runs that are evaluated side by side, each in a process of its own.

    Raises:
        InputError: the first has no run, or the runs differ in their data or classes.
    """
    name, runs, failures = groups_of_runs[0]
    if not runs:
        raise InputError(f"'{name}', which all are compared with, has no run: {failures[0]}")
    first = runs[0]
    truth, digest = read_annotations(first.annotations), _digest(first.annotations)
    weights = draw_images(len(truth.images), draws)
    groups = [first.groups.get(c) or truth.categories[c].frequency for c in _classes(truth)]
    holding = _images_holding(truth, groups)
    check_same_data(
        [(f"'{r.folder}'", r.annotations) for _, runs, _ in groups_of_runs for r in runs]
    )
    all_runs = [run for _, runs, _ in groups_of_runs for run in runs]
    measured = iter(_measure_all(all_runs, jobs, (truth, weights, groups, task)))
    entries = []
    for name, runs, failures in groups_of_runs:
        metrics, classes = zip(*(next(measured) for _ in runs)) if runs else ((), ())
        entries.append(
            Entry(name, list(runs), list(failures), np.array(metrics), np.array(classes))
        )
    return Comparison(entries, truth, digest, groups, first.train_images, holding, draws, task)


def _measure_all(runs, jobs, how):
    """A list of :func:`_measure` of the runs, as many at a time as ``jobs``."""
    progress = functools.partial(tqdm, desc="Evaluating", unit="run", total=len(runs))
    if min(jobs, len(runs)) == 1:
        return list(progress(_measure(run, *how) for run in runs))
    # New processes: those of a fork would have copies of torch's threads and locks.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(runs)), context, initializer=_share, initargs=how
    ) as pool:
        return list(progress(pool.map(_measure_shared, runs)))


_shared: list[Any] = []  # what a worker of _measure_all measures by, sent once


def _share(*how):
    _shared[:] = how


def _measure_shared(run):
    return _measure(run, *_shared)


def _classes(truth):
    return range(len(truth.categories))


def _images_holding(truth, groups):
    """Images that hold an object to find, of each metric's classes and of each class."""
    counted = _counted(truth)
    image, category = truth.image[counted], truth.category[counted]
    of_group = np.array([group or "" for group in groups])[category]
    metrics = [
        len(np.unique(image[of_group == name[2:]] if name[2:] in GROUPS else image))
        for name in METRICS
    ]
    pairs = np.unique(np.stack([category, image]), axis=1)
    classes = np.bincount(pairs[0], minlength=len(groups))
    return {"metrics": np.array(metrics), "classes": classes}


def _counted(truth):
    """(n,) bool: what is an object to find."""
    return ~(truth.crowd | truth.ignore) & truth.finite()


def check_same_data(tests: Sequence[tuple[str, str]]) -> None:
    """Refuse what was evaluated on other data or classes than the first.

    Args:
        tests: (what a message calls it, its annotation file).

    Raises:
        InputError: as told, or a file cannot be read.
    """
    name, path = tests[0]
    others = {other: who for who, other in reversed(tests) if other != path}
    if not others:
        return
    truth, digest = read_annotations(path), _digest(path)
    expected = [category.name for category in truth.categories]
    for other, who in others.items():
        own = read_annotations(other)
        names = [category.name for category in own.categories]
        if names != expected:
            raise InputError(
                f"{who} and {name} have other classes: {own.source} lists {len(names)}, "
                f"{truth.source} {len(expected)}, and they differ."
            )
        if _digest(other) != digest:
            raise InputError(
                f"{who} and {name} are evaluated on other data, {own.source} and {truth.source}."
            )


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _measure(run, truth, weights, groups, task):
    """(M, 1 + B) and (K, 1 + B) of one run, in percent."""
    detections = read_detection_files([run.detections], truth, task)
    records = match_records(truth, detections, task, run.max_dets)
    precision = 100 * average_precision(records, weights)  # (10, K, 1 + B)
    classes = precision.mean(axis=0)
    of_metric = {
        "AP": classes,
        "AP50": precision[0],
        "AP75": precision[5],
        **{f"AP{g}": classes[[group == g for group in groups]] for g in GROUPS},
    }
    metrics = np.stack([_mean_of_present(of_metric[name], axis=0) for name in METRICS])
    recorded = (run.metrics or {}).get("AP")
    if recorded is not None and abs(recorded - metrics[0, 0]) > _SAME_AP:
        raise InputError(
            f"'{run.folder}': its detections give AP {metrics[0, 0]:.2f} on {truth.source}, but "
            f"{recorded:.2f} was recorded: the annotations have changed, or it was evaluated "
            "otherwise."
        )
    return metrics, classes


# --- The page and the files -----------------------------------------------------------------------


def write_comparison(c: Comparison, out: str | os.PathLike, command: str = "") -> Path:
    """Write the page and its numbers into a folder, each whole or not at all, the page last.

    They are ``compare.html``, ``runs.jsonl`` (a line a run, with its command, commit, card and
    protocol), ``comparison.jsonl`` and ``comparison.csv`` (a row a setup and metric) and
    ``classes.csv`` (a row a setup and class).

    Args:
        c: what to tell.
        out: folder.
        command: that made it.

    Returns:
        The path of the page.
    """
    out = Path(out)
    rows = comparison_rows(c, command)
    write_json_lines(out / "runs.jsonl", run_rows(c))
    write_json_lines(out / "comparison.jsonl", rows)
    flat = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    write_csv(out / "comparison.csv", flat, ([row[key] for key in flat] for row in rows))
    write_csv(out / "classes.csv", *class_table(c))
    return make_page(c, command).write(out / "compare.html")


def run_rows(c: Comparison) -> list[dict]:
    """Return a dictionary for each run: its numbers, what it cost, and where it comes from."""
    return [
        {
            "setup": entry.name,
            "seed": run.seed,
            "folder": str(run.folder),
            "task": c.task,
            **{name: _number(v) for name, v in zip(METRICS, values[:, 0])},
            **run.cost(),
            **{f"gradient_share_{g}": share for g, share in run.gradient_shares().items()},
            **run.provenance(),
            "test_set": run.test_set,
            "annotations_sha256": c.digest,
        }
        for entry in c.entries
        for run, values in zip(entry.runs, entry.metrics)
    ]


def comparison_rows(c: Comparison, command: str = "") -> list[dict]:
    """Return a dictionary for each setup and metric: mean, spread, difference and intervals."""
    rows = []
    for entry in (c.first, *c.others):
        sources = [run.provenance() for run in entry.runs]
        mean, difference = c.mean(entry), c.difference(entry)
        spread = _spread_of(entry.metrics)
        for m, metric in enumerate(METRICS):
            rows.append(
                {
                    "setup": entry.name,
                    "metric": metric,
                    "runs": len(entry.runs),
                    "mean": _number(mean.value[m]),
                    "standard_deviation": _number(spread[m]),
                    "low": _number(mean.low[m]),
                    "high": _number(mean.high[m]),
                    "against": c.first.name,
                    **_difference_columns(difference, m, entry is c.first),
                    "draws": c.draws,
                    "seeds_freedom": c.seeds_freedom,
                    "task": c.task,
                    "protocol": sources[0]["protocol"],
                    "test_set": entry.runs[0].test_set,
                    "annotations_sha256": c.digest,
                    "commit": _joined(source["commit"] for source in sources),
                    "card": _joined(source["card"] for source in sources),
                    "command": command,
                    "commands": [source["command"] for source in sources],
                }
            )
    return rows


def _difference_columns(difference, index, is_first):
    names = ("value", "low", "high", "images_low", "images_high")
    columns = ["difference", *(f"difference_{name}" for name in names[1:])]
    values = [None if is_first else _number(getattr(difference, n)[index]) for n in names]
    shown = "" if is_first else _VERDICTS[int(difference.shown()[index])]
    return {**dict(zip(columns, values)), "shown": shown}


_VERDICTS = {1: "higher", -1: "lower", 0: ""}


def class_table(c: Comparison) -> tuple[list[str], list[list]]:
    """Return header and rows: each class of each setup that has an object to find."""
    header = [
        "setup",
        "class",
        "group",
        "training images",
        "test images",
        "test objects",
        "AP",
        "low",
        "high",
        "difference",
        "difference low",
        "difference high",
        "shown",
    ]
    objects = np.bincount(c.truth.category[_counted(c.truth)], minlength=len(c.groups))
    rows = []
    for entry in (c.first, *c.others):
        mean, difference = c.mean(entry, "classes"), c.difference(entry, "classes")
        for k, category in enumerate(c.truth.categories):
            if np.isnan(mean.value[k]):
                continue
            columns = _difference_columns(difference, k, entry is c.first)
            rows.append(
                [
                    entry.name,
                    category.name,
                    _GROUP_NAMES.get(c.groups[k]),
                    c.train_images.get(k),
                    int(c.holding["classes"][k]),
                    int(objects[k]),
                    *(_number(getattr(mean, n)[k]) for n in ("value", "low", "high")),
                    *(columns[f"difference{n}"] for n in ("", "_low", "_high")),
                    columns["shown"],
                ]
            )
    return header, rows


def make_page(c: Comparison, command: str = "") -> Page:
    """Return the page of a comparison."""
    page = Page("Comparison", f"Against {c.first.name}, on {c.truth.source}")
    page.tiles(
        {
            "setups": str(len(c.entries)),
            "runs": str(sum(len(entry.runs) for entry in c.entries)),
            "validation images": f"{len(c.truth.images):,}",
            "objects": f"{_counted(c.truth).sum():,}",
            "classes": f"{len(c.truth.categories):,}",
        }
    )
    _show_verdicts(page, c)
    _show_numbers(page, c)
    _show_differences(page, c)
    _show_classes(page, c)
    _show_gradient_shares(page, c)
    _show_cost(page, c)
    _show_settings(page, c)
    _show_runs(page, c, command)
    return page


def _show_verdicts(page, c):
    page.section("What the numbers say")
    for entry in c.entries:
        for failure in entry.failures:
            page.conclude(f"A run of {entry.name} is missing.", failure, "warn")
    for entry in c.others:
        page.conclude(*verdict(c, entry))
    for what, key in (("commits", "commit"), ("limits of detections an image", "max_dets")):
        found = _all(c, key)
        if len(found) > 1:
            page.conclude(
                f"The runs have different {what}, to which a difference may be due.",
                f"{', '.join(found)}.",
                "warn",
            )
    told = len(c.others) * sum(not np.isnan(v) for v in _told_values(c))
    page.say(
        "Higher or lower is said only where a 95% interval excludes zero. Intervals tell what "
        "might have come of "
        + ("other images and other seeds." if c.seeds_freedom else "other images alone.")
    )
    if not c.seeds_freedom:
        page.say(
            "There is one run of each setup, so nothing is known of seeds: another seed may turn "
            "any of these differences round. Train with --seeds 3 or more."
        )
    if told > 5:
        page.say(
            f"{told} differences are told here: where nothing differs, about {0.05 * told:.0f} of "
            "them would look as if it did."
        )


def _all(c, key):
    """What the runs have as their "commit", "card" or "max_dets", each once; unknown ones too."""
    runs = [run for entry in c.entries for run in entry.runs]
    found = ({**run.provenance(), "max_dets": run.max_dets}[key] for run in runs)
    return list(dict.fromkeys("unknown" if value is None else str(value) for value in found))


def _told_values(c):
    return [c.first.metrics[0, METRICS.index(name), 0] for name in _TOLD]


def verdict(c: Comparison, entry: Entry) -> tuple[str, str, str]:
    """Return a sentence, its numbers, and "do", "warn" or "note" for higher, lower or neither."""
    difference = c.difference(entry)
    shown = difference.shown()
    first, *_ = told = [METRICS.index(m) for m in _TOLD if not np.isnan(_at(difference, m))]
    found = [
        f"{METRICS[m]} {abs(difference.value[m]):.1f} {_VERDICTS[int(shown[m])]}"
        for m in told
        if shown[m]
    ]
    if found:
        text = f"{entry.name} has {_listed(found)} than {c.first.name}."
        if not shown[first]:
            text += " For AP over all classes no difference is shown."
    else:
        text = f"{entry.name}: no difference from {c.first.name} is shown."
    numbers = "; ".join(
        f"{METRICS[m]} {difference.value[m]:+.1f} ({_range(difference, m, '+.1f')})" for m in told
    )
    kinds = {1: "do", -1: "warn", 0: "note"}
    return text, f"{numbers}.", kinds[int(shown[first])]


def _range(interval, index, form):
    if np.isnan(interval.low[index]):
        return "too few images"
    return f"{interval.low[index]:{form}} to {interval.high[index]:{form}}"


def _at(interval, metric):
    return interval.value[METRICS.index(metric)]


def _listed(texts):
    *most, last = texts
    return f"{', '.join(most)} and {last}" if most else last


def _show_numbers(page, c):
    page.section("Every setup")
    shown = [m for m, v in enumerate(c.first.metrics[0, :, 0]) if not np.isnan(v)]
    header = ["setup", "runs", *(METRICS[m] for m in shown)]
    page.table(header, [_number_row(c, entry, shown) for entry in c.entries])
    spread = " ± standard deviation between runs" if c.seeds_freedom else ""
    page.say(
        f"Mean over runs{spread}, and below it the 95% interval, in percent. AP is averaged over "
        "classes: r, c and f are those that are rare, common and frequent in training."
    )


def _number_row(c, entry, shown):
    if not entry.runs:
        return [entry.name, 0, *(None for _ in shown)]
    mean, spread = c.mean(entry), _spread_of(entry.metrics)
    cells = []
    for m in shown:
        deviation = "" if np.isnan(spread[m]) else f" ± {spread[m]:.1f}"
        cells.append(f"{mean.value[m]:.1f}{deviation} ({_range(mean, m, '.1f')})")
    return [entry.name, len(entry.runs), *cells]


def _show_differences(page, c):
    if not c.others:
        return
    page.section(f"Differences from {c.first.name}")
    for metric in _TOLD:
        rows = []
        for entry in c.others:
            difference, m = c.difference(entry), METRICS.index(metric)
            if np.isnan(difference.value[m]):
                continue
            rows.append(
                {
                    "setup": _label(c, entry),
                    f"difference in {metric}": float(difference.value[m]),
                    "low": float(difference.low[m]),
                    "high": float(difference.high[m]),
                    "low, images alone": float(difference.images_low[m]),
                    "high, images alone": float(difference.images_high[m]),
                }
            )
        if rows:
            page.figure(
                figures.intervals(
                    rows, f"difference in {metric}", "low", "high", "setup", zero=c.first.name
                ),
                f"{metric} less that of {c.first.name}, percent, with 95% intervals.",
            )


def _label(c, entry):
    """A name for an axis, which cuts long ones: what a setup adds to the first."""
    added = entry.name.removeprefix(f"{c.first.name}+")
    return entry.name if added == entry.name else f"+{added}"


def _show_classes(page, c):
    page.section("Classes")
    header, rows = class_table(c)
    by_setup = [
        [dict(zip(header, row)) for row in rows if row[0] == entry.name] for entry in c.others
    ]
    for entry, table in list(zip(c.others, by_setup))[:_FEW]:
        shown = sum(bool(row["shown"]) for row in table)
        known = sum(row["difference low"] is not None for row in table)
        axis = "training images" if c.train_images else "test objects"
        points = [
            {
                axis: row[axis],
                "difference in AP": row["difference"],
                "class": row["class"],
                "group": row["group"] or "all",
                "low": row["difference low"],
                "high": row["difference high"],
                "test objects": row["test objects"],
            }
            for row in table
        ]
        order = [name for name in _GROUP_NAMES.values() if any(p["group"] == name for p in points)]
        page.figure(
            figures.points(
                points, axis, "difference in AP", color="group", order=order, log_x=True
            ),
            f"{entry.name}: AP of each class less that of {c.first.name}. Of {known} classes that "
            f"{_MIN_IMAGES} or more images hold, the interval of {shown} excludes zero; about "
            f"{0.05 * known:.0f} would by chance.",
        )
    if len(c.others) > _FEW:
        page.say(f"Figures of the first {_FEW} setups; the table has all.")
    page.table(header, rows, summary=f"AP of every class ({len(rows):,} rows)")


def _show_gradient_shares(page, c):
    shares = [[run.gradient_shares() for run in entry.runs] for entry in c.entries]
    rows = [
        [entry.name, *(_mean(share[group] for share in of_runs) for group in GROUPS)]
        for entry, of_runs in zip(c.entries, shares)
    ]
    if all(share is None for _, *of_groups in rows for share in of_groups):
        return
    page.section("Whose gradient it is")
    page.table(["setup", *(f"{name}, percent" for name in _GROUP_NAMES.values())], rows)
    page.say(
        "What part of the classification's gradient each group of classes had, on average over "
        "training and runs."
    )


def _show_cost(page, c):
    page.section("What it costs")
    header = [
        "setup",
        "seconds an iteration",
        "times the first's",
        "training, minutes",
        "GPU memory, MB",
        "host memory, MB",
        "card",
    ]
    costs = [[run.cost() for run in entry.runs] for entry in c.entries]
    first = _median(cost["seconds_per_iteration"] for cost in costs[0])
    rows = []
    for entry, of_runs in zip(c.entries, costs):
        step = _median(cost["seconds_per_iteration"] for cost in of_runs)
        training = _median(cost["training_seconds"] for cost in of_runs)
        rows.append(
            [
                entry.name,
                step,
                step / first if step and first else None,
                training / 60 if training else None,
                _largest(cost["gpu_memory_mb"] for cost in of_runs),
                _largest(cost["host_memory_mb"] for cost in of_runs),
                _joined(run.provenance()["card"] for run in entry.runs) or None,
            ]
        )
    page.table(header, rows)
    together = {n for of_runs in costs for cost in of_runs if (n := cost["side_by_side"])}
    page.say("Seconds are medians over iterations and runs, memory is the largest of a run.")
    if together - {1}:
        told = ", ".join(map(str, sorted(together)))
        page.say(
            f"Trainings that ran side by side: {told}. They share the machine, so times compare "
            "only within this page, and roughly."
        )


def _show_settings(page, c):
    page.section("How the configs differ")
    settings = [entry.runs[0].settings for entry in c.entries if entry.runs]
    names = [entry.name for entry in c.entries if entry.runs]
    keys = sorted(set(itertools.chain(*settings)) - set(PLACE_KEYS))
    rows = [
        [key, *(_setting(s.get(key)) for s in settings)]
        for key in keys
        if any(s.get(key) != settings[0].get(key) for s in settings)
    ]
    if rows:
        page.table(["key", *names], rows)
    else:
        page.say("They do not differ.")


def _show_runs(page, c, command):
    page.section("Where the numbers come from")
    if command:
        page.code(command)
    header = ["setup", "seed", *METRICS, "commit", "card", "command", "protocol"]
    rows = [
        [_protocol(row["protocol"]) if key == "protocol" else row[key] for key in header]
        for row in run_rows(c)
    ]
    page.table(header, rows, summary=f"{len(rows)} runs")
    page.say(
        f"{c.draws:,} draws of the validation images with replacement, the same for all runs; "
        f"seeds' spread pooled over all setups, {c.seeds_freedom} degrees of freedom."
    )


def _protocol(protocol):
    return ", ".join(f"{key} {value}" for key, value in protocol.items())


def _setting(value):
    return None if value is None else str(value)


def _spread_of(metrics):
    """(M,) standard deviation over the runs, NaN for one."""
    if len(metrics) < 2:
        return np.full(metrics.shape[1], np.nan)
    return metrics[..., 0].std(axis=0, ddof=1)


def _number(value):
    return None if np.isnan(value) else round(float(value), 4)


def _median(values):
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _largest(values):
    return max((value for value in values if value is not None), default=None)


def _joined(texts):
    return ", ".join(dict.fromkeys(text for text in texts if text))


def summary(c: Comparison) -> str:
    """Return the table of the page as text, and the verdicts."""
    shown = [m for m, v in enumerate(c.first.metrics[0, :, 0]) if not np.isnan(v)]
    lines = ["| setup | " + " | ".join(METRICS[m] for m in shown) + " |"]
    lines.append("| --- |" + " --- |" * len(shown))
    for entry in c.entries:
        name, _, *cells = _number_row(c, entry, shown)
        lines.append(f"| {name} | " + " | ".join(cell or "failed" for cell in cells) + " |")
    for entry in c.others:
        text, numbers, _ = verdict(c, entry)
        lines.append(f"- {text}\n    {numbers}")
    return "\n".join(lines)


# --- The command line -----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see ``--help``. Returns 1 where a training failed."""
    escape_log_records()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Detectron2 and fvcore still script functions, which torch deprecates at their import.
    warnings.filterwarnings("ignore", ".torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "Importing from timm.models.layers", FutureWarning)
    try:
        options = _parse(arguments)
        setups, opts = _split_words(options.setups)
        compared = _finished(options, setups, opts)
        found = compare_runs(compared, draws=options.draws, task=options.task, jobs=options.jobs)
        command = " ".join(["balanced-det compare", *arguments])
        with telling("Writing the page"):
            page = write_comparison(found, options.out, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        return 130
    print(summary(found))
    print(f"Written to {page}")
    return int(any(entry.failures for entry in found.entries))


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.compare",
        description="Train and compare configs, or compare finished runs, against the first.",
        epilog="A line of @FILE is an argument, so that a whole matrix can be kept in a file.",
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = _words_of_line
    parser.add_argument(
        "setups",
        nargs="+",
        metavar="CONFIG|RUN|KEY VALUE",
        help="CONFIG, CONFIG+FRAGMENT+KEY=VALUE (fragments as for train_net.py --with), or the "
        "folder of a finished run; after them KEY VALUE ... for all configs",
    )
    parser.add_argument("--seeds", type=_positive, default=3, help="runs a config (%(default)s)")
    parser.add_argument(
        "--jobs", type=_positive, default=1, help="trainings, then evaluations, side by side"
    )
    parser.add_argument("--out", type=Path, default=Path("output/compare"), help="(%(default)s)")
    parser.add_argument("--task", choices=IOU_TYPES, default="bbox", help="(%(default)s)")
    parser.add_argument("--test-set", help="of DATASETS.TEST; by default the first")
    parser.add_argument(
        "--draws", type=_positive, default=1000, help="draws of the images (%(default)s)"
    )
    return parser.parse_intermixed_args(arguments)


def _words_of_line(line):
    """A line of a file is one argument; blank lines and those with # at the start are none."""
    line = line.strip()
    return [] if not line or line.startswith("#") else [line]


def _positive(text):
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def _split_words(words):
    """Setups and runs, then KEY VALUE ... or path.key=value of all configs."""
    for index, word in enumerate(words):
        is_there = os.path.exists(word) or os.path.exists(word.partition("+")[0])
        if not is_there and re.match(r"[A-Z_]+(\.|$)|[\w.]+=", word):
            return words[:index], words[index:]
    return words, []


def _finished(options, words, opts):
    """(name, runs, failures) of each setup; what is missing is trained first."""
    if not words:
        raise InputError("There is no config and no run to compare.")
    folders = [word for word in words if os.path.isdir(word)]
    setups = distinct_names([parse_setup(word) for word in words if word not in folders])
    if opts and not setups:
        raise InputError(f"'{opts[0]}' has no effect: all runs are finished.")
    planned = {}
    with telling("Reading what is to be compared"):
        for setup in setups:
            runs = [plan(setup, seed, options.out, opts) for seed in range(options.seeds)]
            planned[setup] = runs
        if planned:  # before hours of training
            check_same_data(
                [
                    (f"'{setup.name}'", annotation_file(runs[0].settings, _test_set(options, runs)))
                    for setup, runs in planned.items()
                ]
            )
    failures = train_all(
        # All setups with one seed before the next: what is there can be compared early.
        [run for of_seed in zip(*planned.values()) for run in of_seed],
        options.jobs,
    )
    read = {}
    for setup, runs in planned.items():
        finished = [_read(options, run.folder) for run in runs if run not in failures]
        reasons = [f"{run.name}: {failures[run]}" for run in runs if run in failures]
        read[setup.name] = (finished, reasons)
    for name, runs in _of_one_setup([_read(options, folder) for folder in folders]).items():
        if name in read:
            raise InputError(f"'{name}' is listed twice.")
        read[name] = (runs, [])
    return [(name, *read[name]) for name in _in_order(words, setups, read)]


def _test_set(options, runs):
    names = runs[0].settings["DATASETS.TEST"]
    if not names:
        raise InputError(f"'{runs[0].setup.name}': DATASETS.TEST is empty.")
    return options.test_set or names[0]


def _read(options, folder):
    return read_run(folder, options.task, options.test_set)


def _of_one_setup(runs):
    """{name: runs}: folders ``NAME_seedN`` of the same settings are runs of one setup."""
    result = {}
    for run in runs:
        stem = re.sub(r"_seed\d+$", "", run.folder.resolve().name)
        key = next(
            (
                key
                for key in (stem, str(run.folder))
                if key not in result or (key == stem and _same_settings(run, result[key][0]))
            ),
            None,
        )
        if key is None:
            raise InputError(f"'{run.folder}' is listed twice.")
        result.setdefault(key, []).append(run)
    return result


def _same_settings(run, other):
    same_folder = run.folder.resolve() == other.folder.resolve()
    same = _settings_of_any_seed(run) == _settings_of_any_seed(other)
    return same and run.seed != other.seed and not same_folder


def _settings_of_any_seed(run):
    """Settings without the seed, also in the name of the run whose weights it began with."""
    settings = {key: value for key, value in run.settings.items() if key not in PLACE_KEYS}
    weights = str(settings.get("MODEL.WEIGHTS", ""))
    return {**settings, "MODEL.WEIGHTS": weights.replace(f"_seed{run.seed}/", "_seed/")}


def _in_order(words, setups, read):
    """Names in the order of the command line."""
    names = {}
    waiting = iter(setups)
    for word in words:
        if os.path.isdir(word):
            for name, (runs, _) in read.items():
                if any(run.folder == Path(word) for run in runs):
                    names[name] = None
        else:
            names[next(waiting).name] = None
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
