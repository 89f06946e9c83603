"""Small detectors and batches that several tests share."""

import torch
from detectron2.config import get_cfg
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

import balanced_det.detectors  # noqa: F401  (registers them)
from balanced_det.config import add_balanced_det_config

NUM_CLASSES = 5

# ResNet-50 with a sixteenth of its channels: 200,000 parameters instead of the 11 million of
# ResNet-18, which cannot be made narrower; tests build, train, compare and write each of them. Each
# of the blocks of an untrained network adds to what it is given: the pixels have a deviation of 1.
NARROW_RESNET = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],
}
RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [24], [32], [48], [64]],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
}
FASTER = {
    **RCNN,
    "MODEL.PROPOSAL_GENERATOR.NAME": "BalancedRPN",
    "MODEL.ROI_HEADS.NAME": "BalancedROIHeads",
}
MASK = {
    **FASTER,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "BalancedMaskHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}
CASCADE = {
    **FASTER,
    "MODEL.ROI_HEADS.NAME": "BalancedCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
_DENSE = {
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
}
RETINANET = {
    **_DENSE,
    "MODEL.META_ARCHITECTURE": "BalancedRetinaNet",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[s, s * 1.26, s * 1.59] for s in (16, 24, 32, 48, 64)],
    "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.IOU_THRESHOLDS": [0.4, 0.5],
    "MODEL.RETINANET.IOU_LABELS": [0, -1, 1],
}
FCOS = {
    **_DENSE,
    "MODEL.META_ARCHITECTURE": "BalancedFCOS",
    "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.FCOS.NUM_CONVS": 1,
    "BALANCE.DENSE.BOX_LOSS": "GIoULoss",
}
DETECTORS = {
    "faster": FASTER,
    "mask": MASK,
    "cascade": CASCADE,
    "retinanet": RETINANET,
    "fcos": FCOS,
}


def config(*choices):
    """Return the config of a small detector on CPU; ``choices`` are dicts of keys, in order."""
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    for keys in (NARROW_RESNET, *choices):
        cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def batch(num_objects=(2, 3), seed=0, polygons=False):
    """Return inputs for a detector: one 96 x 128 image an entry, with that many objects each.

    Their masks fill the image, or are triangles within their boxes where ``polygons`` are wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for count in num_objects:
        size = 16 + 40 * torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([128.0, 96.0]) - size)
        instances = Instances((96, 128))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
        if polygons:
            corners = instances.gt_boxes.tensor[:, [0, 1, 2, 1, 0, 3]].double().numpy()
            instances.gt_masks = PolygonMasks([[triangle] for triangle in corners])
        else:
            instances.gt_masks = BitMasks(torch.ones(count, 96, 128, dtype=torch.bool))
        image = 255 * torch.rand(3, 96, 128, generator=generator)
        inputs.append({"image": image, "instances": instances, "height": 96, "width": 128})
    return inputs
