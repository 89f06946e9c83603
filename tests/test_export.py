"""Tracing by Detectron2's ``TracingAdapter``, ONNX, and ``torch.export`` as far as its own go."""

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import build_model
from detectron2.utils.testing import assert_instances_allclose
from models import DETECTORS, batch, config
from torch.nn import functional as F

# Nearly all boxes are detections, so that a number that tracing fixed shows in what comes out.
LOW = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 500,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 500,
    "MODEL.RPN.MIN_SIZE": 0,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
}


# Of K, K + 1 and K + 2 logits.
CASES = [(name, {}) for name in DETECTORS]
CASES += [
    ("retinanet", {"BALANCE.DENSE.CLASSIFICATION_LOSS": "SeesawLoss"}),
    ("fcos", {"BALANCE.DENSE.CLASSIFICATION_LOSS": "CrossEntropyLoss"}),
    ("faster", {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "SeesawLoss"}),
    ("cascade", {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "BinaryCrossEntropyLoss"}),
]


def build(name, more=None):
    keys = {key: value for key, value in LOW.items() if key != "MODEL.RPN.MIN_SIZE"}
    keys |= more or {}
    torch.manual_seed(0)
    return build_model(config(DETECTORS[name], keys)).eval()


def postprocessed(model, image):
    inputs = [{"image": image, "height": image.shape[1], "width": image.shape[2]}]
    if hasattr(model, "inference"):
        return model.inference(inputs, do_postprocess=True)[0]["instances"]
    return model.forward(inputs)[0]["instances"]


@pytest.mark.parametrize(
    "name, loss", CASES, ids=[", ".join([name, *keys.values()]) for name, keys in CASES]
)
def test_traced_detector_takes_images_of_other_sizes_and_numbers_of_proposals(name, loss):
    model = build(name, loss)
    large = batch((1,), seed=1)[0]["image"]
    small = F.interpolate(large[None], scale_factor=0.5)[0]
    wrapper = TracingAdapter(model, large, postprocessed).eval()
    with torch.no_grad(), patch_builtin_len():
        traced = torch.jit.trace(wrapper, (small,), check_trace=False)
    with torch.no_grad():
        for image in (small, large):
            expected = postprocessed(model, image)
            assert len(expected) > 0
            found = wrapper.outputs_schema(traced(image))
            # The traced graph may fuse what eager mode computes one by one; in float32 boxes of up
            # to 128 pixels are then off by some 1e-5.
            assert_instances_allclose(found, expected, rtol=1e-4, size_as_tensor=True)


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_traced_batch_lets_the_proposals_of_each_image_vary(name):
    model = build(name)
    images = [batch((1,), seed=seed)[0]["image"] for seed in (1, 2)]
    # One image without contrast has other proposals than one with.
    others = [images[1], torch.zeros_like(images[0]) + 128]

    def inference(model, first, second):
        return model.inference([{"image": first}, {"image": second}], do_postprocess=False)

    wrapper = TracingAdapter(model, tuple(images), inference).eval()
    with torch.no_grad(), patch_builtin_len():
        traced = torch.jit.trace(wrapper, tuple(images), check_trace=False)
    with torch.no_grad():
        expected = inference(model, *others)
        found = wrapper.outputs_schema(traced(*others))
        for one, other in zip(found, expected, strict=True):
            assert_instances_allclose(one, other, rtol=1e-4, size_as_tensor=True)


PYRAMID = {"MODEL.BACKBONE.NAME": "build_balanced_pyramid_backbone"}


@pytest.mark.parametrize("pyramid", [False, True], ids=["FPN", "balanced pyramid"])
@pytest.mark.parametrize("name", ["faster", "retinanet"])
def test_backbone_is_exported_as_detectron2s_is(name, pyramid):
    """Whole detectors are not, ours or Detectron2's: how many boxes there are depends on pixels."""
    keys = {}
    if pyramid:
        inner = config(DETECTORS[name]).MODEL.BACKBONE.NAME
        keys = {**PYRAMID, "BALANCE.PYRAMID.BACKBONE": inner}
    torch.manual_seed(0)
    backbone = build_model(config(DETECTORS[name], keys)).backbone.eval()
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        exported = torch.export.export(backbone, (image,), strict=False).module()
        other = torch.rand(1, 3, 96, 128)
        found, expected = exported(other), backbone(other)
    assert found.keys() == expected.keys()
    for level, features in expected.items():
        # The same operations; one that is written otherwise may round otherwise, by some 1e-6.
        torch.testing.assert_close(found[level], features, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_detector_becomes_an_onnx_model_by_tracing_as_detectron2s_do(name, tmp_path):
    """By the exporter that traces; the one that begins with ``torch.export`` takes none of them."""
    onnx = pytest.importorskip("onnx")
    model = build(name)
    image = batch((1,), seed=1)[0]["image"]
    wrapper = TracingAdapter(model, image, postprocessed).eval()
    path = tmp_path / "model.onnx"
    with torch.no_grad(), patch_builtin_len():
        torch.onnx.export(wrapper, (image,), path, dynamo=False, opset_version=16)
    onnx.checker.check_model(path, full_check=False)
    (given,) = onnx.load(path).graph.input
    assert [side.dim_value for side in given.type.tensor_type.shape.dim] == list(image.shape)
