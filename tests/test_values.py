"""Every key that a user sets, with values that cannot train: one sentence that names the key.

Each value goes through what a command line goes through before anything is written or started.
"""

import math

import pytest
import runs
import torch
from detectron2.config import get_cfg

from balanced_det.config import add_balanced_det_config, check_values, load_config
from balanced_det.config.reads import all_values
from balanced_det.config.values import _CAN_BE_NONE
from balanced_det.engine import Trainer, check_run, in_a_sentence
from balanced_det.engine.output import locked
from balanced_det.errors import InputError

NAN, INF = math.nan, math.inf
CROP = {"INPUT.CROP.ENABLED": True}
WEIGHTED = {"DATALOADER.SAMPLER_TRAIN": "WeightedTrainingSampler"}
REPEAT = {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}
SUBSET = {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler"}
COSINE = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"}
FIXED_GAMMA = {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"}
PRECISE_BN = {"TEST.PRECISE_BN.ENABLED": True, "TEST.EVAL_PERIOD": 1}
PYRAMID = {"MODEL.BACKBONE.NAME": "build_balanced_pyramid_backbone"}
FOCAL = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "FocalLoss"}
STEM = {"MODEL.RESNETS.OUT_FEATURES": ["stem", "res2", "res3", "res4", "res5"]}
ALL_SIXTEEN = [[-16]] * 5

# Beside the quickstart's keys: what makes a key of effect, and what it cannot be.
FASTER = [
    ("MODEL.PIXEL_MEAN", {}, [1.0], ["a", "b", "c"], [NAN, 0.0, 0.0], 3.0),
    ("MODEL.PIXEL_STD", {}, [0.0, 1.0, 1.0], [1.0], [-1.0, 1.0, 1.0], [INF] * 3),
    ("MODEL.DEVICE", {}, "gpu", "cuda:99", ""),
    ("MODEL.META_ARCHITECTURE", {}, "FasterRCNN", ""),
    ("MODEL.BACKBONE.NAME", {}, "resnet", ""),
    ("MODEL.BACKBONE.FREEZE_AT", {}, -1, 2.5, "x"),
    ("MODEL.FPN.IN_FEATURES", {}, [], ["res1"], ["res2", "res2"], ["res5", "res4"], "res2", [2]),
    ("MODEL.FPN.IN_FEATURES", STEM, ["stem"]),
    ("MODEL.FPN.OUT_CHANNELS", {}, 0, -1, 1.5),
    ("MODEL.FPN.NORM", {}, "Batch", "GN", "bn"),
    ("MODEL.FPN.FUSE_TYPE", {}, "max", ""),
    ("MODEL.PROPOSAL_GENERATOR.NAME", {}, "rpn", "PrecomputedProposals", ""),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", {}, -1, NAN),
    ("MODEL.ANCHOR_GENERATOR.NAME", {}, "Anchors"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", {}, [], [[]], [[16], [32]], [[0]] * 5, ALL_SIXTEEN),
    ("MODEL.ANCHOR_GENERATOR.SIZES", {}, [["a"]], [[16, 32], *[[32]] * 4], [[NAN]], 32, [16, [9]]),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", {}, [], [[]], [[0.0]], [[-1.0]], [["x"]], [[INF]]),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", {}, [[1.0], [2.0]]),
    ("MODEL.ANCHOR_GENERATOR.OFFSET", {}, -0.5, 1.0, NAN),
    ("MODEL.RPN.HEAD_NAME", {}, "Head"),
    ("MODEL.RPN.IN_FEATURES", {}, [], ["p9"], ["res4"], "p2", ["p2", "p2"]),
    ("MODEL.RPN.IOU_THRESHOLDS", {}, [], [0.5], [0.7, 0.3], [-0.1, 0.7], ["a", "b"]),
    ("MODEL.RPN.IOU_LABELS", {}, [], [0, 1], [0, -1, 2], [1, -1, 0], ["a", "b", "c"]),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", {}, 0, -1, 1.5),
    ("MODEL.RPN.BBOX_REG_WEIGHTS", {}, (1.0,), (0.0, 1.0, 1.0, 1.0), ("a",) * 4, (NAN,) * 4, ()),
    ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", {}, 0, -5),
    ("MODEL.RPN.NMS_THRESH", {}, -0.5, 1.5, NAN, "x"),
    ("MODEL.RPN.CONV_DIMS", {}, [0], [-2], [1.5], ["a"], -1),
    ("MODEL.RPN.LOSS_WEIGHT", {}, -1, NAN, INF),
    ("MODEL.ROI_HEADS.NAME", {}, "Heads", "RROIHeads"),
    ("MODEL.ROI_HEADS.NUM_CLASSES", {}, 0, -1, 5, 1.5, "all"),
    ("MODEL.ROI_HEADS.IN_FEATURES", {}, [], ["p9"], ["p2", "p2"], ["p4", "p2"], ["p2", "p5"]),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", {}, [], [0.3, 0.5], [1.5], ["x"], 0.5),
    ("MODEL.ROI_HEADS.IOU_LABELS", {}, [], [1, 0], [0, 2], [0, 1, 1]),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", {}, 0, -1),
    ("MODEL.ROI_HEADS.POSITIVE_FRACTION", {}, -1, 2),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", {}, -1, 1.5, NAN, "low"),
    ("MODEL.ROI_BOX_HEAD.NAME", {}, "Head", ""),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", {}, (10.0,), (0.0, 1.0, 1.0, 1.0), ("a",) * 4, ()),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", {}, 0, -7, 7.5),
    ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", {}, -1, 1.5),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", {}, "ROIAlignV3", "", "ROIAlignRotated"),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", {}, -1, 0),
    ("MODEL.ROI_BOX_HEAD.CONV_DIM", {}, 0, -1),
    ("MODEL.ROI_BOX_HEAD.NORM", {}, "Batch"),
    ("MODEL.RESNETS.DEPTH", {}, 0, 51),
    ("MODEL.RESNETS.OUT_FEATURES", {}, [], ["res1"], ["res4"], "res4", ["res2", "res3"]),
    ("MODEL.RESNETS.NUM_GROUPS", {}, 0, -1),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", {}, 0, -1),
    ("MODEL.RESNETS.RES5_DILATION", {}, 0, 3),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", {}, 0, 256),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", {}, 0, -1),
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", {}, [True] * 4, [False], []),
    ("INPUT.MIN_SIZE_TRAIN", {}, (), (0,), (64.5,), ("a",), 64),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", {}, "random", "range", ""),
    ("INPUT.MAX_SIZE_TRAIN", {}, 0, 1.5),
    ("INPUT.MIN_SIZE_TEST", {}, -1, 64.5),
    ("INPUT.RANDOM_FLIP", {}, "both", ""),
    ("INPUT.CROP.TYPE", CROP, "center", "absolute"),
    ("INPUT.CROP.SIZE", CROP, [0.9], [1.5, 0.5], [0.0, 0.0], [-0.5, 0.5], ["a", "b"], [2, 2]),
    ("INPUT.FORMAT", {}, "RBG", "", "YUV-BT.601", "CMYK"),
    ("INPUT.MASK_FORMAT", {}, "rle", ""),
    ("DATASETS.TRAIN", {}, (), ("nowhere",), "shapes", (3,)),
    ("DATASETS.TEST", {}, ("nowhere",), "shapes"),
    ("DATASETS.TRAIN_REPEAT_FACTOR", WEIGHTED, [["nowhere", 2.0]], ["x"], [["a"]], [[]]),
    ("DATALOADER.NUM_WORKERS", {}, -1, 1.5),
    ("DATALOADER.SAMPLER_TRAIN", {}, "Sampler", ""),
    ("DATALOADER.REPEAT_THRESHOLD", REPEAT, -1, NAN),
    ("DATALOADER.RANDOM_SUBSET_RATIO", SUBSET, 0.0, 2.0, NAN, 0.001),
    ("SOLVER.LR_SCHEDULER_NAME", {}, "Cosine", "WarmupStepWithFixedGammaLR", ""),
    ("SOLVER.MAX_ITER", {}, -1, 0, 1.5),
    ("SOLVER.BASE_LR", {}, -1, NAN, INF, "x"),
    ("SOLVER.BASE_LR", COSINE, 0.0),
    ("SOLVER.BASE_LR_END", COSINE, -1.0, NAN, 9.0),
    ("SOLVER.MOMENTUM", {}, -0.5, 1, NAN),
    ("SOLVER.WEIGHT_DECAY", {}, -1, NAN, INF),
    ("SOLVER.WEIGHT_DECAY_BIAS", {}, -1, "x", NAN, [0.1]),
    ("SOLVER.BIAS_LR_FACTOR", {}, -1, NAN),
    ("SOLVER.GAMMA", {}, 0, -1),
    ("SOLVER.STEPS", {}, (-1,), (0,), (1.5,), (5, 3), ("a",), 3, (2, 2), (1, 2)),
    ("SOLVER.NUM_DECAYS", FIXED_GAMMA, 0, -1, 2),
    ("SOLVER.WARMUP_FACTOR", {}, -1, 2, NAN),
    ("SOLVER.WARMUP_ITERS", {}, -1, 1.5),
    ("SOLVER.WARMUP_METHOD", {}, "exp", ""),
    ("SOLVER.CHECKPOINT_PERIOD", {}, 0, -1),
    ("SOLVER.IMS_PER_BATCH", {}, 0, -2, 1.5),
    ("SOLVER.REFERENCE_WORLD_SIZE", {}, -1, 3),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", {}, "all"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", {}, 0, -1, NAN),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", {}, 0, NAN),
    ("TEST.EXPECTED_RESULTS", {}, ["x"], [["bbox"]], [["bbox", "AP", "high", 0.2]]),
    ("TEST.EVAL_PERIOD", {}, -1, 1.5),
    ("TEST.DETECTIONS_PER_IMAGE", {}, 0, -1),
    ("TEST.AUG.MIN_SIZES", {}, (), (0,), ("a",)),
    ("TEST.AUG.MAX_SIZE", {}, 0, -1),
    ("TEST.PRECISE_BN.NUM_ITER", PRECISE_BN, 0, -1),
    ("SEED", {}, 1.5, 2**70),
    ("FLOAT32_PRECISION", {}, "half"),
    ("VIS_PERIOD", {}, -1),
    ("OUTPUT_DIR", {}, "", "/proc/out", 5),
    ("VERSION", {}, 1, 3),
    ("BALANCE.IMPORTS", {}, ["no_such_module"], "x", [3]),
    ("BALANCE.DATASETS", {}, "x", [["a"]], [3], [["a", 1, 2]]),
    ("BALANCE.COUNT_IMAGES", {}, 0, -1, "x"),
    ("BALANCE.TRAIN_ONLY", {}, ["nothing."], "x", [3]),
    ("BALANCE.GRADIENT_FIGURE_PERIOD", {}, 0, "x", 1.5, True, [10]),
    ("BALANCE.STATISTICS", {}, "mine", None),
    ("BALANCE.TRUSTED_WEIGHTS", {}, "x", [3]),
    ("BALANCE.SKIP_BAD_STEPS", {}, -1, 1.5),
    ("BALANCE.SKIP_BROKEN_IMAGES", {}, -1, "x"),
    ("BALANCE.AMP_DTYPE", {"SOLVER.AMP.ENABLED": True}, "float8", "float16", None),
    ("BALANCE.ACCUMULATE_STEPS", {}, 0, 1.5),
    ("BALANCE.BEST_METRIC", {}, "APx", 3, ""),
    ("BALANCE.STOP_AFTER", {"BALANCE.BEST_METRIC": "AP"}, 0, "x", 3),
    ("BALANCE.EqualizationLoss.TAIL_THRESHOLD", {}, -1, 2, NAN, "x"),
    ("BALANCE.EqualizationLoss.TAIL_SHARE", {}, -1.0, 2.0, "x"),
    ("BALANCE.FocalLoss.ALPHA", FOCAL, 2, -1),
    ("BALANCE.SmoothL1Loss.BETA", {}, -1, NAN, "x"),
    ("BALANCE.ROI_HEADS.CLASSIFICATION_LOSS", {}, "Loss", "", None, 3),
    ("BALANCE.ROI_HEADS.BOX_LOSS", {}, "L1", "", "SmoothL1Loss +", "-1 * SmoothL1Loss", None),
    ("BALANCE.ROI_HEADS.SAMPLER", {}, "Random", None),
    ("BALANCE.ROI_HEADS.SCORE_THRESHOLD", {}, "Threshold", None),
    ("BALANCE.ROI_HEADS.SCORE_CALIBRATION", {}, "Cal", "NorCal", 3),
    ("BALANCE.ROI_HEADS.CLASSIFIER", {}, "Lin", 3),
    ("BALANCE.ROI_HEADS.CLASSIFICATION_WEIGHT", {}, -1, NAN, None),
    ("BALANCE.ROI_HEADS.PRIOR_PROB", {}, 0, 1, "x", [0.5]),
    ("BALANCE.ROI_HEADS.GUIDED_FACTOR", {}, 0, -1),
    ("BALANCE.ROI_HEADS.CLASS_WEIGHTS", {}, "x", [1.0], [-1.0] * 6, [NAN] * 6, 3, ["a"] * 6, []),
    ("BALANCE.RPN.CLASSIFICATION_LOSS", {}, "SeesawLoss"),
    ("BALANCE.PYRAMID.REFINE_LEVEL", PYRAMID, 9, -1),
    ("BALANCE.PYRAMID.REFINE_TYPE", PYRAMID, "x"),
]
MASK = [
    ("MODEL.ROI_MASK_HEAD.NAME", {}, "Head", ""),
    ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", {}, 0, -1),
    ("MODEL.ROI_MASK_HEAD.NUM_CONV", {}, -1),
    ("MODEL.ROI_MASK_HEAD.CONV_DIM", {}, 0, -1),
    ("MODEL.ROI_MASK_HEAD.NORM", {}, "x", "GN"),
    ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", {}, "x"),
]
CASCADE = [
    ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", {}, (), (0.5,), (0.7, 0.6, 0.5), (1.5, 0.6, 0.7)),
    ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", {}, (), ((10.0,),) * 3, ((0.0,) * 4,) * 3),
    ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", {}, ((1.0,) * 4,) * 2, (10.0, 10.0, 5.0)),
    ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", {}, False),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", {}, [0.7]),
]
RETINANET = [
    ("MODEL.RETINANET.IN_FEATURES", {}, [], ["p2"], ["p3"], "p3", ["p3"] * 5),
    ("MODEL.RETINANET.NUM_CONVS", {}, -1, 0),
    ("MODEL.RETINANET.IOU_THRESHOLDS", {}, [], [0.5, 0.4], [0.5], [2, 3]),
    ("MODEL.RETINANET.IOU_LABELS", {}, [0, 1], [0, 0, 0]),
    ("MODEL.RETINANET.PRIOR_PROB", {}, 0.5),
    ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", {}, 0),
    ("MODEL.RETINANET.BBOX_REG_WEIGHTS", {}, (1.0,), (0.0,) * 4),
    ("MODEL.RETINANET.NORM", {}, "x"),
    ("MODEL.RETINANET.NUM_CLASSES", {}, 5, 0),
    ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", {}, 1.0),
    ("MODEL.BACKBONE.NAME", {}, "build_resnet_fpn_backbone"),
    ("MODEL.FPN.IN_FEATURES", {}, ["res5"]),
    ("BALANCE.DENSE.ROWS_PER_IMAGE", {}, 0),
    ("BALANCE.DENSE.PRIOR_PROB", {}, 0, 1.0),
]
FCOS = [
    ("MODEL.FCOS.IN_FEATURES", {}, [], ["p2"], ["p3"] * 5),
    ("MODEL.FCOS.NUM_CONVS", {}, -1, 0),
    ("MODEL.FCOS.NORM", {}, "x"),
    ("MODEL.FCOS.CENTER_SAMPLING_RADIUS", {}, -1, NAN),
    ("MODEL.FCOS.INITIAL_DISTANCE", {}, 0, -1, "x", NAN, True, [2.0]),
]
SHAPES_RETINANET = "configs/shapes/retinanet.yaml"
DETECTORS = {
    "faster": ("configs/quickstart.yaml", {"MODEL.ROI_HEADS.NUM_CLASSES": runs.CLASSES}, FASTER),
    "mask": (
        "configs/quickstart.yaml",
        {
            "MODEL.ROI_HEADS.NUM_CLASSES": runs.CLASSES,
            "MODEL.MASK_ON": True,
            "MODEL.ROI_MASK_HEAD.NAME": "BalancedMaskHead",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        },
        MASK,
    ),
    "cascade": (
        "configs/quickstart.yaml",
        {
            "MODEL.ROI_HEADS.NUM_CLASSES": runs.CLASSES,
            "MODEL.ROI_HEADS.NAME": "BalancedCascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        },
        CASCADE,
    ),
    "retinanet": (SHAPES_RETINANET, {"MODEL.RETINANET.NUM_CLASSES": runs.CLASSES}, RETINANET),
    "fcos": ("configs/shapes/fcos.yaml", {"MODEL.FCOS.NUM_CLASSES": runs.CLASSES}, FCOS),
}
# Odd values that mean something: these train.
LEGAL = [
    ("MODEL.BACKBONE.FREEZE_AT", 9),
    ("MODEL.FPN.OUT_CHANNELS", 7),
    ("MODEL.FPN.FUSE_TYPE", "avg"),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 100_000),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [16, 32, 64]),
    ("MODEL.RPN.IN_FEATURES", ["p6", "p5", "p4", "p3", "p2"]),
    ("MODEL.RPN.CONV_DIMS", [16, -1]),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p6"]),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1),
    ("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 1),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
    ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
    ("MODEL.RESNETS.NORM", ""),
    ("INPUT.MIN_SIZE_TRAIN", (10**7,)),
    ("INPUT.MAX_SIZE_TRAIN", 10),
    ("INPUT.MIN_SIZE_TEST", 0),
    ("INPUT.RANDOM_FLIP", "vertical"),
    ("INPUT.FORMAT", "L"),
    ("DATASETS.TEST", ()),
    ("SOLVER.BASE_LR", 0),
    ("SOLVER.STEPS", (99,)),
    ("SOLVER.WARMUP_ITERS", 10**6),
    ("SOLVER.WEIGHT_DECAY_NORM", None),
    ("SEED", -7),
    ("VIS_PERIOD", 1),
]
CASES = [
    pytest.param(name, key, value, more, id=f"{name} {key} {value}")
    for name, (_, _, rows) in DETECTORS.items()
    for key, more, *values in rows
    for value in values
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_data(tmp_path_factory.mktemp("data"))


def loaded(data, out, name, changes):
    """Return the config of a small detector, as a command line makes it."""
    path, keys, _ = DETECTORS[name]
    sets = [[str(p), str(p), str(data.image_root)] for p in (data.train_json, data.val_json)]
    keys = {
        "BALANCE.DATASETS": sets,
        "DATASETS.TRAIN": (sets[0][0],),
        "DATASETS.TEST": (sets[1][0],),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.DEVICE": "cpu",
        "MODEL.FPN.OUT_CHANNELS": 64 if name in ("retinanet", "fcos") else 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (),
        "OUTPUT_DIR": str(out),
        **keys,
        **changes,
    }
    return load_config(path, [item for pair in keys.items() for item in pair])


def check(data, out, name, changes):
    """Do what a command does before it starts a process."""
    cfg = loaded(data, out, name, changes)
    check_run(cfg)
    return cfg


def test_there_are_many_values():
    assert len(CASES) >= 250
    assert len({case.values[1] for case in CASES}) >= 120


@pytest.mark.parametrize(("name", "key", "value", "more"), CASES)
def test_value_that_cannot_train_is_refused_by_name(data, tmp_path, name, key, value, more):
    out = tmp_path / "out"
    with pytest.raises(InputError) as refused:
        cfg = check(data, out, name, {**more, key: value})
        with locked(cfg.OUTPUT_DIR):  # a folder may let nobody write, whatever its rights say
            pass
    message = str(refused.value)
    # A method names its parameter as its constructor does.
    node, _, parameter = key.rpartition(".")
    assert key in message or (node in message and parameter.lower() in message.lower())
    assert "\n" not in message and message.endswith(".")
    assert "Traceback" not in message and not out.exists()


@pytest.mark.parametrize("name", DETECTORS)
def test_the_small_detectors_themselves_are_sound(data, tmp_path, name):
    check(data, tmp_path / "out", name, {})


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), LEGAL)
def test_odd_value_that_means_something_trains(data, tmp_path, key, value):
    cfg = check(data, tmp_path / "out", "faster", {key: value, "SOLVER.MAX_ITER": 1})
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "out" / "model_final.pth").exists()


# --- Every key ------------------------------------------------------------------------------------


def default_config():
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    return cfg


DEFAULTS = all_values(default_config())
OF_DETECTRON2 = {
    key: value
    for key, value in DEFAULTS.items()
    if not key.startswith(("BALANCE.", "MODEL.FCOS.", "MODEL.BOTTOM_UP.")) and value is not None
}


def other_type(default):
    """Return a text that yacs reads as a value of another type."""
    if isinstance(default, str):
        return "[1]"
    return "{'a': 1}" if isinstance(default, (list, tuple)) else "word"


def test_every_key_refuses_a_value_of_another_type_by_name():
    wrong = []
    for key, default in DEFAULTS.items():
        if default is None:
            continue
        try:
            load_config("configs/quickstart.yaml", [key, other_type(default)])
        except InputError as error:
            if key not in str(error):
                wrong.append(key)
        else:
            wrong.append(key)
    assert not wrong


def test_none_is_refused_by_name_where_a_value_is_wanted():
    wrong = []
    for key in OF_DETECTRON2.keys() - _CAN_BE_NONE:
        cfg = default_config()
        cfg.merge_from_list([key, None])
        try:
            check_values(cfg)
        except InputError as error:
            if f"{key} is None" not in str(error):
                wrong.append(key)
        else:
            wrong.append(key)
    assert not wrong


# --- The last net ---------------------------------------------------------------------------------


class FailingTrainer(Trainer):
    """A trainer whose model fails in its first step as Detectron2's parts do."""

    @classmethod
    def build_model(cls, cfg, count=True):
        model = super().build_model(cfg, count)
        model.backbone.register_forward_pre_hook(fail_by_an_assertion)
        return model


def fail_by_an_assertion(*_):
    raise AssertionError("p6 has no anchors")


def failing(data, tmp_path):
    cfg = check(data, tmp_path / "out", "faster", {"SOLVER.MAX_ITER": 1})
    trainer = FailingTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def test_what_no_check_foresaw_is_one_sentence_with_a_hint_where(data, tmp_path):
    with pytest.raises(InputError) as told:
        failing(data, tmp_path).train()
    message = str(told.value)
    assert message.startswith("The first step failed: p6 has no anchors (AssertionError in ")
    assert "perhaps by MODEL.RPN.IN_FEATURES" in message
    path = tmp_path / "out" / "traceback.txt"
    assert message.endswith(f"'{path}' has more.")
    assert "fail_by_an_assertion" in path.read_text()


def test_a_check_before_the_run_writes_nothing_into_a_folder_that_is_there(data, tmp_path):
    (tmp_path / "out").mkdir()
    # Strides that no check knows: those of a pyramid on a dilated last stage.
    keys = {"MODEL.RESNETS.RES5_DILATION": 2}
    with pytest.raises(InputError, match="The model cannot be built: .*BALANCED_DET_TRACEBACK=1"):
        check(data, tmp_path / "out", "faster", keys)
    assert not list((tmp_path / "out").iterdir())


def test_environment_may_ask_for_the_exception_itself(data, tmp_path, monkeypatch):
    monkeypatch.setenv("BALANCED_DET_TRACEBACK", "1")
    with pytest.raises(AssertionError):
        failing(data, tmp_path).train()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a.json"), "No space left on device: 'a.json'"),
        (KeyError("p7"), "p7"),
        (ValueError(3, "a"), "(3, 'a')"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
    ],
)
def test_a_sentence_says_what_the_exception_says(tmp_path, error, said):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(InputError) as told, in_a_sentence("The evaluation failed", cfg):
        raise error
    assert f"{said} ({type(error).__name__} in test_values.py, line " in str(told.value)


def test_proposals_that_are_not_finite_are_a_bad_step(data, tmp_path):
    changes = {"SOLVER.MAX_ITER": 2, "BALANCE.SKIP_BAD_STEPS": 1, "DATASETS.TEST": ()}
    cfg = check(data, tmp_path / "out", "faster", changes)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)

    def spoil(module, inputs, output):
        return {n: f * math.nan if trainer.iter == 0 else f for n, f in output.items()}

    handle = trainer.model.backbone.register_forward_hook(spoil)
    trainer.train()
    handle.remove()
    assert trainer._trainer.skipped_steps == 1
    state = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert all(value.isfinite().all() for value in state.values())
    trainer = Trainer(loaded(data, tmp_path / "two", "faster", {"SOLVER.MAX_ITER": 1}))
    trainer.resume_or_load(resume=False)
    trainer.model.backbone.register_forward_hook(spoil)
    with pytest.raises(InputError, match="Iteration 0: .*Inf/NaN.*images [0-9]+ '.*jpg'"):
        trainer.train()
