"""Whether a model, a checkpoint and the data sets speak of the same classes."""

from ..data.registration import check_num_classes


def check_model_classes(cfg, names):
    """Refuse a config whose number of classes is not that of the data sets called ``names``."""
    node = {
        "GeneralizedRCNN": "ROI_HEADS",
        "BalancedRetinaNet": "RETINANET",
        "BalancedFCOS": "FCOS",
    }.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        check_num_classes(cfg, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES", names)
