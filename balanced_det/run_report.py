"""What came of a run, on one page: ``python -m balanced_det.run_report OUTPUT_DIR``.

Every training and ``--eval-only`` ends with it (``BALANCE.REPORT``): ``report.html`` needs no
network; beside it stand its numbers, ``report.json`` and ``report_classes.csv``. The page is made
of what the run has written, so it can be made again, and of a run that was killed as well.
"""

import argparse
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import detectron2
import hotcoco
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from . import __version__
from .config.keys import add_balanced_det_config
from .config.lazy import lazy_config
from .config.loading import COMMAND_LINE
from .config.saved import saved_config
from .data.images import read_image
from .data.registration import register_datasets
from .engine.gradient_share import NAME as GRADIENT_SHARE
from .errors import InputError, printable
from .evaluation.errors import analyse_errors
from .evaluation.operating_points import RECALLS
from .logs import escape_log_records
from .report import Page, figures, telling, write_csv, write_json
from .report.pictures import as_data_url, class_color, draw_objects
from .run_files import Run, class_biases, read_run

logger = logging.getLogger(__name__)

PAGE = "report.html"
GROUPS = {"r": "rare", "c": "common", "f": "frequent", None: "no group"}
_MOST_CONFUSED = 12  # classes that the figure shows
_MOST_IMAGES = 8
_MOST_POINTS = 400  # of a curve


def report_run(cfg: CfgNode, config_file: str = "", weights: str = "") -> Path | None:
    """Write the page of the run of ``cfg``, which has ended well whatever happens here.

    Args:
        cfg: the config, with its data sets registered.
        config_file: whose keys are the run's own; others come from its bases.
        weights: the checkpoint that was evaluated; by default the run's last.

    Returns:
        the page; None, after a warning, where it could not be made.
    """
    try:
        datasets = test_sets(cfg)
        run = read_run(cfg.OUTPUT_DIR, datasets, weights)
        page = write_report(run, cfg, config_file)
    except Exception as error:  # a page is not worth the exit code of days of training
        told = printable(" ".join(str(error).split()))
        logger.warning("The report could not be made: %s: %s", type(error).__name__, told)
        return None
    logger.info("The report is %s", page)
    return page


def test_sets(cfg: CfgNode) -> dict[str, tuple[str, str]]:
    """Return {name: (annotation file, image root)} of the test sets of a config."""
    found = {}
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file"):
            found[name] = metadata.json_file, metadata.get("image_root")
    return found


def write_report(run: Run, cfg: CfgNode | None = None, config_file: str = "") -> Path:
    """Write ``report.html``, ``report.json`` and ``report_classes.csv`` into the run's folder.

    Args:
        run: of :func:`~balanced_det.run_files.read_run`.
        cfg: its config, where it is known.
        config_file: as for :func:`report_run`.

    Returns:
        the page.

    Raises:
        InputError: the folder cannot be written, or the drawing library is not installed.
    """
    name = printable(run.folder.resolve().name)
    page = Page(f"What came of {name}", str(run.folder.resolve()))
    numbers: dict = {"run": str(run.folder), "problems": run.problems, "evaluations": []}
    _tiles(page, run)
    for problem in run.problems:
        page.conclude(problem, kind="warn")
    if not run.evaluations:
        page.conclude(
            "There are no results of an evaluation in this folder.",
            "A run that was interrupted, or has no DATASETS.TEST, has none.",
            "warn",
        )
    for evaluated in run.evaluations:
        numbers["evaluations"].append(_evaluation(page, run, evaluated))
    _training(page, run)
    _learned(page, run)
    numbers["settings"] = _settings(page, cfg, config_file)
    numbers["versions"] = _versions(page, run)
    write_json(run.folder / "report.json", numbers)
    write_csv(run.folder / "report_classes.csv", *_class_table(run))
    return page.write(run.folder / PAGE)


# --- What was measured ----------------------------------------------------------------------------


def _tiles(page, run):
    tiles = {}
    if run.evaluations:
        first = run.evaluations[0]
        for key in ("AP", "AP50", "APr", "APc", "APf"):
            value = first.metrics[first.task].get(key)
            if value is not None:
                tiles[f"{key}, {first.task}"] = f"{value:.1f}"
    losses = run.series("total_loss")
    if losses:
        tiles["iterations"] = f"{losses[-1][0] + 1:,}"
        tiles["last loss"] = f"{losses[-1][1]:.3g}"
    if tiles:
        page.tiles(tiles)


def _evaluation(page, run, evaluated):
    """Add the sections of one evaluation; return its numbers."""
    several = f" on {evaluated.name}" if len(run.evaluations) > 1 else ""
    page.section(f"Average precision{several}")
    _conclusions(page, evaluated)
    _groups(page, evaluated)
    _classes(page, evaluated, _objects_of(evaluated))
    page.section(f"Precision and recall{several}")
    _precision(page, evaluated)
    errors = None
    page.section(f"Errors{several}")
    if evaluated.problem:
        page.say(evaluated.problem)
    elif evaluated.detections is not None:
        errors = _errors(page, evaluated)
        page.section(f"Images{several}")
        _images(page, evaluated)
    return {
        "data": evaluated.name,
        "metrics": evaluated.metrics,
        "protocol": evaluated.protocol,
        "errors": None if errors is None else vars(errors),
    }


def _errors(page, evaluated):
    """Add what kinds of errors there are; return them, None where they cannot be analysed."""
    limit = evaluated.protocol[evaluated.task].get("max_dets_per_image")
    try:
        errors = analyse_errors(evaluated.truth, evaluated.detections, evaluated.thresholds, limit)
    except Exception as error:  # whatever the library raises: the rest of the page is worth having
        page.conclude(f"Errors are not analysed: {type(error).__name__}: {error}.", kind="warn")
        return None
    _error_types(page, errors)
    _confusion(page, evaluated, errors)
    _calibration(page, errors)
    return errors


def _conclusions(page, evaluated):
    task = evaluated.task
    metrics = evaluated.metrics[task]
    aps = [row[task].get("AP") for row in evaluated.classes]
    known = [ap for ap in aps if ap is not None]
    zero = sum(ap == 0 for ap in known)
    if not known:
        page.say("No class has an object to find.")
        return
    page.say(
        f"{evaluated.name}: {_n(len(known), 'class', 'classes')} of {len(aps)} "
        "have an object to find; numbers are averages over these, in percent."
    )
    if zero:
        page.conclude(
            f"{zero} of {_n(len(known), 'class', 'classes')} "
            f"{'is' if zero == 1 else 'are'} never found right.",
            "AP is exactly 0.",
            "warn",
        )
    rare, frequent = metrics.get("APr"), metrics.get("APf")
    if rare is not None and frequent is not None and abs(frequent - rare) >= 0.1:
        page.conclude(
            f"Rare classes have {abs(frequent - rare):.1f} points "
            f"{'less' if rare < frequent else 'more'} than frequent ones.",
            f"APr {rare:.1f}, APf {frequent:.1f}.",
        )


def _groups(page, evaluated):
    rows = []
    for task, metrics in evaluated.metrics.items():
        for key in ("APr", "APc", "APf", "AP", "AP50", "AP75", "APs", "APm", "APl"):
            value = metrics.get(key)
            if value is not None:
                rows.append(
                    {
                        "metric": f"{key} {task}" if len(evaluated.metrics) > 1 else key,
                        "percent": round(value, 2),
                        "task": task,
                    }
                )
    figure = figures.bars(
        rows, "metric", "percent", color="task" if len(evaluated.metrics) > 1 else None
    )
    counts = [row["group"] for row in evaluated.classes]
    held = ", ".join(f"{counts.count(key)} {word}" for key, word in GROUPS.items() if key in counts)
    page.figure(figure, f"AP by group of classes ({held}) and by size of objects.")


def _classes(page, evaluated, objects):
    task = evaluated.task
    has_counts = any(row.get("train_images") for row in evaluated.classes)
    x = "training images" if has_counts or objects is None else "validation objects"
    rows = []
    for c, row in enumerate(evaluated.classes):
        if row[task].get("AP") is None:
            continue
        rows.append(
            {
                "class": printable(row["name"]),
                x: row.get("train_images") if x == "training images" else int(objects[c]),
                "AP": round(float(row[task]["AP"]), 2),
                "group": GROUPS[row["group"]],
                "best F1": row[task].get("F1"),
                "threshold": row[task].get("threshold"),
            }
        )
    shown = [row for row in rows if row[x]]
    figure = figures.points(
        shown, x, "AP", color="group", order=_present(shown, "group"), log_x=True
    )
    page.figure(figure, f"AP of each class over its {x}; a point's name shows on hover.")
    header = ["class", "group", x, "AP", "best F1", "threshold"]
    order = sorted(rows, key=lambda row: row["AP"])
    page.table(
        header,
        [
            [row[key] for key in ("class", "group", x, "AP", "best F1", "threshold")]
            for row in order
        ],
        summary=f"All {len(rows)} classes, the worst first",
    )


def _precision(page, evaluated):
    points = evaluated.points
    if points is None:
        page.say("The curves of this evaluation were not kept.")
        return
    measured = (points.precision >= 0).any(axis=0)
    groups = [row["group"] for row in evaluated.classes]
    lines = {"all": measured}
    if len(groups) == points.num_classes:
        for key, word in GROUPS.items():
            of_group = measured & np.array([group == key for group in groups], dtype=bool)
            if key is not None and of_group.any():
                lines[word] = of_group
    rows = [
        {
            "recall": round(float(recall), 2),
            "precision": round(float(value), 4),
            "classes": word,
        }
        for word, chosen in lines.items()
        if chosen.any()
        for recall, value in zip(RECALLS, points.precision[:, chosen].mean(axis=1))
    ]
    figure = figures.lines(rows, "recall", "precision", color="classes", order=list(lines))
    page.figure(figure, "Precision over recall at IoU 0.50, the mean over the classes of a group.")


def _error_types(page, errors):
    if not errors.types:
        page.say("There is no object or no detection, so there are no errors to sort.")
        return
    rows = [
        {"error": kind, "AP50 to gain": round(gain, 2), "errors": count}
        for kind, (count, gain) in errors.types.items()
    ]
    figure = figures.bars(rows, "error", "AP50 to gain")
    page.figure(
        figure,
        "What AP50 would gain if errors of one kind were mended (TIDE, arXiv 2008.08115), over "
        f"{errors.num_images:,} images.",
    )
    page.table(list(rows[0]), [list(row.values()) for row in rows])


def _confusion(page, evaluated, errors):
    chosen: list[int] = []
    for true, predicted, _ in errors.confused:
        chosen += [c for c in (true, predicted) if c not in chosen]
        if len(chosen) >= _MOST_CONFUSED:
            break
    chosen = chosen[:_MOST_CONFUSED]
    if not chosen:
        page.say("No object was taken for one of another class at the thresholds of the best F1.")
        return
    names = figures.distinct([printable(row["name"]) for row in evaluated.classes])
    times = {(true, predicted): n for true, predicted, n in errors.confused}
    rows = [
        {"true": names[i], "found as": names[j], "times": times.get((i, j), 0)}
        for i in chosen
        for j in chosen
    ]
    order = [names[c] for c in sorted(chosen)]
    page.figure(
        figures.heat(rows, "found as", "true", "times", order=order),
        f"The {len(chosen)} most confused classes, at each class's threshold of the best F1: an "
        "object of the row was found as the column. What was found right is left out.",
    )


def _calibration(page, errors):
    rows = [
        {
            "score": round(score, 4),
            "right": round(right, 4),
            "detections": count,
            "line": "measured",
        }
        for _, score, right, count in errors.bins
    ]
    if not rows:
        return
    ideal = [{"score": x, "right": x, "detections": None, "line": "perfect"} for x in (0.0, 1.0)]
    figure = figures.lines(
        [*rows, *ideal], "score", "right", color="line", order=["measured", "perfect"]
    )
    page.figure(
        figure,
        "How often detections of a score are right, at IoU 0.50; expected calibration error "
        f"{100 * errors.calibration_error:.1f}%.",
    )


# --- Images ---------------------------------------------------------------------------------------


def _images(page, evaluated):
    """Show images of the rarest classes, the truth beside what was found."""
    truth, found = evaluated.truth, evaluated.detections
    pictures, unread = [], ""
    for image in _chosen_images(evaluated):
        path = _image_path(evaluated, truth.images[image])
        if path is None:
            unread = "The images are not where the annotations say."
            continue
        try:
            pixels = read_image(path)
        except InputError as error:
            unread = str(error)
            continue
        own = np.flatnonzero((truth.image == image) & truth.finite() & ~truth.crowd)
        rows = np.flatnonzero(found.image == image)
        rows = rows[found.scores[rows] >= evaluated.thresholds[found.category[rows]]]
        rows = rows[np.argsort(-found.scores[rows], kind="stable")][:50]
        named = printable(truth.images[image].file_name or truth.images[image].id)
        scores = [f" {100 * s:.0f}%" for s in found.scores[rows]]
        for what, boxes, classes, more in (
            ("truth", truth.boxes[own], truth.category[own], [""] * len(own)),
            ("found", found.boxes[rows], found.category[rows], scores),
        ):
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            labels = [
                printable(evaluated.classes[c]["name"]) + text for c, text in zip(classes, more)
            ]
            colors = [class_color(int(c)) for c in classes]
            picture = draw_objects(pixels, corners.tolist(), labels, colors)
            count = _n(len(boxes), "object", "objects")
            pictures.append((as_data_url(picture), f"{named}, {what}: {count}"))
    if pictures:
        page.say(
            "Images that hold the rarest classes, with all that is annotated and, beside it, what "
            "was found from each class's threshold of the best F1 on."
        )
        page.pictures(pictures)
    else:
        page.say(unread or "There is no image with an object.")


def _chosen_images(evaluated):
    """Indices of images: one for each of the rarest classes that are annotated."""
    truth = evaluated.truth
    counts = np.bincount(truth.category, minlength=len(truth.categories))
    train = [row.get("train_images") for row in evaluated.classes]
    rarity = [t if t is not None else n for t, n in zip(train, counts.tolist())]
    chosen: list[int] = []
    for c in sorted(np.flatnonzero(counts).tolist(), key=lambda c: rarity[c]):
        images = truth.image[truth.category == c]
        new = next((int(i) for i in images if i not in chosen), None)
        if new is not None:
            chosen.append(new)
        if len(chosen) == _MOST_IMAGES:
            break
    return chosen


def _image_path(evaluated, image):
    """Where an image is: LVIS v0.5 names COCO 2014's files, ``coco_url`` the real ones."""
    names = [image.file_name, "/".join((image.coco_url or "").split("/")[-2:])]
    for name in filter(None, names):
        path = os.path.join(evaluated.image_root or "", name)
        if os.path.isfile(path):
            return path
    return None


# --- The training ---------------------------------------------------------------------------------


def _training(page, run):
    if len(run.series("total_loss")) == 0:
        return
    page.section("Training")
    losses = [k for k in run.logged() if k.split("/")[-1].startswith(("loss_", "total_loss"))]
    _curves(page, run, [k for k in losses if not k.endswith("_unscaled")], "loss", "Losses.")
    raw = [k for k in losses if k.endswith("loss_cls_unscaled")]
    if raw:
        guided = [key for key in losses if key.split("/")[-1] == "loss_cls"]
        _curves(
            page, run, [*raw, *guided], "loss", "The classification loss, raw and as it is guided."
        )
        scales = [key for key in run.logged() if key.endswith("guided_scale")]
        _curves(page, run, scales, "scale", "What guided loss multiplies it by.")
    shares = [
        key for group in "rcf" for key in run.logged() if key.endswith(f"{GRADIENT_SHARE}_{group}")
    ]
    _curves(
        page,
        run,
        shares,
        "share",
        "Share of the classification gradient that each group of classes has.",
        name=lambda key: _group_of(key, len(shares) > 3),
    )
    progress = [k for k in run.logged() if k.split("/")[-1] in ("AP", "APr", "APc", "APf")]
    if any(len(run.series(key)) > 1 for key in progress):
        _curves(page, run, progress, "percent", "AP of each evaluation.")
    _curves(page, run, [k for k in run.logged() if k == "lr"], "learning rate", "Learning rate.")


def _curves(page, run, keys, value, caption, name=None):
    """Draw what was logged under names, which are shortened where no two become equal."""
    last = [key.split("/")[-1] for key in keys]
    words = [
        name(key) if name is not None else short if last.count(short) == 1 else key
        for key, short in zip(keys, last)
    ]
    rows = [
        {"iteration": i, value: float(f"{v:.6g}"), "what": printable(word)}
        for key, word in zip(keys, words)
        for i, v in _thinned(run.series(key))
    ]
    if rows:
        order = [printable(word) for word in words]
        page.figure(figures.lines(rows, "iteration", value, color="what", order=order), caption)


def _group_of(key, with_part):
    part, _, group = key.rpartition(f"/{GRADIENT_SHARE}_")
    return f"{part} {GROUPS[group]}" if with_part else GROUPS[group]


def _thinned(series):
    """At most so many points of a curve, the first and the last among them."""
    if len(series) <= _MOST_POINTS:
        return series
    at = np.linspace(0, len(series) - 1, _MOST_POINTS).round().astype(int)
    return [series[i] for i in at]


# --- What was learned -----------------------------------------------------------------------------


def _learned(page, run):
    classes = run.evaluations[0].classes if run.evaluations else []
    task = run.evaluations[0].task if run.evaluations else ""
    page.section("Learned and counted state")
    if not run.state:
        page.say("The run left no checkpoint to look into.")
        return
    page.say(f"Of {run.state_path}.")
    said = len(page)
    for name, tensor in run.state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name.endswith("gradient_density.running") and tensor.ndim == 2:
            _gradient_density(page, name, tensor)
        elif name.endswith("row_counts") and tensor.numel() == 2 and tensor[1] > 0:
            foreground, rows = tensor.tolist()
            page.say(
                f"{name}: {foreground:,.0f} of {rows:,.0f} rows are foreground, "
                f"{foreground / rows:.3g}; the counted thresholds are shares of it."
            )
        elif name.endswith(".sums") and tensor.ndim == 2 and tensor.shape[1] == len(classes):
            _gradient_sums(page, name, tensor, classes)
        elif "classification_loss." in name and tensor.shape == (len(classes),):
            value = name.rpartition(".")[2].replace("_", " ")
            _over_classes(page, classes, {value: tensor.tolist()}, value, f"{name} of each class.")
    if classes:
        for layer, bias in class_biases(run.state, len(classes)).items():
            values = {"bias": bias, "sigmoid of the bias": 1 / (1 + np.exp(-bias.clip(-80, 80)))}
            _over_classes(
                page, classes, values, "bias", f"The bias of each class in {layer}: its prior."
            )
        thresholds = [row[task].get("threshold") for row in classes]
        if any(t is not None for t in thresholds):
            _over_classes(
                page,
                classes,
                {"threshold": thresholds},
                "threshold",
                "The score that gives each class its best F1 on validation data.",
            )
    if len(page) == said:
        page.say("No loss or threshold of this model keeps a statistic.")


def _gradient_density(page, name, running):
    totals, mass = running.double().tolist()
    bins = len(totals)
    rows = [
        {"gradient length": f"{(b + 0.5) / bins:.3g}", "elements": total / m}
        for b, (total, m) in enumerate(zip(totals, mass))
        if m > 0
    ]
    page.figure(
        figures.bars(rows, "gradient length", "elements", log_y=True),
        f"Elements in each bin of gradient lengths, the moving average of {name}.",
    )


def _gradient_sums(page, name, sums, classes):
    positive, negative = sums.double().numpy()
    values = {"positive": positive, "negative": negative, "ratio": positive / (negative + 1e-10)}
    _over_classes(
        page, classes, values, "ratio", f"Positive over negative gradient of each class, {name}."
    )


def _over_classes(page, classes, values, y, caption):
    """Draw a number of each class over its training images."""
    x = "training images"
    rows = []
    for c, row in enumerate(classes):
        numbers = {key: value[c] for key, value in values.items()}
        numbers = {k: None if v is None else float(f"{float(v):.6g}") for k, v in numbers.items()}
        if row.get("train_images") and numbers[y] is not None:
            entry = {"class": printable(row["name"]), x: row["train_images"], **numbers}
            rows.append({**entry, "group": GROUPS[row["group"]]})
    figure = figures.points(rows, x, y, color="group", order=_present(rows, "group"), log_x=True)
    page.figure(figure, caption)


# --- How it was made ------------------------------------------------------------------------------


def _settings(page, cfg, config_file):
    """Add what the config changes; return the rows."""
    page.section("Settings")
    if cfg is None:
        page.say("The run's config is not known.")
        return []
    if lazy_config(cfg) is not None:
        page.say("The run is of a Python config: lazy.yaml in its folder has all of it.")
        return []
    origins = cfg.BALANCE.__dict__.get("origins", {})
    defaults, values = _leaves(_default_config()), _leaves(cfg)
    changed = {k: v for k, v in values.items() if k not in defaults or defaults[k] != v}
    own = {COMMAND_LINE, config_file} if origins else set()
    rows = []
    for key in sorted(changed, key=lambda k: (_source(origins, k) not in own, k)):
        default = _short(defaults[key]) if key in defaults else None
        rows.append([key, _short(changed[key]), default, printable(_source(origins, key))])
    mine = [row for row in rows if row[3] in own]
    header = ["key", "value", "default", "set by"]
    if mine:
        page.say("What this run changes against the configs that it is based on:")
        page.table(header, mine)
    summary = f"All {_n(len(rows), 'key', 'keys')} that differ from the defaults"
    page.table(header, rows, summary=summary if mine else None)
    return [dict(zip(header, row)) for row in rows]


def _source(origins, key):
    return origins[key].source if key in origins else ""


def _default_config():
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    return cfg


def _leaves(node, prefix=""):
    found = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _short(value):
    text = printable(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _versions(page, run):
    versions = {
        "balanced_det": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "hotcoco": hotcoco.__version__,
        "python": platform.python_version(),
    }
    page.section("Protocol and versions")
    for evaluated in run.evaluations:
        for task, protocol in evaluated.protocol.items():
            page.table(
                [f"{evaluated.name}, {task}", ""],
                [
                    [key.replace("_", " "), value if value is None else str(value)]
                    for key, value in protocol.items()
                ],
            )
    page.table(["package", "version"], [[name, text] for name, text in versions.items()])
    page.say("The versions are those that made this page.")
    return versions


# --- Tables and words -----------------------------------------------------------------------------


def _class_table(run):
    """Header and rows of ``report_classes.csv``."""
    header = [
        "data",
        "category_id",
        "class",
        "group",
        "train_images",
        "task",
        "AP",
        "AR",
        "F1",
        "threshold",
    ]
    rows = []
    for evaluated in run.evaluations:
        for row in evaluated.classes:
            start = [evaluated.name, row["category_id"], row["name"], row["group"]]
            for task in evaluated.metrics:
                numbers = [row[task].get(key) for key in ("AP", "AR", "F1", "threshold")]
                rows.append([*start, row.get("train_images"), task, *numbers])
    return header, rows


def _objects_of(evaluated):
    """(K,) objects of each class in the annotations, or None where these are not known."""
    truth = evaluated.truth
    if truth is None:
        return None
    return np.bincount(truth.category[~truth.crowd], minlength=len(truth.categories))


def _present(rows: Sequence[Mapping], field: str) -> list:
    """The groups that occur, in order."""
    found = {row[field] for row in rows}
    return [word for word in GROUPS.values() if word in found]


def _n(count, one, many):
    return f"{count:,} {one if count == 1 else many}"


# --- The command line -----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    escape_log_records()
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.run_report",
        description="Write the page of a run again, or of one that was interrupted.",
    )
    parser.add_argument("folder", help="OUTPUT_DIR of the run")
    parser.add_argument("--weights", default="", help="the checkpoint to look into (the last)")
    options = parser.parse_args(arguments)
    try:
        folder = Path(options.folder)
        if not folder.is_dir():
            raise InputError(f"The folder '{folder}' does not exist.")
        cfg, problems = _config_of(folder)
        with telling(f"Reading '{folder}'"):
            run = read_run(folder, {} if cfg is None else test_sets(cfg), options.weights)
        run.problems.extend(problems)
        page = write_report(run, cfg)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {page}")
    return 0


def _config_of(folder):
    """The config that a run has kept, with its data sets registered: (config or None, problems)."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None, []
    try:
        cfg, _ = saved_config(path.read_text(encoding="utf-8", errors="replace"), f"'{path}'")
    except InputError as error:
        return None, [str(error)]
    try:
        register_datasets(cfg)
    except InputError as error:
        cfg.DATASETS.TEST = ()
        return cfg, [str(error)]
    return cfg, []


if __name__ == "__main__":
    sys.exit(main())
