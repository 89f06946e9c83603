"""A run that is killed and resumed ends as one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import NARROW_RESNET
from runs import CLASSES, keys_of_data, make_data, options

ROOT = Path(__file__).parents[1]
ITERATIONS = 12

# Small enough for seconds; every loss keeps a state, and so does the sampler of the images.
COMMON = {
    "INPUT.MIN_SIZE_TRAIN": "(48,64)",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.CROP.ENABLED": True,
    "MODEL.DEVICE": "cpu",
    **NARROW_RESNET,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.STEPS": "(9,)",
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "DATALOADER.NUM_WORKERS": 1,
    "DATALOADER.REPEAT_THRESHOLD": 0.5,
    # An evaluation draws random numbers of its own in between.
    "TEST.EVAL_PERIOD": 4,
}
DETECTORS = {
    "dense": (
        "configs/shapes/retinanet.yaml",
        {
            "DATALOADER.SAMPLER_TRAIN": "ClassAwareTrainingSampler",
            "MODEL.RETINANET.NUM_CLASSES": CLASSES,
            "BALANCE.DENSE.CLASSIFICATION_LOSS": "GHMClassificationLoss",
            "BALANCE.DENSE.BOX_LOSS": "GHMRegressionLoss",
            "BALANCE.DENSE.SCORE_THRESHOLD": "ClassAdaptiveThreshold",
        },
    ),
    "two_stage": (
        "configs/quickstart_softmax.yaml",
        {
            "DATALOADER.SAMPLER_TRAIN": "InstanceAwareRepeatFactorTrainingSampler",
            "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
            "BALANCE.RPN.CLASSIFICATION_LOSS": "GHMClassificationLoss",
            "BALANCE.ROI_HEADS.CLASSIFICATION_LOSS": "SoftmaxEqualizationLoss",
            "BALANCE.ROI_HEADS.SAMPLER": "IoUBalancedSampler",
            "BALANCE.ROI_HEADS.SCORE_THRESHOLD": "ClassAdaptiveThreshold",
            "BALANCE.SoftmaxEqualizationLoss.TAIL_SHARE": 0.5,
        },
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def command(data, out, detector, *flags, **changes):
    keys = {**keys_of_data(data), **COMMON, **DETECTORS[detector][1], "OUTPUT_DIR": out, **changes}
    return [
        sys.executable,
        "train_net.py",
        "--config-file",
        DETECTORS[detector][0],
        *flags,
        *options(keys),
    ]


def run(*arguments, **changes):
    done = subprocess.run(command(*arguments, **changes), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def kill_at(iteration, data, out, detector, *flags, **changes):
    """Start a run and kill it, at once and hard, when its log says that it reached an iteration."""
    # The period of Detectron2's writers is 20 iterations; checkpoints are told at once.
    done = out / f"model_{iteration:07d}.pth"
    process = subprocess.Popen(
        command(data, out, detector, *flags, **changes),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not done.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tensors(value, name=""):
    """Yield (name, tensor or number) of everything in a checkpoint."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors(part, f"{name}.{index}")
    else:
        yield name, value


def differing(first, second):
    first, second = (dict(tensors(torch.load(path))) for path in (first, second))
    assert first.keys() == second.keys()
    # The config says how the commands differ: in their folder and number of loading processes.
    del first[".config"]
    return {
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name])
            if isinstance(value, torch.Tensor)
            else value == second[name]
        )
    }


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_run_killed_twice_and_resumed_ends_as_the_uninterrupted_one(data, tmp_path, detector):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(data, whole, detector, SEED=3)
    kill_at(2, data, killed, detector, "SEED", "3")
    kill_at(8, data, killed, detector, "--resume", "SEED", "3")
    # Another number of loading processes, too, must change nothing.
    run(data, killed, detector, "--resume", SEED=3, **{"DATALOADER.NUM_WORKERS": 0})
    assert differing(whole / "model_final.pth", killed / "model_final.pth") == set()


@pytest.mark.slow
def test_run_without_a_seed_goes_on_with_the_random_numbers_it_began_with(data, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(data, whole, "dense")
    resumed.mkdir()
    (resumed / "model_0000005.pth").write_bytes((whole / "model_0000005.pth").read_bytes())
    run(data, resumed, "dense", "--resume")
    assert differing(whole / "model_final.pth", resumed / "model_final.pth") == set()


# --- Several processes, and a GPU -----------------------------------------------------------------

# As many as there are, of two; SyncBN and the rest talk by NCCL then.
NUM_GPUS = min(2, torch.cuda.device_count())


def on_device(device, amp=None):
    """Return the flags and keys of a run on a device, in mixed precision where ``amp`` names it."""
    keys = {"MODEL.DEVICE": device, "SEED": 3, "SOLVER.CHECKPOINT_PERIOD": 1}
    keys.update({"SOLVER.AMP.ENABLED": True, "BALANCE.AMP_DTYPE": amp} if amp else {})
    processes = NUM_GPUS if device == "cuda" else 2
    return ("--num-gpus", str(processes), "--dist-url", "auto"), keys


def exact_state_of(path):
    """Return what no order of a sum changes: where the run is, its rates, and the scaler."""
    trainer = torch.load(path, map_location="cpu")["trainer"]
    step = trainer["_trainer"]
    groups = step["optimizer"]["param_groups"]
    return {
        "iteration": trainer["iteration"],
        "rates": [group["lr"] for group in groups],
        "schedule": trainer["hooks"]["LRScheduler"],
        "scaler": step.get("grad_scaler"),
        "seed": step["seed"],
        "skipped": (step["skipped_steps"], step["skipped_images"]),
    }


def killed_and_resumed(data, folder, detector, flags, keys):
    """Kill all processes of a run at once, resume it, and return its last checkpoint."""
    kill_at(2, data, folder, detector, *flags, **keys)
    run(data, folder, detector, *flags, "--resume", **keys)
    return folder / "model_final.pth"


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_two_processes_killed_and_resumed_end_as_the_uninterrupted_ones(data, tmp_path, detector):
    flags, keys = on_device("cpu")
    run(data, tmp_path / "whole", detector, *flags, **keys)
    killed = killed_and_resumed(data, tmp_path / "killed", detector, flags, keys)
    assert differing(tmp_path / "whole/model_final.pth", killed) == set()


def last_step(before, after):
    """Return what a step changed, {name: vector}: of all weights together, and of each buffer.

    Apart, since counts of rows are ten thousand times as large as weights.
    """
    before, after = (torch.load(path, map_location="cpu") for path in (before, after))
    changes = {
        name: (value.double() - before["model"][name].double()).flatten()
        for name, value in after["model"].items()
        if value.is_floating_point()
    }
    weights = [name for name in changes if name.endswith((".weight", ".bias"))]
    return {"weights": torch.cat([changes.pop(name) for name in weights]), **changes}


def largest_difference(step, other):
    """Return the largest |a - b| / |a| of what two steps changed."""
    return max(
        ((change - other[name]).norm() / change.norm()).item()
        for name, change in step.items()
        if change.any() or other[name].any()
    )


def without_momentum(checkpoint):
    """Return a checkpoint of a run that forgot its momentum."""
    checkpoint["trainer"]["_trainer"]["optimizer"]["state"] = {}
    return checkpoint


# On a GPU sums come in any order. How much that does to a step is measured: the same step is made
# twice. Two such differences, of sums of very many errors, are of one size: one is not ten times
# the other. Where twice the same comes out by chance, a rounding of float16 is allowed.
NOISE, ROUNDING = 10, 1e-3


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not NUM_GPUS, reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_resumed_run_on_a_gpu_makes_the_step_of_the_uninterrupted_one(
    data, tmp_path, detector, amp
):
    flags, keys = on_device("cuda", amp)
    whole = tmp_path / "whole"
    run(data, whole, detector, *flags, **keys)

    # One step only: the next begins with other last bits, which decide which proposals come first
    # and so which rows are drawn. Gradients that differ by a millionth, drawn at random on a CPU,
    # make of six steps of the two-stage detector others by half of their length.
    before = whole / f"model_{ITERATIONS - 2:07d}.pth"

    def resumed(name, edited=lambda checkpoint: checkpoint):
        folder = tmp_path / name
        folder.mkdir()
        checkpoint = torch.load(before, map_location="cpu")
        torch.save(edited(checkpoint), folder / before.name)
        run(data, folder, detector, *flags, "--resume", **keys)
        return folder / "model_final.pth"

    final = [whole / "model_final.pth", resumed("once"), resumed("twice")]
    expected, once, twice = (last_step(before, path) for path in final)
    assert expected["weights"].any()
    allowed = max(NOISE * largest_difference(once, twice), ROUNDING)
    assert largest_difference(expected, once) <= allowed
    # Small beside what a run differs by that forgot its momentum.
    forgetful = last_step(before, resumed("forgetful", without_momentum))
    assert allowed < largest_difference(expected, forgetful) / 10

    state = exact_state_of(final[0])
    assert exact_state_of(final[1]) == state
    if amp == "float16":
        assert state["scaler"]["scale"] > 0
        # Counted since the start or the last overflow, which the resumed run must know of.
        assert exact_state_of(before)["scaler"] != state["scaler"]

    killed = killed_and_resumed(data, tmp_path / "killed", detector, flags, keys)
    assert exact_state_of(killed)["iteration"] == state["iteration"]
