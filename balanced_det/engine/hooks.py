"""What happens before and after every step of a training, beside Detectron2's own hooks."""

import torch
from detectron2.engine import HookBase, hooks

from ..criterion import criteria
from .checkpoint import statistics_names


class KeepFrozenStatistics(HookBase):
    """Keep the running statistics of frozen batch normalization as they are, and train with them.

    Without gradients alone, they would still follow the batches of the training.
    """

    def before_step(self) -> None:
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

    def __init__(self, period: int = 20):
        self.period = period

    def after_step(self) -> None:
        """Log when the period is over."""
        if (self.trainer.iter + 1) % self.period and self.trainer.iter + 1 < self.trainer.max_iter:
            return
        for name, criterion in criteria(self.trainer.model):
            for key, value in criterion.monitored.items():
                self.trainer.storage.put_scalar(f"{name}/{key}", value.item())


class RestartablePreciseBN(hooks.PreciseBN):
    """Detectron2's ``PreciseBN``, each time on the first images of its loader.

    Detectron2 goes on where it stopped the time before, which a resumed run does not know; and the
    losses count what they see in it, though nothing is trained on that.
    """

    def update_stats(self) -> None:
        """Update the statistics of batch normalization, and no others; see Detectron2."""
        self._data_iter = None
        self._data_loader.seed = self.trainer._trainer.seed
        buffers = self._model.state_dict()
        counted = [buffers[name] for name in statistics_names(self._model)]
        before = [buffer.clone() for buffer in counted]
        super().update_stats()
        for buffer, value in zip(counted, before, strict=True):
            buffer.copy_(value)
