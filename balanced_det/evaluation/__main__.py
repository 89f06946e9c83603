"""Evaluate a detection file again, without the model: ``python -m balanced_det.evaluation``."""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from ..data.annotations import Annotations, integer, read_annotations, shortened
from ..errors import InputError
from ..logs import escape_log_records
from .detections import first_row, read_detection_files
from .lvis import IOU_TYPES, MAX_DETS, METRICS, Matcher, fixed_result
from .per_class import (
    class_rows,
    class_table,
    percent,
    protocol_text,
    write_results,
)


def train_counts(path: str, truth: Annotations) -> tuple[dict, dict]:
    """Count the training images of each class of ``truth``, and find its group by them.

    Args:
        path: annotations of the training set; classes are compared by id and name.
        truth: what is evaluated.

    Returns:
        Two dictionaries by category id: training images, and "r", "c" or "f".

    Raises:
        InputError: the file cannot be used, or lists other classes.
    """
    from ..data.statistics import frequency_group  # which needs torch

    train = read_annotations(path)
    if [(c.id, c.name) for c in train.categories] != [(c.id, c.name) for c in truth.categories]:
        raise InputError(f"{train.source} and {truth.source} differ in their classes.")
    counted = ~(train.crowd | train.ignore)
    pairs = np.unique(np.stack([train.category[counted], train.image[counted]]), axis=1)
    counts = np.bincount(pairs[0], minlength=len(train.categories)).tolist()
    ids = [category.id for category in train.categories]
    return dict(zip(ids, counts)), dict(zip(ids, map(frequency_group, counts)))


def evaluate_files(
    annotations: str,
    detections: Sequence[str],
    tasks: Sequence[str] | None = None,
    max_dets: int | None = MAX_DETS,
    train: str | None = None,
    out: str | None = None,
) -> None:
    """Print the numbers and one row a class, and write them into ``out``.

    Args:
        annotations: annotation file.
        detections: detection files, the parts of an interrupted run for example.
        tasks: of "bbox" and "segm"; None takes boxes, and masks where the first detection of each
            file and all objects have one.
        max_dets: detections that count in an image; None for all.
        train: annotation file of the training set, for groups and training images.
        out: folder for ``lvis_results.json``, ``lvis_classes.json`` and ``lvis_classes.csv``.

    Raises:
        InputError: a file cannot be used.
    """
    truth = read_annotations(annotations)
    images, groups = train_counts(train, truth) if train else ({}, {})
    if not len(truth):
        raise InputError(f"{truth.source} holds no annotation to evaluate with.")
    results, percents = {}, {}
    for task in tasks or _tasks(truth, detections):
        matcher = Matcher(truth, task, max_dets)
        found = read_detection_files(detections, truth, task)
        matcher.update_all(found)
        results[task] = matcher.result(groups)
        fixed = fixed_result(truth, found, task, groups)
        percents[task] = {name: percent(results[task].metrics[name]) for name in METRICS}
        for name in ("AP", "APr", "APc", "APf"):
            percents[task][f"{name}fixed"] = percent(fixed.metrics[name])
    classes = class_rows(results, images)
    print(class_table(classes, list(results)))
    for task, result in results.items():
        print(f"\n{task}: {protocol_text(result.protocol)}")
    names = list(next(iter(percents.values())))
    table = [[name, *(numbers[name] for numbers in percents.values())] for name in names]
    print(f"\n{tabulate(table, headers=['percent', *percents], floatfmt='.3f')}")
    if out:
        write_results(percents, classes, results, out)
        print(f"\nWritten to {os.path.abspath(out)}")


def _tasks(truth: Annotations, detections: Sequence[str]) -> tuple[str, ...]:
    rows = [row for row in map(first_row, detections) if row is not None]
    has_masks = rows and all(isinstance(row, dict) and row.get("segmentation") for row in rows)
    return IOU_TYPES if has_masks and truth.first_without_mask() is None else IOU_TYPES[:1]


def _limit(text: str) -> int | None:
    limit = integer(int(text)) if text.lstrip("-").isdecimal() else None
    if limit is None or (limit < 1 and limit != -1):
        raise argparse.ArgumentTypeError(f"{shortened(text)} is neither a positive number nor -1")
    return None if limit == -1 else limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    escape_log_records()
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.evaluation",
        description="Evaluate a detection file by LVIS's protocol, without the model.",
    )
    parser.add_argument("annotations", help="annotation file, LVIS or COCO format")
    parser.add_argument("detections", nargs="+", help="detection files, taken together")
    parser.add_argument("--tasks", nargs="+", choices=IOU_TYPES, help="what is compared")
    parser.add_argument(
        "--max-dets", type=_limit, default=MAX_DETS, help="detections of an image, -1 for all"
    )
    parser.add_argument("--train", help="annotations of the training set, for groups and counts")
    parser.add_argument("--out", help="folder to write the numbers into")
    options = parser.parse_args(arguments)
    try:
        evaluate_files(**vars(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
