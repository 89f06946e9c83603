"""One row a class: as a table for the log, as CSV and as JSON."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from .lvis import ABSENT, ClassResult, LVISResult

_NUMBERS = ("AP", "AR", "F1", "threshold")
_FACTS = ("name", "group", "train_images", "test_objects")  # of a class, whatever the task


def class_rows(
    results: Mapping[str, LVISResult], train_images: Mapping[int, int] | None = None
) -> list[dict]:
    """Return a dictionary for each class, by ascending category id.

    Args:
        results: task ("bbox", "segm") -> result, of the same annotations.
        train_images: category id -> training images that hold the class, where it is known.

    Returns:
        ``{"category_id", "name", "group", "train_images", "test_objects", "bbox": {"AP", "AR",
        "F1", "threshold"}, "segm": ...}``. AP, AR and F1 are in percent, the threshold is a score;
        NaN where a class has no object to find or no detection is right.
    """
    rows = []
    for of_class in zip(*(result.classes for result in results.values())):
        first = of_class[0]
        rows.append(
            {
                "category_id": first.category_id,
                "name": first.name,
                "group": first.group,
                "train_images": (train_images or {}).get(first.category_id),
                "test_objects": first.objects,
                **{task: _numbers(one) for task, one in zip(results, of_class)},
            }
        )
    return rows


def percent(fraction: float) -> float:
    """Return a fraction in percent, NaN for the -1 of nothing to average."""
    return math.nan if fraction == ABSENT else 100 * fraction


def _numbers(of_class: ClassResult) -> dict[str, Any]:
    return {
        "AP": percent(of_class.ap),
        "AR": percent(of_class.ar),
        "F1": percent(of_class.f1),
        "threshold": of_class.threshold,
    }


def class_table(rows: Sequence[Mapping], tasks: Sequence[str]) -> str:
    """Return AP of each class as text; two classes a line, as Detectron2 prints classes."""
    cells: list[list[Any]] = [
        ["-" if row[key] is None else row[key] for key in _FACTS]
        + [row[task]["AP"] for task in tasks]
        for row in rows
    ]
    half = (len(cells) + 1) // 2
    lines = [left + right for left, right in zip(cells[:half], [*cells[half:], []])]
    facts = ["class", "group", "train images", "test objects"]
    headers = [*facts, *(f"AP {task}" for task in tasks)] * 2
    return tabulate(lines, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left")


def class_csv(rows: Sequence[Mapping], results: Mapping[str, LVISResult]) -> str:
    """Return the rows as CSV; the last column tells the protocol. What is absent is empty."""
    tasks = list(results)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = [f"{task}_{name}" for task in tasks for name in _NUMBERS]
    writer.writerow(["category_id", *_FACTS, *numbers, "protocol"])
    protocol = "; ".join(protocol_text(result.protocol) for result in results.values())
    for row in rows:
        values = [row[key] for key in ("category_id", *_FACTS)]
        values += [row[task][name] for task in tasks for name in _NUMBERS]
        values = ["" if value is None or value != value else value for value in values]
        writer.writerow([*values, protocol])
    return file.getvalue()


def protocol_text(protocol: Mapping) -> str:
    """Return a protocol in a line, its name first."""
    name, *settings = (
        str(value) if key == "protocol" else f"{key} {value}" for key, value in protocol.items()
    )
    return f"{name}: {', '.join(settings)}"


def write_results(
    percents: Mapping[str, Mapping[str, float]],
    rows: Sequence[Mapping],
    results: Mapping[str, LVISResult],
    folder: str | os.PathLike,
) -> None:
    """Write ``lvis_results.json``, ``lvis_classes.json`` and ``lvis_classes.csv`` into ``folder``.

    Args:
        percents: task -> the numbers in percent.
        rows: of :func:`class_rows`.
        results: task -> result, for the protocols.
        folder: it is made where it is not there.
    """
    protocol = {task: result.protocol for task, result in results.items()}
    classes = [
        {
            **{key: row[key] for key in _FACTS},
            **{task: row[task]["AP"] for task in results},
        }
        for row in rows
    ]
    content = {**percents, "classes": classes, "protocol": protocol}
    write_json(content, folder, "lvis_results.json")
    write_json({"protocol": protocol, "classes": rows}, folder, "lvis_classes.json")
    write_text(class_csv(rows, results), folder, "lvis_classes.csv")


def write_json(content: Any, folder: str | os.PathLike, name: str) -> None:
    """Write JSON, whole or not at all; NaN, which JSON lacks, becomes null."""
    write_text(json.dumps(_null_for_nan(content), allow_nan=False), folder, name)


def write_text(text: str, folder: str | os.PathLike, name: str) -> None:
    """Write whole or not at all: a file of that name is complete, whatever interrupts us."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(f"{path}.partial", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(f"{path}.partial", path)


def _null_for_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _null_for_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_null_for_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
