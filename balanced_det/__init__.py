"""Remedies for imbalanced detector training, composable in Detectron2."""

__version__ = "0.1.0"
