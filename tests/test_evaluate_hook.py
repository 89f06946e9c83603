"""What a training does with its evaluations, and what it logs of its gradients."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from models import RETINANET, batch, config
from runs import make_data, run_config, train
from torch import nn

from balanced_det.criterion import Criterion
from balanced_det.engine import Trainer, check_run, remove_checkpoints
from balanced_det.engine.checkpoint import statistics_names
from balanced_det.engine.evaluate import metric_value
from balanced_det.engine.gradient_share import LogGradientShare
from balanced_det.engine.step import TrainStep
from balanced_det.errors import InputError
from balanced_det.losses import CLASSIFICATION_LOSSES
from balanced_det.losses.box.smooth_l1 import SmoothL1Loss


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def scripted(*values):
    """Return a trainer whose evaluations give these values of AP, one after the other."""
    rest = list(values)

    class Scripted(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": rest.pop(0), "APr": math.nan}}

    return Scripted


def keys(**more):
    return {
        "TEST__EVAL_PERIOD": 1,
        "SOLVER__CHECKPOINT_PERIOD": 1,
        "SOLVER__MAX_ITER": 4,
        "BALANCE__BEST_METRIC": "AP",
        **more,
    }


def last(folder):
    return (folder / "last_checkpoint").read_text()


# --- The best checkpoint --------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_never_taken_for_the_last(data, tmp_path):
    out = train(run_config(data, tmp_path / "out", **keys()), scripted(10.0, 30.0, 20.0, 30.0))
    best, second = (torch.load(out / f"{name}.pth") for name in ("model_best", "model_0000001"))
    assert (best["metric"], best["value"], best["iteration"]) == ("AP", 30.0, 1)
    assert best["classes"] == second["classes"] and best["config"] == second["config"]
    assert best["model"].keys() == second["model"].keys()
    assert all(torch.equal(best["model"][name], x) for name, x in second["model"].items())
    assert "optimizer" not in best
    assert last(out) == "model_final.pth"


def test_a_resumed_run_knows_the_best_of_before(data, tmp_path):
    out = tmp_path / "out"
    train(run_config(data, out, **keys(SOLVER__MAX_ITER=2)), scripted(10.0, 30.0))
    train(run_config(data, out, **keys()), scripted(20.0, 25.0), resume=True)
    assert torch.load(out / "model_best.pth")["iteration"] == 1
    longer = keys(SOLVER__MAX_ITER=5)
    train(run_config(data, out, **longer), scripted(31.0), resume=True)
    assert torch.load(out / "model_best.pth")["iteration"] == 4


def test_a_training_that_gets_no_better_ends_whole(data, tmp_path, caplog):
    cfg = run_config(data, tmp_path / "out", **keys(SOLVER__MAX_ITER=9, BALANCE__STOP_AFTER=2))
    trainer = scripted(10.0, 30.0, 20.0, 30.0, 99.0)(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results == {"bbox": {"AP": 30.0, "APr": pytest.approx(math.nan, nan_ok=True)}}
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == 3
    assert last(tmp_path / "out") == "model_final.pth"
    assert torch.load(tmp_path / "out" / "model_best.pth")["iteration"] == 1
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 3
    assert "Exception during training" not in caplog.text


def test_a_metric_without_a_value_keeps_nothing_and_is_told(data, tmp_path, caplog):
    cfg = run_config(data, tmp_path / "out", **keys(BALANCE__BEST_METRIC="APr"))
    train(cfg, scripted(1.0, 2.0, 3.0, 4.0))
    assert "'APr' has no value here; known are: bbox/AP" in caplog.text
    assert not (tmp_path / "out" / "model_best.pth").exists()


def test_operating_points_belong_to_the_weights_that_they_were_measured_on(data, tmp_path):
    cfg = run_config(data, tmp_path / "out", **keys(TEST__EVAL_PERIOD=2, BALANCE__BEST_METRIC=None))
    out = train(cfg)
    has_points = {
        name: "operating_points" in torch.load(out / f"{name}.pth")
        for name in ("model_0000000", "model_0000001", "model_0000002", "model_0000003")
    }
    assert has_points == {
        "model_0000000": False,
        "model_0000001": True,
        "model_0000002": False,
        "model_0000003": True,
    }
    final = torch.load(out / "model_final.pth")
    assert final["iteration"] == 3 and "operating_points" in final and "trainer" in final


def test_starting_over_removes_the_best_of_the_run_before(data, tmp_path):
    (tmp_path / "model_best.pth").write_bytes(b"")
    remove_checkpoints(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BALANCE__BEST_METRIC": "mAP"}, "BALANCE.BEST_METRIC is 'mAP'; known are: AP, "),
        ({"BALANCE__STOP_AFTER": 2}, "BALANCE.STOP_AFTER needs BALANCE.BEST_METRIC"),
        ({"BALANCE__BEST_METRIC": "AP", "DATASETS__TEST": ()}, "needs DATASETS.TEST"),
        ({"BALANCE__BEST_METRIC": "AP", "BALANCE__STOP_AFTER": 0}, "STOP_AFTER is 0"),
        ({"BALANCE__BEST_METRIC": "AP", "BALANCE__STOP_AFTER": 1}, "needs TEST.EVAL_PERIOD"),
    ],
)
def test_keys_that_can_have_no_effect_are_refused_before_the_run(data, tmp_path, changes, message):
    cfg = run_config(data, tmp_path / "out", **changes)
    with pytest.raises(InputError, match=message):
        check_run(cfg)
    assert not (tmp_path / "out").exists()


def test_a_metric_is_found_with_or_without_its_task():
    metrics = {"bbox/AP": 1.0, "segm/AP": 2.0, "segm/APr": math.nan}
    assert metric_value(metrics, "AP") == 1.0
    assert metric_value(metrics, "segm/AP") == 2.0
    assert metric_value(metrics, "APr") is None
    assert metric_value(metrics, "APc") is None


# --- Share of the gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FocalLoss", "CrossEntropyLoss"])
def test_the_share_of_a_group_is_that_of_its_absolute_gradients(name):
    torch.manual_seed(0)
    loss = CLASSIFICATION_LOSSES.get(name)(4)
    model = nn.Module()
    model.layer = nn.Linear(8, loss.num_logits)
    model.criterion = Criterion(loss, SmoothL1Loss(), classification_weight=3.0)
    groups = ["r", "f", "c", "f"]
    features, labels = torch.randn(30, 8), torch.randint(-1, 5, (30,))
    hook = LogGradientShare(groups, period=2)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(model=model, storage=storage, iter=1, max_iter=9)
        hook.before_step()
        # Two batches of one step add up.
        gradients = []
        for rows, own in ((features[:10], labels[:10]), (features[10:], labels[10:])):
            logits = model.layer(rows)
            logits.retain_grad()
            boxes = {"deltas": (torch.zeros(0, 4), torch.zeros(0, 4))}
            model.criterion(logits, own, boxes, 7.0)["loss_cls"].backward()
            gradients.append(logits.grad)
        hook.after_step()
        found = {g: storage.latest()[f"dense/gradient_share_{g}"][0] for g in "rcf"}
    sums = torch.cat(gradients)[:, :4].abs().sum(dim=0)
    expected = {g: sum(s for s, h in zip(sums, groups) if h == g) / sums.sum() for g in "rcf"}
    for group in "rcf":
        # Thirty float32 numbers added in another order.
        assert found[group] == pytest.approx(expected[group].item(), rel=1e-5)
    hook.trainer.iter = 2
    hook.before_step()
    assert not model.criterion.classification_loss._forward_pre_hooks


# --- Accumulation ---------------------------------------------------------------------------------


def build(loss):
    torch.manual_seed(0)
    keys = {"BALANCE.DENSE.CLASSIFICATION_LOSS": loss, "MODEL.RESNETS.NORM": "FrozenBN"}
    return build_model(config(RETINANET, keys)).train()


@pytest.mark.parametrize("loss", ["FocalLoss", "GHMClassificationLoss", "EqualizedFocalLoss"])
def test_a_step_of_two_batches_has_their_mean_gradient_and_the_statistics_of_both(loss):
    batches = [batch((2,), seed=1), batch((3,), seed=2)]
    plain = build(loss)
    with EventStorage():
        for images in batches:
            (sum(plain(images).values()) / 2).backward()
    model = build(loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainStep(model, batches, optimizer, accumulate=2)
    with EventStorage():
        step.iter = 0
        step.run_step()
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        # The same operations in the same order.
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-8, msg=name)
    state, expected = model.state_dict(), plain.state_dict()
    counted = [name for name in statistics_names(model) if "classification_loss" in name]
    assert all((expected[name] != 0).any() for name in counted)
    assert counted or loss == "FocalLoss"
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=0, msg=name)
