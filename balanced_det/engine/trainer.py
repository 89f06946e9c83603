"""The trainer: Detectron2's, with this project's evaluation, counted priors and log entries."""

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, defaults, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from ..build import build_model
from ..criterion import Criterion
from ..data.loader import TrainLoader, build_test_loader
from ..data.registration import training_statistics
from ..detectors.counting import fit_to_training_data
from ..detectors.masks import MasksAsRLE
from ..errors import InputError, printable
from ..evaluation import BalancedLVISEvaluator, build_evaluator
from ..gradient_figure import PlotGradients
from ..logs import escaped
from .checkpoint import build_checkpointer, load_weights
from .classes import check_model_classes
from .evaluate import Evaluate, TrainingStopped
from .gradient_share import LogGradientShare
from .hooks import KeepFrozenStatistics, LogMonitored, RestartablePreciseBN
from .imbalance import log_remedies
from .sentence import in_a_sentence
from .step import TrainStep, amp_dtype

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for the detectors of this project.

    It trains on CPU with several processes too, trains the part of a model that
    ``BALANCE.TRAIN_ONLY`` names, and evaluates as LVIS does.
    """

    _hooks: list[Any]  # Detectron2's

    def __init__(self, cfg: CfgNode):
        check_model_classes(cfg, cfg.DATASETS.TRAIN)
        self._amp_dtype = amp_dtype(cfg)
        create_ddp_model = defaults.create_ddp_model
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            # Detectron2 gives every process a GPU, which processes on CPU refuse.
            defaults.create_ddp_model = functools.partial(create_ddp_model, device_ids=None)
        try:
            # Detectron2's step for mixed precision needs a GPU; ours takes the place of both.
            super().__init__(_with(cfg, "SOLVER.AMP.ENABLED", False))
        finally:
            defaults.create_ddp_model = create_ddp_model
        self._failed = False

    @classmethod
    def build_model(cls, cfg: CfgNode, count: bool = True) -> nn.Module:
        """Build the model, and freeze all of it but ``BALANCE.TRAIN_ONLY``.

        Args:
            cfg: the config.
            count: as in :func:`balanced_det.build.build_model`; False to evaluate.
        """
        check_model_classes(cfg, cfg.DATASETS.TEST)
        model = build_model(cfg, count)
        logger.info("Model:\n%s", model)
        train_only(model, cfg.BALANCE.TRAIN_ONLY)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Return the batches of the training, which can be started at any of them."""
        return TrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return Detectron2's loader of a test set, with broken images named."""
        return build_test_loader(cfg, dataset_name)

    def resume_or_load(self, resume: bool = True) -> None:
        """Count the training set where the config asks for it, then load as Detectron2 does."""
        resumed = resume and self.checkpointer.has_checkpoint()
        if not resumed:
            model: Any = getattr(self.model, "module", self.model)
            fit_to_training_data(model, self.cfg)
        load_weights(self.checkpointer, self.cfg, resumed)
        if resumed:
            self.start_iter = self.iter + 1  # the checkpoint has the iteration that was finished
            for module in self.model.modules():
                if isinstance(module, Criterion):
                    module.rows_are_counted = True  # what was counted came with the checkpoint

    def run_step(self) -> None:
        """Train one step, see :class:`~balanced_det.engine.step.TrainStep`."""
        self._failed = True
        # What is wrong with a config shows in the first step; what fails later is another matter.
        is_first = self.iter == self.start_iter
        net = in_a_sentence("The first step failed", self.cfg)
        with net if is_first else contextlib.nullcontext():
            try:
                super().run_step()
            except torch.cuda.OutOfMemoryError as error:
                raise InputError(
                    f"Iteration {self.iter}: the GPU has too little memory: lower "
                    "SOLVER.IMS_PER_BATCH, INPUT.MIN_SIZE_TRAIN or INPUT.MAX_SIZE_TRAIN, or set "
                    f"SOLVER.AMP.ENABLED ({str(error).split('. ')[0]})."
                ) from error
        self._failed = False

    def after_train(self) -> None:
        """Call the hooks; one that evaluates has nothing to do after a step that failed."""
        if self._failed:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        super().after_train()

    def train(self) -> dict[str, Any] | None:
        """Train; return the results of the last evaluation, or None on workers but the main one."""
        log_remedies(self.cfg, self.model)
        logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
        with contextlib.suppress(TrainingStopped):
            super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build Detectron2's optimizer, with one more ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``.

        Detectron2's "norm" clips the gradient of each parameter for itself; "full_model" clips the
        norm of all of them together, as most published schedules mean it. With mixed precision
        that is the norm of the unscaled gradients, since the scaler divides before the step.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE in ("value", "norm"):
            return super().build_optimizer(cfg, model)
        max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
        optimizer = super().build_optimizer(
            _with(cfg, "SOLVER.CLIP_GRADIENTS.ENABLED", False), model
        )

        def clip_gradients(optimizer: Any, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Return a data set's evaluator, see :func:`balanced_det.evaluation.build_evaluator`."""
        try:
            statistics = training_statistics(cfg)
        except InputError as error:
            logger.warning("Evaluating without the training set's class counts: %s", error)
            statistics = None
        return build_evaluator(cfg, dataset_name, output_folder, train_statistics=statistics)

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate as ``TEST.AUG`` says, as Detectron2's ``train_net`` does.

        Returns:
            The results of ``test``, with "_TTA" at the end of each task.
        """
        logger.info("Evaluating with the augmentations of TEST.AUG")
        model = GeneralizedRCNNWithTTA(cfg, model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, model, evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate on every test set; where all evaluators take them, masks come as run lengths."""
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if all(isinstance(evaluator, BalancedLVISEvaluator) for evaluator in evaluators):
            with_run_lengths = MasksAsRLE(model)
            with_run_lengths.training = model.training  # what is set again afterwards
            model = with_run_lengths
        return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[Any]:
        """Return Detectron2's hooks and this project's own."""
        # Detectron2 calls this when all that it makes is there, to be replaced by what can do more.
        self._trainer = self._build_step()
        self.checkpointer = build_checkpointer(
            self.model, self.cfg, self.cfg.DATASETS.TRAIN, trainer=weakref.proxy(self)
        )
        ret = [self._own(hook) for hook in super().build_hooks()]
        if self.cfg.BALANCE.TRAIN_ONLY:
            ret.insert(0, KeepFrozenStatistics())
        writers = [hook for hook in ret if isinstance(hook, hooks.PeriodicWriter)]
        own = [LogMonitored(), *self._gradient_share()]
        period = self.cfg.BALANCE.GRADIENT_FIGURE_PERIOD
        if period and comm.is_main_process():
            own.append(PlotGradients(period, self.cfg.OUTPUT_DIR))
        # Before the writers, which then find what was logged.
        position = ret.index(writers[0]) if writers else len(ret)
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            own.append(hooks.EvalHook(0, self._test_with_augmentation))
        ret[position:position] = own
        return ret

    def _own(self, hook):
        """Return what takes the place of one of Detectron2's hooks, or the hook itself."""
        if isinstance(hook, hooks.PreciseBN):
            images = self.cfg.TEST.PRECISE_BN.NUM_ITER
            return RestartablePreciseBN(hook._period, self.model, hook._data_loader, images)
        if isinstance(hook, hooks.EvalHook):
            keys = self.cfg.BALANCE
            return Evaluate(
                hook._period, self._evaluate, self.checkpointer, keys.BEST_METRIC, keys.STOP_AFTER
            )
        return hook

    def _evaluate(self):
        evaluators = [self.build_evaluator(self.cfg, name) for name in self.cfg.DATASETS.TEST]
        with in_a_sentence("The evaluation failed", self.cfg):
            self._last_eval_results = self.test(self.cfg, self.model, evaluators)
        self.last_evaluation = self._last_eval_results, evaluators
        return self._last_eval_results

    def _gradient_share(self):
        """The hook that logs it, where the classes can be counted."""
        try:
            return [LogGradientShare(training_statistics(self.cfg).group)]
        except InputError:
            return []

    def _test_with_augmentation(self):
        with in_a_sentence("The evaluation with TEST.AUG failed", self.cfg):
            results = self.test_with_augmentation(self.cfg, self.model)
        if comm.is_main_process():
            self._last_eval_results = {**self._last_eval_results, **results}
        return results

    def _build_step(self):
        keys = self.cfg.BALANCE
        return TrainStep(
            self.model,
            self.data_loader,
            self.optimizer,
            seed=getattr(self.data_loader, "seed", max(self.cfg.SEED, 0)),
            dtype=self._amp_dtype,
            accumulate=keys.ACCUMULATE_STEPS,
            max_skipped=keys.SKIP_BAD_STEPS,
            max_skipped_images=keys.SKIP_BROKEN_IMAGES,
        )


def _without_traceback(record):
    """Leave the traceback of bad input out of the log; an early end is no error at all."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, TrainingStopped):
        return False
    if isinstance(error, InputError):
        record.exc_info = record.exc_text = None
        record.msg = f"{record.msg} {error}"
    return True


def _with(cfg, key, value):
    """Return a copy of ``cfg`` in which one key is another, frozen as ``cfg`` is."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list([key, value])
    if cfg.is_frozen():
        copy.freeze()
    return copy


def train_only(model: nn.Module, prefixes: Sequence[str]) -> None:
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


def print_results(results: dict[str, Any], output_dir: str) -> None:
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
    print(f"\n{escaped(table)}\n\nWritten to {printable(os.path.abspath(output_dir))}")


def _metric_rows(results, prefix=""):
    for name, value in results.items():
        if isinstance(value, dict) and value and not isinstance(next(iter(value.values())), dict):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _metric_rows(value, f"{prefix}{name} ")
