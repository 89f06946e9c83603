"""Several processes, however they are started, train one model and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import make_data, options, run_keys

ROOT = Path(__file__).parents[1]
# Issued to a run that would go on for hours.
ENDLESS = {"SOLVER.MAX_ITER": 1_000_000}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def command(data, out, *flags, starter=(), **changes):
    keys = run_keys(data, out, **{"DATALOADER.NUM_WORKERS": 1, **changes})
    config = ("--config-file", "configs/quickstart.yaml")
    return [sys.executable, *starter, "train_net.py", *config, *flags, *options(keys)]


class Run(subprocess.Popen):
    """A command in processes of its own session, with all that they print in a file."""

    def __init__(self, arguments, folder):
        self.printed = folder / "printed.txt"
        with open(self.printed, "w") as file:  # a pipe that nobody reads would stop the run
            super().__init__(
                arguments,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def output(self, timeout=None):
        """Wait for the end; return what was printed."""
        self.wait(timeout)
        return self.printed.read_text()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_torchrun_trains_what_num_gpus_trains(data, tmp_path):
    runs = {
        "launch": command(data, tmp_path / "launch", "--num-gpus", "2", "--dist-url", "auto"),
        "torchrun": command(data, tmp_path / "torchrun", starter=TORCHRUN),
    }
    states = {}
    for name, arguments in runs.items():
        process = Run(arguments, tmp_path)
        output = process.output()
        assert process.returncode == 0, output
        assert "World size: 2" in output
        assert "Written to" in output
        states[name] = torch.load(tmp_path / name / "model_final.pth")["model"]
    assert all(torch.equal(states["launch"][k], v) for k, v in states["torchrun"].items())


@pytest.mark.slow
def test_torchrun_tells_bad_input_once(data, tmp_path):
    arguments = command(data, tmp_path / "out", starter=TORCHRUN, **{"SOLVER.IMS_PER_BATCH": 3})
    process = Run(arguments, tmp_path)
    output = process.output()
    assert process.returncode != 0
    assert output.count("SOLVER.IMS_PER_BATCH is 3") == 1
    assert not (tmp_path / "out").exists()


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_training(process, out):
    """Wait until the run has written a checkpoint, so that all its processes are at work."""
    while not (out / "last_checkpoint").exists():
        assert process.poll() is None, process.output()
        time.sleep(0.05)


def command_lines(pids):
    return {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}


def workers_of(pid):
    """Return the training processes below ``pid``, without those that load images for them."""
    direct = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return [p for p, line in command_lines(direct).items() if "spawn_main" in line]


ENDINGS = {
    "SIGINT to all": (lambda parent: os.killpg(parent, signal.SIGINT), "interrupted"),
    "SIGINT to the parent alone": (lambda parent: os.kill(parent, signal.SIGINT), "interrupted"),
    "SIGTERM to the parent": (lambda parent: os.kill(parent, signal.SIGTERM), ""),
    "a worker killed": (lambda p: os.kill(workers_of(p)[1], signal.SIGKILL), "worker died"),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_process_ends_when_one_is_told_to(data, tmp_path, ending):
    end, message = ENDINGS[ending]
    out = tmp_path / "out"
    changes = {**ENDLESS, "SOLVER.CHECKPOINT_PERIOD": 10}
    arguments = command(data, out, "--num-gpus", "2", "--dist-url", "auto", **changes)
    process = Run(arguments, tmp_path)
    try:
        wait_for_training(process, out)
        everyone = children(process.pid)
        assert len(workers_of(process.pid)) == 2
        end(process.pid)
        # Detectron2 and torch wait for 30 s at the most; a run that hangs ends the test here.
        output = process.output(timeout=120)
        assert process.returncode != 0
        last = output.rstrip().splitlines()[-1]
        assert message in last
        deadline = time.monotonic() + 30
        while any(map(is_alive, everyone)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in everyone if is_alive(pid)]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_bad_input_met_by_a_worker_is_one_sentence(data, tmp_path):
    content = json.loads(data.train_json.read_text())
    folder = data.image_root
    name = content["images"][0]["file_name"]
    broken = tmp_path / "images"
    broken.mkdir()
    for image in content["images"]:
        source = folder / image["file_name"]
        copy = broken / image["file_name"]
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes()[:300])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    sets = [[str(path), str(path), str(broken)], [str(data.val_json)] * 2 + [str(folder)]]
    changes = {"BALANCE.DATASETS": sets, "DATASETS.TRAIN": (str(path),)}
    flags = ("--num-gpus", "2", "--dist-url", "auto")
    process = Run(command(data, tmp_path / "out", *flags, **changes), tmp_path)
    output = process.output()
    assert process.returncode == 1
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("train_net.py: Batch 0 of the training: The image ")
    assert Path(name).suffix in last
    assert "Traceback" not in output
