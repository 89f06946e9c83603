"""The figure of the GHM paper (arXiv 1811.05181, Fig. 1) for one's own training.

Left, how many elements of the latest batch have which gradient length; right, how much gradient
each bin of lengths contributes, before and after harmonizing. matplotlib, of the extra "report",
is needed only here, and only when ``BALANCE.GRADIENT_FIGURE_PERIOD`` asks for the figures.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from detectron2.engine import HookBase
from torch import nn

from .errors import InputError
from .losses import GradientDensity

if TYPE_CHECKING:  # nobody else needs it, see above
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Two colours of Okabe and Ito's palette, which colour-blind people tell apart; one is also filled
# and the other a line, for those who see or print none.
_BLUE, _ORANGE = "#56B4E9", "#D55E00"


class PlotGradients(HookBase):
    """Draw every GHM loss of the model, to ``gradients/`` in the output folder and to TensorBoard.

    For the main process alone. Each drawing waits for the device.

    Args:
        period: iterations between two drawings.
        output_dir: the run's folder.

    Raises:
        InputError: for a period below 1, or without matplotlib.
    """

    def __init__(self, period: int, output_dir: str):
        if period < 1:
            raise InputError(f"BALANCE.GRADIENT_FIGURE_PERIOD must be at least 1, not {period}.")
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "BALANCE.GRADIENT_FIGURE_PERIOD needs matplotlib, which is not installed: "
                "pip install matplotlib, or set it to None."
            )
        self.period = period
        self.folder = os.path.join(output_dir, "gradients")

    def before_train(self) -> None:
        """Say so when there is nothing to draw."""
        if not any(gradient_densities(self.trainer.model)):
            logger.warning(
                "BALANCE.GRADIENT_FIGURE_PERIOD is %d, but no loss of the model is a GHM loss: "
                "there is nothing to draw.",
                self.period,
            )

    def after_step(self) -> None:
        """Draw when the period is over. A loss that has seen no foreground row yet is left out."""
        iteration = self.trainer.iter
        if (iteration + 1) % self.period:
            return
        for name, method, density in gradient_densities(self.trainer.model):
            if not density.counts.any():
                continue
            os.makedirs(self.folder, exist_ok=True)
            figure = draw_gradients(density, f"{method} ({name}), iteration {iteration:,}")
            figure.savefig(os.path.join(self.folder, f"{name}_{iteration:07d}.png"))
            self.trainer.storage.put_image(f"gradients/{name}", _pixels(figure))


def gradient_densities(model: nn.Module) -> Iterator[tuple[str, str, GradientDensity]]:
    """Yield (name, class, density) of every loss of ``model`` that harmonizes gradients.

    The name is that of the module without "criterion": "proposal_generator.box_losses.0"; it starts
    with "dense" where the criterion is the model's own.
    """
    for name, module in model.named_modules():
        density = getattr(module, "gradient_density", None)
        if isinstance(density, GradientDensity):
            owner, _, slot = name.removeprefix("module.").rpartition("criterion.")
            yield f"{owner or 'dense.'}{slot}", type(module).__name__, density


def draw_gradients(density: GradientDensity, title: str) -> "Figure":
    """Return the matplotlib figure of a :class:`~balanced_det.losses.GradientDensity`.

    Totals count every element of a bin with the length at its centre, so that of the first bin,
    where most lengths are nearly 0, is too large before and after.

    Args:
        density: one that has seen a batch with foreground.
        title: what stands above both panels.
    """
    # The figure is its own canvas: pyplot would keep it and might look for a screen.
    from matplotlib.figure import Figure

    edges = np.linspace(0, 1, density.bins + 1)
    before, after = (total.cpu().numpy() for total in density.gradient_totals())
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2)

    bars = {"fill": True, "color": _BLUE}
    line = {"color": _ORANGE, "linewidth": 1.5, "baseline": None}
    left.stairs(density.counts.cpu(), edges, label="latest batch", **bars)
    left.stairs(density.density.cpu(), edges, label="moving average", **line)
    left.set_ylabel("elements in bin")
    right.stairs(before, edges, label="before (plain mean)", **bars)
    right.stairs(after, edges, label="after harmonizing", **line)
    right.set_ylabel("gradient in bin: sum of weight × g")
    for axes in (left, right):
        axes.set(xlabel="gradient length g", xlim=(0, 1), yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        # Above the bars: where they leave room changes during training.
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    left.set_ylim(bottom=0.5)  # a bin of one element still shows
    return figure


def _pixels(figure):
    """Return the drawn figure as (3, height, width) uint8, as TensorBoard takes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy()
