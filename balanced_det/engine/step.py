"""One training step: forward, backward and update, of which nothing happens when a number is bad.

Detectron2's two step classes in one, with what they lack: bfloat16, gradient accumulation, random
numbers that depend on the iteration alone, and a look at every loss and gradient before anything is
kept of it.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..distributed import num_workers, sum_over_workers
from ..errors import InputError, NonFiniteError, printable
from ..seeds import derived_seed, seed_generators

logger = logging.getLogger(__name__)

# The stream of random numbers of the steps; those of the images are in balanced_det.data.loader.
_STEP_STREAM = 3
_AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer``, with every number looked at.

    A step in which a loss, a gradient or a weight is not finite changes nothing: neither weights
    nor optimizer, nor any buffer of the model, in which statistics are kept. It raises, or, up to a
    limit, is skipped.

    Args:
        model, data_loader, optimizer: as in Detectron2.
        seed: of the run. The generators are seeded by (seed, worker, iteration) before each step.
        dtype: None for float32, or what autocast computes in. float16 scales its gradients; their
            overflow is a skipped step of the scaler, as ever, and no error.
        accumulate: batches a step; its gradient is their mean.
        max_skipped, max_skipped_images: how many steps of a run may be skipped, and how many broken
            images replaced, on all workers together.

    Attributes:
        skipped_steps, skipped_images: how many were, in the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
        max_skipped: int = 0,
        max_skipped_images: int = 0,
    ):
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.dtype = dtype
        self.accumulate = accumulate
        self.max_skipped = max_skipped
        self.max_skipped_images = max_skipped_images
        self.skipped_steps = self.skipped_images = 0
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=dtype == torch.float16 and self.device_type != "cpu"
        )
        self._buffers = list(model.buffers())
        self._saved_buffers = [torch.empty_like(b) for b in self._buffers]

    def run_step(self) -> None:
        """Train on the next ``accumulate`` batches."""
        assert self.model.training, "the model was switched to evaluation"
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.accumulate)]
        data_time = time.perf_counter() - start
        broken = [
            f"Iteration {self.iter}: {reason}"
            for batch in batches
            for image in batch
            for reason in image.get("skipped_images", ())
        ]

        # After the data, whose loader may draw from the generators of this process.
        seed_generators(derived_seed(self.seed, _STEP_STREAM, comm.get_rank(), self.iter))
        self._copy_buffers(self._saved_buffers, self._buffers)
        self.optimizer.zero_grad()
        try:
            losses = self._backward(batches)
        except FloatingPointError as error:
            # Region proposals are looked at in the middle of the forward pass.
            if num_workers() == 1:
                self._count_skipped_images(broken, len(broken))
            self._refuse({}, batches, str(error).rstrip("."))
            return
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        # The scaler itself skips a step whose gradients overflow, and lowers its factor.
        may_overflow = self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1
        is_bad, num_broken = self._look(losses, len(broken), check_gradients=not may_overflow)
        self._count_skipped_images(broken, num_broken)
        if is_bad:
            self._refuse(losses, batches)
            self.grad_scaler.update()  # without it, the next step could not be unscaled
            return
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batches: list[list[dict]]) -> dict[str, torch.Tensor]:
        """Add the gradients of all batches; return the mean of each loss."""
        means: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # Gradients of several workers are averaged once, with the last batch.
            local = number < len(batches) and hasattr(self.model, "no_sync")
            with self.model.no_sync() if local else contextlib.nullcontext():
                with torch.autocast(
                    self.device_type, dtype=self.dtype, enabled=self.dtype is not None
                ):
                    losses = self.model(batch)
                if isinstance(losses, torch.Tensor):
                    losses = {"total_loss": losses}
                total = sum(losses.values()) / len(batches)
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                share = loss.detach() / len(batches)
                means[name] = means[name] + share if name in means else share
        return means

    # --- Bad numbers ------------------------------------------------------------------------------

    def _copy_buffers(self, target: list[torch.Tensor], source: list[torch.Tensor]):
        if source:  # a model may have none
            # Two launches on a device, however many buffers there are.
            torch._foreach_copy_(target, source)

    def _look(
        self, losses: Mapping[str, torch.Tensor], num_broken: int, check_gradients: bool
    ) -> tuple[bool, int]:
        """Ask all workers what they saw; waits for the device, once.

        Args:
            losses: of this worker.
            num_broken: images of its batches that others took the place of.
            check_gradients: look at the gradients, too.

        Returns:
            Whether a loss or gradient is not finite, and how many images were broken, on any.
        """
        numbers = list(losses.values())
        if check_gradients:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            numbers += _largest(gradients)
        bad = ~torch.stack([n.float() for n in numbers]).isfinite().all()
        seen = torch.stack([bad.float(), torch.full_like(bad, num_broken, dtype=torch.float32)])
        num_bad, num_broken = sum_over_workers(seen).tolist()
        return num_bad > 0, round(num_broken)

    def _refuse(
        self, losses: Mapping[str, torch.Tensor], batches: list[list[dict]], reason: str = ""
    ):
        """Undo the step; raise, unless it may be skipped.

        Args:
            losses: of the step; none where it did not come to an end, for ``reason``.
            batches: of the step.
            reason: what ended the step, on this worker alone.
        """
        weights, others = self._culprits(losses)
        if reason and not weights:
            others = [reason]
        found = [f"{'; '.join([*weights, *others])} ({_image_names(batches)})"]
        # Other workers wait for this one's gradients, so it cannot ask what they found, nor skip.
        alone = bool(reason) and num_workers() > 1
        if num_workers() > 1 and not alone:
            found = [
                text for text in comm.all_gather(found[0] if weights or others else "") if text
            ]
        self._copy_buffers(self._buffers, self._saved_buffers)
        self.optimizer.zero_grad()
        self.skipped_steps += 1
        message = f"Iteration {self.iter}: not finite: {'; '.join(found)}"
        never = bool(weights) or alone
        if never or self.skipped_steps > self.max_skipped:
            skip = "" if never else ", or let BALANCE.SKIP_BAD_STEPS steps be skipped"
            raise NonFiniteError(
                f"{message}; nothing of this step was kept. Try a smaller SOLVER.BASE_LR or "
                f"SOLVER.CLIP_GRADIENTS{skip}."
            )
        logger.warning(
            "%s; skipped, %d of the %d steps that BALANCE.SKIP_BAD_STEPS allows.",
            printable(message),
            self.skipped_steps,
            self.max_skipped,
        )

    def _culprits(self, losses: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
        """Name what is not finite on this worker: weights, and losses or else gradients."""
        named = [*self.model.named_parameters()]
        weights = _first([f"weight {name}" for name, p in named if not p.isfinite().all()])
        others = [
            f"{name} is {loss.item()}" for name, loss in losses.items() if not loss.isfinite()
        ]
        if not others and not weights:
            others = _first(
                [
                    f"gradient of {name}"
                    for name, p in named
                    if p.grad is not None and not p.grad.isfinite().all()
                ]
            )
        return weights, others

    def _count_skipped_images(self, reasons: list[str], number: int):
        """Count the broken images of a step, and say which they are; raise beyond the limit.

        Args:
            reasons: why each of this worker's images cannot be used.
            number: how many there are on all workers.
        """
        if not number:
            return
        self.skipped_images += number
        if self.skipped_images > self.max_skipped_images:
            # All workers come here together, since all know the number.
            reasons = [reason for part in comm.all_gather(reasons) for reason in part]
            raise InputError(
                f"{'; '.join(reasons[:3])}; BALANCE.SKIP_BROKEN_IMAGES allows "
                f"{self.max_skipped_images} of it, and these make {self.skipped_images}."
            )
        for reason in reasons:
            logger.warning(
                "%s; another image takes its place, %d of the %d that BALANCE.SKIP_BROKEN_IMAGES "
                "allows.",
                reason,
                self.skipped_images,
                self.max_skipped_images,
            )

    # --- Restart ----------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Return what a later run needs to go on as if this one had."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        names = ("seed", "skipped_steps", "skipped_images")
        return {**state, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on after the iteration that ``state_dict`` is of."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.seed = state_dict.get("seed", self.seed)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self.skipped_images = state_dict.get("skipped_images", 0)
        self.data_loader.seed = self.seed
        self.data_loader.start = (self.iter + 1) * self.accumulate


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Return what ``SOLVER.AMP`` and ``BALANCE.AMP_DTYPE`` ask autocast to compute in, or None.

    Raises:
        InputError: an unknown type, or float16 on CPU, which has no gradient scaling.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.BALANCE.AMP_DTYPE
    if name not in _AMP_DTYPES:
        raise InputError(f"BALANCE.AMP_DTYPE is {name!r}; known are: {', '.join(_AMP_DTYPES)}.")
    if name == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise InputError(
            "SOLVER.AMP.ENABLED with float16 needs a GPU: set BALANCE.AMP_DTYPE to 'bfloat16', or "
            "SOLVER.AMP.ENABLED to False."
        )
    return _AMP_DTYPES[name]


def _largest(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return scalars that are finite where all elements of the tensors are.

    They are the largest elements, not sums of squares, which may overflow where nothing is bad.
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if tensors and tensors[0].device.type == "cpu":
        # There the norm takes fifteen times as long.
        return [scalar for tensor in tensors for scalar in torch.aminmax(tensor)]
    return list(torch._foreach_norm(tensors, float("inf"))) if tensors else []


def _first(names: list[str], count: int = 3) -> list[str]:
    rest = len(names) - count
    return names if rest <= 0 else [*names[:count], f"{rest} more"]


def _image_names(batches: list[list[dict]]) -> str:
    names = [
        f"{image.get('image_id', '?')} '{image.get('file_name', '')}'"
        for batch in batches
        for image in batch
    ]
    return f"images {', '.join(names)}"
