"""Fragments of ``configs/methods``: each fits its detectors, and is refused elsewhere."""

import pytest
import yaml
from shipped_configs import BASES, FITTING, FOLDER, FRAGMENTS, SMALL, load, relative
from test_detectors import assert_one_sentence

from balanced_det.build import build_model
from balanced_det.config import load_config, parse_args
from balanced_det.cosine import CosineLinear
from balanced_det.engine import train_only
from balanced_det.errors import InputError

pytestmark = pytest.mark.usefixtures("undrawn_weights")

PAIRS = [(detector, fragment) for detector in BASES for fragment in FITTING[detector]]
# Each fragment with each detector that it is not for.
STRANGERS = [
    (detector, fragment)
    for detector in BASES
    for fragment in sorted({path.stem for path in FRAGMENTS.rglob("*.yaml")})
    if fragment not in FITTING[detector]
]


def test_every_detector_has_a_base_on_every_data_set_that_serves_it():
    for detector in ("retinanet", "fcos"):
        large = [f"{data}/{detector}_R_50_FPN_1x" for data in ("coco", "lvis_v1")]
        assert BASES[detector] == [*large, f"shapes/{detector}"]
    large = {
        f"{data}/{detector}_R_50_FPN_1x"
        for data in ("coco", "lvis_v0.5", "lvis_v1")
        for detector in ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")
    }
    assert {*large, "shapes/faster_rcnn"} <= {*BASES["rcnn"]}


@pytest.mark.parametrize("detector, fragment", PAIRS)
def test_a_fragment_is_merged_over_every_base_that_it_fits(detector, fragment):
    for base in BASES[detector]:
        assert load(base, fragment).DATASETS == load(base).DATASETS


@pytest.mark.parametrize("detector, fragment", PAIRS)
def test_a_fragment_builds_a_model_of_every_detector_that_it_fits(detector, fragment):
    cfg = load(SMALL[detector], fragment)
    train_only(build_model(cfg, count=False), cfg.BALANCE.TRAIN_ONLY)


@pytest.mark.parametrize("fragment", FITTING["rcnn"])
def test_a_fragment_of_region_heads_builds_a_cascade(fragment):
    cfg = load(SMALL["rcnn"], "cascade", fragment)
    assert len(build_model(cfg, count=False).roi_heads.box_predictor) == 3


@pytest.mark.parametrize("detector, fragment", STRANGERS)
def test_a_fragment_is_refused_for_a_detector_that_it_does_not_fit(detector, fragment):
    with pytest.raises(InputError, match=f"^--with {fragment}: unknown for .*; known are: ") as no:
        load(SMALL[detector], fragment)
    assert_one_sentence(no.value)


# Fragments of defaults, of Detectron2's own keys or of a backbone: no key of ours to be ignored.
OF_ALL = {"softmax", "class_agnostic_boxes", "cascade"}
OF_ALL |= {"balanced_pyramid", "libra", "libra_published"}
# It names a part of the model to train, and is refused when that is looked for.
PARTS = {"decoupled"}


@pytest.mark.parametrize(
    "fragment", sorted({*FITTING["rcnn"]} - {*FITTING["fcos"]} - OF_ALL - PARTS)
)
def test_a_fragment_of_region_heads_given_by_its_path_is_refused_for_a_dense_detector(fragment):
    cfg = load(SMALL["fcos"], str(FRAGMENTS / "rcnn" / f"{fragment}.yaml"))
    with pytest.raises(InputError, match="nothing in this model reads it"):
        build_model(cfg, count=False)


def test_decoupled_training_of_a_dense_detector_is_refused():
    cfg = load(SMALL["fcos"], str(FRAGMENTS / "rcnn" / "decoupled.yaml"))
    with pytest.raises(InputError, match="TRAIN_ONLY") as refused:
        train_only(build_model(cfg, count=False), cfg.BALANCE.TRAIN_ONLY)
    assert_one_sentence(refused.value)


def test_norcal_is_refused_for_what_is_no_softmax_and_fits_each_that_is():
    with pytest.raises(InputError, match="SCORE_CALIBRATION: NorCal needs scores") as refused:
        build_model(load("quickstart", "norcal"), count=False)
    assert_one_sentence(refused.value)
    for loss in ("softmax", "softmax_eql", "seesaw"):
        build_model(load("quickstart", loss, "norcal"), count=False)


# The loss that each fragment of a loss means, wherever it fits.
LOSSES = {
    "bce": "BinaryCrossEntropyLoss",
    "drop_loss": "DropLoss",
    "ecm": "EffectiveClassMarginLoss",
    "efl": "EqualizedFocalLoss",
    "eql": "EqualizationLoss",
    "eqlv2": "EqualizationLossV2",
    "federated": "FederatedLoss",
    "seesaw": "SeesawLoss",
    "softmax": "CrossEntropyLoss",
    "softmax_eql": "SoftmaxEqualizationLoss",
}


@pytest.mark.parametrize("fragment", LOSSES)
def test_a_fragment_of_a_loss_trains_that_loss(fragment):
    for detector, base in SMALL.items():
        if fragment in FITTING[detector]:
            model = build_model(load(base, fragment), count=False)
            head = model.roi_heads.box_predictor if detector == "rcnn" else model
            assert type(head.criterion.classification_loss).__name__ == LOSSES[fragment]


def test_seesaw_has_the_cosine_classifier_and_sampling_of_its_paper():
    cfg = load("lvis_v1/mask_rcnn_R_50_FPN_1x", "seesaw")
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    assert cfg.DATALOADER.REPEAT_THRESHOLD == 0.001
    layer = build_model(cfg, count=False).roi_heads.box_predictor.cls_score
    assert isinstance(layer, CosineLinear)
    assert layer.scale == 20 and layer.out_features == 1203 + 2


def test_a_list_of_bases_is_what_the_command_line_gives(tmp_path):
    bases = ["lvis_v1/mask_rcnn_R_50_FPN_1x", "methods/rcnn/eql", "methods/rfs"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": [str(FOLDER / f"{base}.yaml") for base in bases]}))
    listed = load_config(str(path), MODEL__DEVICE="cpu")
    assert listed == load("lvis_v1/mask_rcnn_R_50_FPN_1x", "eql", "rfs")


def test_the_name_of_a_fragment_means_that_of_the_detector():
    assert load(SMALL["retinanet"], "ohem").BALANCE.DENSE.SAMPLER == "OHEMSampler"
    assert load(SMALL["rcnn"], "ohem").BALANCE.RPN.SAMPLER == "OHEMSampler"


def test_an_unknown_fragment_is_refused_with_those_that_fit():
    said = "--with rpn_ghm: unknown for BalancedRetinaNet, it is for GeneralizedRCNN; .*ghmc, "
    with pytest.raises(InputError, match=said):
        load(SMALL["retinanet"], "rpn_ghm")
    with pytest.raises(InputError, match="--with ghmc: .*, it is for BalancedRetinaNet; known"):
        load(SMALL["rcnn"], "ghmc")


def test_a_misspelt_fragment_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="--with eqll: .*GeneralizedRCNN, the nearest is eql; "):
        load(SMALL["rcnn"], "eqll")
    with pytest.raises(InputError, match="--with xyz: unknown for GeneralizedRCNN; known are: "):
        load(SMALL["rcnn"], "xyz")


def test_a_fragment_may_be_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("SEED: 7")
    assert load(SMALL["retinanet"], str(path)).SEED == 7


@pytest.mark.parametrize("path", sorted(FRAGMENTS.rglob("*.yaml")), ids=relative)
def test_a_fragment_says_what_it_is_and_chooses_no_data(path):
    content = path.read_text()
    assert content.startswith("# ")
    assert not {"DATASETS", "OUTPUT_DIR", "VERSION"} & yaml.safe_load(content).keys()


COMMANDS = [
    ("--with eql rfs", ["eql", "rfs"], []),
    ("--with eql rfs SEED 1", ["eql", "rfs"], ["SEED", "1"]),
    ("--with eql SOLVER.MAX_ITER 1 SEED 2", ["eql"], ["SOLVER.MAX_ITER", "1", "SEED", "2"]),
    ("--with eql --num-gpus 2 SEED 1", ["eql"], ["SEED", "1"]),
    ("--with My/File.yaml x.yaml SEED 1", ["My/File.yaml", "x.yaml"], ["SEED", "1"]),
    ("--with eql train.max_iter=1", ["eql"], ["train.max_iter=1"]),
    ("SEED 1", [], ["SEED", "1"]),
]


@pytest.mark.parametrize("line, fragments, opts", COMMANDS, ids=next(zip(*COMMANDS)))
def test_the_command_line_tells_fragments_from_keys(line, fragments, opts):
    args = parse_args(["--config-file", "a.yaml", *line.split()])
    assert (args.fragments, args.opts) == (fragments, opts)
