"""Python configs: they load, build, train and evaluate, through the checks of all configs."""

import builtins
import json
import textwrap
from pathlib import Path

import pytest
import torch
from distributed import run_command
from models import FASTER
from models import config as keys_config
from omegaconf import OmegaConf

from balanced_det.build import build_model, counted
from balanced_det.config import load_config
from balanced_det.config.lazy import lazy_config
from balanced_det.data import shapes
from balanced_det.detectors.counting import fit_to_training_data
from balanced_det.engine import LazyTrainer, check_run, trainer_of
from balanced_det.errors import InputError
from balanced_det.train import main

ROOT = Path(__file__).parents[1]
LAZY = ROOT / "configs" / "lazy"
MASK_RCNN = str(LAZY / "mask_rcnn_R_50_FPN.py")
VITDET = str(LAZY / "vitdet_B.py")
CLASSES = 5
# Detectors of some thousand parameters in place of the shipped ones.
SMALL = {
    MASK_RCNN: [
        "model.backbone.bottom_up.stages.norm=BN",
        "model.backbone.bottom_up.stem.norm=BN",
        "model.backbone.bottom_up.freeze_at=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ],
    VITDET: [
        "model.backbone.net.img_size=64",
        "model.backbone.net.embed_dim=32",
        "model.backbone.net.depth=2",
        "model.backbone.net.num_heads=2",
        "model.backbone.net.window_size=2",
        "model.backbone.net.window_block_indexes=[0]",
        "model.backbone.square_pad=64",
        "dataloader.train.mapper.augmentations.1.target_height=64",
        "dataloader.train.mapper.augmentations.1.target_width=64",
        "dataloader.train.mapper.augmentations.1.min_scale=0.9",
        "dataloader.train.mapper.augmentations.2.crop_size=[64,64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "train.amp.enabled=False",
    ],
}
BOTH = pytest.mark.parametrize("path", [MASK_RCNN, VITDET], ids=["mask_rcnn", "vitdet"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return shapes.generate(folder, classes=CLASSES, train=12, val=4, size=64)


def options(path, data, out):
    train, val = str(data.train_json), str(data.val_json)
    sets = ",".join(f"['{p}','{p}','{data.image_root}']" for p in (train, val))
    return [
        *SMALL.get(path, []),
        f"balance.DATASETS=[{sets}]",
        f"dataloader.train.dataset.names='{train}'",
        f"dataloader.test.dataset.names='{val}'",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.train.total_batch_size=2",
        f"model.roi_heads.num_classes={CLASSES}",
        "model.backbone.out_channels=16",
        "model.proposal_generator.head.in_channels=16",
        "model.proposal_generator.post_nms_topk=[50,50]",
        "model.roi_heads.box_head.input_shape.channels=16",
        "model.roi_heads.box_head.fc_dims=[16]",
        "model.roi_heads.box_predictor.input_shape.channels=16",
        "model.roi_heads.box_predictor.score_threshold.fixed=0.0",
        "model.roi_heads.box_predictor.test_topk_per_image=10",
        "model.roi_heads.mask_head.input_shape.channels=16",
        "model.roi_heads.mask_head.conv_dims=[8,8]",
        "train.init_checkpoint=''",
        "train.device=cpu",
        "train.max_iter=2",
        f"train.output_dir='{out}'",
    ]


def train_net(path, *opts):
    run_command(main, ["--config-file", path, *opts], ROOT)


@BOTH
def test_the_shipped_config_loads_as_it_is(path):
    cfg = load_config(path)
    assert cfg.DATASETS.TRAIN == ("lvis_v1_train",)
    assert cfg.SOLVER.MAX_ITER == lazy_config(cfg).train.max_iter > 100_000
    assert trainer_of(cfg) is LazyTrainer
    assert lazy_config(cfg.clone()) == lazy_config(cfg)


@BOTH
def test_the_shipped_model_has_the_detectors_size(path):
    model = build_model(load_config(path, ["train.device=cpu"]), count=False)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    # Mask R-CNN R-50-FPN has 44 million parameters with COCO's 80 classes, ViTDet-B 111: 1,123 more
    # classes add 1,024 weights of class scores, 4,096 of boxes and 256 of masks each, 6 million.
    assert millions == pytest.approx({MASK_RCNN: 50, VITDET: 117}[path], abs=1)


@BOTH
def test_the_command_trains_two_steps_and_evaluates(path, data, tmp_path):
    train_net(path, *options(path, data, tmp_path / "out"))
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    step = next(line for line in map(json.loads, lines) if "total_loss" in line)
    assert step["iteration"] == 1
    assert step["loss_cls"] > 0 and step["loss_mask"] > 0 and step["loss_rpn_cls"] > 0
    results = json.loads((tmp_path / "out" / "inference" / "lvis_results.json").read_text())
    assert {"bbox", "segm"} <= results.keys()
    written = (tmp_path / "out" / "lazy.yaml").read_text()
    assert "EqualizationLoss" in written and "max_iter: 2" in written

    weights = f"train.init_checkpoint='{tmp_path / 'out' / 'model_final.pth'}'"
    train_net(path, "--eval-only", *options(path, data, tmp_path / "again"), weights)
    again = json.loads((tmp_path / "again" / "inference" / "lvis_results.json").read_text())
    assert again["bbox"] == results["bbox"]


def test_frequencies_are_counted_in_the_configs_data(data, tmp_path):
    cfg = load_config(MASK_RCNN, options(MASK_RCNN, data, tmp_path))
    frequency = "roi_heads.box_predictor.criterion.classification_loss.class_frequency"
    content = json.loads(data.train_json.read_text())
    holders = {c["id"]: set() for c in content["categories"]}
    for annotation in content["annotations"]:
        holders[annotation["category_id"]].add(annotation["image_id"])
    images = len(set.union(*holders.values()))
    expected = torch.tensor([len(holders[i]) / images for i in sorted(holders)])
    value = build_model(cfg)
    for name in frequency.split("."):
        value = getattr(value, name)
    torch.testing.assert_close(value, expected)
    unknown = build_model(cfg, count=False)
    for name in frequency.split("."):
        unknown = getattr(unknown, name)
    assert unknown.isnan().all()
    with pytest.raises(InputError, match="'counted' has a meaning only"):
        counted("class_frequency")


def test_the_prior_is_counted_through_the_configs_own_augmentations(data, tmp_path):
    # The images are resized to half and to the same size: rows differ, as their number does.
    priors = []
    for size in (32, 64):
        opts = options(MASK_RCNN, data, tmp_path)
        opts += [f"dataloader.train.mapper.augmentations.0.short_edge_length={size}"]
        cfg = load_config(MASK_RCNN, [*opts, "+balance.RPN.OPTIMAL_PRIOR=True"])
        model = build_model(cfg)
        fit_to_training_data(model, cfg)
        priors.append(model.proposal_generator.rpn_head.objectness_logits.bias[0].item())
    assert priors[0] != priors[1]
    assert max(priors) < 0  # fewer than half of the anchors are foreground


def test_constructed_heads_are_those_of_the_keys(data, tmp_path):
    """The box predictor of a Python config equals the one that keys make."""
    cfg = load_config(MASK_RCNN, options(MASK_RCNN, data, tmp_path))
    lazy = build_model(cfg, count=False)
    eql = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "EqualizationLoss"}
    eql["BALANCE.ROI_HEADS.PRIOR_PROB"] = 0.001
    by_keys = build_model(keys_config(FASTER, eql))
    for part in ("proposal_generator", "roi_heads.box_predictor"):
        ours, theirs = lazy.get_submodule(part), by_keys.get_submodule(part)
        assert repr(ours.criterion) == repr(theirs.criterion)
        for name in ("rows_per_image", "positive_fraction"):
            assert getattr(ours.selection.quota, name) == getattr(theirs.selection.quota, name)
        assert type(ours.selection.divisor) is type(theirs.selection.divisor)
    layers = [model.roi_heads.box_predictor.cls_score for model in (lazy, by_keys)]
    assert torch.equal(layers[0].bias, layers[1].bias)


OWN = """
    import torch
    from detectron2.config import LazyCall as L
    from detectron2.config import LazyConfig
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import Backbone


    class Pooled(Backbone):
        '''Five levels of one convolution each.'''

        def __init__(self, channels):
            super().__init__()
            self.channels = channels
            self.conv = torch.nn.Conv2d(3, channels, 3, padding=1)

        def forward(self, x):
            x = self.conv(x)
            return {f"p{i}": torch.nn.functional.max_pool2d(x, 2**i) for i in range(2, 7)}

        def output_shape(self):
            return {
                f"p{i}": ShapeSpec(channels=self.channels, stride=2**i) for i in range(2, 7)
            }


    base = LazyConfig.load("BASE")
    model, dataloader, optimizer, lr_multiplier, train, balance = (
        base[name]
        for name in ("model", "dataloader", "optimizer", "lr_multiplier", "train", "balance")
    )
    model.backbone = L(Pooled)(channels=16)
"""


def write(folder, content, name="own.py"):
    path = folder / name
    path.write_text(textwrap.dedent(content))
    return str(path)


def test_a_config_of_ones_own_has_a_backbone_of_ones_own(data, tmp_path):
    path = write(tmp_path, OWN.replace("BASE", MASK_RCNN))
    opts = [o for o in options(path, data, tmp_path / "out") if "backbone.out_channels" not in o]
    opts += ["dataloader.train.mapper.augmentations.0.short_edge_length=64"]
    cfg = load_config(path, opts)
    check_run(cfg)
    trainer = trainer_of(cfg)(cfg)
    trainer.resume_or_load(resume=False)
    before = trainer.model.backbone.conv.weight.detach().clone()
    trainer.train()
    assert trainer.iter == 2
    assert not torch.equal(trainer.model.backbone.conv.weight, before)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "mentioned"),
    [
        (["train.max_itr=3"], "no key 'train.max_itr'"),
        (["trian.max_iter=3"], "no key 'trian.max_iter'"),
        (["model.backbone.bottom_up.freeze=3"], "no key 'model.backbone.bottom_up.freeze'"),
        (["dataloader.train.mapper.augmentations.9.max_size=1"], "augmentations.9"),
        (["SOLVER.MAX_ITER", "3"], "'SOLVER.MAX_ITER' is no key=value"),
        (["train.max_iter=many"], "SOLVER.MAX_ITER"),
        (["train.max_iter=-3"], "SOLVER.MAX_ITER is -3"),
        (["train.max_iter=[3"], "train.max_iter=[3"),
        (["+train.ddp.find_unused_parameters=True"], "no key 'train.ddp"),
        (["balance.DATASETS=[[a]]"], "BALANCE.DATASETS"),
        (["dataloader.train.dataset.names=nowhere"], "DATASETS.TRAIN names 'nowhere'"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(opts, mentioned):
    with pytest.raises(InputError) as caught:
        load_config(MASK_RCNN, opts)
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        ("model = ", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("from .nothing import model", "nothing.py does not exist"),
        ("model = dict(a=1)", "has no 'dataloader'"),
        (
            f"from detectron2.config import LazyConfig\nbase = LazyConfig.load('{MASK_RCNN}')\n"
            "model, dataloader, optimizer, lr_multiplier = (base[n] for n in ("
            "'model', 'dataloader', 'optimizer', 'lr_multiplier'))\n"
            "train = dict(max_iter=3, log_period=1)",
            "train.log_period is 1, which has no effect",
        ),
        (
            f"from detectron2.config import LazyConfig\nbase = LazyConfig.load('{MASK_RCNN}')\n"
            "model, dataloader, optimizer, lr_multiplier, train = (base[n] for n in ("
            "'model', 'dataloader', 'optimizer', 'lr_multiplier', 'train'))\n"
            "balance = dict(RPN=dict(BOX_LOSS='GIoULoss'))",
            "balance.RPN.BOX_LOSS has no effect",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, content, mentioned):
    path, imported = write(tmp_path, content), builtins.__import__
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)
    assert builtins.__import__ is imported


def test_a_missing_file_and_fragments_are_refused(tmp_path):
    with pytest.raises(InputError, match="no.py' does not exist"):
        load_config(str(tmp_path / "no.py"))
    with pytest.raises(InputError, match="path.key=value alone"):
        load_config(MASK_RCNN, fragments=["eql"])


def test_classes_are_compared_with_the_data(data, tmp_path):
    opts = options(MASK_RCNN, data, tmp_path)
    cfg = load_config(MASK_RCNN, [*opts, f"model.roi_heads.num_classes={CLASSES + 1}"])
    with pytest.raises(InputError, match=f"has {CLASSES} classes"):
        check_run(cfg)


def test_an_argument_that_no_constructor_has_is_one_sentence(data, tmp_path):
    cfg = load_config(MASK_RCNN, options(MASK_RCNN, data, tmp_path))
    OmegaConf.update(lazy_config(cfg), "model.roi_heads.selection.rows", 3, force_add=True)
    with pytest.raises(InputError, match="The model cannot be built: .*'rows'"):
        build_model(cfg)
