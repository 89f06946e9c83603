"""Training: Detectron2's trainer with this project's evaluation, checks and checkpoints."""

from ..config import load_config
from .checkpoint import Checkpointer, load_trained
from .classes import check_model_classes
from .hooks import KeepFrozenStatistics, LogMonitored
from .launch import is_first_process, num_processes, start
from .lazy import LazyTrainer, trainer_of
from .output import locked, remove_checkpoints
from .preflight import check_run
from .sentence import in_a_sentence
from .trainer import Trainer, print_results, train_only

__all__ = [
    "Checkpointer",
    "KeepFrozenStatistics",
    "LazyTrainer",
    "LogMonitored",
    "Trainer",
    "check_model_classes",
    "check_run",
    "in_a_sentence",
    "is_first_process",
    "load_config",
    "load_trained",
    "locked",
    "num_processes",
    "print_results",
    "remove_checkpoints",
    "start",
    "train_only",
    "trainer_of",
]
