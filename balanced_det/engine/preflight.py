"""What is checked before a run starts a process or writes a file."""

import functools
import logging
import os
import traceback

from detectron2.data import DatasetCatalog

from ..data.registration import check_masks, training_statistics
from ..data.training_samplers import TRAINING_SAMPLERS
from ..errors import InputError
from ..gradient_figure import PlotGradients
from .checkpoint import (
    build_checkpointer,
    is_local,
    load_trained,
    load_weights,
    saved_checkpoints,
)
from .classes import check_model_classes, check_same_classes
from .evaluate import check_best
from .lazy import trainer_of
from .output import check_output_dir
from .step import amp_dtype

logger = logging.getLogger(__name__)

TRAIN_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
    *TRAINING_SAMPLERS,
)
_RESNET_DEPTHS = (18, 34, 50, 101, 152)


def check_run(cfg, eval_only=False, resume=False, num_workers=1):
    """Refuse a run that cannot work, before it starts a process or writes a file.

    Annotations are read and the model is built, once, on CPU. What is counted is kept for the run,
    unless that runs in other processes.

    Args:
        cfg: a config of :func:`balanced_det.config.load_config`.
        eval_only: the training set is not needed.
        resume: where ``OUTPUT_DIR`` holds a checkpoint, ``MODEL.WEIGHTS`` is not needed.
        num_workers: processes that will train, on all machines.

    Raises:
        InputError: an annotation file, an image, the weights, a method's name or another value of
            the config is missing or wrong.
    """
    _check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    _check_choice("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, _RESNET_DEPTHS)
    _check_task(cfg)
    check_output_dir(cfg, eval_only, resume)
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    resumes = resume and bool(saved_checkpoints(cfg.OUTPUT_DIR))
    if weights and is_local(weights) and not resumes and not os.path.isfile(weights):
        raise InputError(f"MODEL.WEIGHTS: the file '{weights}' does not exist.")
    check_same_classes([*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST])
    for name in cfg.DATASETS.TEST:
        DatasetCatalog.get(name)
    if not eval_only:
        _check_loader(cfg, num_workers)
        amp_dtype(cfg)
        _check_sampler(cfg)
        check_best(cfg)
        check_model_classes(cfg, cfg.DATASETS.TRAIN)
        if cfg.BALANCE.GRADIENT_FIGURE_PERIOD:
            PlotGradients(cfg.BALANCE.GRADIENT_FIGURE_PERIOD, cfg.OUTPUT_DIR)  # for its checks
    check_masks(cfg, eval_only)
    _check_model(cfg, eval_only, resumes)


def _check_model(cfg, eval_only, resumes):
    """Build the model on CPU and load what it starts with, but for what lies elsewhere."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = trainer_of(cfg).build_model(cfg, count=not eval_only)
        if not eval_only:
            trainer_of(cfg).build_optimizer(cfg, model)
    except InputError:
        raise
    except Exception as error:  # Detectron2 and torch raise nearly anything for a wrong value
        raise InputError(f"The model cannot be built: {_told(error)}.") from error
    if not resumes and not is_local(cfg.MODEL.WEIGHTS):
        return
    if eval_only:
        load_trained(model, cfg, resumes)
    elif resumes or cfg.MODEL.WEIGHTS:
        load_weights(build_checkpointer(model, cfg, cfg.DATASETS.TRAIN), cfg, resumes)


def _told(error):
    """Return what an exception says and, since that may be little, where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error.args[0] if error.args else error).rstrip("!.")
    place = f"{os.path.basename(where.filename)}, line {where.lineno}"
    return f"{' '.join(text.split()) or where.line} ({type(error).__name__} in {place})"


# Detectron2's detectors of something else than boxes and masks of objects.
_OTHER_TASKS = {
    "MODEL.META_ARCHITECTURE": {
        "ProposalNetwork": "proposals have no classes to evaluate",
        "PanopticFPN": "segmentations of a whole image are not read",
        "SemanticSegmentor": "segmentations of a whole image are not read",
    },
    "MODEL.PROPOSAL_GENERATOR.NAME": {"RRPN": "boxes are read without an angle"},
    "MODEL.ROI_HEADS.NAME": {"RROIHeads": "boxes are read without an angle"},
    "MODEL.ANCHOR_GENERATOR.NAME": {
        "RotatedAnchorGenerator": "boxes are read without an angle",
    },
    "MODEL.KEYPOINT_ON": {True: "keypoints are not read"},
    "MODEL.LOAD_PROPOSALS": {True: "proposals of files are not read"},
}


def _check_task(cfg):
    """Refuse what this project's reader and evaluation do not serve."""
    for key, reasons in _OTHER_TASKS.items():
        node, _, name = key.rpartition(".")
        value = functools.reduce(getattr, node.split("."), cfg)[name]
        if value in reasons:
            raise InputError(f"{key} is {value!r}, which cannot be trained here: {reasons[value]}.")
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise InputError(
            f"TEST.AUG.ENABLED: Detectron2 augments images at test time for GeneralizedRCNN alone, "
            f"not for MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}."
        )


def _check_loader(cfg, num_workers):
    batch = cfg.SOLVER.IMS_PER_BATCH
    workers = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
    if batch < 1 or batch % workers:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a positive multiple of the number of "
            f"workers, {workers}."
        )
    if cfg.BALANCE.ACCUMULATE_STEPS < 1:
        raise InputError(
            f"BALANCE.ACCUMULATE_STEPS is {cfg.BALANCE.ACCUMULATE_STEPS}; it must be at least 1."
        )


def _check_sampler(cfg):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    _check_choice("DATALOADER.SAMPLER_TRAIN", name, TRAIN_SAMPLERS)
    has_objects = training_statistics(cfg).instance_count.any()
    if name == "ClassAwareTrainingSampler" and not has_objects:
        raise InputError(f"DATALOADER.SAMPLER_TRAIN: {name} needs an object; there is none.")


def _check_choice(key, value, choices):
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{key} is {value!r}; known are: {known}.")


def _check_writable(key, path):
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{key}: '{path}' cannot be written, because of '{folder}'.")
