"""Numbers counted in the training data that a loss keeps with the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


class ClassStatistic(nn.Module):
    """One number a class, saved with the model, and the tables that a loss derives from it.

    A subclass names the statistic (:attr:`name`), says which values it can have (:meth:`check`)
    and derives its tables (:meth:`derive`), when the values are given and after each load.

    Args:
        num_classes: K.
        values: (K,), or None for a model that is built to load a checkpoint, which brings them.

    Attributes:
        values: (K,) buffer called by :attr:`name`; NaN while unknown.

    Raises:
        InputError: for values of another length than K, or that :meth:`check` refuses.
    """

    name = "class_counts"
    meaning = "how many training images hold each class"

    def __init__(self, num_classes: int, values: Sequence[float] | Tensor | None):
        super().__init__()
        self.register_buffer(self.name, torch.full((num_classes,), torch.nan))
        self._known = False
        self.register_load_state_dict_post_hook(ClassStatistic._after_load)
        if values is None:
            return
        given = torch.as_tensor(values, dtype=torch.float32)
        if given.shape != (num_classes,):
            raise InputError(
                f"{self.name} has shape {tuple(given.shape)}, but there are {num_classes} classes."
            )
        self.check(given)
        self.values.copy_(given)

    @property
    def values(self) -> Tensor:
        """The (K,) statistic."""
        return getattr(self, self.name)

    def check(self, values: Tensor) -> None:
        """Raise an InputError for values that cannot be; here for other than counts."""
        if not (values.isfinite() & (values >= 0)).all():
            raise InputError(f"{self.name} must be finite numbers of at least 0.")

    def derive(self) -> None:
        """Fill the tables that depend on the values, which are known."""

    def derive_if_known(self) -> None:
        """Call :meth:`derive` unless the values are unknown; a subclass's last line of building."""
        # A host read is free of harm here: neither building nor loading is training.
        if not self.values.isnan().any():
            self.derive()
            self._known = True

    def check_known(self) -> None:
        """Raise an InputError while the values are unknown."""
        if not self._known:
            raise InputError(
                f"{self.name} is unknown: give {self.meaning}, or load a checkpoint that has it."
            )

    @staticmethod
    def _after_load(module: "ClassStatistic", incompatible_keys: Any) -> None:
        module.derive_if_known()
