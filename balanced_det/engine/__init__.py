"""Training: Detectron2's trainer with this project's evaluation, checks and checkpoints."""

from ..config import load_config
from .classes import check_model_classes
from .hooks import KeepFrozenStatistics, LogMonitored
from .lazy import LazyTrainer, trainer_of
from .preflight import check_run
from .trainer import Trainer, print_results, train_only

__all__ = [
    "KeepFrozenStatistics",
    "LazyTrainer",
    "LogMonitored",
    "Trainer",
    "check_model_classes",
    "check_run",
    "load_config",
    "print_results",
    "train_only",
    "trainer_of",
]
