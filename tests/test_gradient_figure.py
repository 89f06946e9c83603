"""What a GHM training needs around its losses: its figures, full-model clipping, a warning."""

import importlib.util
import logging
import sys
from types import SimpleNamespace

import matplotlib.image
import models
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balanced_det.build import build_criterion
from balanced_det.config import check_values
from balanced_det.engine import Trainer
from balanced_det.errors import InputError
from balanced_det.gradient_figure import PlotGradients, draw_gradients
from balanced_det.losses import GradientDensity


class RandomImagesTrainer(Trainer):
    """The trainer on random images; the first iteration has none with an object."""

    @classmethod
    def build_train_loader(cls, cfg):
        first = models.batch(num_objects=(0,))
        return [first, *(models.batch(seed=seed) for seed in range(1, cfg.SOLVER.MAX_ITER))]


def train(out, *choices, iterations=4, period=2):
    cfg = models.config(
        *choices,
        {
            "BALANCE.GRADIENT_FIGURE_PERIOD": period,
            "DATASETS.TRAIN": (),
            "DATASETS.TEST": (),
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.STEPS": (),
            "OUTPUT_DIR": str(out),
        },
    )
    torch.manual_seed(0)
    RandomImagesTrainer(cfg).train()


def drawn(out):
    return sorted(path.name for path in (out / "gradients").glob("*"))


def test_every_ghm_loss_is_drawn_every_period(tmp_path):
    ghm = {
        "BALANCE.RPN.CLASSIFICATION_LOSS": "GHMClassificationLoss",
        "BALANCE.RPN.BOX_LOSS": "GHMRegressionLoss",
        "BALANCE.RPN.SAMPLER": "AllSampler",
        "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "SoftmaxGHMLoss",
        "BALANCE.ROI_HEADS.SAMPLER": "AllSampler",
    }
    train(tmp_path, models.FASTER, ghm)
    names = [
        "proposal_generator.box_losses.0",
        "proposal_generator.classification_loss",
        "roi_heads.box_predictor.classification_loss",
    ]
    assert drawn(tmp_path) == [f"{name}_{step:07d}.png" for name in names for step in (1, 3)]

    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for name in names:
        images = events.Images(f"gradients/{name}")
        assert [image.step for image in images] == [1, 3]
        height, width, _ = matplotlib.image.imread(
            tmp_path / "gradients" / f"{name}_0000001.png"
        ).shape
        assert (images[0].height, images[0].width) == (height, width)


def test_loss_without_foreground_so_far_is_not_drawn(tmp_path):
    ghm = {"BALANCE.DENSE.CLASSIFICATION_LOSS": "GHMClassificationLoss"}
    train(tmp_path, models.RETINANET, ghm, iterations=2, period=1)
    assert drawn(tmp_path) == ["dense.classification_loss_0000001.png"]


def test_nothing_is_drawn_by_default(tmp_path):
    assert models.config().BALANCE.GRADIENT_FIGURE_PERIOD is None
    ghm = {"BALANCE.DENSE.CLASSIFICATION_LOSS": "GHMClassificationLoss"}
    train(tmp_path, models.RETINANET, ghm, iterations=2, period=None)
    assert not (tmp_path / "gradients").exists()


def test_figure_shows_counts_average_and_totals():
    density = GradientDensity(bins=3, momentum=0.5, bias_correction=True)
    for counts in ([40, 0, 4], [80, 3, 1]):
        density.weights(torch.tensor(counts), torch.tensor(1))
    left, right = draw_gradients(density, "title").axes
    before, after = density.gradient_totals()
    for axes, bars, line in ((left, density.counts, density.density), (right, before, after)):
        shown = [patch.get_data() for patch in axes.patches]
        assert [data.values.tolist() for data in shown] == [bars.tolist(), line.tolist()]
        for data in shown:
            assert data.edges.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert axes.get_yscale() == "log"
    assert left.figure.get_suptitle() == "title"


def test_figures_without_a_ghm_loss_are_a_warning(tmp_path, caplog):
    hook = PlotGradients(1, str(tmp_path))
    hook.trainer = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with caplog.at_level(logging.WARNING):
        hook.before_train()
    assert "no loss of the model is a GHM loss" in caplog.text


def test_figures_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="GRADIENT_FIGURE_PERIOD must be at least 1"):
        PlotGradients(-1, str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    with pytest.raises(InputError, match="matplotlib"):
        PlotGradients(1, str(tmp_path))


def test_the_hook_is_imported_where_there_is_no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    spec = importlib.util.find_spec("balanced_det.gradient_figure")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PlotGradients is not PlotGradients  # it ran anew


def clipped_step(clip_type, gradient_norm, scaler=None, clip_value=0.5):
    """Return (gradients, changes) of two parameters after one step of SGD at learning rate 1."""
    model = torch.nn.Linear(3, 2)
    cfg = models.config(
        {
            "SOLVER.BASE_LR": 1.0,
            "SOLVER.MOMENTUM": 0.0,
            "SOLVER.WEIGHT_DECAY": 0.0,
            "SOLVER.CLIP_GRADIENTS.ENABLED": True,
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": clip_type,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": clip_value,
        }
    )
    optimizer = Trainer.build_optimizer(cfg, model)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    gradients = [g * gradient_norm / norm for g in gradients]
    before = [p.detach().clone() for p in model.parameters()]
    loss = sum((p * g).sum() for p, g in zip(model.parameters(), gradients))
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    return gradients, [old - p.detach() for old, p in zip(before, model.parameters())]


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("gradient_norm, factor", [(2.0, 0.25), (0.4, 1.0)])
def test_full_model_clipping_bounds_the_norm_of_all_gradients(
    gradient_norm, factor, mixed_precision
):
    # As in mixed precision: gradients are 1024 times too large until the scaler's own step.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if mixed_precision else None
    gradients, changes = clipped_step("full_model", gradient_norm, scaler)
    for gradient, change in zip(gradients, changes):
        # Float32 rounding of parameters around 0.5, and the 1e-6 that torch adds to the norm.
        torch.testing.assert_close(change, factor * gradient, rtol=3e-6, atol=1e-7)


def test_detectron2s_clipping_is_as_it_was():
    gradients, changes = clipped_step("norm", 2.0)
    for gradient, change in zip(gradients, changes):
        expected = gradient * min(1.0, 0.5 / gradient.norm().item())
        # As above.
        torch.testing.assert_close(change, expected, rtol=3e-6, atol=1e-7)


def test_unknown_clipping_is_refused():
    cfg = models.config({"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "model"})
    with pytest.raises(InputError, match="CLIP_TYPE is 'model'; known are: .*full_model"):
        check_values(cfg)


@pytest.mark.parametrize("loss", ["GHMClassificationLoss", "SoftmaxGHMLoss"])
@pytest.mark.parametrize("sampler", ["RandomSampler", "IoUBalancedSampler", "AllSampler"])
def test_ghm_on_sampled_rows_of_a_region_head_is_one_warning(loss, sampler, caplog):
    cfg = models.config(
        {"BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": loss, "BALANCE.ROI_HEADS.SAMPLER": sampler}
    )
    with caplog.at_level(logging.WARNING):
        build_criterion(cfg, "ROI_HEADS", models.NUM_CLASSES)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (sampler != "AllSampler")
    if messages:
        assert f"'{loss}' is known not to work" in messages[0]
        assert f"SAMPLER, which is '{sampler}', to 'AllSampler'" in messages[0]


def test_ghm_elsewhere_is_no_warning(caplog):
    cfg = models.config(
        {
            "BALANCE.DENSE.CLASSIFICATION_LOSS": "GHMClassificationLoss",
            "BALANCE.RPN.CLASSIFICATION_LOSS": "GHMClassificationLoss",
            "BALANCE.ROI_HEADS.BOX_LOSS": "GHMRegressionLoss",
        }
    )
    with caplog.at_level(logging.WARNING):
        for part in ("DENSE", "RPN", "ROI_HEADS"):
            build_criterion(cfg, part, 1)
    assert not caplog.records
