"""Where the config of a region head is translated: ``BALANCE.ROI_HEADS`` and Detectron2's keys."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ..build import (
    build_classifier,
    build_criterion,
    build_score_threshold,
    build_selection,
    initial_prior,
)
from ..criterion import Criterion
from ..errors import InputError
from ..selection import Selection

REPLACED_KEYS = {
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (0.0, "BALANCE.SmoothL1Loss.BETA"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1", "BALANCE.ROI_HEADS.BOX_LOSS"),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False, "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False, "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS"),
}


def region_arguments(
    cfg: CfgNode, input_shape: ShapeSpec, num_classes: int, fixed_threshold: float
) -> dict[str, Any]:
    """Translate ``cfg.BALANCE.ROI_HEADS`` into the arguments of a box predictor.

    Args:
        cfg: the whole config.
        input_shape: shape of a region's features.
        num_classes: K.
        fixed_threshold: Detectron2's own score threshold.
    """
    weight = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT
    criterion = build_criterion(cfg, "ROI_HEADS", num_classes, box_weight=weight)
    return {
        "criterion": criterion,
        "selection": proposal_selection(cfg),
        "score_threshold": build_score_threshold(cfg, "ROI_HEADS", num_classes, fixed_threshold),
        "prior_prob": initial_prior(cfg, "ROI_HEADS"),
        "classifier": build_classifier(
            cfg, "ROI_HEADS", _num_features(input_shape), criterion.num_logits
        ),
    }


def proposal_selection(cfg: CfgNode) -> Selection:
    """Build the :class:`~balanced_det.selection.Selection` of region heads."""
    keys = cfg.MODEL.ROI_HEADS
    quota = (keys.BATCH_SIZE_PER_IMAGE, keys.POSITIVE_FRACTION)
    return build_selection(cfg, "ROI_HEADS", rows_per_image=quota[0], positive_fraction=quota[1])


def _num_features(input_shape: ShapeSpec) -> int:
    """Return how many numbers a region has: channels, by height and width where it has them."""
    return input_shape.channels * (input_shape.width or 1) * (input_shape.height or 1)


def check_classifier(classifier: Any, in_features: int, criterion: Criterion) -> None:
    """Refuse a last layer that does not fit a region's features or the criterion's logits."""
    expected = in_features, criterion.num_logits
    found = classifier.in_features, classifier.out_features
    if found != expected:
        raise InputError(
            f"The classifier {classifier} takes {found[0]} features to {found[1]} logits; a region "
            f"has {expected[0]} and {type(criterion.classification_loss).__name__} {expected[1]}."
        )
