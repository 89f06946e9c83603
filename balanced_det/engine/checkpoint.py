"""Checkpoints that are whole or absent, run no code, and tell the classes they were trained on."""

import functools
import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..config.lazy import lazy_config
from ..criterion import Criterion
from ..errors import InputError, NonFiniteError
from ..evaluation.operating_points import OperatingPoints
from ..losses.base import BoxLoss, ClassificationLoss
from ..thresholds import ScoreThreshold
from .classes import compare_classes, dataset_classes

logger = logging.getLogger(__name__)

BEST = "model_best"  # the checkpoint of the best weights, without ".pth"

# All that a pickle of Detectron2's model zoo, or of its ancestors, is made of besides containers,
# texts and numbers. "numpy._core" is what numpy 2 calls "numpy.core".
_PLAIN_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
}


def statistics_names(model: nn.Module) -> list[str]:
    """Return the names of the buffers that hold statistics of the data or of the training.

    They are all buffers of a criterion, a loss or a score threshold, and those that another module
    names in an attribute ``statistics``.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        owns_all = isinstance(module, Criterion | ClassificationLoss | BoxLoss | ScoreThreshold)
        own = dict(module.named_buffers()) if owns_all else getattr(module, "statistics", ())
        names.update(f"{prefix}.{name}" if prefix else name for name in own)
    return sorted(names & model.state_dict().keys())


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for files that may be damaged, a stranger's, or of other classes.

    Args:
        model, save_dir, checkpointables: as in Detectron2.
        classes: {"names": K texts, "ids": K numbers} of the data, or None to compare nothing.
        other_classes: load a checkpoint of other classes.
        keep_statistics: loading weights leaves the model's statistics as they are; resuming never
            does.
        trusted: SHA-256 digests of pickles that may run code.
        config: the run's config as YAML, or None.

    Attributes:
        operating_points: an :class:`~balanced_det.evaluation.operating_points.OperatingPoints` of
            the weights as they are, or None. What is saved brings classes, config and these along,
            so that a checkpoint can be used alone, see :mod:`balanced_det.predict`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        classes: dict | None = None,
        other_classes: bool = False,
        keep_statistics: bool = False,
        trusted: Iterable[str] = (),
        config: str | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.config = config
        self.operating_points: OperatingPoints | None = None
        self.classes = classes
        self.other_classes = other_classes
        self.keep_statistics = keep_statistics
        self.trusted = frozenset(trusted)
        # What the last load left as it was: names of parameters and buffers.
        self.untouched: list[str] = []
        self._resuming = False

    # --- Saving -----------------------------------------------------------------------------------

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name``.pth into ``save_dir``, whole or not at all, and call it the last.

        Raises:
            NonFiniteError: a number of the model is not finite; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {k: v.state_dict() for k, v in self.checkpointables.items()}
        self._write(name, {**states, **extra})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_to_use(self, name: str, **extra: Any) -> None:
        """Write ``name``.pth as :meth:`save` does, but without what a training would go on with.

        It is not called the last, so that no run is resumed from it.
        """
        if self.save_dir and self.save_to_disk:
            self._write(name, extra)

    def keep_operating_points(
        self, points: OperatingPoints | None, names: Iterable[str] = ()
    ) -> None:
        """Take the points of the weights as they are, and add them to files that hold these.

        Args:
            points: of an evaluation; None where there is none.
            names: checkpoints in ``save_dir``, without ".pth", that were saved of these weights.
        """
        self.operating_points = points
        if points is None or not self.save_dir or not self.save_to_disk:
            return
        for name in names:
            path = os.path.join(self.save_dir, f"{name}.pth")
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            content["operating_points"] = _as_tensors(points)
            write_whole(path, functools.partial(torch.save, content))

    def _write(self, name, more):
        check_finite(self.model, f"checkpoint '{name}' is not written")
        data = {"model": self.model.state_dict()}
        if self.classes is not None:
            data["classes"] = self.classes
        if self.config is not None:
            data["config"] = self.config
        if self.operating_points is not None:
            data["operating_points"] = _as_tensors(self.operating_points)
        data.update(more)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_whole(path, functools.partial(torch.save, data))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write which checkpoint is the last, whole or not at all."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_whole(path, lambda file: file.write(last_filename_basename.encode()))

    # --- Loading ----------------------------------------------------------------------------------

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return bool(self.save_dir) and bool(saved_checkpoints(self.save_dir))

    def get_checkpoint_file(self) -> str:
        """Return the last checkpoint that is sound; a line tells of each that is not.

        Raises:
            InputError: all are damaged.
        """
        found = saved_checkpoints(self.save_dir)
        for path in found:
            reason = damage(path)
            if reason is None:
                return path
            logger.warning(
                "The checkpoint '%s' is damaged (%s): trying the one before it.",
                path,
                reason,
            )
        if not found:
            return ""
        raise InputError(
            f"No checkpoint of '{self.save_dir}' can be read: {', '.join(map(repr, found))} "
            f"{'is' if len(found) == 1 else 'are'} damaged."
        )

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the last checkpoint and all that a run goes on with, or the weights in ``path``."""
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        # One worker decides which is sound, for all.
        chosen = self.get_checkpoint_file() if comm.is_main_process() else None
        self._resuming = True
        try:
            return self.load(comm.all_gather(chosen)[0])
        finally:
            self._resuming = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load a file; see Detectron2. An empty path loads nothing.

        Raises:
            InputError: the file is missing, damaged, runs code, holds numbers that are not finite,
                or was trained on other classes.
        """
        self.untouched = list(self.model.state_dict())
        if not path:
            return super().load(path, checkpointables)
        try:
            rest = super().load(path, checkpointables)
        except AssertionError as error:
            raise InputError(f"MODEL.WEIGHTS: '{path}' cannot be loaded: {error}.") from None
        finally:
            # Detectron2 would refuse every later load after one that failed.
            self._parsed_url_during_load = None
        check_finite(self.model, f"'{path}' cannot be used")
        return rest

    def _load_file(self, filename):
        if filename.endswith(".pkl"):
            self._check_pickle(filename)
        elif filename.endswith(".pyth"):
            self._torch_load(filename)  # Detectron2 loads these with torch's own default
        reason = damage(filename)
        if reason is not None:
            raise InputError(f"The checkpoint '{filename}' is damaged or no checkpoint: {reason}.")
        checkpoint = super()._load_file(filename)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
            raise InputError(f"The checkpoint '{filename}' holds no weights of a model.")
        if self.classes is not None and not self.other_classes:
            compare_classes(checkpoint.get("classes"), self.classes, filename)
        return checkpoint

    def _torch_load(self, f):
        try:
            return torch.load(f, map_location="cpu", weights_only=_sha256(f) not in self.trusted)
        except pickle.UnpicklingError:
            raise InputError(
                f"The checkpoint '{f}' is damaged or holds more than tensors and may run code: if "
                f"you trust it, add its SHA-256 '{_sha256(f)}' to BALANCE.TRUSTED_WEIGHTS."
            ) from None
        except Exception as error:  # an unpickler raises nearly anything on broken bytes
            raise InputError(f"The checkpoint '{f}' cannot be read: {error}.") from None

    def _check_pickle(self, filename):
        digest = _sha256(filename)
        if digest in self.trusted:
            return
        try:
            with open(filename, "rb") as file:
                _PlainUnpickler(file, encoding="latin1").load()
        except _UnplainPickleError as error:
            raise InputError(
                f"MODEL.WEIGHTS: the pickle '{filename}' holds more than arrays ('{error}') and "
                f"may run any code: if you trust it, add its SHA-256 '{digest}' to "
                "BALANCE.TRUSTED_WEIGHTS."
            ) from None
        except Exception as error:  # an unpickler raises nearly anything on broken bytes
            raise InputError(
                f"MODEL.WEIGHTS: the pickle '{filename}' is damaged: {error or 'it is cut off'}."
            ) from None

    def _load_model(self, checkpoint):
        if self.keep_statistics and not self._resuming:
            dropped = [k for k in statistics_names(self.model) if k in checkpoint["model"]]
            for name in dropped:
                del checkpoint["model"][name]
            if dropped:
                logger.info(
                    "%d statistics of the checkpoint are not loaded: those of this run's data are "
                    "kept (BALANCE.STATISTICS): %s.",
                    len(dropped),
                    ", ".join(dropped),
                )
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [name for name, *_ in incompatible.incorrect_shapes]
        parameters = {name for name, _ in self.model.named_parameters()}
        if self._resuming and (lacking := parameters & {*incompatible.missing_keys, *wrong_shape}):
            raise InputError(
                f"--resume: the checkpoint in '{self.save_dir}' is of another model: it has no "
                f"'{min(lacking)}' of the shape that this config builds."
            )
        self.untouched = [*incompatible.missing_keys, *wrong_shape]
        return incompatible


def _as_tensors(points):
    """Operating points as a file of tensors holds them."""
    return {
        "task": points.task,
        "data": points.data,
        # (K, 101), as in `to_json`
        "precision": torch.from_numpy(points.precision.T.copy()).float(),
        "scores": torch.from_numpy(points.scores.T.copy()).float(),
    }


def build_checkpointer(
    model: nn.Module,
    cfg: CfgNode,
    names: Iterable[str],
    counted: bool = True,
    **checkpointables: Any,
) -> Checkpointer:
    """Build the checkpointer that ``cfg`` asks for.

    Args:
        model, checkpointables: as in Detectron2.
        cfg: the config.
        names: the data sets whose classes the model has.
        counted: the model has statistics of its data, which ``BALANCE.STATISTICS`` may keep.
    """
    return Checkpointer(
        model,
        cfg.OUTPUT_DIR,
        classes=next(map(dataset_classes, names), None),
        other_classes=cfg.BALANCE.OTHER_CLASSES,
        keep_statistics=counted and cfg.BALANCE.STATISTICS == "data",
        trusted=cfg.BALANCE.TRUSTED_WEIGHTS,
        # A Python config is code, which no checkpoint carries.
        config=cfg.dump() if lazy_config(cfg) is None else None,
        **checkpointables,
    )


def read_checkpoint(path: str) -> dict:
    """Return all that a file of :class:`Checkpointer` holds, after the checks of its loading.

    Raises:
        InputError: the file is missing, damaged, no checkpoint, or would run code.
    """
    if not os.path.isfile(path):
        raise InputError(f"The checkpoint '{path}' does not exist.")
    reason = damage(path)
    if reason is not None:
        raise InputError(f"The checkpoint '{path}' is damaged or no checkpoint: {reason}.")
    content = Checkpointer(nn.Module())._torch_load(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"The checkpoint '{path}' holds no weights of a model.")
    return content


def load_weights(checkpointer: Checkpointer, cfg: CfgNode, resume: bool = False) -> None:
    """Load what a training starts with: the run's last checkpoint, or ``MODEL.WEIGHTS``.

    Raises:
        InputError: ``MODEL.WEIGHTS`` holds nothing of the model; or see :meth:`Checkpointer.load`.
    """
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    parameters = {name for name, _ in checkpointer.model.named_parameters()}
    if cfg.MODEL.WEIGHTS and parameters <= set(checkpointer.untouched):
        raise InputError(f"MODEL.WEIGHTS: '{cfg.MODEL.WEIGHTS}' holds no weight of this model.")
    if cfg.MODEL.WEIGHTS and not resume:
        new = sorted(parameters & set(checkpointer.untouched))
        num_loaded = len(parameters) - len(new)
        logger.info("Loaded: %d of the model's %d weights.", num_loaded, len(parameters))
        logger.info("Not loaded, so start anew: %s.", ", ".join(new) or "none")


def load_trained(model: nn.Module, cfg: CfgNode, resume: bool = False) -> None:
    """Load what ``--eval-only`` evaluates: the run's last checkpoint, or ``MODEL.WEIGHTS``.

    Raises:
        InputError: that leaves weights or counted thresholds of the model at their start, unless
            ``BALANCE.UNTRAINED`` says that this is wanted; or see :meth:`Checkpointer.load`.
    """
    checkpointer = build_checkpointer(model, cfg, cfg.DATASETS.TEST, counted=False)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    missing = untrained(checkpointer)
    if missing and not cfg.BALANCE.UNTRAINED:
        what = f"'{cfg.MODEL.WEIGHTS}' lacks" if cfg.MODEL.WEIGHTS else "is empty and lacks"
        raise InputError(
            f"MODEL.WEIGHTS: {what} {len(missing)} of the model's weights, the first is "
            f"'{missing[0]}', which would be evaluated as they start: give the checkpoint of a "
            "training, or set BALANCE.UNTRAINED."
        )


def untrained(checkpointer: Checkpointer) -> list[str]:
    """Return the parameters and counted thresholds that the last load left as they start."""
    model = checkpointer.model
    names = {name for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        if isinstance(module, ScoreThreshold):
            names.update(f"{prefix}.{name}" for name, _ in module.named_buffers())
    return [name for name in checkpointer.untouched if name in names]


def saved_checkpoints(folder: str) -> list[str]:
    """Return the paths of a run's checkpoints, the last first: the tagged one, then by age."""
    try:
        names = [n for n in os.listdir(folder) if n.startswith("model_") and n.endswith(".pth")]
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names if not name.startswith(BEST)]
    paths.sort(key=lambda path: (os.path.getmtime(path), path), reverse=True)
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as file:
            last = os.path.join(folder, os.path.basename(file.read().strip()))
    except (OSError, ValueError):
        return paths
    return [last, *(p for p in paths if p != last)] if os.path.isfile(last) else paths


def damage(path: str) -> str | None:
    """Return what is wrong with a file that should be a checkpoint, or None."""
    if not os.path.isfile(path):
        return "it is no file"
    if os.path.getsize(path) == 0:
        return "it is empty"
    if not path.endswith(".pth") or not zipfile.is_zipfile(path):
        if path.endswith(".pth") and not _is_legacy_checkpoint(path):
            return "it is cut off or no checkpoint of torch"
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch itself compares no checksums
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        return str(error)
    return None if wrong is None else f"the checksum of '{wrong}' is wrong"


def check_finite(model: nn.Module, consequence: str) -> None:
    """Raise NonFiniteError, which names it, if a weight is not finite or a buffer holds NaN."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"The weight '{name}' is not finite, so {consequence}.")
    statistics = set(statistics_names(model))
    for name, buffer in model.named_buffers():
        # Statistics may be NaN while they are unknown.
        if name not in statistics and buffer.is_floating_point() and buffer.isnan().any():
            raise NonFiniteError(f"The buffer '{name}' holds NaN, so {consequence}.")


def write_whole(path: str, write: Callable[[Any], object]) -> None:
    """Let ``write(file)`` write ``path``; a kill or a full disk leaves the old file, or none."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    # The new name itself is on the disk once its folder is.
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_local(path: str) -> bool:
    """Return whether ``MODEL.WEIGHTS`` names a file of this machine."""
    return urlparse(path).scheme in ("", "file")


class _UnplainPickleError(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    """Makes arrays, containers, texts and numbers, and calls nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _PLAIN_GLOBALS:
            raise _UnplainPickleError(f"{module}.{name}")
        return super().find_class(module, name)


def _is_legacy_checkpoint(path):
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"  # torch before 1.6 wrote a pickle


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
