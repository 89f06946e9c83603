"""What a training does with an evaluation: keep the best weights, end when they stop improving."""

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..errors import InputError, printable
from ..evaluation.evaluator import FIXED, BalancedLVISEvaluator
from ..evaluation.lvis import METRICS
from .checkpoint import BEST, Checkpointer, damage

logger = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """Ends a training early, and no error: what it leaves is whole."""


class Evaluate(hooks.EvalHook):
    """Detectron2's ``EvalHook``, which also keeps what an evaluation found.

    * Each class's AP goes to the event storage.
    * The last checkpoint, where it is of the same weights, gets the operating points.
    * ``model_best.pth`` has the weights of the largest value of a metric; it brings that value, so
      a resumed run knows it.
    * After so many evaluations in a row without a larger value the training ends, with a
      ``model_final.pth`` of the weights as they are.

    Its trainer has, in ``last_evaluation``, the results and the evaluators that ``function`` used.

    Args:
        period, function: as in Detectron2.
        checkpointer: a :class:`~balanced_det.engine.checkpoint.Checkpointer`.
        metric: "bbox/AP", or "AP" of the first task that has it; None keeps no best.
        patience: evaluations without a larger value after which the training ends; None never.
    """

    def __init__(
        self,
        period: int,
        function: Callable[[], Any],
        checkpointer: Checkpointer,
        metric: str | None = None,
        patience: int | None = None,
    ):
        super().__init__(period, function)
        self._checkpointer = checkpointer
        self._metric = metric
        self._patience = patience
        self._best: tuple[float, int] | None = None  # value and iteration
        # Those of the latest evaluation, with what they found.
        self._evaluators: list[BalancedLVISEvaluator] = []

    def before_train(self) -> None:
        """Take the best of a run that goes on from the file that has it."""
        path = os.path.join(self._checkpointer.save_dir, f"{BEST}.pth")
        if self._metric is None or not self.trainer.start_iter or damage(path) is not None:
            return
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if content.get("metric") == self._metric:
            self._best = content["value"], content["iteration"]

    def before_step(self) -> None:
        """Forget the operating points: the weights are going to change."""
        self._checkpointer.operating_points = None

    def _do_eval(self):
        super()._do_eval()
        results, evaluators = self.trainer.last_evaluation
        self._evaluators = [e for e in evaluators if isinstance(e, BalancedLVISEvaluator)]
        if comm.is_main_process():
            self._keep_operating_points()
            self._log_classes()
        if self._metric is not None:
            self._compare(flatten_results_dict(results or {}))

    def _keep_operating_points(self):
        points = [evaluator.operating_points for evaluator in self._evaluators]
        points = next((p for p in points if p is not None), None)
        self._checkpointer.keep_operating_points(points, self._checkpoints_of_these_weights())

    def _checkpoints_of_these_weights(self):
        """Names of the checkpoints that were saved after the latest step."""
        iteration = self._iteration()
        period = self.trainer.cfg.SOLVER.CHECKPOINT_PERIOD
        names = [f"model_{iteration:07d}"] if (iteration + 1) % period == 0 else []
        if iteration + 1 >= self.trainer.max_iter:
            names.append("model_final")
        folder = self._checkpointer.save_dir
        return [name for name in names if os.path.isfile(os.path.join(folder, f"{name}.pth"))]

    def _log_classes(self):
        for evaluator in self._evaluators:
            data = f"{evaluator.dataset_name} " if len(self._evaluators) > 1 else ""
            for row in evaluator.class_rows:
                for task in ("bbox", "segm"):
                    value = row.get(task, {}).get("AP", math.nan)
                    if not math.isnan(value):
                        # A slash begins a group of TensorBoard's.
                        name = printable(f"{data}{row['name']} ({row['category_id']})")
                        tag = f"AP of class, {task}/{name.replace('/', '|')}"
                        self.trainer.storage.put_scalar(tag, value, smoothing_hint=False)

    def _iteration(self):
        """The latest step, also after the last, when the trainer counts one more."""
        return min(self.trainer.iter, self.trainer.max_iter - 1)

    def _compare(self, metrics):
        """Keep the weights if they are the best; end the training where that is long ago."""
        stop = False
        if comm.is_main_process():
            value = metric_value(metrics, self._metric)
            if value is None:
                logger.warning(
                    "BALANCE.BEST_METRIC: '%s' has no value here; known are: %s.",
                    self._metric,
                    ", ".join(metrics) or "none",
                )
            elif self._best is None or value > self._best[0]:
                self._best = value, self._iteration()
                self._checkpointer.save_to_use(
                    BEST, iteration=self._iteration(), metric=self._metric, value=value
                )
                logger.info("%s is %.3f, the best so far: kept as %s.", self._metric, value, BEST)
            stop = self._is_long_ago()
        if self.trainer.iter < self.trainer.max_iter and any(comm.all_gather(stop)):
            self._stop()

    def _is_long_ago(self):
        if self._patience is None or self._best is None:
            return False
        return self._iteration() - self._best[1] >= self._patience * self._period

    def _stop(self):
        if comm.is_main_process():
            logger.info(
                "The training ends after iteration %d: %s was the best, %.3f, at iteration %d, "
                "%d evaluations ago (BALANCE.STOP_AFTER).",
                self._iteration(),
                self._metric,
                *self._best,
                self._patience,
            )
            self._checkpointer.save("model_final", iteration=self._iteration())
        raise TrainingStopped


def metric_value(metrics: dict[str, Any], name: str) -> float | None:
    """Return {"bbox/AP": number, ...}[name]; a name without a task is that of the first.

    None where there is none, or where it is not finite.
    """
    if name in metrics:
        found = metrics[name]
    else:
        found = next((v for key, v in metrics.items() if key.split("/")[-1] == name), math.nan)
    return float(found) if math.isfinite(found) else None


def check_best(cfg: CfgNode) -> None:
    """Refuse keys of the best checkpoint and of early stopping that can have no effect.

    Raises:
        InputError: a metric that is not measured, patience without it, or no evaluation to compare.
    """
    metric, patience = cfg.BALANCE.BEST_METRIC, cfg.BALANCE.STOP_AFTER
    if patience is not None and metric is None:
        raise InputError("BALANCE.STOP_AFTER needs BALANCE.BEST_METRIC: which number to look at.")
    if metric is None:
        return
    known = [*METRICS, *(f"{name}fixed" for name in FIXED)]
    name = metric.split("/")[-1] if isinstance(metric, str) else metric
    if name not in known:
        raise InputError(
            f"BALANCE.BEST_METRIC is {metric!r}; known are: {', '.join(known)}, also after a task, "
            "as in bbox/AP."
        )
    if not cfg.DATASETS.TEST:
        raise InputError("BALANCE.BEST_METRIC needs DATASETS.TEST, to measure it on.")
    if patience is not None and (type(patience) is not int or patience < 1):
        raise InputError(f"BALANCE.STOP_AFTER is {patience!r}; it must be 1 or more evaluations.")
    if patience is not None and not cfg.TEST.EVAL_PERIOD > 0:
        raise InputError("BALANCE.STOP_AFTER needs TEST.EVAL_PERIOD: evaluations to count.")
