"""Look at a data set before training on it: ``python -m balanced_det.analyze --data train.json``.

Counts what the annotations hold, under the configured detector too, and says in sentences what
follows for training, each with the number that it rests on. Writes ``analysis.html``, one page that
needs no network, and the numbers beside it: ``analysis.json`` and ``classes.csv``.
"""

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from . import new
from .data import advice as rules
from .data import survey
from .data.advice import Advice, advise
from .data.registration import check_same_classes
from .data.statistics import COMMON_MAX_IMAGES, RARE_MAX_IMAGES, dataset_statistics
from .data.survey import Columns, NearDuplicates
from .detectors.anchor_fit import IOU_BINS, MISSED_IOU, AnchorFit, fit_anchors
from .errors import InputError
from .logs import escape_log_records
from .losses.tail import tail_is_useful
from .report import Page, figures, telling, write_csv, write_json

GROUPS = ("rare", "common", "frequent")
_FEW = 25  # classes that a figure shows at once


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that is counted; the page and the files are made of it.

    Attributes:
        source: what was analysed, in words.
        classes: K names.
        limits: most training images of a rare and of a common class.
        data: the objects.
        num_training: images that are trained on.
        num_unlabelled: images without an object.
        drops_unlabelled: whether the training leaves these out.
        num_crowds: annotations that are groups, which are not trained on.
        image_count, object_count: (K,) int, over the images that are trained on.
        together: (K, K) int, images that hold two classes.
        duplicates: boxes that lie nearly on each other.
        advice: settings that follow; None without an object.
        anchors: None where the detector has none, or without an object.
        config: the config that anchors were taken from, and what a training would repeat.
        suggestion: text of a config, where none was given.
    """

    source: str
    classes: list[str]
    limits: tuple[int, int]
    data: Columns
    num_training: int
    num_unlabelled: int
    drops_unlabelled: bool
    num_crowds: int
    image_count: np.ndarray
    object_count: np.ndarray
    together: np.ndarray
    duplicates: NearDuplicates
    advice: Advice | None
    anchors: AnchorFit | None
    config: CfgNode | None
    suggestion: str = ""

    @property
    def frequency(self) -> np.ndarray:
        """(K,) fraction of the training images that hold each class."""
        return self.image_count / max(self.num_training, 1)

    @property
    def joint_frequency(self) -> np.ndarray:
        """(K,) geometric mean of ``frequency`` and each class's share of all objects, for IRFS."""
        share = self.object_count / max(self.object_count.sum(), 1)
        return np.sqrt(self.frequency * share)

    @property
    def groups(self) -> list[str]:
        """K of "rare", "common", "frequent"."""
        return survey.group_names(self.image_count, self.limits)

    @property
    def present(self) -> np.ndarray:
        """Indices of the classes that occur, those in the most images first."""
        order = np.argsort(-self.image_count, kind="stable")
        return order[self.image_count[order] > 0]

    @property
    def repeat_threshold(self) -> float:
        """The threshold of repeat-factor sampling: the config's where it repeats, or the advice."""
        if self.config is not None and "RepeatFactor" in self.config.DATALOADER.SAMPLER_TRAIN:
            return float(self.config.DATALOADER.REPEAT_THRESHOLD)
        return self.advice.frequency_limit if self.advice else rules.LVIS_REPEAT_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """What follows from a number.

    Attributes:
        topic: a short name, for the JSON file.
        text: a sentence.
        numbers: what it rests on.
        kind: "note", "do" or "warn", as the page shows it.
    """

    topic: str
    text: str
    numbers: str
    kind: str = "note"


# --- Counting -------------------------------------------------------------------------------------


def analyze_file(
    json_file: str | os.PathLike,
    *,
    limits: tuple[int, int] = (RARE_MAX_IMAGES, COMMON_MAX_IMAGES),
    row_images: int = 300,
    size: int | None = None,
    start: str = "imagenet",
) -> Analysis:
    """Analyse an annotation file, and the config that would be suggested for it.

    Args:
        json_file: in COCO or LVIS format; its images are not needed.
        limits: most training images of a rare and of a common class.
        row_images: images, drawn at random, that anchors are labelled on.
        size: longer side of training images in pixels; by default chosen from the data.
        start: a key of ``new.STARTS``.

    Raises:
        InputError: the file cannot be used.
    """
    with telling(f"Reading '{json_file}' ({_megabytes(json_file)})"):
        source = new.open_data(json_file, images="")
    counted = _count(source.dicts, source.classes, limits, drops_unlabelled=True, size=size)
    config, suggestion = None, ""
    if counted["advice"] is not None:
        chosen = new.STARTS[start]
        content = new.suggested_config(source, None, counted["advice"], chosen, "output/detector")
        config = new.check(content)
        suggestion = new.as_yaml(content, new.reasons(source, counted["advice"], chosen))
    anchors = _label_anchors(config, source.dicts, row_images)
    return Analysis(
        source=str(json_file), config=config, anchors=anchors, suggestion=suggestion, **counted
    )


def analyze_config(
    cfg: CfgNode,
    *,
    limits: tuple[int, int] = (RARE_MAX_IMAGES, COMMON_MAX_IMAGES),
    row_images: int = 300,
) -> Analysis:
    """Analyse ``DATASETS.TRAIN`` of a config of ``load_config``, under its detector.

    Arguments and errors are those of :func:`analyze_file`.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise InputError("DATASETS.TRAIN is empty: there is nothing to analyse.")
    dicts = []
    for name in names:
        with telling(f"Reading data set '{name}'"):
            dicts += DatasetCatalog.get(name)
    check_same_classes(names)
    classes = list(MetadataCatalog.get(names[0]).thing_classes)
    counted = _count(
        dicts,
        classes,
        limits,
        drops_unlabelled=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        size=None,
    )
    anchors = _label_anchors(cfg, dicts, row_images)
    return Analysis(source=", ".join(names), config=cfg, anchors=anchors, **counted)


def _count(dicts, classes, limits, *, drops_unlabelled, size):
    if not 0 < limits[0] < limits[1]:
        raise InputError(f"The limits of groups must rise from 1; {limits} do not.")
    with telling("Counting objects"):
        data = survey.columns(dicts)
        labelled = np.unique(data.image)
        num_training = len(labelled) if drops_unlabelled else data.num_images
        statistics = dataset_statistics(dicts, len(classes))
        image_count = statistics.image_count.numpy()
    with telling("Counting classes that occur together"):
        together = survey.co_occurrence(data, len(classes))
    with telling("Looking for boxes that lie on each other"):
        duplicates = survey.near_duplicates(data)
    advice = None
    if len(data.image):
        advice = advise(data, num_training, image_count, limits=limits, size=size)
    return {
        "classes": classes,
        "limits": limits,
        "data": data,
        "num_training": num_training,
        "num_unlabelled": data.num_images - len(labelled),
        "drops_unlabelled": drops_unlabelled,
        "num_crowds": sum(len(r.get("annotations", ())) for r in dicts) - len(data.image),
        "image_count": image_count,
        "object_count": statistics.instance_count.numpy(),
        "together": together,
        "duplicates": duplicates,
        "advice": advice,
    }


def _label_anchors(cfg, dicts, count):
    """Label the anchors of some images with objects; None where the detector has no anchors."""
    labelled = [r for r in dicts if any(not a.get("iscrowd", 0) for a in r["annotations"])]
    if cfg is None or not labelled or count < 1:
        return None
    # The choice is part of the result, so it never varies.
    chosen = np.random.RandomState(0).permutation(len(labelled))[:count]
    try:
        return fit_anchors(
            cfg, tqdm([labelled[i] for i in chosen], desc="Labelling anchors", unit="image")
        )
    except InputError as error:
        logging.getLogger(__name__).warning("Anchors are left out: %s", error)
        return None


# --- Conclusions ----------------------------------------------------------------------------------


def conclusions(a: Analysis) -> list[Conclusion]:
    """Return what follows from an analysis, each with the numbers that it rests on."""
    if a.advice is None:
        return [Conclusion("objects", "There is no object to train on.", "0 objects.", kind="warn")]
    return [
        c
        for make in (
            _about_imbalance,
            _about_repeats,
            _about_class_aware,
            _about_classifier,
            _about_tail,
            _about_absent,
            _about_unlabelled,
            _about_duplicates,
            _about_sizes,
            _about_rows,
            _about_missed,
        )
        if (c := make(a)) is not None
    ]


def _about_imbalance(a):
    most, least = a.present[0], a.present[-1]
    ratio = a.image_count[most] / a.image_count[least]
    numbers = (
        f"“{a.classes[most]}” is in {_n(a.image_count[most])} training images, "
        f"“{a.classes[least]}” in {_n(a.image_count[least])}: {_n(ratio)} to 1."
    )
    most_objects = a.present[a.object_count[a.present].argmax()]
    least_objects = a.present[a.object_count[a.present].argmin()]
    object_ratio = a.object_count[most_objects] / a.object_count[least_objects]
    if len(a.present) == 1:
        return Conclusion(
            "imbalance",
            "There is one class: no class can be rarer than another. What is left to balance is "
            "background against objects.",
            f"“{a.classes[most]}” is in {_n(a.image_count[most])} training images.",
        )
    if ratio < 10 <= object_ratio:
        text = (
            "The classes are in about equally many images, but not as many objects: rows are out "
            "of balance, and sampling images cannot change it."
        )
        numbers += (
            f" “{a.classes[most_objects]}” has {_n(a.object_count[most_objects])} objects, "
            f"“{a.classes[least_objects]}” {_n(a.object_count[least_objects])}: "
            f"{_n(object_ratio)} to 1."
        )
    elif ratio < 10:
        text = (
            "The classes are about equally frequent: remedies for rare classes have little to do."
        )
    elif ratio < 100:
        text = "The classes are out of balance."
    else:
        text = "The classes are far out of balance: a few own the data set."
    return Conclusion("imbalance", text, numbers)


# What docs/results.md measured on photographs: EQL was behind its control.
_EQL_LATER = (
    "EQL is not what to try first: on photographs it was behind BinaryCrossEntropyLoss at the same "
    "prior and weight, its control, with nearly all classes tail, and no better with the rare. If "
    "you compare the two on this data,"
)


def _about_tail(a):
    """The tail threshold of EQL, where LVIS's own makes it do nothing."""
    lvis = int((a.frequency[a.present] < rules.LVIS_TAIL_THRESHOLD).sum())
    here = int((a.frequency[a.present] < _tail_threshold(a)).sum())
    total = len(a.present)
    numbers = (
        f"{_n(lvis)} of the {_n(total)} classes that occur are in fewer than "
        f"{rules.LVIS_TAIL_THRESHOLD} of the {_n(a.num_training)} training images, {_n(here)} in "
        f"fewer than {_tail_threshold(a):.3g}. On LVIS {rules.LVIS_TAIL_THRESHOLD} means "
        f"{COMMON_MAX_IMAGES} images; here {_tail_threshold(a):.3g} means "
        f"{_n(int(_tail_threshold(a) * a.num_training))}."
    )
    if tail_is_useful(here, total) and here <= rules.SUGGESTED_TAIL_SHARE * total:
        warning = (
            ""
            if tail_is_useful(lvis, total)
            else f" Its default of {rules.LVIS_TAIL_THRESHOLD} is LVIS's number and would make "
            f"{_n(lvis)} of {_n(total)} classes tail."
        )
        return Conclusion(
            "tail threshold",
            f"{_EQL_LATER} set TAIL_THRESHOLD to {_tail_threshold(a):.3g}, which makes {_n(here)} "
            f"of {_n(total)} classes tail.{warning}",
            numbers,
        )
    if total < 3 or _ratio(a) < 10:
        return Conclusion(
            "tail threshold",
            "EQL has no tail to protect here; its default TAIL_THRESHOLD of "
            f"{rules.LVIS_TAIL_THRESHOLD}, LVIS's number, would make {_n(lvis)} of {_n(total)} "
            "classes tail.",
            numbers,
        )
    return Conclusion(
        "tail threshold",
        f"{_EQL_LATER} set TAIL_SHARE, 0.5 for example, instead of a threshold: one of "
        f"{_tail_threshold(a):.3g} makes {_n(here)} of {_n(total)} classes tail, and LVIS's "
        f"{rules.LVIS_TAIL_THRESHOLD} makes {_n(lvis)}; a tail of nearly none or nearly all tells "
        "no classes apart.",
        numbers,
    )


def _about_repeats(a):
    sampled = survey.image_repeats(a.data, survey.class_repeats(a.frequency, a.repeat_threshold))
    irfs = survey.image_repeats(a.data, survey.class_repeats(a.joint_frequency, a.repeat_threshold))
    if a.drops_unlabelled:
        labelled = np.unique(a.data.image)
        sampled, irfs = sampled[labelled], irfs[labelled]
    numbers = (
        f"At a threshold of {a.repeat_threshold:.3g}, {_n((sampled > 1).sum())} of "
        f"{_n(len(sampled))} images are repeated, at most {sampled.max():.1f} times, and an epoch "
        f"has {sampled.mean():.2f} times the images; with IRFS {_n((irfs > 1).sum())}, at most "
        f"{irfs.max():.1f} times, and {irfs.mean():.2f} times the images."
    )
    if sampled.max() <= 1:
        return Conclusion(
            "sampler",
            "Repeat-factor sampling would repeat nothing: keep the TrainingSampler.",
            numbers,
        )
    return Conclusion(
        "sampler",
        "Repeat images of rare classes: DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler, "
        f"REPEAT_THRESHOLD {a.repeat_threshold:.3g}.",
        numbers,
        kind="do",
    )


def _has_rare_classes(a):
    """Whether the data is as that on which sampling and the cosine classifier helped."""
    return a.advice.repeats and len(a.present) > 1 and _ratio(a) >= 10


def _about_class_aware(a):
    if not _has_rare_classes(a):
        return None
    most, least = a.present[0], a.present[-1]
    draws = survey.class_aware_draws(a.data)
    if a.drops_unlabelled:  # plain sampling draws among fewer images then
        draws = draws * a.num_training / a.data.num_images
    often, seldom = (
        draws[np.unique(a.data.image[a.data.category == c])].mean() for c in (least, most)
    )
    return Conclusion(
        "class-aware sampling",
        "Where rare classes matter more to you than frequent ones, try ClassAwareTrainingSampler "
        "too (--with class_aware): on photographs of 179 classes it raised rare classes most, and "
        "cost the frequent ones.",
        f"It would draw the images of “{a.classes[least]}” {_n(often)} times as often as plain "
        f"sampling does, those of “{a.classes[most]}” {_n(seldom)} times.",
    )


def _about_classifier(a):
    dense = a.config is not None and a.config.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    if dense or not _has_rare_classes(a):
        return None
    return Conclusion(
        "classifier",
        "Of remedies inside a detector try the cosine classifier first, --with cosine "
        "(BALANCE.ROI_HEADS.CLASSIFIER CosineLinear), for Faster, Mask and Cascade R-CNN with a "
        "softmax: on photographs of 179 classes it helped, with repeat-factor sampling and "
        "without. After a short training it cost frequent classes nothing that could be seen, "
        "after a longer one, with the sampling, they lost some.",
        f"{_n(a.advice.num_small)} of {_n(len(a.present))} classes are in at most "
        f"{_n(a.advice.limit)} training images.",
        kind="do",
    )


def _about_absent(a):
    absent = np.flatnonzero(a.image_count == 0)
    if not len(absent):
        return None
    names = ", ".join(f"“{a.classes[i]}”" for i in absent[:3])
    return Conclusion(
        "absent classes",
        f"{_n(len(absent))} of {_n(len(a.classes))} classes have no object and cannot be learnt.",
        f"{names}{' and others' if len(absent) > 3 else ''} {_is(absent)} in no training image.",
        kind="warn",
    )


def _about_unlabelled(a):
    if not a.num_unlabelled:
        return None
    share = a.num_unlabelled / a.data.num_images
    text = (
        "Images without an object are left out of training. If they are checked and show only "
        "background, set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False; if they are not annotated "
        "yet, leave them out."
        if a.drops_unlabelled
        else "Images without an object are trained on as background: be sure that they are checked."
    )
    numbers = f"{_n(a.num_unlabelled)} of {_n(a.data.num_images)} images, {share:.2g} of all."
    return Conclusion("unlabelled images", text, numbers, kind="warn" if share > 0.2 else "note")


def _about_duplicates(a):
    found = a.duplicates.same_class + a.duplicates.other_class
    if not found:
        return None
    pairs = [
        f"“{a.classes[i]}” and “{a.classes[j]}” {'once' if count == 1 else f'{_n(count)} times'}"
        for (i, j), count in list(a.duplicates.class_pairs.items())[:3]
    ]
    return Conclusion(
        "near-duplicate boxes",
        "Some boxes lie nearly on each other: the same object may be annotated twice, or under two "
        "names.",
        f"{_n(a.duplicates.same_class)} pairs of one class and {_n(a.duplicates.other_class)} of "
        f"two have an IoU above {survey.NEAR_DUPLICATE_IOU}, of {_n(len(a.data.image))} objects"
        + (f"; {', '.join(pairs)}." if pairs else "."),
        kind="warn" if found > 0.01 * len(a.data.image) else "note",
    )


def _about_sizes(a):
    size = _training_size(a)
    sides = rules.scaled_sides(a.data, size)
    share = float((sides < 8).mean())
    if share < 0.02:
        return None
    return Conclusion(
        "small objects",
        f"At {size} pixels many objects are smaller than two cells of the finest level: train on "
        "larger images, if they have the pixels.",
        f"{share:.1%} of {_n(len(sides))} objects have sides below 8 pixels once an image's longer "
        f"side is {size}.",
        kind="warn",
    )


def _about_rows(a):
    if a.anchors is None or not a.anchors.num_foreground:
        return None
    fit = a.anchors
    rows = fit.num_foreground + fit.num_background
    num_classes, slot = (
        (1, "RPN")
        if a.config.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        else (len(a.classes), "DENSE")
    )
    prior = fit.num_foreground / (rows * num_classes)
    return Conclusion(
        "optimal prior",
        f"{_n(fit.num_background / fit.num_foreground)} background anchors stand against each "
        f"foreground anchor. Training on all of them, without sampling, starts best at a prior of "
        f"{prior:.2g}: BALANCE.{slot}.OPTIMAL_PRIOR True counts and sets it.",
        f"{_n(fit.num_foreground)} of {_n(rows)} anchors of {_n(fit.num_images)} images are "
        f"foreground, {_n(fit.num_ignored)} more ignored; N_f / (N C) with C = {num_classes}.",
        kind="do",
    )


def _about_missed(a):
    if a.anchors is None or not a.anchors.num_objects:
        return None
    share = a.anchors.missed / a.anchors.num_objects
    if share < 0.05:
        return None
    return Conclusion(
        "anchors",
        "The anchors do not fit some objects: change MODEL.ANCHOR_GENERATOR.SIZES or "
        "ASPECT_RATIOS.",
        f"{_n(a.anchors.missed)} of {_n(a.anchors.num_objects)} objects ({share:.1%}) have no "
        f"anchor of an IoU of {MISSED_IOU} or more.",
        kind="warn" if share > 0.3 else "note",
    )


def _tail_threshold(a):
    """As the page shows it, so that what is counted is what a reader would set."""
    # A class in as many images as the limit is small still.
    return float(f"{min((a.advice.limit + 0.5) / a.num_training, 0.5):.3g}")


def _ratio(a):
    return a.image_count[a.present[0]] / a.image_count[a.present[-1]]


def _training_size(a):
    return min(a.config.INPUT.MAX_SIZE_TRAIN, 4096) if a.config is not None else a.advice.size


# --- The page and the files -----------------------------------------------------------------------


def write_analysis(a: Analysis, out: str | os.PathLike) -> Path:
    """Write ``analysis.html``, ``analysis.json`` and ``classes.csv`` into a folder.

    Each is written whole or not at all, the page last.

    Returns:
        The path of the page.
    """
    out = Path(out)
    found = conclusions(a)
    page = make_page(a, found)
    write_csv(out / "classes.csv", *_class_table(a))
    write_json(out / "analysis.json", _numbers(a, found))
    return page.write(out / "analysis.html")


def make_page(a: Analysis, found: list[Conclusion]) -> Page:
    """Return the page of an analysis and its conclusions."""
    page = Page("Before training", f"What {a.source} holds, and what follows")
    page.tiles(
        {
            "images": _n(a.data.num_images),
            "objects": _n(len(a.data.image)),
            "classes": _n(len(a.classes)),
            **{f"{name}": _n(a.groups.count(name)) for name in GROUPS},
        }
    )
    page.section("What follows")
    for c in found:
        page.conclude(c.text, c.numbers, c.kind)
    if a.advice is not None:
        _show_classes(page, a)
        _show_together(page, a)
        _show_boxes(page, a)
        _show_repeats(page, a)
        _show_anchors(page, a)
    page.section("Every class")
    header, rows = _class_table(a)
    page.table(header, rows, summary=f"{_n(len(a.classes))} classes")
    if a.suggestion:
        page.section("A config to start from")
        page.say("python -m balanced_det.new writes it with your images and validation set.")
        page.code(a.suggestion)
    return page


def _show_classes(page, a):
    page.section("Classes")
    low, high = a.limits
    page.say(
        f"A class is called rare in up to {low} training images and common in up to {high}. "
        "LVIS's limits are 10 and 100; --limits sets others."
    )
    rows = [
        {
            "class": a.classes[i],
            "training images": int(a.image_count[i]),
            "objects": int(a.object_count[i]),
            "objects an image": float(a.object_count[i] / a.image_count[i]),
            "group": a.groups[i],
            "rank": rank,
        }
        for rank, i in enumerate(a.present, 1)
    ]
    if len(rows) <= _FEW:
        figure = figures.bars(
            rows, "class", "training images", color="group", order=GROUPS, log_y=True
        )
    else:
        figure = figures.points(
            rows, "rank", "training images", color="group", order=GROUPS, log_y=True
        )
        figure = figures.rules(figure, {"rare up to": low, "common up to": high}, axis="y")
    page.figure(figure, "Training images of each class, the most frequent first (log scale).")
    page.figure(
        figures.points(
            rows,
            "training images",
            "objects an image",
            color="group",
            order=GROUPS,
            log_x=True,
            log_y=True,
        ),
        "Objects of a class in each image that holds it (log scales).",
    )


def _show_together(page, a):
    if len(a.present) < 2:
        return
    page.section("Classes that occur together")
    shown = a.present[:_FEW]
    names = figures.distinct([a.classes[i] for i in shown])
    rows = [
        {
            "class": names[r],
            "with": names[c],
            "images of both": int(a.together[i, j]),
            "share of the class's images": float(a.together[i, j] / max(a.together[i, i], 1)),
        }
        for r, i in enumerate(shown)
        for c, j in enumerate(shown)
        if i != j
    ]
    few = f"the {_FEW} most frequent classes" if len(a.present) > _FEW else "all classes"
    page.figure(
        figures.heat(rows, "with", "class", "share of the class's images", order=names),
        f"Of the images that hold the row's class, the share that also holds the column's; {few}.",
    )


def _show_boxes(page, a):
    page.section("Boxes")
    sides = rules.scaled_sides(a.data, _training_size(a))
    powers = np.arange(1, 11.01, 0.5)  # 2 to 2,048 pixels, halves of an octave
    counts = np.histogram(np.log2(np.clip(sides, 2, 2047)), powers)[0]
    rows = [
        {"side, pixels": f"{2**p:.0f}–{2 ** (p + 0.5):.0f}", "objects": int(count)}
        for p, count in zip(powers, counts)
    ]
    page.figure(
        figures.bars(_trimmed(rows, "objects"), "side, pixels", "objects"),
        f"Square root of the boxes' areas once an image's longer side is {_training_size(a)}.",
    )
    per_image = a.data.objects_per_image
    edges = [0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 257, np.iinfo(np.int64).max]
    counts = np.histogram(per_image, edges)[0]
    rows = [
        {"objects an image": _range(low, high), "images": int(count)}
        for low, high, count in zip(edges, edges[1:], counts)
    ]
    page.figure(
        figures.bars(_trimmed(rows, "images"), "objects an image", "images"),
        f"Objects of an image: {per_image.mean():.1f} in the mean, {_n(per_image.max())} at most.",
    )
    if a.num_crowds:
        page.say(f"{_n(a.num_crowds)} groups (iscrowd) are not among the objects.")


def _show_repeats(page, a):
    page.section("What repeating would do")
    page.say(
        "Repeat-factor sampling shows an image as often as its rarest class asks for, sqrt(t / f) "
        "times where f is the share of images that hold the class (arXiv 1908.03195). IRFS takes "
        "the geometric mean of that and of the share of objects for f (arXiv 2305.08069); it is "
        "the InstanceAwareRepeatFactorTrainingSampler."
    )
    factors = [
        survey.class_repeats(f, a.repeat_threshold) for f in (a.frequency, a.joint_frequency)
    ]
    rows = [
        {
            "training images": int(a.image_count[i]),
            "repeats": float(factor[i]),
            "sampling": name,
            "class": a.classes[i],
        }
        for name, factor in zip(("repeat-factor", "IRFS"), factors)
        for i in a.present
    ]
    page.figure(
        figures.points(
            rows,
            "training images",
            "repeats",
            color="sampling",
            order=("repeat-factor", "IRFS"),
            log_x=True,
        ),
        f"How often images of a class are repeated at a threshold of {a.repeat_threshold:.3g}.",
    )


def _show_anchors(page, a):
    if a.anchors is None:
        return
    page.section("Background")
    width = 0.5 / IOU_BINS
    total = max(sum(a.anchors.background_iou), 1)
    rows = [
        {
            "largest IoU with an object": f"{k * width:.2f}–{(k + 1) * width:.2f}",
            "background anchors": int(count),
            "share": count / total,
        }
        for k, count in enumerate(a.anchors.background_iou)
    ]
    page.figure(
        figures.bars(rows, "largest IoU with an object", "background anchors", log_y=True),
        f"Background anchors of {_n(a.anchors.num_images)} images by their IoU (log scale). "
        "Sampling at random takes them as they are, IoU-balanced sampling the same number of each "
        "range.",
    )


def _class_table(a):
    header = [
        "class",
        "group",
        "training images",
        "objects",
        "frequency",
        "repeat factor",
        "repeat factor, IRFS",
        "median side, pixels",
    ]
    rfs = survey.class_repeats(a.frequency, a.repeat_threshold)
    irfs = survey.class_repeats(a.joint_frequency, a.repeat_threshold)
    sides = _medians(a.data.side, a.data.category, len(a.classes))
    order = np.argsort(-a.image_count, kind="stable")
    return header, [
        [
            a.classes[i],
            a.groups[i],
            int(a.image_count[i]),
            int(a.object_count[i]),
            float(f"{a.frequency[i]:.6g}"),
            round(float(rfs[i]), 3),
            round(float(irfs[i]), 3),
            None if np.isnan(sides[i]) else round(float(sides[i]), 1),
        ]
        for i in order
    ]


def _numbers(a, found):
    return {
        "source": a.source,
        "images": a.data.num_images,
        "training_images": a.num_training,
        "unlabelled_images": a.num_unlabelled,
        "objects": len(a.data.image),
        "crowds": a.num_crowds,
        "classes": len(a.classes),
        "limits": list(a.limits),
        "groups": {name: a.groups.count(name) for name in GROUPS},
        "repeat_threshold": a.repeat_threshold,
        "near_duplicates": {
            "same_class": a.duplicates.same_class,
            "other_class": a.duplicates.other_class,
        },
        "anchors": None if a.anchors is None else dataclasses.asdict(a.anchors),
        "advice": None if a.advice is None else dataclasses.asdict(a.advice),
        "conclusions": [dataclasses.asdict(c) for c in found],
    }


def _medians(values, groups, num_groups):
    """(num_groups,) median of the values of each group, NaN for a group without any."""
    order = np.lexsort((values, groups))
    counts = np.bincount(groups, minlength=num_groups)
    first = np.cumsum(counts) - counts
    middle = first + (counts - 1) // 2
    result = np.full(num_groups, np.nan)
    some = counts > 0
    low, high = middle[some], (first + counts // 2)[some]
    result[some] = (values[order][low] + values[order][high]) / 2
    return result


def _trimmed(rows, field):
    """Without the empty bins at both ends."""
    filled = [k for k, row in enumerate(rows) if row[field]]
    return rows[filled[0] : filled[-1] + 1] if filled else rows


def _range(low, high):
    if high - low == 1:
        return str(low)
    return f"{low}+" if high > 1_000_000 else f"{low}–{high - 1}"


def _n(number):
    number = float(number)
    return f"{number:,.0f}" if number == round(number) or number >= 100 else f"{number:.3g}"


def _is(items):
    return "is" if len(items) == 1 else "are"


# --- The command line -----------------------------------------------------------------------------


def _megabytes(path):
    try:
        return f"{os.path.getsize(path) / 1e6:,.0f} MB"
    except OSError:
        return "missing"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see ``--help``."""
    escape_log_records()
    parser = argparse.ArgumentParser(
        prog="python -m balanced_det.analyze",
        description="Look at a data set before training on it.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="annotations in COCO or LVIS format; no image is needed")
    source.add_argument("--config-file", help="a config, whose DATASETS.TRAIN is analysed")
    parser.add_argument(
        "--limits",
        nargs=2,
        type=int,
        default=(RARE_MAX_IMAGES, COMMON_MAX_IMAGES),
        metavar=("RARE", "COMMON"),
        help="most training images of a rare and of a common class (10 100)",
    )
    parser.add_argument(
        "--row-images",
        type=int,
        default=300,
        help="images that anchors are labelled on (%(default)s); 0 leaves them out",
    )
    parser.add_argument("--size", type=int, help="with --data: longer side of images, pixels")
    parser.add_argument("--out", default="output/analysis", help="folder (%(default)s)")
    parser.add_argument("opts", nargs="*", help="with --config-file: KEY VALUE ...")
    options = parser.parse_args(arguments)
    shared = {"limits": tuple(options.limits), "row_images": options.row_images}
    try:
        if options.data:
            analysis = analyze_file(options.data, size=options.size, **shared)
        else:
            from .engine import load_config  # which a person without a config need not wait for

            cfg = load_config(options.config_file, options.opts)
            analysis = analyze_config(cfg, **shared)
        with telling("Writing the page"):
            page = write_analysis(analysis, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for conclusion in conclusions(analysis):
        print(f"- {conclusion.text}\n    {conclusion.numbers}")
    print(f"Written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
