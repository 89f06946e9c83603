"""The keys of ``BALANCE`` are the methods' own parameters, with the methods' own defaults."""

import inspect

import pytest
from detectron2.config import CfgNode, get_cfg

from balanced_det.calibration import SCORE_CALIBRATIONS
from balanced_det.config import add_balanced_det_config
from balanced_det.losses import BOX_LOSSES, CLASSIFICATION_LOSSES
from balanced_det.pyramid import BalancedFeaturePyramid
from balanced_det.samplers import SAMPLERS

# What a detector passes itself: it is no choice of the config.
PASSED_BY_DETECTORS = {"num_classes", "class_frequency", "class_counts", "backbone"}
SLOTS = {
    "CLASSIFICATION_LOSS": CLASSIFICATION_LOSSES,
    "BOX_LOSS": BOX_LOSSES,
    "SAMPLER": SAMPLERS,
}
PARTS = ("DENSE", "RPN", "ROI_HEADS")
METHODS = [method for registry in (*SLOTS.values(), SCORE_CALIBRATIONS) for _, method in registry]


def balance():
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    return cfg.BALANCE


def constructor_defaults(method):
    """Return {KEY: default} of the parameters that a method's constructor names."""
    parameters = inspect.signature(method).parameters.values()
    return {
        p.name.upper(): p.default
        for p in parameters
        if p.name not in PASSED_BY_DETECTORS and p.kind is p.POSITIONAL_OR_KEYWORD
    }


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


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_defaults_to_a_registered_method(part, slot):
    assert balance()[part][slot] in SLOTS[slot]
