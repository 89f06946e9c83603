"""Backbones beside Detectron2's, whose ImageNet weights install as packages.

Importing this registers the builders and the address ``imagenet://`` of ``MODEL.WEIGHTS``.
"""

from .build import build_bottom_up_fpn_backbone, build_retinanet_bottom_up_fpn_backbone
from .efficientnet_lite import EfficientNetLite
from .imagenet import imagenet_weights

__all__ = [
    "EfficientNetLite",
    "build_bottom_up_fpn_backbone",
    "build_retinanet_bottom_up_fpn_backbone",
    "imagenet_weights",
]
