"""The keys of ``BALANCE`` come from constructors; what is configured is read, or refused."""

import inspect
import re

import models
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model as detectron2_build
from detectron2.utils.events import EventStorage
from models import CASCADE, FASTER, FCOS, MASK, RETINANET
from test_detectors import assert_one_sentence

from balanced_det.build import build_model
from balanced_det.config import add_balanced_det_config
from balanced_det.config.keys import SLOTS, add_own_node, default_values, slot_keys
from balanced_det.config.ranges import RANGES, check_ranges, inside
from balanced_det.config.reads import recorded
from balanced_det.criterion import Criterion
from balanced_det.errors import InputError
from balanced_det.parts import PARTS
from balanced_det.pyramid import BalancedFeaturePyramid
from balanced_det.registry import Registry

# What a detector passes itself: it is no choice of the config.
PASSED_BY_DETECTORS = {"num_classes", "backbone", "fixed", "in_features", "out_features"}
METHODS = [method for registry in SLOTS.values() for _, method in registry]


def config(*choices):
    """Return the config of a small detector, in which a part may have its own parameters."""
    cfg = models.config()
    for choice in choices:
        for key, value in choice.items():
            add_own_node(cfg, key)
            cfg.merge_from_list([key, value])
    return cfg


def balance():
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    return cfg.BALANCE


def constructor_defaults(method):
    """Return {KEY: default} of the parameters that a method's constructor names."""
    passed = {*PASSED_BY_DETECTORS, *getattr(method, "needs", ())}
    return {
        p.name.upper(): p.default
        for p in inspect.signature(method).parameters.values()
        if p.name not in passed and p.kind is p.POSITIONAL_OR_KEYWORD
    }


# --- Where keys come from -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_keys_of_a_method_are_its_constructors(method):
    # Equality also asks that each parameter has a default: inspect's "empty" equals no value.
    assert dict(balance().get(method.__name__, {})) == constructor_defaults(method)


def test_keys_of_the_pyramid_are_its_constructors():
    keys = dict(balance().PYRAMID)
    # A builder of backbones in the config, a backbone in the constructor.
    assert keys.pop("BACKBONE") == "build_resnet_fpn_backbone"
    assert keys == constructor_defaults(BalancedFeaturePyramid)


def test_every_node_is_a_part_or_a_method():
    nodes = {name for name, value in balance().items() if isinstance(value, CfgNode)}
    assert nodes <= {*PARTS, "PYRAMID", *(method.__name__ for method in METHODS)}


@pytest.mark.parametrize("slot", slot_keys())
def test_every_slot_defaults_to_a_registered_method(slot):
    default = default_values()[slot]
    # Detectron2's scores are as they are and its last layer is linear; other slots have a method.
    can_be_off = slot.endswith(("SCORE_CALIBRATION", "CLASSIFIER"))
    assert default in slot_keys()[slot] or (default is None and can_be_off)


def test_a_method_whose_argument_no_config_can_hold_is_not_registered():
    registry = Registry("loss")
    with pytest.raises(InputError, match="'Bad' has the argument 'weights'"):

        @registry.register
        class Bad:
            def __init__(self, num_classes, weights):
                pass

    assert "Bad" not in registry


def test_counted_statistics_are_no_keys():
    registry = Registry("loss")

    @registry.register
    class Good:
        needs = ("class_counts",)

        def __init__(self, num_classes, class_counts, power=0.5):
            pass

    assert registry.parameters("Good") == {"power": 0.5}


# --- A part's own parameters ----------------------------------------------------------------------


def test_a_part_has_its_own_value_beside_that_of_all():
    keys = {"BALANCE.SmoothL1Loss.BETA": 0.5, "BALANCE.RPN.SmoothL1Loss.BETA": 0.11}
    cfg = config(FASTER, keys)
    model = build_model(cfg)
    assert model.proposal_generator.criterion.box_losses[0].beta == 0.11
    assert model.roi_heads.box_predictor.criterion.box_losses[0].beta == 0.5
    # And through what a checkpoint's folder keeps of the config.
    loaded = config()
    loaded.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    assert loaded.BALANCE.RPN.SmoothL1Loss.BETA == 0.11


def test_a_part_without_its_own_value_shows_none():
    assert set(config().BALANCE.RPN) & {method.__name__ for method in METHODS} == set()


def test_a_parameter_that_no_method_has_is_no_key_of_a_part():
    with pytest.raises(AssertionError, match="Non-existent key"):
        config({"BALANCE.RPN.SmoothL1Loss.ALPHA": 0.1})
    with pytest.raises(AssertionError, match="Non-existent key"):
        config({"BALANCE.RPN.NoLoss.ALPHA": 0.1})


def test_a_parts_own_value_of_another_type_is_refused():
    cfg = config(FASTER, {"BALANCE.RPN.SmoothL1Loss.BETA": "small"})
    with pytest.raises(InputError, match="BALANCE.RPN.SmoothL1Loss.BETA is 'small'.*float"):
        build_model(cfg)


def test_a_shared_value_that_every_part_overrides_is_refused():
    keys = {f"BALANCE.{part}.SmoothL1Loss.BETA": 0.1 for part in ("RPN", "ROI_HEADS")}
    with pytest.raises(InputError, match="^BALANCE.SmoothL1Loss.BETA is 0.7"):
        build_model(config(FASTER, keys, {"BALANCE.SmoothL1Loss.BETA": 0.7}))


# --- What has no effect ---------------------------------------------------------------------------

STANDARD_HEADS = {**FASTER, "MODEL.ROI_HEADS.NAME": "StandardROIHeads"}
CASCADE_HEADS = {**CASCADE, "MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}
STANDARD_RPN = {**FASTER, "MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}
PYRAMID = {**FASTER, "MODEL.BACKBONE.NAME": "build_balanced_pyramid_backbone"}
EQL = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "EqualizationLoss"}
UNUSED = {
    "loss of Detectron2's heads": (STANDARD_HEADS, EQL, "BalancedROIHeads"),
    "loss of Detectron2's cascade": (CASCADE_HEADS, EQL, "BalancedCascadeROIHeads"),
    "dense keys of an R-CNN": (FASTER, {"BALANCE.DENSE.PRIOR_PROB": 0.1}, "one-stage"),
    "region keys of a RetinaNet": (RETINANET, EQL, "BALANCE.ROI_HEADS is for region heads"),
    "Detectron2's RPN": (STANDARD_RPN, {"BALANCE.RPN.BOX_WEIGHT": 2.0}, "BalancedRPN"),
    "its prior": (STANDARD_RPN, {"BALANCE.RPN.OPTIMAL_PRIOR": True}, "BalancedRPN"),
    "pyramid without its backbone": (FASTER, {"BALANCE.PYRAMID.REFINE_LEVEL": 1}, "build_balanced"),
    "nonsense there": (MASK, {"BALANCE.PYRAMID.BACKBONE": "nonsense"}, "build_balanced_pyramid"),
    "parameters of no slot": (FASTER, {"BALANCE.FocalLoss.GAMMA": 1.0}, "names 'FocalLoss'"),
    "parameters of a part's no slot": (
        FASTER,
        {"BALANCE.RPN.BalancedL1Loss.BETA": 0.5},
        "no slot of BALANCE.RPN names 'BalancedL1Loss'",
    ),
    "parameters of a part that is not built": (
        RETINANET,
        {"BALANCE.RPN.SmoothL1Loss.BETA": 0.5},
        "BALANCE.RPN is for the region proposal network",
    ),
    "weight of a guided loss": (
        FASTER,
        {"BALANCE.ROI_HEADS.GUIDED_LOSS": True, "BALANCE.ROI_HEADS.CLASSIFICATION_WEIGHT": 2.0},
        "without GUIDED_LOSS only",
    ),
    "factor of an unguided loss": (FASTER, {"BALANCE.RPN.GUIDED_FACTOR": 2.0}, "with GUIDED_LOSS"),
    "prior that is counted": (
        RETINANET,
        {"BALANCE.DENSE.OPTIMAL_PRIOR": True, "BALANCE.DENSE.PRIOR_PROB": 0.1},
        "without OPTIMAL_PRIOR",
    ),
    "floor of a fixed threshold": (
        RETINANET,
        {"BALANCE.ClassAdaptiveThreshold.FLOOR": 0.1},
        "names 'ClassAdaptiveThreshold'",
    ),
    "quota of all rows": (FCOS, {"BALANCE.DENSE.ROWS_PER_IMAGE": 100}, "not take all rows"),
    "images to count nothing on": (RETINANET, {"BALANCE.COUNT_IMAGES": 5}, "nothing is counted"),
    "counted while training": (
        FASTER,
        {"BALANCE.ROI_HEADS.SCORE_THRESHOLD": "ForegroundThreshold", "BALANCE.COUNT_IMAGES": 5},
        "nothing is counted",
    ),
    "scale of a linear classifier": (
        FASTER,
        {"BALANCE.CosineLinear.SCALE": 10.0},
        "no slot of the model names 'CosineLinear'",
    ),
    "figure without GHM": (FASTER, {"BALANCE.GRADIENT_FIGURE_PERIOD": 5}, "no loss of the model"),
    "strength of no weights": (
        RETINANET,
        {"BALANCE.DENSE.CLASS_WEIGHT_STRENGTH": 1.0},
        "with counted CLASS_WEIGHTS",
    ),
    "strength of listed weights": (
        RETINANET,
        {
            "BALANCE.DENSE.CLASS_WEIGHTS": [1.0, 2.0, 1.0, 1.0, 1.0],
            "BALANCE.DENSE.CLASS_WEIGHT_STRENGTH": 1.0,
        },
        "with counted CLASS_WEIGHTS",
    ),
    "a network below no pyramid": (FASTER, {"MODEL.BOTTOM_UP.NORM": "FrozenBN"}, "bottom_up_fpn"),
    "FCOS's keys": (RETINANET, {"MODEL.FCOS.NUM_CONVS": 2}, "BalancedFCOS"),
}


@pytest.mark.parametrize("keys, choice, why", UNUSED.values(), ids=UNUSED)
def test_a_key_without_effect_is_refused_by_name(keys, choice, why):
    build_model(config(keys))
    with pytest.raises(InputError, match="nothing in this model reads it") as caught:
        build_model(config(keys, choice))
    message = str(caught.value)
    assert any(message.startswith(f"{key} is {value!r}") for key, value in choice.items())
    assert why in message
    assert "\n" not in message


USED = {
    "prior": (RETINANET, {"BALANCE.DENSE.OPTIMAL_PRIOR": True, "BALANCE.COUNT_IMAGES": 5}),
    "quota": (
        RETINANET,
        {"BALANCE.DENSE.SAMPLER": "RandomSampler", "BALANCE.DENSE.ROWS_PER_IMAGE": 9},
    ),
    "guided": (
        CASCADE,
        {"BALANCE.ROI_HEADS.GUIDED_LOSS": True, "BALANCE.ROI_HEADS.GUIDED_FACTOR": 2.0},
    ),
    "threshold": (
        FASTER,
        {
            "BALANCE.ROI_HEADS.SCORE_THRESHOLD": "ForegroundThreshold",
            "BALANCE.ForegroundThreshold.FLOOR": 0.1,
        },
    ),
    "own floor": (
        FASTER,
        {
            "BALANCE.ROI_HEADS.SCORE_THRESHOLD": "ForegroundThreshold",
            "BALANCE.ROI_HEADS.ForegroundThreshold.FLOOR": 0.1,
        },
    ),
    "class weights": (
        RETINANET,
        {"BALANCE.DENSE.CLASS_WEIGHTS": "auto", "BALANCE.DENSE.CLASS_WEIGHT_STRENGTH": 1.0},
    ),
    "class weights of regions": (
        FASTER,
        {
            "BALANCE.ROI_HEADS.CLASS_WEIGHTS": "effective_number",
            "BALANCE.ROI_HEADS.CLASS_WEIGHT_STRENGTH": 0.99,
        },
    ),
    "calibration": (
        FASTER,
        {"BALANCE.ROI_HEADS.SCORE_CALIBRATION": "NorCal", "BALANCE.NorCal.GAMMA": 0.3},
    ),
    "classifier": (
        CASCADE,
        {"BALANCE.ROI_HEADS.CLASSIFIER": "CosineLinear", "BALANCE.CosineLinear.SCALE": 10.0},
    ),
    "pyramid": (PYRAMID, {"BALANCE.PYRAMID.REFINE_LEVEL": 1}),
    "figure": (
        RETINANET,
        {
            "BALANCE.DENSE.CLASSIFICATION_LOSS": "GHMClassificationLoss",
            "BALANCE.GRADIENT_FIGURE_PERIOD": 5,
        },
    ),
    "all images": (RETINANET, {"BALANCE.DENSE.OPTIMAL_PRIOR": True, "BALANCE.COUNT_IMAGES": None}),
}


@pytest.mark.parametrize("keys, choice", USED.values(), ids=USED)
def test_a_key_with_an_effect_is_accepted(keys, choice):
    build_model(config(keys, choice))


def test_every_key_of_a_part_has_an_effect_somewhere():
    # A key that no model reads could not be set by anybody.
    reads = set()
    guided = {f"BALANCE.{part}.GUIDED_LOSS": True for part in PARTS}
    for keys, choice in [*USED.values(), (FCOS, {}), (MASK, EQL), (FCOS, guided), (MASK, guided)]:
        cfg, found = recorded(config(keys, choice))
        detectron2_build(cfg)
        reads |= found
    of_parts = {key for key in default_values() if key.split(".")[1] in PARTS}
    assert of_parts - reads == set()


def test_several_box_losses_are_added_and_each_has_its_parameters():
    keys = {"BALANCE.DENSE.BOX_LOSS": "SmoothL1Loss + GIoULoss", "BALANCE.SmoothL1Loss.BETA": 0.2}
    criterion = build_model(config(RETINANET, keys, {"BALANCE.DENSE.BOX_WEIGHT": 3.0})).criterion
    assert [type(loss).__name__ for loss in criterion.box_losses] == ["SmoothL1Loss", "GIoULoss"]
    assert criterion.box_losses[0].beta == 0.2
    assert criterion.box_weights == [3.0, 3.0]


@pytest.mark.parametrize(
    "keys, part", [(RETINANET, "DENSE"), (FCOS, "DENSE"), (FASTER, "RPN"), (CASCADE, "ROI_HEADS")]
)
def test_box_losses_have_weights_of_their_own_and_train(keys, part):
    choice = {
        f"BALANCE.{part}.BOX_LOSS": "GIoULoss+0.5*BalancedL1Loss",
        f"BALANCE.{part}.BOX_WEIGHT": 3.0,
        "BALANCE.BalancedL1Loss.BETA": 0.2,  # read, so not refused
    }
    model = build_model(config(keys, choice)).train()
    criteria = [
        module
        for module in model.modules()
        if isinstance(module, Criterion) and len(module.box_losses) == 2
    ]
    assert len(criteria) == (3 if keys is CASCADE else 1)
    with EventStorage():
        sum(model(models.batch()).values()).backward()
    for criterion in criteria:
        assert criterion.box_weights == [3.0, 1.5]
        assert {"loss_box_GIoULoss", "loss_box_BalancedL1Loss"} <= criterion.monitored.keys()


@pytest.mark.parametrize(
    "value, message",
    [
        ("GIoULoss +", "unknown box loss ''"),
        ("GIoULoss + x * SmoothL1Loss", "'x' is no weight"),
        ("GIoULoss + -1 * SmoothL1Loss", "'-1' is no weight"),
        ("nan * GIoULoss", "'nan' is no weight"),
        ("GIoULoss + 2 * GIoULoss", "give each loss once"),
    ],
)
def test_box_losses_that_cannot_be_are_refused_in_one_sentence(value, message):
    with pytest.raises(InputError, match=f"^BALANCE.DENSE.BOX_LOSS.*{re.escape(message)}") as no:
        build_model(config(RETINANET, {"BALANCE.DENSE.BOX_LOSS": value}))
    assert_one_sentence(no.value)


# --- What is out of range -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("BALANCE.DENSE.POSITIVE_FRACTION", 7.0),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 7.0),
        ("BALANCE.COUNT_IMAGES", -5),
        ("BALANCE.COUNT_IMAGES", 0),
        ("BALANCE.GRADIENT_FIGURE_PERIOD", 0),
        ("BALANCE.ROI_HEADS.CLASSIFICATION_WEIGHT", -3.0),
        ("BALANCE.RPN.BOX_WEIGHT", -3.0),
        ("BALANCE.DENSE.PRIOR_PROB", 0.0),
        ("BALANCE.DENSE.PRIOR_PROB", float("nan")),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1.0),
        ("SOLVER.STEPS", (10, -1)),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.3, 1.7]),
    ],
)
def test_a_value_out_of_its_range_is_refused(key, value):
    with pytest.raises(InputError) as caught:
        check_ranges(config({key: value}))
    assert str(caught.value).startswith(f"{key} is {value}; it must lie in ")


def test_defaults_lie_in_their_ranges():
    check_ranges(config())


@pytest.mark.parametrize(
    "key, old", [("BALANCE.IoUBalancedSampler.FLOOR_THRESHOLD", -1.0), ("MODEL.FCOS.NORM", "")]
)
def test_what_was_off_is_refused_with_the_word_for_it(key, old):
    with pytest.raises(InputError, match=f"{key} is {old!r}, which was off; off is None"):
        check_ranges(config({key: old}))


def test_off_has_one_spelling():
    other = [key for key, value in default_values().items() if value in (-1, "")]
    assert not other


def test_interval_ends_are_as_their_brackets_say():
    assert inside(0, "[0, 1)") and not inside(1, "[0, 1)")
    assert not inside(0, "(0, 1]") and inside(1, "(0, 1]")
    assert inside(float("inf"), "(0, inf]") and not inside(float("inf"), "(0, inf)")
    assert not inside("1", "[0, 1]")


def test_every_number_of_a_part_has_a_range():
    numbers = {
        key
        for key, value in default_values().items()
        if key.split(".")[1] in PARTS and isinstance(value, (int, float)) and value not in (0, 1)
    }
    assert {key for key in numbers if not isinstance(default_values()[key], bool)} <= RANGES.keys()
