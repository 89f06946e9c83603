"""The trainer of Python configs: the same, but that objects come from ``LazyConfig``."""

import copy

from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.solver import LRMultiplier

from ..config.lazy import lazy_config
from ..data.loader import TrainLoader
from .trainer import Trainer


class LazyTrainer(Trainer):
    """:class:`Trainer` whose optimizer, schedule and loaders the Python config constructs."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Construct ``optimizer``; its ``params`` are given the model, as Detectron2 does."""
        optimizer = copy.deepcopy(lazy_config(cfg).optimizer)
        optimizer.params.model = model
        return instantiate(optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """Return the schedule that multiplies all learning rates by ``lr_multiplier``."""
        multiplier = instantiate(lazy_config(cfg).lr_multiplier)
        return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg):
        """Construct ``dataloader.train``.

        Where it is Detectron2's loader, its mapper and sampler are given to ours, which can be
        started at any batch and names broken images.
        """
        loader = lazy_config(cfg).dataloader.train
        if loader._target_ is not build_detection_train_loader:
            return instantiate(loader)
        sampler = None
        if loader.get("sampler") is not None:

            def sampler(cfg, records):
                return instantiate(loader.sampler)

        return TrainLoader(cfg, instantiate(loader.mapper), sampler)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Construct ``dataloader.test`` for one data set."""
        # A copy of the whole: what is inside may refer to other parts.
        lazy = copy.deepcopy(lazy_config(cfg))
        lazy.dataloader.test.dataset.names = dataset_name
        return instantiate(lazy.dataloader.test)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """Construct ``dataloader.evaluator``, or without one evaluate as LVIS does."""
        evaluator = lazy_config(cfg).dataloader.get("evaluator")
        if evaluator is None:
            return super().build_evaluator(cfg, dataset_name, output_folder)
        return instantiate(evaluator)


def trainer_of(cfg) -> type[Trainer]:
    """Return the trainer of a config: :class:`LazyTrainer` for a Python config."""
    return Trainer if lazy_config(cfg) is None else LazyTrainer
