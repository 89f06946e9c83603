"""What the folder of a run holds, read for the report; every part of it may be missing."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .data.annotations import Annotations, read_annotations, read_json
from .engine.checkpoint import BEST, read_checkpoint, saved_checkpoints
from .errors import InputError
from .evaluation.detections import Detections, read_detection_files
from .evaluation.evaluator import DETECTIONS, POINTS
from .evaluation.operating_points import OperatingPoints, with_fallback


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One data set's evaluation.

    Attributes:
        name: of the data set, or of the folder.
        metrics: {task: {metric: percent, or None}}.
        classes: rows of ``lvis_classes.json``, by ascending category id.
        protocol: {task: {...}}.
        points: of the model's classes, or None.
        truth, detections: None where the annotations are not known or cannot be read.
        image_root: where the images are, or None.
        problem: why a part is missing, a sentence.
    """

    name: str
    metrics: dict
    classes: list[dict]
    protocol: dict
    points: OperatingPoints | None = None
    truth: Annotations | None = None
    detections: Detections | None = None
    image_root: str | None = None
    problem: str = ""

    @property
    def task(self) -> str:
        """The first task: "bbox" where boxes are evaluated."""
        return next(iter(self.metrics))

    @property
    def thresholds(self) -> np.ndarray:
        """(K,) score of the best F1 of each class of the annotations."""
        known = [row[self.task].get("threshold") for row in self.classes]
        return with_fallback(np.array([math.nan if t is None else t for t in known], dtype=float))


@dataclass(frozen=True, eq=False)
class Run:
    """What a run left.

    Attributes:
        folder: of the run.
        steps: a dictionary for each line of ``metrics.json``, by rising iteration.
        evaluations: those that left results.
        state: {name: tensor} of the model's checkpoint; empty without one.
        state_path: that checkpoint.
        problems: sentences, for what could not be read.
    """

    folder: Path
    steps: list[dict] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    state: dict = field(default_factory=dict)
    state_path: str = ""
    problems: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (iteration, value) of each finite value that was logged under a name."""
        found = [(step["iteration"], step.get(key)) for step in self.steps]
        return [(i, v) for i, v in found if isinstance(v, int | float) and math.isfinite(v)]

    def logged(self) -> list[str]:
        """All names that something was logged under, sorted."""
        return sorted({key for step in self.steps for key in step})


def read_run(
    folder: str | os.PathLike, datasets: Mapping[str, tuple[str, str]], weights: str = ""
) -> Run:
    """Read the folder of a run.

    Args:
        folder: ``OUTPUT_DIR``.
        datasets: name -> (annotation file, image root) of the test sets that are known.
        weights: the checkpoint that was evaluated; by default the folder's last.
    """
    folder = Path(folder)
    problems: list[str] = []
    steps = _steps(folder / "metrics.json", problems)
    evaluations = []
    for place in _evaluation_folders(folder):
        try:
            evaluations.append(_evaluated(place, folder, datasets))
        except (InputError, KeyError, TypeError, AttributeError, StopIteration) as error:
            problems.append(f"The results in '{place}' cannot be read: {error}.")
    path = weights or next(iter(saved_checkpoints(str(folder))), "")
    if not path and (folder / f"{BEST}.pth").is_file():
        path = str(folder / f"{BEST}.pth")
    state = {}
    if path:
        try:
            state = read_checkpoint(path)["model"]
        except InputError as error:
            problems.append(str(error))
    return Run(folder, steps, evaluations, state, path, problems)


def _steps(path, problems):
    """The lines of metrics.json; of an iteration that a resumed run repeated, the later one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    steps, broken = {}, 0
    for line in lines:
        try:
            step = json.loads(line)
            iteration = int(step["iteration"])
        except (ValueError, TypeError, KeyError, RecursionError):
            broken += 1
            continue
        steps[iteration] = {**steps.get(iteration, {}), **step, "iteration": iteration}
    if broken:
        problems.append(f"{broken} lines of '{path}' are broken and left out.")
    return [steps[i] for i in sorted(steps)]


def _evaluation_folders(folder):
    base = folder / "inference"
    if (base / "lvis_results.json").is_file():
        return [base]
    if not base.is_dir():
        return []
    return sorted(path.parent for path in base.glob("*/lvis_results.json"))


def _evaluated(place, folder, datasets):
    results = read_json(str(place / "lvis_results.json"), "file of results")
    rows = read_json(str(place / "lvis_classes.json"), "file of classes")["classes"]
    protocol = results.pop("protocol")
    results.pop("classes", None)
    next(iter(results))  # nothing was evaluated
    points = None
    if (place / POINTS).is_file():
        content = read_json(str(place / POINTS), "file of operating points")
        points = OperatingPoints.from_json(content, f"'{place / POINTS}'")
    name = points.data if points is not None else place.name
    if name not in datasets and len(datasets) == 1 and place == folder / "inference":
        name = next(iter(datasets))
    json_file, image_root = datasets.get(name, (None, None))
    truth = detections = None
    problem = "" if json_file else "The annotations are not known, so errors are not analysed."
    if json_file:
        try:
            truth = read_annotations(json_file)
            detections = read_detection_files([place / DETECTIONS], truth, "bbox")
        except InputError as error:
            truth, problem = None, f"Errors are not analysed: {error}"
    return Evaluated(name, results, rows, protocol, points, truth, detections, image_root, problem)


def class_biases(state: Mapping[str, torch.Tensor], num_classes: int) -> dict[str, np.ndarray]:
    """Return {layer: (K,)} the bias of each class in the classifiers, the mean over anchors."""
    found = {}
    for name, tensor in state.items():
        is_classifier = name.endswith(("cls_score.bias", "cls_logits.bias"))
        if not is_classifier or "proposal_generator" in name:
            continue
        bias = torch.as_tensor(tensor).float().flatten()
        if num_classes < bias.numel() < min(num_classes + 3, 2 * num_classes):
            bias = bias[:num_classes]  # without background, or Seesaw's two of objectness
        if bias.numel() and bias.numel() % num_classes == 0:
            found[name.removesuffix(".bias")] = bias.view(-1, num_classes).mean(dim=0).numpy()
    return found
