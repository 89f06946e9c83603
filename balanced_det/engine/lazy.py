"""The trainer of Python configs: the same, but that objects come from ``LazyConfig``."""

import copy
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from omegaconf import OmegaConf
from torch import nn

from ..config.lazy import lazy_config
from ..data.loader import TrainLoader
from .trainer import Trainer


class LazyTrainer(Trainer):
    """:class:`Trainer` whose optimizer, schedule and loaders the Python config constructs."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Construct ``optimizer``; its ``params`` are given the model, as Detectron2 does."""
        optimizer = copy.deepcopy(lazy_config(cfg).optimizer)
        optimizer.params.model = model
        built = instantiate(optimizer)
        # Older torch keeps a list as it is given, here the config's own kind, which no checkpoint
        # of weights and numbers alone may hold.
        for options in (built.defaults, *built.param_groups):
            options.update({k: tuple(v) for k, v in options.items() if OmegaConf.is_list(v)})
        return built

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        """Return the schedule that multiplies all learning rates by ``lr_multiplier``."""
        multiplier = instantiate(lazy_config(cfg).lr_multiplier)
        return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Construct ``dataloader.train``.

        Where it is Detectron2's loader, its mapper and sampler are given to ours, which can be
        started at any batch and names broken images.
        """
        loader = lazy_config(cfg).dataloader.train
        if loader._target_ is not build_detection_train_loader:
            return instantiate(loader)
        sampler = None
        if loader.get("sampler") is not None:

            def sampler(cfg: CfgNode, records: list[dict]) -> Any:
                return instantiate(loader.sampler)

        return TrainLoader(cfg, instantiate(loader.mapper), sampler)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Construct ``dataloader.test`` for one data set."""
        # A copy of the whole: what is inside may refer to other parts.
        lazy = copy.deepcopy(lazy_config(cfg))
        lazy.dataloader.test.dataset.names = dataset_name
        return instantiate(lazy.dataloader.test)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Construct ``dataloader.evaluator``, or without one evaluate as LVIS does."""
        evaluator = lazy_config(cfg).dataloader.get("evaluator")
        if evaluator is None:
            return super().build_evaluator(cfg, dataset_name, output_folder)
        return instantiate(evaluator)


def trainer_of(cfg: CfgNode) -> type[Trainer]:
    """Return the trainer of a config: :class:`LazyTrainer` for a Python config."""
    return Trainer if lazy_config(cfg) is None else LazyTrainer
