"""Fragments of ``configs/methods``: each fits its detectors, and stands for the files shipped."""

import pytest
import yaml
from test_configs import FOLDER, FRAGMENTS, relative
from test_detectors import assert_one_sentence

from balanced_det.build import build_model
from balanced_det.config import load_config, parse_args
from balanced_det.config.reads import leaves
from balanced_det.cosine import CosineLinear
from balanced_det.errors import InputError

BASES = {
    "rcnn": ("lvis_v1/Base-Faster-RCNN-FPN", "lvis_v1/Base-Cascade-Mask-RCNN-FPN", "quickstart"),
    "retinanet": ("lvis_v1/Base-RetinaNet", "Base-shapes-RetinaNet", "shapes/retinanet_ghmc"),
    "fcos": ("lvis_v1/Base-FCOS", "Base-shapes-FCOS"),
}
FITTING = {
    detector: sorted(
        path.stem for path in (*FRAGMENTS.glob("*.yaml"), *(FRAGMENTS / detector).glob("*.yaml"))
    )
    for detector in BASES
}
# Calibrating a softmax, on a base whose loss is none.
NO_SOFTMAX = ("quickstart", "norcal")
PAIRS = [
    (base, fragment)
    for detector, bases in BASES.items()
    for base in bases
    for fragment in FITTING[detector]
    if (base, fragment) != NO_SOFTMAX
]
# Each fragment with a base of each detector that it is not for.
STRANGERS = [
    (bases[0], fragment)
    for detector, bases in BASES.items()
    for fragment in sorted({path.stem for path in FRAGMENTS.rglob("*.yaml")})
    if fragment not in FITTING[detector]
]


def load(base, *fragments):
    path = str(FOLDER / f"{base}.yaml")
    return load_config(path, fragments=fragments, MODEL__DEVICE="cpu")


@pytest.mark.parametrize("base, fragment", PAIRS)
def test_a_fragment_builds_a_model_on_every_base_that_it_fits(base, fragment):
    build_model(load(base, fragment), count=False)


@pytest.mark.parametrize("base, fragment", STRANGERS)
def test_a_fragment_is_refused_for_a_detector_that_it_does_not_fit(base, fragment):
    with pytest.raises(InputError, match=f"^--with {fragment}: unknown for .*; known are: ") as no:
        load(base, fragment)
    assert_one_sentence(no.value)


# Fragments of defaults, of Detectron2's own keys or of a backbone: no key of ours to be ignored.
OF_ALL = {"softmax", "class_agnostic_boxes", "balanced_pyramid", "libra", "libra_published"}


@pytest.mark.parametrize("fragment", sorted({*FITTING["rcnn"]} - {*FITTING["fcos"]} - OF_ALL))
def test_a_fragment_of_region_heads_given_by_its_path_is_refused_for_a_dense_detector(fragment):
    cfg = load("lvis_v1/Base-FCOS", str(FRAGMENTS / "rcnn" / f"{fragment}.yaml"))
    with pytest.raises(InputError, match="nothing in this model reads it"):
        build_model(cfg, count=False)


def test_norcal_is_refused_for_what_is_no_softmax_and_fits_each_that_is():
    with pytest.raises(InputError, match="SCORE_CALIBRATION: NorCal needs scores") as refused:
        build_model(load(*NO_SOFTMAX), count=False)
    assert_one_sentence(refused.value)
    for loss in ("softmax", "softmax_eql", "seesaw"):
        build_model(load("quickstart", loss, "norcal"), count=False)


# The loss that each fragment of a loss means, wherever it fits.
LOSSES = {
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
    for detector, bases in BASES.items():
        if fragment in FITTING[detector]:
            model = build_model(load(bases[-1], fragment), count=False)
            head = model.roi_heads.box_predictor if detector == "rcnn" else model
            assert type(head.criterion.classification_loss).__name__ == LOSSES[fragment]


def test_seesaw_has_the_cosine_classifier_and_sampling_of_its_paper():
    cfg = load("lvis_v1/Base-Mask-RCNN-FPN", "seesaw")
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    assert cfg.DATALOADER.REPEAT_THRESHOLD == 0.001
    layer = build_model(cfg, count=False).roi_heads.box_predictor.cls_score
    assert isinstance(layer, CosineLinear)
    assert layer.scale == 20 and layer.out_features == 1203 + 2


# A base, the fragments over it, and the file that has the same in one.
EQUAL = [
    ("lvis_v1/Base-Mask-RCNN-FPN", ["eql", "rfs"], "lvis_v1/mask_rcnn_R_50_FPN_1x_eql_rfs"),
    ("lvis_v1/Base-Faster-RCNN-FPN", ["softmax"], "lvis_v1/faster_rcnn_R_50_FPN_1x_softmax"),
    ("lvis_v1/Base-Cascade-Mask-RCNN-FPN", ["eql"], "lvis_v1/cascade_mask_rcnn_R_50_FPN_1x_eql"),
    ("lvis_v0.5/Base-Mask-RCNN-FPN", ["eql"], "lvis_v0.5/mask_rcnn_R_50_FPN_1x_eql"),
    ("Base-RCNN-FPN", ["sampling_free"], "coco/faster_rcnn_R_50_FPN_1x_sampling_free"),
    ("Base-RCNN-FPN", ["libra"], "coco/libra_faster_rcnn_R_50_FPN_1x"),
    ("Base-RCNN-FPN", ["rpn_ghm"], "coco/faster_rcnn_R_50_FPN_1x_rpn_ghm"),
    ("Base-RCNN-FPN", ["ohem"], "coco/faster_rcnn_R_50_FPN_1x_ohem"),
    ("Base-RetinaNet", ["sampling_free"], "coco/retinanet_R_50_FPN_1x_sampling_free"),
    ("Base-RetinaNet", ["libra"], "coco/libra_retinanet_R_50_FPN_1x"),
    ("Base-RetinaNet", ["ohem"], "coco/retinanet_R_50_FPN_1x_ohem"),
    ("Base-shapes-RetinaNet", ["ghmc_ghmr"], "shapes/retinanet_ghmc_ghmr"),
    ("Base-shapes-RetinaNet", ["balanced_l1"], "shapes/retinanet_balanced_l1"),
    ("Base-shapes-RetinaNet", ["optimal_prior"], "shapes/retinanet_bias_only"),
    ("Base-shapes-RetinaNet", ["guided"], "shapes/retinanet_guided_only"),
    ("Base-shapes-RCNN", ["iou_balanced_sampling"], "shapes/faster_rcnn_iou_balanced_sampling"),
    ("Base-shapes-FCOS", ["ghmc_ghmr"], "shapes/fcos_ghmc_ghmr"),
    ("Base-shapes-FCOS", ["sampling_free"], "shapes/fcos_sampling_free"),
]


@pytest.mark.parametrize("base, fragments, file", EQUAL, ids=[file for *_, file in EQUAL])
def test_fragments_over_a_base_are_the_shipped_file(base, fragments, file):
    assert leaves(load(base, *fragments), "") == leaves(load(file), "")


def test_a_list_of_bases_is_what_the_command_line_gives(tmp_path):
    bases = ["lvis_v1/Base-Mask-RCNN-FPN", "methods/rcnn/eql", "methods/rfs"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": [str(FOLDER / f"{base}.yaml") for base in bases]}))
    listed = load_config(str(path), MODEL__DEVICE="cpu")
    assert listed == load("lvis_v1/Base-Mask-RCNN-FPN", "eql", "rfs")


def test_the_name_of_a_fragment_means_that_of_the_detector():
    assert load("Base-RetinaNet", "ohem").BALANCE.DENSE.SAMPLER == "OHEMSampler"
    assert load("Base-RCNN-FPN", "ohem").BALANCE.RPN.SAMPLER == "OHEMSampler"


def test_an_unknown_fragment_is_refused_with_those_that_fit():
    with pytest.raises(InputError, match="--with rpn_ghm: unknown for BalancedRetinaNet.*ghmc, "):
        load("Base-RetinaNet", "rpn_ghm")


def test_a_fragment_may_be_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("SEED: 7")
    assert load("Base-RetinaNet", str(path)).SEED == 7


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
