"""Builders of feature pyramids on the networks of ``MODEL.BOTTOM_UP``.

``MODEL.BACKBONE.NAME`` names one of the two builders, as with Detectron2's ResNets: one for
detectors with regions (levels p2 to p6), one for RetinaNet and FCOS (levels p3 to p7).
"""

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..errors import InputError
from .efficientnet_lite import (
    NORMS,
    PIXEL_FORMAT,
    PIXEL_MEAN,
    PIXEL_STD,
    SCALINGS,
    EfficientNetLite,
)
from .imagenet import PREFIX, find_weights


@BACKBONE_REGISTRY.register()
def build_bottom_up_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec | None) -> FPN:
    """Build the pyramid of Faster, Mask and Cascade R-CNN: p6 is p5 at every second position.

    Args:
        cfg: ``MODEL.BOTTOM_UP``, ``MODEL.FPN`` and ``MODEL.BACKBONE.FREEZE_AT`` are read.
        input_shape: Detectron2's, of the image; not needed.

    Raises:
        InputError: a key is wrong, the images are not as the network expects them, or its weights
            are asked for and not installed.
    """
    return _pyramid(cfg, _bottom_up(cfg), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_bottom_up_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec | None) -> FPN:
    """Build the pyramid of RetinaNet and FCOS: p6 and p7 are convolutions of res5.

    Arguments and errors are those of :func:`build_bottom_up_fpn_backbone`.
    """
    bottom_up = _bottom_up(cfg)
    channels = bottom_up.output_shape()["res5"].channels
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _bottom_up(cfg: CfgNode) -> EfficientNetLite:
    keys = cfg.MODEL.BOTTOM_UP
    _check_choice("MODEL.BOTTOM_UP.NAME", keys.NAME, SCALINGS)
    _check_choice("MODEL.BOTTOM_UP.NORM", keys.NORM, NORMS)
    _check_pixels(cfg)
    _check_weights(cfg)
    network = EfficientNetLite(keys.NAME, keys.NORM)
    return network.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def _pyramid(cfg: CfgNode, bottom_up: EfficientNetLite, top_block: nn.Module) -> FPN:
    in_features = cfg.MODEL.FPN.IN_FEATURES
    known = list(bottom_up.output_shape())
    # FPN takes neighbouring levels only; p6 is made of p5 or res5, which is then the last.
    if not in_features or in_features != known[-len(in_features) :]:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {in_features}; it must be the last of {known}, in order."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_pixels(cfg: CfgNode) -> None:
    """Refuse images other than those that the network's weights expect."""
    wanted = {
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, PIXEL_FORMAT),
        "MODEL.PIXEL_MEAN": (list(cfg.MODEL.PIXEL_MEAN), list(PIXEL_MEAN)),
        "MODEL.PIXEL_STD": (list(cfg.MODEL.PIXEL_STD), list(PIXEL_STD)),
    }
    wrong = [(key, found, right) for key, (found, right) in wanted.items() if found != right]
    if wrong:
        raise InputError(
            f"MODEL.BOTTOM_UP.NAME '{cfg.MODEL.BOTTOM_UP.NAME}' expects "
            + ", ".join(f"{key} {right!r} (it is {found!r})" for key, found, right in wrong)
            + "."
        )


def _check_weights(cfg: CfgNode) -> None:
    """Find weights of a package now, when the model is built: training would find them missing."""
    weights = cfg.MODEL.WEIGHTS
    if not weights.startswith(PREFIX):
        return
    name = weights.removeprefix(PREFIX)
    if name != cfg.MODEL.BOTTOM_UP.NAME:
        raise InputError(
            f"MODEL.WEIGHTS is '{weights}', but MODEL.BOTTOM_UP.NAME is "
            f"'{cfg.MODEL.BOTTOM_UP.NAME}'."
        )
    find_weights(name)


def _check_choice(key: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        raise InputError(f"{key} is {value!r}; known are: {', '.join(known)}.")
