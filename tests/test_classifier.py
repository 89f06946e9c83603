"""The last layer of region heads: linear, or of cosines, as one choice of the config."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from models import CASCADE, FASTER, FCOS, NUM_CLASSES, RETINANET, batch, config
from test_detectors import assert_one_sentence, assert_trains, build

from balanced_det.build import build_model
from balanced_det.cosine import CosineLinear
from balanced_det.criterion import Criterion
from balanced_det.detectors import BalancedFastRCNNOutputLayers
from balanced_det.errors import InputError
from balanced_det.losses import CLASSIFICATION_LOSSES, SeesawLoss, SmoothL1Loss
from balanced_det.samplers import RandomSampler
from balanced_det.selection import Selection
from balanced_det.thresholds import FixedThreshold

COSINE = {"BALANCE.ROI_HEADS.CLASSIFIER": "CosineLinear"}
ROI_LOSSES = [name for name, loss in CLASSIFICATION_LOSSES if "ROI_HEADS" not in loss.refused_on]


def predictors(model):
    predictor = model.roi_heads.box_predictor
    return list(predictor) if isinstance(predictor, torch.nn.ModuleList) else [predictor]


@pytest.mark.parametrize("name", ["faster", "cascade"])
@pytest.mark.parametrize("loss", ROI_LOSSES)
def test_every_loss_of_region_heads_trains_and_scores_cosines(loss, name):
    choice = {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": loss, "BALANCE.CosineLinear.SCALE": 16.0}
    model = build(name, COSINE, choice)
    for predictor in predictors(model):
        assert isinstance(predictor.cls_score, CosineLinear)
        assert predictor.cls_score.scale == 16.0
        assert predictor.cls_score.out_features == predictor.criterion.num_logits
    assert_trains(model, batch((0, 2)))
    with torch.no_grad():
        (found,) = model.eval()(batch((2,)))
    assert found["instances"].scores.isfinite().all()


def test_each_stage_of_a_cascade_has_a_classifier_of_its_own():
    layers = [p.cls_score for p in predictors(build_model(config(CASCADE, COSINE)))]
    assert len({id(layer) for layer in layers}) == 3


@pytest.mark.parametrize("prior", [0.01, 0.001])
def test_a_prior_starts_cosines_at_its_probability(prior):
    torch.manual_seed(0)
    keys = {
        "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "EqualizationLoss",
        "BALANCE.ROI_HEADS.PRIOR_PROB": prior,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    }
    layer = build_model(config(FASTER, COSINE, keys)).roi_heads.box_predictor.cls_score
    logits = layer(torch.rand(2000, 1024)).flatten()
    # All features point nearly one way, so that the mean over them has 20 / sqrt(1024) as standard
    # deviation a class, and over five classes this one; five of it.
    expected = math.log(prior / (1 - prior))
    assert logits.mean().item() == pytest.approx(expected, abs=5 * 20 / math.sqrt(1024 * 5))
    assert (logits - expected).abs().max() <= 20


def test_cosines_are_the_linear_layers_with_its_weights_and_features_normalized():
    torch.manual_seed(0)
    cosine = build_model(config(FASTER, COSINE)).roi_heads.box_predictor
    linear = build_model(config(FASTER)).roi_heads.box_predictor
    linear.load_state_dict(cosine.state_dict())  # names and shapes are the same
    unit = torch.nn.functional.normalize
    features = torch.randn(7, 32)
    with torch.no_grad():
        linear.cls_score.weight.copy_(unit(linear.cls_score.weight, dim=1))
    expected = linear.cls_score(20 * unit(features, dim=1))
    # Float32 rounding of 32 products of at most 20.
    torch.testing.assert_close(cosine(features)[0], expected, rtol=1e-5, atol=1e-4)


def arguments(classifier):
    return {
        "input_shape": ShapeSpec(channels=16),
        "box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "num_classes": NUM_CLASSES,
        "criterion": Criterion(SeesawLoss(NUM_CLASSES), SmoothL1Loss()),
        "selection": Selection(RandomSampler()),
        "score_threshold": FixedThreshold(0.05, NUM_CLASSES),
        "classifier": classifier,
    }


def test_a_classifier_may_be_given_to_the_constructor():
    layer = CosineLinear(16, NUM_CLASSES + 2, scale=5.0)
    assert BalancedFastRCNNOutputLayers(**arguments(layer)).cls_score is layer


@pytest.mark.parametrize("sizes", [(16, NUM_CLASSES + 1), (8, NUM_CLASSES + 2)])
def test_a_classifier_of_other_sizes_is_refused_in_one_sentence(sizes):
    with pytest.raises(InputError, match="16 and SeesawLoss 7") as refused:
        BalancedFastRCNNOutputLayers(**arguments(CosineLinear(*sizes)))
    assert_one_sentence(refused.value)


@pytest.mark.parametrize("keys", [RETINANET, FCOS], ids=["retinanet", "fcos"])
def test_dense_detectors_refuse_it(keys):
    with pytest.raises(InputError, match="BALANCE.ROI_HEADS is for region heads"):
        build_model(config(keys, COSINE))


def test_unknown_classifiers_and_impossible_scales_are_refused():
    with pytest.raises(InputError, match="CLASSIFIER: unknown classifier 'Cosine'; known are"):
        build_model(config(FASTER, {"BALANCE.ROI_HEADS.CLASSIFIER": "Cosine"}))
    with pytest.raises(InputError, match="BALANCE.CosineLinear: .*scale must be above 0"):
        build_model(config(FASTER, COSINE, {"BALANCE.CosineLinear.SCALE": -1.0}))
