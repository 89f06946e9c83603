"""What is checked before a run starts a process or writes a file."""

import logging
import os

import numpy as np
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.transforms import AugInput
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from .. import detectors  # noqa: F401  (registers them)
from ..config.lazy import lazy_config
from ..config.reads import value_of
from ..config.values import check_pairs
from ..data.registration import check_masks, check_same_classes, training_statistics
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
from .classes import check_model_classes
from .evaluate import check_best
from .lazy import trainer_of
from .output import check_output_dir
from .sentence import in_a_sentence
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
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
}


def check_run(
    cfg: CfgNode, eval_only: bool = False, resume: bool = False, num_workers: int = 1
) -> None:
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
    _check_task(cfg)
    check_pairs(cfg)
    _check_names(cfg)
    _check_augmentations(cfg)
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
    trainer = trainer_of(cfg)
    with in_a_sentence("The model cannot be built", cfg, keep=False):
        model = trainer.build_model(cfg, count=not eval_only)
    if not eval_only:
        with in_a_sentence("The optimizer cannot be built", cfg, keep=False):
            optimizer = trainer.build_optimizer(cfg, model)
            trainer.build_lr_scheduler(cfg, optimizer)
    if not resumes and not is_local(cfg.MODEL.WEIGHTS):
        return
    if eval_only:
        load_trained(model, cfg, resumes)
    elif resumes or cfg.MODEL.WEIGHTS:
        load_weights(build_checkpointer(model, cfg, cfg.DATASETS.TRAIN), cfg, resumes)


# Detectron2's detectors of something else than boxes and masks of objects.
_OTHER_TASKS = {
    "MODEL.META_ARCHITECTURE": {
        "ProposalNetwork": "proposals have no classes to evaluate",
        "PanopticFPN": "segmentations of a whole image are not read",
        "SemanticSegmentor": "segmentations of a whole image are not read",
    },
    "MODEL.PROPOSAL_GENERATOR.NAME": {
        "RRPN": "boxes are read without an angle",
        "PrecomputedProposals": "proposals of files are not read",
    },
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
        value = value_of(cfg, key)
        if value in reasons:
            raise InputError(f"{key} is {value!r}, which cannot be trained here: {reasons[value]}.")
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise InputError(
            f"TEST.AUG.ENABLED: Detectron2 augments images at test time for GeneralizedRCNN alone, "
            f"not for MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}."
        )


def _check_names(cfg):
    """Refuse names that no registry of Detectron2 has, where the model is made of keys."""
    if lazy_config(cfg) is not None:
        return
    for key, registry in _REGISTRIES.items():
        name = value_of(cfg, key)
        if name not in registry and (name or _uses(cfg, key)):
            known = ", ".join(sorted(known for known, _ in registry))
            raise InputError(
                f"{key} is {name!r}; Detectron2's registry '{registry._name}' has: {known}."
            )


def _uses(cfg, key):
    """Say whether a model has the part that a key names; a head of boxes may be of the regions."""
    return key != "MODEL.ROI_BOX_HEAD.NAME" or (
        cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
        and cfg.MODEL.ROI_HEADS.NAME != "Res5ROIHeads"
    )


def _check_augmentations(cfg):
    """Turn an image as training and evaluation will."""
    if lazy_config(cfg) is not None:
        return
    for is_train in (True, False):
        with in_a_sentence("INPUT: images cannot be prepared", cfg, keep=False):
            mapper = DatasetMapper(cfg, is_train)
            mapper.augmentations(AugInput(np.zeros((480, 640, 3), np.uint8)))


def _check_loader(cfg, num_workers):
    batch = cfg.SOLVER.IMS_PER_BATCH
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    workers = reference or num_workers
    if batch % workers:
        of = "SOLVER.REFERENCE_WORLD_SIZE" if reference else "the number of workers"
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a positive multiple of {of}, {workers}."
        )


def _check_sampler(cfg):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    _check_choice("DATALOADER.SAMPLER_TRAIN", name, TRAIN_SAMPLERS)
    statistics = training_statistics(cfg)
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if name == "RandomSubsetTrainingSampler" and int(statistics.num_images * ratio) < 1:
        raise InputError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}; of {statistics.num_images} images that is "
            "not one."
        )
    has_objects = statistics.instance_count.any()
    if name == "ClassAwareTrainingSampler" and not has_objects:
        raise InputError(f"DATALOADER.SAMPLER_TRAIN: {name} needs an object; there is none.")


def _check_choice(key, value, choices):
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{key} is {value!r}; known are: {known}.")


def _check_writable(key, path):
    if not path:
        raise InputError(f"{key} is empty.")
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{key}: '{path}' cannot be written, because of '{folder}'.")
