"""The trainer: Detectron2's, with this project's evaluation, counted priors and log entries."""

import functools
import logging
import os

import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.utils import comm
from tabulate import tabulate

from .config import add_balanced_det_config
from .criterion import Criterion
from .data.registration import (
    check_masks,
    check_num_classes,
    register_datasets,
    training_statistics,
)
from .detectors.counting import fit_to_training_data
from .errors import InputError
from .evaluation import build_evaluator
from .gradient_figure import PlotGradients

logger = logging.getLogger(__name__)

_TRAIN_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)
_RESNET_DEPTHS = (18, 34, 50, 101, 152)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for the detectors of this project.

    It trains on CPU with several processes too, trains the part of a model that
    ``BALANCE.TRAIN_ONLY`` names, and evaluates as LVIS does.
    """

    def __init__(self, cfg):
        check_model_classes(cfg, cfg.DATASETS.TRAIN)
        create_ddp_model = defaults.create_ddp_model
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            # Detectron2 gives every process a GPU, which processes on CPU refuse.
            defaults.create_ddp_model = functools.partial(create_ddp_model, device_ids=None)
        try:
            super().__init__(cfg)
        finally:
            defaults.create_ddp_model = create_ddp_model

    @classmethod
    def build_model(cls, cfg):
        """Build the model, and freeze all of it but ``BALANCE.TRAIN_ONLY``."""
        check_model_classes(cfg, cfg.DATASETS.TEST)
        model = super().build_model(cfg)
        train_only(model, cfg.BALANCE.TRAIN_ONLY)
        return model

    def resume_or_load(self, resume=True):
        """Count the training set where the config asks for it, then load as Detectron2 does."""
        resumed = resume and self.checkpointer.has_checkpoint()
        if self.cfg.BALANCE.COUNT and not resumed:
            fit_to_training_data(getattr(self.model, "module", self.model), self.cfg)
        super().resume_or_load(resume)

    def train(self):
        """Train; return the results of the last evaluation, or None on workers but the main one."""
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Build Detectron2's optimizer, with one more ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``.

        Detectron2's "norm" clips the gradient of each parameter for itself; "full_model" clips the
        norm of all of them together, as most published schedules mean it. With mixed precision
        that is the norm of the unscaled gradients, since the scaler divides before the step.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE in ("value", "norm"):
            return super().build_optimizer(cfg, model)
        if clip.CLIP_TYPE != "full_model":
            raise InputError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: '{clip.CLIP_TYPE}' is unknown; "
                "known are: full_model, norm, value."
            )
        max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(cfg, model)

        def clip_gradients(optimizer, args, kwargs):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        """Return a data set's evaluator, see :func:`balanced_det.evaluation.build_evaluator`."""
        try:
            statistics = training_statistics(cfg)
        except InputError as error:
            if cfg.BALANCE.COUNT:
                raise
            logger.warning("Evaluating without the training set's class counts: %s", error)
            statistics = None
        return build_evaluator(cfg, dataset_name, output_folder, train_statistics=statistics)

    def build_hooks(self):
        """Return Detectron2's hooks and this project's own."""
        ret = super().build_hooks()
        if self.cfg.BALANCE.TRAIN_ONLY:
            ret.insert(0, KeepFrozenStatistics())
        writers = [hook for hook in ret if isinstance(hook, hooks.PeriodicWriter)]
        own = [LogMonitored()]
        period = self.cfg.BALANCE.GRADIENT_FIGURE_PERIOD
        if period and comm.is_main_process():
            own.append(PlotGradients(period, self.cfg.OUTPUT_DIR))
        # Before the writers, which then find what was logged.
        position = ret.index(writers[0]) if writers else len(ret)
        ret[position:position] = own
        return ret


class KeepFrozenStatistics(HookBase):
    """Keep the running statistics of frozen batch normalization as they are, and train with them.

    Without gradients alone, they would still follow the batches of the training.
    """

    def before_step(self):
        """Switch frozen layers to evaluation, since each ``model.train()`` switches them back."""
        for module in self.trainer.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()


class LogMonitored(HookBase):
    """Write what each criterion monitors (unscaled loss, guided scale) to the event storage.

    Args:
        period: iterations between two entries; each waits for the device once.
    """

    def __init__(self, period=20):
        self.period = period

    def after_step(self):
        """Log when the period is over."""
        if (self.trainer.iter + 1) % self.period and self.trainer.iter + 1 < self.trainer.max_iter:
            return
        for name, module in self.trainer.model.named_modules():
            if isinstance(module, Criterion):
                part = name.removeprefix("module.").rpartition(".")[0] or "dense"
                for key, value in module.monitored.items():
                    self.trainer.storage.put_scalar(f"{part}/{key}", value.item())


def print_results(results, output_dir):
    """Print AP, AP50, AP75, APr, APc and APf of every task, and where the run wrote its files.

    Args:
        results: what ``Trainer.test`` returns, {task: {metric: percent}}, or that of each data set;
            None, on a worker that has none, prints nothing.
        output_dir: the run's folder.
    """
    if not results:
        return
    rows = list(_metric_rows(results))
    names = ["AP", "AP50", "AP75", "APr", "APc", "APf"]
    names = [n for n in names if any(n in metrics for _, metrics in rows)]
    table = tabulate(
        [[task, *(metrics.get(n, float("nan")) for n in names)] for task, metrics in rows],
        headers=["", *names],
        floatfmt=".1f",
        tablefmt="github",
    )
    print(f"\n{table}\n\nWritten to {os.path.abspath(output_dir)}")


def _metric_rows(results, prefix=""):
    for name, value in results.items():
        if isinstance(value, dict) and value and not isinstance(next(iter(value.values())), dict):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _metric_rows(value, f"{prefix}{name} ")


def train_only(model, prefixes):
    """Freeze all parameters but those whose name starts with one of ``prefixes``.

    Batch statistics are not parameters: :class:`KeepFrozenStatistics` keeps those. An empty list
    leaves the model as it is; a prefix that no parameter has is an :class:`InputError`.
    """
    if not prefixes:
        return
    prefixes = tuple(prefixes)
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise InputError(f"BALANCE.TRAIN_ONLY: no parameter's name starts with '{prefix}'.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("Training %d parameters, those of %s; all others are frozen.", trained, prefixes)


def check_model_classes(cfg, names):
    """Refuse a config whose number of classes is not that of the data sets called ``names``."""
    node = {
        "GeneralizedRCNN": "ROI_HEADS",
        "BalancedRetinaNet": "RETINANET",
        "BalancedFCOS": "FCOS",
    }.get(cfg.MODEL.META_ARCHITECTURE)
    if node is not None:
        check_num_classes(cfg, cfg.MODEL[node].NUM_CLASSES, f"MODEL.{node}.NUM_CLASSES", names)


def check_run(cfg, eval_only=False, resume=False, num_workers=1):
    """Refuse a run that cannot work, before it starts a process or writes a file.

    Annotations are read and the model is built, once, on CPU. What is counted is kept for the run,
    unless that runs in other processes.

    Args:
        cfg: a config of :func:`load_config`.
        eval_only: the training set is not needed.
        resume: where ``OUTPUT_DIR`` holds a checkpoint, ``MODEL.WEIGHTS`` is not needed.
        num_workers: processes that will train, on all machines.

    Raises:
        InputError: an annotation file, an image, the weights, a method's name or another value of
            the config is missing or wrong.
    """
    _check_writable("OUTPUT_DIR", cfg.OUTPUT_DIR)
    _check_choice("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, _RESNET_DEPTHS)
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]
    resumes = resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if weights and "://" not in weights and not resumes and not os.path.isfile(weights):
        raise InputError(f"MODEL.WEIGHTS: the file '{weights}' does not exist.")
    for name in cfg.DATASETS.TEST:
        DatasetCatalog.get(name)
    if not eval_only:
        _check_loader(cfg, num_workers)
        training_statistics(cfg)
        check_model_classes(cfg, cfg.DATASETS.TRAIN)
        if cfg.BALANCE.GRADIENT_FIGURE_PERIOD:
            PlotGradients(cfg.BALANCE.GRADIENT_FIGURE_PERIOD, cfg.OUTPUT_DIR)  # for its checks
    check_masks(cfg, eval_only)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = Trainer.build_model(cfg)
        if not eval_only:
            Trainer.build_optimizer(cfg, model)
    except KeyError as error:
        # Detectron2's registries; any other KeyError is a bug to be seen.
        if "registry" not in str(error):
            raise
        raise InputError(f"The model cannot be built: {error.args[0].rstrip('!')}.") from None


def _check_loader(cfg, num_workers):
    batch = cfg.SOLVER.IMS_PER_BATCH
    workers = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
    if batch < 1 or batch % workers:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a positive multiple of the number of "
            f"workers, {workers}."
        )
    _check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, _TRAIN_SAMPLERS)


def _check_choice(key, value, choices):
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{key} is {value!r}; Detectron2 has {known}.")


def _check_writable(key, path):
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{key}: '{path}' cannot be written, because of '{folder}'.")


def load_config(config_file, opts=(), **overrides):
    """Read a config file of this project and register the data sets that it names.

    Args:
        config_file: path of a YAML file.
        opts: ["KEY", "VALUE", ...] to set after that, as on the command line.
        overrides: more keys to set, with "__" for each dot.

    Returns:
        The config, not frozen. A key that does not exist, or a value of the wrong type, is an
        :class:`InputError`.
    """
    cfg = get_cfg()
    add_balanced_det_config(cfg)
    _merge_file(cfg, config_file)
    if len(opts) % 2:
        raise InputError(f"Not pairs of KEY VALUE: {' '.join(map(str, opts))}.")
    pairs = [*zip(opts[::2], opts[1::2])]
    for key, value in [*pairs, *((k.replace("__", "."), v) for k, v in overrides.items())]:
        try:
            cfg.merge_from_list([key, value])
        except _CONFIG_ERRORS as error:
            raise InputError(f"{key} {value}: {_reason(error)}.") from None
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        logger.warning("No GPU is available: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    return cfg


# What yacs and Detectron2 raise for a key or value that they refuse.
_CONFIG_ERRORS = (KeyError, ValueError, TypeError, AssertionError)


def _merge_file(cfg, config_file):
    if not os.path.isfile(config_file):
        raise InputError(f"The config file '{config_file}' does not exist.")
    try:
        with open(config_file, encoding="utf-8") as file:
            has_keys = isinstance(yaml.safe_load(file), dict)
        if has_keys:
            # Detectron2's default may execute code from the file.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as error:
        raise InputError(f"{config_file}: its _BASE_ '{error.filename}' does not exist.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{config_file} is no valid YAML: {reason}.") from None
    except _CONFIG_ERRORS as error:
        raise InputError(f"{config_file}: {_reason(error)}.") from None
    if not has_keys:
        raise InputError(f"The config file '{config_file}' holds no 'KEY: value'.")


def _reason(error):
    return str(error.args[0] if error.args else error).rstrip(".!")
