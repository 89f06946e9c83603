"""What a run refuses, keeps and names: checkpoints, statistics, bad numbers, output folders."""

import copy
import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.engine.hooks import CallbackHook
from runs import CLASSES, make_data, run_config
from torch import nn

from balanced_det.data.loader import TrainLoader
from balanced_det.data.registration import load_detections
from balanced_det.data.training_samplers import TRAINING_SAMPLERS
from balanced_det.engine import Trainer, check_run, load_config, locked
from balanced_det.engine.checkpoint import (
    Checkpointer,
    damage,
    load_trained,
    saved_checkpoints,
    statistics_names,
    write_whole,
)
from balanced_det.errors import InputError, NonFiniteError, printable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def config(data, out, **changes):
    return run_config(data, out, **{"SOLVER__MAX_ITER": 2, **changes})


FREQUENCY = "roi_heads.box_predictor.criterion.classification_loss.tail.class_frequency"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return the folder of a run of two steps."""
    out = tmp_path_factory.mktemp("trained") / "out"
    trainer = Trainer(config(data, out))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return out


def altered(trained, folder, change):
    """Write a copy of the run's checkpoint after ``change(content)``; return its path."""
    content = torch.load(trained / "model_final.pth")
    change(content)
    path = folder / "model.pth"
    torch.save(content, path)
    return str(path)


# --- Statistics -----------------------------------------------------------------------------------


def test_statistics_are_all_buffers_of_losses_and_thresholds(data, tmp_path):
    cfg = config(data, tmp_path, BALANCE__ROI_HEADS__SCORE_THRESHOLD="ClassAdaptiveThreshold")
    names = statistics_names(Trainer.build_model(cfg))
    assert FREQUENCY in names
    assert any(name.endswith("row_counts") for name in names)
    assert not any("running_mean" in name for name in names)


def other_frequencies(content):
    content["model"][FREQUENCY] = torch.linspace(0, 1, CLASSES)


@pytest.mark.parametrize("kept", ["data", "checkpoint"])
def test_weights_of_an_earlier_run_bring_its_counts_only_by_key(data, trained, tmp_path, kept):
    path = altered(trained, tmp_path, other_frequencies)
    cfg = config(data, tmp_path / "out", MODEL__WEIGHTS=path, BALANCE__STATISTICS=kept)
    trainer = Trainer(cfg)
    counted = trainer.model.state_dict()[FREQUENCY].clone()
    trainer.resume_or_load(resume=False)
    expected = counted if kept == "data" else torch.linspace(0, 1, CLASSES)
    state = trainer.model.state_dict()
    assert torch.equal(state[FREQUENCY], expected)
    weight = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(state[weight], torch.load(path)["model"][weight])


def test_evaluation_takes_the_counts_of_the_checkpoint(data, trained, tmp_path):
    path = altered(trained, tmp_path, other_frequencies)
    cfg = config(data, tmp_path / "out", MODEL__WEIGHTS=path)
    model = Trainer.build_model(cfg, count=False)
    load_trained(model, cfg)
    assert torch.equal(model.state_dict()[FREQUENCY], torch.linspace(0, 1, CLASSES))


# --- Classes --------------------------------------------------------------------------------------


def swap_first_two_classes(content):
    names = content["classes"]["names"]
    names[0], names[1] = names[1], names[0]


def test_checkpoint_tells_its_classes(data, trained):
    classes = torch.load(trained / "model_final.pth")["classes"]
    content = json.loads(data.train_json.read_text())["categories"]
    assert classes == {"names": [c["name"] for c in content], "ids": [c["id"] for c in content]}


@pytest.mark.parametrize("eval_only", [True, False])
def test_checkpoint_of_the_same_classes_in_another_order_is_refused(
    data, trained, tmp_path, eval_only
):
    path = altered(trained, tmp_path, swap_first_two_classes)
    cfg = config(data, tmp_path / "out", MODEL__WEIGHTS=path)
    with pytest.raises(InputError, match="same names in another order, class 0"):
        check_run(cfg, eval_only=eval_only)
    cfg.BALANCE.OTHER_CLASSES = True
    check_run(cfg, eval_only=eval_only)


def retinanet_config(data, out, **overrides):
    sets = str(data.train_json), str(data.val_json)
    return load_config(
        "configs/shapes/retinanet.yaml",
        BALANCE__DATASETS=[[p, p, str(data.image_root)] for p in sets],
        DATASETS__TRAIN=sets[:1],
        DATASETS__TEST=sets[1:],
        OUTPUT_DIR=str(out),
        **overrides,
    )


def test_detectron2s_own_retinanet_must_have_the_classes_of_the_data(data, tmp_path):
    keys = {
        "MODEL__META_ARCHITECTURE": "RetinaNet",
        "MODEL__RETINANET__NUM_CLASSES": CLASSES - 1,
    }
    cfg = retinanet_config(data, tmp_path / "out", **keys)
    with pytest.raises(InputError, match=f"MODEL.RETINANET.NUM_CLASSES is {CLASSES - 1}"):
        check_run(cfg)


def test_test_set_with_classes_in_another_order_is_refused(data, tmp_path):
    content = json.loads(data.val_json.read_text())
    first, second, *_ = content["categories"]
    first["id"], second["id"] = second["id"], first["id"]
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    swapped = dataclasses.replace(data, val_json=path)
    with pytest.raises(InputError, match="differ"):
        check_run(config(swapped, tmp_path / "out"))


# --- Weights --------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", ["pkl", "pth", "pyth"])
def test_weights_that_run_code_are_refused_and_do_not_run(data, tmp_path, suffix):
    marker = tmp_path / "ran"
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(pickle.dumps({"model": {}, "__author__": Payload(marker)}))
    with pytest.raises(InputError, match=r"BALANCE\.TRUSTED_WEIGHTS"):
        check_run(config(data, tmp_path / "out", MODEL__WEIGHTS=str(path)))
    assert not marker.exists()


def test_pickle_of_plain_arrays_loads(data, trained, tmp_path):
    state = torch.load(trained / "model_final.pth")["model"]
    arrays = {name: value.numpy() for name, value in state.items()}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    cfg = config(data, tmp_path / "out", MODEL__WEIGHTS=str(path))
    model = Trainer.build_model(cfg, count=False)
    load_trained(model, cfg)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_evaluation_of_random_layers_is_refused(data, trained, tmp_path):
    cfg = config(data, tmp_path / "out")
    with pytest.raises(InputError, match="MODEL.WEIGHTS: is empty and lacks .*BALANCE.UNTRAINED"):
        check_run(cfg, eval_only=True)

    def without_head(content):
        del content["model"]["roi_heads.box_predictor.cls_score.weight"]

    cfg.MODEL.WEIGHTS = altered(trained, tmp_path, without_head)
    with pytest.raises(InputError, match="lacks 1 of the model's weights, .*cls_score.weight"):
        check_run(cfg, eval_only=True)
    cfg.BALANCE.UNTRAINED = True
    check_run(cfg, eval_only=True)


@pytest.mark.parametrize("eval_only", [True, False])
def test_weights_of_another_model_are_refused(data, tmp_path, eval_only):
    path = tmp_path / "other.pth"
    torch.save({"model": {"fc.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(InputError, match="MODEL.WEIGHTS: .*other.pth"):
        check_run(config(data, tmp_path / "out", MODEL__WEIGHTS=str(path)), eval_only)


def test_what_was_and_what_was_not_loaded_is_said_in_a_line_each(data, trained, tmp_path, caplog):
    def other_classes(content):
        name = "roi_heads.box_predictor.cls_score.weight"
        content["model"][name] = torch.zeros(91, content["model"][name].shape[1])

    path = altered(trained, tmp_path, other_classes)
    trainer = Trainer(config(data, tmp_path / "out", MODEL__WEIGHTS=path))
    with caplog.at_level(logging.INFO, "balanced_det"):
        trainer.resume_or_load(resume=False)
    total = len(list(trainer.model.named_parameters()))
    told = [record.getMessage() for record in caplog.records]
    assert f"Loaded: {total - 1} of the model's {total} weights." in told
    assert "Not loaded, so start anew: roi_heads.box_predictor.cls_score.weight." in told


# --- Checkpoints ----------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, flip_a_byte, empty])
def test_damaged_weights_are_named(data, trained, tmp_path, spoil):
    path = tmp_path / "model.pth"
    path.write_bytes((trained / "model_final.pth").read_bytes())
    assert damage(str(path)) is None
    spoil(path)
    with pytest.raises(InputError, match="model.pth' is damaged"):
        check_run(config(data, tmp_path / "out", MODEL__WEIGHTS=str(path)))


@pytest.mark.parametrize("spoil", [cut, flip_a_byte, empty, Path.unlink])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, spoil):
    model = nn.Linear(64, 64)  # most bytes of the file are weights
    checkpointer = Checkpointer(model, str(tmp_path))
    for number in range(2):
        nn.init.constant_(model.weight, number)
        checkpointer.save(f"model_{number:07d}", iteration=number)
        time.sleep(0.01)  # the age decides; file systems tell it in milliseconds at least
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    spoil(tmp_path / "model_0000001.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0
    assert (model.weight == 0).all()


def test_all_checkpoints_damaged_is_told(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model_0000000")
    empty(tmp_path / "model_0000000.pth")
    with pytest.raises(InputError, match="model_0000000.pth.* is damaged"):
        checkpointer.resume_or_load("", resume=True)


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fails(file):
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        write_whole(str(path), fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weight_that_is_not_finite_reaches_no_checkpoint(tmp_path, bad):
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(model, str(tmp_path))
    nn.init.constant_(model.bias, bad)
    with pytest.raises(NonFiniteError, match="weight 'bias' is not finite"):
        checkpointer.save("model_final")
    assert saved_checkpoints(str(tmp_path)) == []


# --- Output folder --------------------------------------------------------------------------------


def test_resuming_without_a_checkpoint_asks_for_a_key(data, tmp_path):
    cfg = config(data, tmp_path / "out")
    with pytest.raises(InputError, match="--resume: .*BALANCE.RESUME_OR_START"):
        check_run(cfg, resume=True)
    cfg.BALANCE.RESUME_OR_START = True
    check_run(cfg, resume=True)


def test_resuming_a_run_of_another_model_is_refused(data, trained):
    cfg = config(data, trained, MODEL__FPN__OUT_CHANNELS=24)
    with pytest.raises(InputError, match="--resume: the checkpoint in .* is of another model"):
        check_run(cfg, resume=True)


def test_run_over_another_asks_for_a_key(data, trained):
    cfg = config(data, trained)
    with pytest.raises(InputError, match="model_final.pth' of an earlier run.*BALANCE.OVERWRITE"):
        check_run(cfg)
    check_run(cfg, resume=True)
    cfg.BALANCE.OVERWRITE = True
    check_run(cfg)
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    with pytest.raises(InputError, match="lies in OUTPUT_DIR"):
        check_run(cfg)


def test_second_run_on_one_folder_is_refused_while_the_first_lives(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from balanced_det.engine import locked\n"
            "with locked(sys.argv[1]):\n"
            "    print('held', flush=True)\n"
            "    time.sleep(600)\n",
            str(tmp_path),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is writing"), locked(str(tmp_path)):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(str(tmp_path)):
        pass


# --- Bad numbers ----------------------------------------------------------------------------------


class Poison:
    """Makes one number of the training bad at an iteration, where a real one would arise."""

    def __init__(self, trainer, iteration, where):
        self.trainer, self.iteration = trainer, iteration
        model = trainer.model
        if where == "loss":
            layer = model.roi_heads.box_predictor.cls_score
            layer.register_forward_hook(lambda *_: self.bad(_[2]))
        elif where == "gradient":
            layer = model.roi_heads.box_predictor.cls_score
            # Finite forward, not backward: as the root of an exact zero would have it.
            layer.weight.register_hook(lambda grad: self.bad(grad))
        else:
            self.weight = model.roi_heads.box_predictor.cls_score.weight
            layer = model.backbone
            layer.register_forward_pre_hook(lambda *_: self.spoil())

    def due(self):
        return self.trainer.iter == self.iteration and self.trainer.model.training

    def bad(self, value):
        return value * float("nan") if self.due() else value

    def spoil(self):
        if self.due():
            self.weight.data[0, 0] = float("inf")


def state_of(trainer):
    model = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return model, copy.deepcopy(trainer.optimizer.state_dict())


def same(first, second):
    return all(torch.equal(first[0][name], second[0][name]) for name in first[0]) and str(
        first[1]
    ) == str(second[1])


@pytest.mark.parametrize("clip", ["", "value", "norm", "full_model"])
@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("loss", "loss_cls is nan"),
        ("gradient", "gradient of roi_heads.box_predictor.cls_score.weight"),
        ("weight", "weight roi_heads.box_predictor.cls_score.weight"),
    ],
)
def test_bad_number_is_named_and_reaches_nothing(data, tmp_path, where, named, clip):
    if clip and where != "gradient":
        pytest.skip("clipping sees gradients alone")
    changes = {"SOLVER__CLIP_GRADIENTS__ENABLED": True, "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": clip}
    cfg = config(data, tmp_path, SOLVER__CHECKPOINT_PERIOD=1, **(changes if clip else {}))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    Poison(trainer, 1, where)
    before = []
    run_step = trainer.run_step

    def remember():
        before.append(state_of(trainer))
        run_step()

    trainer.run_step = remember
    pattern = f"^Iteration 1: .*{named}.*images [0-9]+ '.*jpg'"
    with pytest.raises(NonFiniteError, match=pattern) as told:
        trainer.train()
    # Weights that are not finite stay so, however many steps are skipped.
    assert ("SKIP_BAD_STEPS" in str(told.value)) == (where != "weight")
    if where != "weight":
        assert same(before[1], state_of(trainer))
    assert [os.path.basename(p) for p in saved_checkpoints(str(tmp_path))] == ["model_0000000.pth"]
    state = torch.load(tmp_path / "model_0000000.pth")["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_bad_step_is_skipped_by_key_up_to_its_limit(data, tmp_path):
    cfg = config(data, tmp_path, BALANCE__SKIP_BAD_STEPS=1, SOLVER__MAX_ITER=3)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    Poison(trainer, 1, "loss")
    trainer.train()
    assert trainer._trainer.skipped_steps == 1
    content = torch.load(tmp_path / "model_final.pth")
    assert content["trainer"]["_trainer"]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in content["model"].values())

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    Poison(trainer, 1, "loss")
    Poison(trainer, 2, "gradient")
    with pytest.raises(NonFiniteError, match="Iteration 2"):
        trainer.train()


def test_a_skipped_step_leaves_scaled_gradients_to_the_next(data, tmp_path):
    cfg = config(data, tmp_path, BALANCE__SKIP_BAD_STEPS=1, SOLVER__MAX_ITER=3)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    # What mixed precision has on a GPU; it scales gradients of float32 as well.
    scaler = trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Poison(trainer, 1, "loss")
    before = []
    weight = trainer.model.roi_heads.box_predictor.cls_score.weight
    remember = CallbackHook(before_step=lambda _: before.append(weight.detach().clone()))
    trainer.register_hooks([remember])
    trainer.train()
    assert trainer._trainer.skipped_steps == 1
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], weight)
    assert scaler.get_scale() == 512  # gradients of a bad loss are taken for an overflow


# --- Loading images -------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize(
    "sampler",
    [
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
        *TRAINING_SAMPLERS,
    ],
)
def test_order_is_detectron2s_and_any_batch_can_be_the_first(data, tmp_path, sampler, grouping):
    cfg = config(
        data,
        tmp_path,
        DATALOADER__SAMPLER_TRAIN=sampler,
        DATALOADER__ASPECT_RATIO_GROUPING=grouping,
        DATALOADER__REPEAT_THRESHOLD=0.5,
        DATALOADER__RANDOM_SUBSET_RATIO=0.5,
        SEED=5,
    )
    ours = TrainLoader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"  # Detectron2 knows not all of the names
    arguments = _train_loader_from_config(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    arguments["sampler"] = ours.stream().sampler  # those without a seed draw one when they are made
    theirs = build_detection_train_loader.__wrapped__(**arguments)
    batches = [batch for batch, _ in zip(ours, range(20))]
    for batch, expected in zip(batches, theirs):
        assert [image["image_id"] for image in batch] == [image["image_id"] for image in expected]
    ours.start = 13
    again = next(iter(ours))
    assert [image["image_id"] for image in again] == [image["image_id"] for image in batches[13]]
    for image, expected in zip(again, batches[13]):
        assert torch.equal(image["image"], expected["image"])


@pytest.mark.parametrize("sampler", TRAINING_SAMPLERS)
def test_order_without_a_seed_is_that_of_the_runs_own(data, tmp_path, sampler):
    cfg = config(data, tmp_path, DATALOADER__SAMPLER_TRAIN=sampler, SEED=-1)
    orders = []
    for seed in (7, 7, 8):
        loader = TrainLoader(cfg)
        loader.seed = seed  # what a checkpoint brings
        orders.append([sample for batch, _ in zip(loader.stream(), range(50)) for sample in batch])
    assert orders[0] == orders[1] != orders[2]


def test_sampling_by_class_without_an_object_is_refused_before_the_run(data, tmp_path):
    path = tmp_path / "train.json"
    content = json.loads(data.train_json.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    sets = [["none", str(path), str(data.image_root)]]
    keys = {
        "BALANCE__DATASETS": sets,
        "DATASETS__TRAIN": ("none",),
        "DATASETS__TEST": (),
        "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False,
        "DATALOADER__SAMPLER_TRAIN": "ClassAwareTrainingSampler",
        "BALANCE__EqualizationLoss__TAIL_SHARE": 0.5,
    }
    with pytest.raises(InputError, match="ClassAwareTrainingSampler needs an object"):
        check_run(config(data, tmp_path / "out", **keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_file_name_that_leaves_the_image_root_is_refused_unless_told(data, tmp_path, name):
    content = json.loads(data.train_json.read_text())
    content["images"][0].update(file_name=name, coco_url="")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="leaves the image root: BALANCE.IMAGES_ANYWHERE"):
        load_detections(path, data.image_root)
    with pytest.raises(InputError, match="1 of the .* are missing"):  # looked for, at least
        load_detections(path, data.image_root, images_anywhere=True)


# --- Tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL__KEYPOINT_ON", True),
        ("MODEL__LOAD_PROPOSALS", True),
        ("MODEL__META_ARCHITECTURE", "ProposalNetwork"),
        ("MODEL__META_ARCHITECTURE", "PanopticFPN"),
        ("MODEL__PROPOSAL_GENERATOR__NAME", "RRPN"),
        ("MODEL__ROI_HEADS__NAME", "RROIHeads"),
        ("MODEL__ANCHOR_GENERATOR__NAME", "RotatedAnchorGenerator"),
    ],
)
def test_task_that_is_not_served_is_refused(data, tmp_path, key, value):
    with pytest.raises(InputError, match=f"^{key.replace('__', '.')} is .*cannot be trained here"):
        check_run(config(data, tmp_path / "out", **{key: value}))


def test_augmentation_at_test_time_is_served_as_detectron2_does(data, trained, tmp_path):
    cfg = config(
        data,
        tmp_path / "out",
        MODEL__WEIGHTS=str(trained / "model_final.pth"),
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
        TEST__AUG__ENABLED=True,
        TEST__AUG__MIN_SIZES=(64, 80),
        TEST__AUG__MAX_SIZE=100,
        SOLVER__MAX_ITER=1,
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert {"bbox", "bbox_TTA"} <= results.keys()
    assert np.isfinite(results["bbox_TTA"]["AP"])


def test_augmentation_at_test_time_is_refused_where_detectron2_has_none(data, tmp_path):
    cfg = retinanet_config(data, tmp_path / "out", TEST__AUG__ENABLED=True)
    with pytest.raises(InputError, match="TEST.AUG.ENABLED"):
        check_run(cfg)


# --- Mixed precision, accumulation ----------------------------------------------------------------


def test_float16_on_a_cpu_is_refused_and_bfloat16_trains(data, tmp_path):
    cfg = config(data, tmp_path / "out", SOLVER__AMP__ENABLED=True)
    with pytest.raises(InputError, match="BALANCE.AMP_DTYPE to 'bfloat16'"):
        check_run(cfg)
    cfg.BALANCE.AMP_DTYPE = "bfloat16"
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    types = []
    layer = trainer.model.roi_heads.box_predictor.cls_score
    layer.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    trainer.train()
    assert torch.bfloat16 in types


def test_accumulated_batches_have_the_gradient_of_their_mean(data, tmp_path):
    """Without sampling and batch statistics, two batches of one image are as one of two."""
    gradients = {}
    for name, size, steps in (("one", 2, 1), ("two", 1, 2)):
        cfg = config(
            data,
            tmp_path / name,
            SOLVER__IMS_PER_BATCH=size,
            BALANCE__ACCUMULATE_STEPS=steps,
            SOLVER__MAX_ITER=1,
            DATALOADER__ASPECT_RATIO_GROUPING=False,
            DATASETS__TEST=(),
            MODEL__RESNETS__NORM="FrozenBN",
            MODEL__FPN__NORM="",
            SEED=1,
        )
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        # The mask and box losses sample; the backbone's gradient of a plain sum does not.
        trainer.model.forward = lambda batch, model=trainer.model: {
            "loss": sum(
                f.pow(2).mean()
                for f in model.backbone(model.preprocess_image(batch).tensor).values()
            )
        }
        trainer.train()
        gradients[name] = [
            p.grad.clone() for p in trainer.model.backbone.parameters() if p.grad is not None
        ]
    for one, two in zip(gradients["one"], gradients["two"], strict=True):
        # Sums of float32 in another order: relative errors of some 1e-6 of the largest.
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item())


# --- Text of strangers ----------------------------------------------------------------------------


def test_only_what_is_printed_as_itself_reaches_a_terminal():
    assert printable("Bär 熊 🐻") == "Bär 熊 🐻"
    assert printable("a\x1b[31m\nb\u202e\ud800") == "a\\x1b[31m\\nb\\u202e\\ud800"
    assert str(InputError("'a\nb\x07'")) == "'a\\nb\\x07'"
