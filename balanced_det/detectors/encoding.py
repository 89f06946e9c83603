"""Box encoding that does not wait for the device."""

from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


class WaitlessTransform:
    """Detectron2's transform of a detector, without the check with which it waits for the device.

    ``Box2BoxTransform.get_deltas`` asserts on the host that every source has a width. Anchors have
    one, and so do the proposals that are foreground, since they overlap an object by half.

    Args:
        transform: a ``Box2BoxTransform``, or another of Detectron2's, which is called as it is.
    """

    def __init__(self, transform: Any):
        self.transform = transform

    def get_deltas(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Return the deltas (F, 4) from boxes (F, 4) to others, as the transform encodes them."""
        if type(self.transform) is not Box2BoxTransform:
            return self.transform.get_deltas(sources, targets)
        sizes = sources[:, 2:] - sources[:, :2]  # (F, 2): widths and heights
        target_sizes = targets[:, 2:] - targets[:, :2]
        shift = targets[:, :2] + 0.5 * target_sizes - (sources[:, :2] + 0.5 * sizes)
        (x, y), (w, h), (tw, th) = (t.unbind(1) for t in (shift, sizes, target_sizes))
        wx, wy, ww, wh = self.transform.weights
        deltas = [wx * x / w, wy * y / h, ww * torch.log(tw / w), wh * torch.log(th / h)]
        return torch.stack(deltas, dim=1)

    def apply_deltas(self, deltas: Tensor, sources: Tensor) -> Tensor:
        """Return the boxes (F, 4) that deltas (F, 4) make of others."""
        return self.transform.apply_deltas(deltas, sources)
