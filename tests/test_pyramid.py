import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from balanced_det.config import add_balanced_det_config
from balanced_det.errors import InputError
from balanced_det.pyramid import BalancedFeaturePyramid, NonLocal, build_balanced_pyramid_backbone

BUILDERS = ["build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]


class GivenLevels(Backbone):
    """A backbone whose levels are given: its "image" is the dictionary that it returns."""

    def __init__(self, channels, strides):
        super().__init__()
        self._shapes = {
            f"p{index}": ShapeSpec(channels=c, stride=s)
            for index, (c, s) in enumerate(zip(channels, strides))
        }

    def forward(self, x):
        return x

    def output_shape(self):
        return self._shapes


def levels_of(sizes, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{index}": torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
        for index, size in enumerate(sizes)
    }


def pyramid_on_given(count, channels=3, **kwargs):
    backbone = GivenLevels([channels] * count, [2**index for index in range(count)])
    return BalancedFeaturePyramid(backbone, **kwargs).double()


def config(builder, **pyramid):
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.BALANCE.PYRAMID.update({"BACKBONE": builder} | pyramid)
    cfg.MODEL.BACKBONE.NAME = "build_balanced_pyramid_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    retina = "retinanet" in builder
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"][retina:]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    return cfg


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_configured_backbone_keeps_its_interface(builder):
    torch.manual_seed(0)
    pyramid = build_backbone(config(builder))
    assert isinstance(pyramid, BalancedFeaturePyramid)
    assert pyramid.output_shape() == pyramid.backbone.output_shape()
    assert pyramid.size_divisibility == pyramid.backbone.size_divisibility == 32
    assert pyramid.padding_constraints == pyramid.backbone.padding_constraints
    first = {"build_resnet_fpn_backbone": 2, "build_retinanet_resnet_fpn_backbone": 3}[builder]
    assert list(pyramid.output_shape()) == [f"p{index}" for index in range(first, first + 5)]

    image = torch.randn(1, 3, 96, 160)  # p5 is 3 x 5, so that p6 and p7 do not halve evenly
    with torch.no_grad():
        outputs, plain = pyramid(image), pyramid.backbone(image)
    assert list(outputs) == list(plain)
    for name in plain:
        assert outputs[name].shape == plain[name].shape
        assert not torch.equal(outputs[name], plain[name])


@pytest.mark.parametrize("refine_type", ["non_local", "conv"])
def test_a_new_refinement_is_the_identity(refine_type):
    levels = levels_of([(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)])
    refined = pyramid_on_given(5, refine_type=refine_type)(levels)
    plain = pyramid_on_given(5, refine_type="none")(levels)
    assert all(torch.equal(refined[name], plain[name]) for name in levels)


@pytest.mark.parametrize("refine_type, fans", [("non_local", 3 + 3), ("conv", 9 * (3 + 3))])
def test_xavier_draws_every_layer_of_the_refinement(refine_type, fans):
    torch.manual_seed(0)
    pyramid = pyramid_on_given(5, channels=3, refine_type=refine_type, initialization="xavier")
    weights = [p for name, p in pyramid.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in pyramid.named_parameters() if name.endswith("bias")]
    assert len(weights) == len(biases) == {"non_local": 4, "conv": 1}[refine_type]
    assert not any(bias.any() for bias in biases)
    # Uniform within sqrt(6 / (fan_in + fan_out)): of 9 draws at least, one is beyond half of that
    # but for a chance of 2^-9, and none is beyond it.
    bound = (6 / fans) ** 0.5
    assert all(bound / 2 < weight.abs().max() <= bound for weight in weights)
    levels = levels_of([(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)])
    plain = pyramid_on_given(5, refine_type="none")(levels)
    assert not torch.equal(pyramid(levels)["p2"], plain["p2"])


def test_an_unknown_initialization_is_refused():
    with pytest.raises(InputError, match="INITIALIZATION is 'zero'; known are: identity, xavier"):
        pyramid_on_given(3, initialization="zero")


def test_levels_get_the_average_of_maxima_and_neighbours():
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    middle = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    coarse = torch.tensor([[[[100.0]]]])
    backbone = GivenLevels([1] * 3, [4, 8, 16])
    outputs = BalancedFeaturePyramid(backbone, 1, "none")({"p0": fine, "p1": middle, "p2": coarse})
    # Maxima of the 2 x 2 windows of `fine`: 5, 7, 13, 15.
    average = torch.tensor([[5 + 1, 7 + 2], [13 + 3, 15 + 4]]) / 3 + 100 / 3
    # Sums of three small integers over 3: two roundings of float32 at most.
    torch.testing.assert_close(outputs["p1"][0, 0], middle[0, 0] + average)
    torch.testing.assert_close(outputs["p2"][0, 0], coarse[0, 0] + average.max())
    spread = average.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(outputs["p0"][0, 0], fine[0, 0] + spread)


@pytest.mark.parametrize("refine_type", ["non_local", "conv", "none"])
@pytest.mark.parametrize("refine_level", range(5))
def test_odd_sizes_keep_their_shape_at_every_refine_level(refine_level, refine_type):
    levels = levels_of([(25, 43), (13, 22), (7, 11), (4, 6), (2, 3)])
    pyramid = pyramid_on_given(5, refine_level=refine_level, refine_type=refine_type)
    outputs = pyramid(levels)
    assert {name: x.shape for name, x in outputs.items()} == {
        name: x.shape for name, x in levels.items()
    }


def test_levels_are_counted_from_the_finest_in_whatever_order_they_come():
    backbone = GivenLevels([3] * 3, [16, 4, 8])
    pyramid = BalancedFeaturePyramid(backbone, refine_level=0, refine_type="none")
    levels = levels_of([(2, 2), (8, 8), (4, 4)])
    added = pyramid(levels)["p1"] - levels["p1"]
    # The average has the size of the finest level: its 8 x 8 values all differ.
    assert len(added[0, 0].unique()) == 64


def trained_non_local(channels=4):
    torch.manual_seed(0)
    block = NonLocal(channels).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def test_the_non_local_block_follows_its_equation():
    block = trained_non_local()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    expected = torch.empty_like(x)
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    for n in range(2):
        weights = (theta[n].T @ phi[n]).softmax(dim=1)  # (35, 35), rows: i, columns: j
        expected[n] = (weights @ g[n].T).T.reshape(4, 5, 7)
    # float64 on both sides, sums of 35 terms: the default of 1e-7 relative is ample.
    torch.testing.assert_close(block(x), x + block.out(expected))


def test_the_gradient_reaches_every_level_and_every_parameter():
    pyramid = pyramid_on_given(3, refine_level=1)
    nn.init.normal_(pyramid.refine.out.weight)
    levels = levels_of([(6, 8), (3, 4), (2, 2)])
    for level in levels.values():
        level.requires_grad_()
    weights = levels_of([(6, 8), (3, 4), (2, 2)], seed=1)
    outputs = pyramid(levels)
    sum((outputs[name] * weights[name]).sum() for name in outputs).backward()
    for name, level in levels.items():
        # Beyond what passes by the pyramid, which is the weight itself.
        assert not torch.equal(level.grad, weights[name])
    for name, parameter in pyramid.named_parameters():
        if name != "refine.phi.bias":  # adds the same to all products: softmax does not see it
            assert parameter.grad.abs().max() > 0, name


def test_the_non_local_gradient_is_that_of_differences():
    block = trained_non_local(channels=2)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return results


def test_no_matrix_of_all_pairs_of_positions_is_made():
    height, width, channels = 100, 168, 8
    x = torch.randn(1, channels, height, width, requires_grad=True)
    with LargestTensor() as largest:
        NonLocal(channels)(x).sum().backward()
    # A few maps; of all pairs there would be 2,100 times as many.
    assert largest.elements <= 4 * x.numel()
    assert x.grad.isfinite().all()


def test_mixed_precision_gives_finite_outputs_and_gradients():
    pyramid = pyramid_on_given(3, refine_level=1).float()
    levels = {name: x.float() for name, x in levels_of([(6, 8), (3, 4), (2, 2)]).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = pyramid(levels)
        sum(x.float().sum() for x in outputs.values()).backward()
    assert all(x.isfinite().all() for x in outputs.values())
    assert all(p.grad.isfinite().all() for p in pyramid.parameters())


@pytest.mark.parametrize(
    ("channels", "kwargs", "message"),
    [
        ([3, 4], {"refine_level": 0}, "levels of equal channels; the backbone GivenLevels gives"),
        ([3, 3], {}, "REFINE_LEVEL is 2; the backbone GivenLevels has levels 0 to 1"),
        ([3, 3], {"refine_level": -1}, "REFINE_LEVEL is -1"),
        ([3, 3], {"refine_level": 0, "refine_type": "attention"}, "REFINE_TYPE is 'attention'"),
    ],
)
def test_what_cannot_work_is_named(channels, kwargs, message):
    backbone = GivenLevels(channels, [4 * 2**index for index in range(len(channels))])
    with pytest.raises(InputError, match=message):
        BalancedFeaturePyramid(backbone, **kwargs)


@pytest.mark.parametrize("name", ["no_such_backbone", build_balanced_pyramid_backbone.__name__])
def test_a_backbone_that_takes_no_pyramid_is_named(name):
    with pytest.raises(InputError, match=f"BALANCE.PYRAMID.BACKBONE: '{name}'"):
        build_backbone(config(name))
