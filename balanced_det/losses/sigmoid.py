"""The family of losses over independent sigmoids: K of them, or K + 1 with background."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..ops import sigmoid_loss
from ..priors import prior_bias
from ..rows import foreground
from .base import ClassificationLoss, add, upcast

# The pass makes the gradient of float16 logits in float16, whose least number is 6e-8, before the
# gradient scaler of automatic mixed precision has multiplied the loss. A gradient of 1e-3 divided
# by 100,000 rows would be 0 there. So the pass multiplies by this number instead of dividing by the
# normalizer, and both are made good by one factor of the loss, which backward brings together with
# the scaler's. A power of two changes no digit.
_FLOAT16_SCALE = 2.0**12


class SigmoidLoss(ClassificationLoss):
    """A loss of K independent sigmoids: one pass of :func:`balanced_det.ops.sigmoid_loss` a level.

    A subclass says which weights make it (:meth:`pass_options`); logits are read where they lie,
    never concatenated.
    """

    scores_rise_with_logits: ClassVar[bool] = True
    neutral: ClassVar[dict | None] = {}

    def __init__(self, num_classes: int):
        super().__init__(num_classes, num_logits=num_classes)

    def pass_options(self, levels: list[tuple[Tensor, Tensor]]) -> dict:
        """Return the keyword arguments of ``sigmoid_loss`` that make the method."""
        return {}

    def level_options(self, levels: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
        """Return :meth:`pass_options` for each level, with the class weights where there are any.

        A subclass overrides it where levels differ; those here share one dictionary.
        """
        options = dict(self.pass_options(levels))
        if self.class_weight is not None:
            self._add_class_weight(options, self.class_weight)
        return [options] * len(levels)

    def after_pass(self, gradient_sums: Tensor, scale: float | Tensor) -> None:
        """Take what a training step's pass has summed, where the options ask for gradient sums.

        Args:
            gradient_sums: (2, C) float64, of this worker: the sum over rows of |dL/dx| of every
                channel where y = 1, and where y = 0, before ``scale``.
            scale: what the loss is multiplied by.
        """

    def scaled_sum(
        self, levels: list[tuple[Tensor, Tensor]], scale: float | Tensor, overwrite_logits: bool
    ) -> Tensor:
        """Return ``scale`` times the loss summed over rows and channels."""
        options = self.level_options(levels)
        is_float16 = any(x.dtype == torch.float16 for x, _ in levels)
        common: dict[str, Any] = {
            "overwrite_logits": overwrite_logits,
            "scale": self._float16_scale() if is_float16 else scale,
        }
        # A loss a level, or a loss and its gradient sums.
        results: list[Any] = [
            sigmoid_loss(x, y, **of_level, **common)
            for (x, y), of_level in zip(levels, options, strict=True)
        ]
        if options[0].get("gradient_sums", False):
            results, sums = map(list, zip(*results))
            if self.training:
                self.after_pass(add(sums), scale)
        total = add(results)
        return (total * (scale / common["scale"])).to(total.dtype) if is_float16 else total

    def _add_class_weight(self, options: dict[str, Any], class_weight: Tensor) -> None:
        # Channels beyond the classes, such as one of background, keep weight 1.
        weight = F.pad(class_weight, (0, self.num_logits - self.num_classes), value=1.0)
        given = options.get("positive_weight")
        options["positive_weight"] = weight if given is None else weight * given

    def _float16_scale(self) -> float | Tensor:
        if self.class_weight is None:
            return _FLOAT16_SCALE
        # A weight may be as large as K, and the gradient has to stay below 65,504.
        return _FLOAT16_SCALE / self.class_weight.max().clamp(min=1)

    @torch.no_grad()
    def row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross entropy of each row summed over its channels; see the base."""
        # -log(1 - p) for every channel; for the true one -log(p), which is smaller by the logit.
        x = upcast(logits)
        true_channel = labels.clamp(0, self.num_logits - 1).long().unsqueeze(-1)
        has_channel = foreground(labels, self.num_logits)
        losses = F.softplus(x).sum(dim=-1)
        losses = losses - x.gather(-1, true_channel).squeeze(-1).where(has_channel, 0.0)
        return losses.where(labels >= 0, 0.0)

    def scores(self, logits: Tensor) -> Tensor:
        """Return sigmoid(logits), (*, K) -> (*, K)."""
        return upcast(logits).sigmoid()

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class of the highest logit, or background where none is at least 0."""
        value, index = logits.max(dim=-1)
        return index.where(value >= 0, self.num_classes)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K,) bias whose sigmoid is ``prior_prob``; zeros for None."""
        bias = 0.0 if prior_prob is None else prior_bias(prior_prob)
        return torch.full((self.num_logits,), bias)


class SigmoidWithBackgroundLoss(SigmoidLoss):
    """A loss of K + 1 independent sigmoids, the last of which says background.

    Its target is 1 on background rows: for the pass it is one class more, and every row that takes
    part has a class. An object class scores sigmoid(z_j) (1 - sigmoid(z_background)).
    """

    scores_rise_with_logits: ClassVar[bool] = False

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.num_logits = num_classes + 1

    def scores(self, logits: Tensor) -> Tensor:
        """Return sigmoid(z_j) sigmoid(-z_background), (*, K + 1) -> (*, K)."""
        logits = upcast(logits)
        return logits[..., :-1].sigmoid() * (-logits[..., -1:]).sigmoid()

    def predicted_class(self, logits: Tensor) -> Tensor:
        """Return the class of the highest score, or K where background's sigmoid is higher."""
        background = upcast(logits[..., -1:]).sigmoid()
        return torch.cat([self.scores(logits), background], dim=-1).argmax(dim=-1)

    def initial_bias(self, prior_prob: float | None = None) -> Tensor:
        """Return the (K + 1,) bias that scores each class ``prior_prob``; zeros for None.

        Background starts undecided, at one half, so a class starts at twice ``prior_prob``.
        """
        bias = torch.zeros(self.num_logits)
        if prior_prob is not None:
            if not 0 < prior_prob < 0.5:
                raise InputError(
                    f"{type(self).__name__} cannot start a class at probability {prior_prob}: "
                    "beside a background of one half it must lie between 0 and one half."
                )
            bias[:-1] = prior_bias(2 * prior_prob)
        return bias
