"""Folders of runs: what is to be trained, trained side by side, and read when it is finished.

A run's folder is ``train_net.py``'s ``OUTPUT_DIR``. Beside what that writes, :func:`train_all` puts
``run.json`` (the command, the commit, how long it took) and ``stdout.txt`` there.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .data.annotations import GROUPS
from .errors import InputError
from .report import write_json

RECORD = "run.json"
# Keys of a config that say where and when a run happened, not what was trained.
PLACE_KEYS = ("OUTPUT_DIR", "MODEL.DEVICE", "SEED")
_ROOT = Path(__file__).resolve().parents[1]
_DETECTIONS = ("lvis_instances_results.json", "coco_instances_results.json")
_GRACE_SECONDS = 15  # for a training that is told to end
_STATUS_SECONDS = 10


# --- What is to be trained ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config with what is changed in it; one of those that are compared.

    Attributes:
        name: what it is called, and the beginning of its folders' names.
        config_file: path.
        fragments: as for ``--with``.
        opts: KEY, VALUE, ... of this setup alone; ``{seed}`` and ``{out}`` in a value are a run's
            seed and the folder of all runs, so that a run can begin with the weights of another.
    """

    name: str
    config_file: str
    fragments: tuple[str, ...] = ()
    opts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """A run that is to be there: a setup with a seed, its folder and its command."""

    setup: Setup
    seed: int
    folder: Path
    command: tuple[str, ...]
    settings: dict

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.folder.name


def parse_setup(text: str) -> Setup:
    """Read ``CONFIG+FRAGMENT+KEY=VALUE...``: a config file and what is merged over it.

    Raises:
        InputError: there is no such file.
    """
    path, parts = (text, []) if os.path.isfile(text) else _split(text)
    if not os.path.isfile(path):
        raise InputError(f"'{text}' is neither a config file nor the folder of a run.")
    pairs = [part.partition("=") for part in parts if "=" in part]
    return Setup(
        name="+".join([Path(path).stem, *parts]),
        config_file=path,
        fragments=tuple(part for part in parts if "=" not in part),
        opts=tuple(word for key, _, value in pairs for word in (key, value)),
    )


def _split(text):
    path, *parts = re.split(r"\+(?=[A-Za-z_./])", text)  # no sign of a number, as in 1e+3
    return path, parts


def distinct_names(setups: Sequence[Setup]) -> list[Setup]:
    """Return the setups, those of one name called by their config's folder, too.

    Raises:
        InputError: one stands twice.
    """
    for index, setup in enumerate(setups):
        if setup in setups[:index]:
            raise InputError(f"'{setup.name}' is listed twice.")
    names = [setup.name for setup in setups]
    return [
        setup
        if names.count(setup.name) == 1
        else dataclasses.replace(
            setup, name=f"{Path(setup.config_file).resolve().parent.name}-{setup.name}"
        )
        for setup in setups
    ]


def plan(setup: Setup, seed: int, out: Path, opts: Sequence[str]) -> Planned:
    """Return the run of a setup with a seed; its config is read, so that mistakes are found now.

    Args:
        setup: what to train.
        seed: a config's SEED.
        out: the folder of all runs.
        opts: KEY, VALUE, ... for all setups; the setup's own win.

    Raises:
        InputError: the config cannot be used.
    """
    from .config import load_config
    from .config.lazy import is_lazy_file

    folder = out / f"{_as_file_name(setup.name)}_seed{seed}"
    own = [word.replace("{seed}", str(seed)).replace("{out}", str(out)) for word in setup.opts]
    command = [*_training_program(), "--config-file", setup.config_file]
    if setup.fragments:
        command += ["--with", *setup.fragments]
    if is_lazy_file(setup.config_file):
        pairs = zip(own[::2], own[1::2])
        words = [*opts, *(f"{key}={value}" for key, value in pairs)]
        quoted = str(folder).replace("'", r"\'")  # its name may hold an equals sign
        place = [f"train.output_dir='{quoted}'", f"train.seed={seed}"]
    else:
        words = [*opts, *own]
        place = ["OUTPUT_DIR", str(folder), "SEED", str(seed)]
    cfg = load_config(setup.config_file, [*words, *place], fragments=setup.fragments)
    return Planned(
        setup, seed, folder, (*command, *words, *place), settings_of_text(cfg.dump(), "the config")
    )


def _training_program():
    """The training command of a clone, or of an installed package."""
    script = _ROOT / "train_net.py"
    if script.is_file():
        return [sys.executable, str(script)]
    return [sys.executable, "-m", "balanced_det.cli", "train"]


def _as_file_name(name):
    """Short and without what a folder's name, a shell or a glob pattern could stumble over."""
    plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name)
    if plain == name and len(plain) <= 100:
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{plain[:90]}-{digest}"


# --- Training -------------------------------------------------------------------------------------


def train_all(runs: Sequence[Planned], jobs: int) -> dict[Planned, str]:
    """Train the runs that are not finished, ``jobs`` side by side, spread over the GPUs.

    They start in their order, but one that begins with a file of an earlier one waits for that.
    A run that was interrupted goes on from its last checkpoint; one that is finished is left alone.
    Each has one thread for its arithmetic on CPU.

    Args:
        runs: of :func:`plan`.
        jobs: trainings at a time.

    Returns:
        {a run that failed: why}.

    Raises:
        InputError: a folder holds a run of other settings.
    """
    missing = [run for run in runs if not is_finished(run)]
    if not missing:
        return {}
    import torch

    gpus = _visible_gpus(torch.cuda.device_count())
    slots: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(gpus[slot % len(gpus)] if gpus else None)
    _tell(f"{len(runs) - len(missing)} of {len(runs)} runs are there, {len(missing)} to train.")
    running, failures, number_done = _Running(), {}, 0
    waiting = {run: _begun_with(run, missing[:i]) for i, run in enumerate(missing)}
    pending: dict[concurrent.futures.Future, Planned] = {}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        with _interrupted_by_sigterm():
            while waiting or pending:
                for run in [run for run, others in waiting.items() if not others]:
                    del waiting[run]
                    pending[pool.submit(_train, run, slots, jobs, running)] = run
                done, _ = concurrent.futures.wait(
                    pending, _STATUS_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    run, reason = pending.pop(future), future.result()
                    number_done += 1
                    counted = f"{number_done} of {len(missing)}"
                    _tell(f"{counted}: {run.name} {f'failed: {reason}' if reason else 'is done'}")
                    if reason:
                        failures[run] = reason
                    for others in waiting.values():
                        others.discard(run)
                if pending and not done:
                    _tell(_status(running.runs()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        running.end()
        pool.shutdown()
    return failures


def _begun_with(run, earlier):
    """Return those of the earlier runs in whose folders a file lies that a run's command names."""
    named = " ".join(run.command)
    return {other for other in earlier if f"{other.folder}{os.sep}" in named}


def is_finished(run: Planned) -> bool:
    """Return whether a run's folder holds its results.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    found = run.folder / "config.yaml"
    if found.is_file():
        difference = _first_difference(read_settings(run.folder), run.settings)
        if difference:
            raise InputError(
                f"'{run.folder}' holds a run with another {difference}; choose another --out, or "
                "remove it."
            )
    record = read_record(run.folder)
    if record.get("source") not in (None, _source(run)):
        raise InputError(
            f"'{run.folder}' holds a run of another version of '{run.setup.config_file}'; choose "
            "another --out, or remove it."
        )
    results = [p for name in _DETECTIONS for p in (run.folder / "inference").rglob(name)]
    return record.get("exit") == 0 and bool(results)


def _first_difference(found, wanted):
    # A key that one of them lacks came or went with a version of the code.
    for key in sorted((found.keys() & wanted.keys()) - {"OUTPUT_DIR", "MODEL.DEVICE"}):
        if found[key] != wanted[key]:
            return f"{key}, {_brief(found[key])} instead of {_brief(wanted[key])}"
    return ""


def _brief(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _source(run):
    """A digest of a Python config, whose tree is not among the settings."""
    if run.setup.config_file.endswith(".py"):
        words = run.command[run.command.index("--config-file") + 2 :]
        told = [word for word in words if not word.startswith("train.output_dir=")]
        content = Path(run.setup.config_file).read_bytes() + json.dumps(told).encode()
        return hashlib.sha256(content).hexdigest()
    return None


def _train(run, slots, jobs, running):
    """Train one run; return why it failed, or nothing."""
    gpu = slots.get()
    try:
        return _train_on(run, gpu, jobs, running)
    except OSError as error:
        return str(error)
    finally:
        slots.put(gpu)


def _train_on(run, gpu, jobs, running):
    from .engine.checkpoint import saved_checkpoints

    run.folder.mkdir(parents=True, exist_ok=True)
    command = list(run.command)
    if saved_checkpoints(str(run.folder)):
        command.insert(command.index("--config-file"), "--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    record = {
        "command": shlex.join(_told_command(run.command)),
        "commit": commit(),
        "processor": processor(),
        "source": _source(run),
        "jobs": jobs,
        "seconds": read_record(run.folder).get("seconds", 0.0),  # of earlier attempts
        "exit": None,
    }
    write_json(run.folder / RECORD, record)
    began = time.monotonic()
    with (run.folder / "stdout.txt").open("ab") as log:
        process = running.start(run, command, environment, log)
        if process is None:
            return "it was not started"
        _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    running.ended(run)
    record["seconds"] = round(record["seconds"] + time.monotonic() - began, 1)
    record["host_memory_mb"] = round(usage.ru_maxrss / 1024)  # Linux counts in KiB
    record["exit"] = code
    write_json(run.folder / RECORD, record)
    return None if code == 0 else _last_words(run.folder / "stdout.txt", code)


class _Running:
    """The trainings that run now; after :meth:`end` none starts."""

    def __init__(self):
        self._lock = threading.Lock()
        self._processes = {}
        self._is_over = False

    def start(self, run, command, environment, log):
        with self._lock:
            if self._is_over:
                return None
            # Its own session: an interrupt at the terminal is ours to hand on, once.
            self._processes[run] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            return self._processes[run]

    def ended(self, run):
        with self._lock:
            del self._processes[run]

    def runs(self):
        with self._lock:
            return list(self._processes)

    def end(self):
        """Interrupt all trainings, and kill those that do not end."""
        with self._lock:
            self._is_over = True
            processes = list(self._processes.values())
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        limit = time.monotonic() + _GRACE_SECONDS
        try:
            while self.runs() and time.monotonic() < limit:
                time.sleep(0.1)
        finally:  # also where we are interrupted once more
            with self._lock:
                for process in self._processes.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _interrupted_by_sigterm():
    """Let SIGTERM do what an interrupt does, so that no training outlives us."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _visible_gpus(count):
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(count)]
    return names[:count]


def _told_command(command):
    """The command as a person would type it."""
    program = Path(command[1])
    if program.name == "train_net.py":
        return ["python", program.name, *command[2:]]
    return ["python", *command[1:]]


def _last_words(path, code):
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    ending = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    return f"{said[-1][:300] if said else 'without a word'} ({ending}; see '{path}')"


def _status(running):
    parts = []
    for run in running:
        last = read_metrics(run.folder)[-1:]
        total = run.settings["SOLVER.MAX_ITER"]
        # Where the last evaluation stands, metrics.json counts an iteration past the end.
        done = min(last[0].get("iteration", 0) + 1, total) if last else 0
        parts.append(f"{run.name} ({done:,} of {total:,} iterations)")
    return "  " + ", ".join(parts)


def _tell(text):
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    """Return the commit of this code, "-dirty" where files differ from it.

    Where git does not tell, it is what the environment's ``BALANCED_DET_COMMIT`` says, or else the
    version.
    """
    git = ["git", "-C", str(_ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        tracked = ["ls-files", "--error-unmatch", str(Path(__file__).resolve())]
        subprocess.run([*git, *tracked], check=True, capture_output=True)
        done = subprocess.run(
            [*git, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()
    return os.environ.get("BALANCED_DET_COMMIT") or f"balanced_det {__version__}"


def processor() -> str:
    """Return the name of this machine's CPU."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return "CPU"


# --- Folders of runs ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a finished run's folder tells.

    Attributes:
        folder: its path.
        settings: {full key: value} of its config.
        test_set: the name of the data that it was evaluated on.
        detections: the file of them.
        max_dets: detections of an image that count, None for all.
        metrics: {name: percent, None where nothing is averaged} of its evaluation.
        groups: {position of a class: "r", "c" or "f"}; empty where they are not known.
        train_images: {position of a class: training images}, where they are known.
        protocol: how the metrics were measured.
        record: of ``run.json``; empty where something else started it.
    """

    folder: Path
    settings: dict
    test_set: str
    detections: Path
    max_dets: int | None
    metrics: dict
    groups: dict
    train_images: dict
    protocol: dict
    record: dict

    @property
    def seed(self) -> int:
        """SEED of its config."""
        return self.settings.get("SEED", -1)

    @property
    def annotations(self) -> str:
        """The annotation file of its test set."""
        return annotation_file(self.settings, self.test_set)

    @functools.cached_property
    def _logged(self) -> list[dict]:
        """The lines of metrics.json, of which a long training has thousands."""
        return read_metrics(self.folder)

    def cost(self) -> dict:
        """Return what it took: seconds, and MB; None where the folder does not tell."""
        times = [row["time"] for row in self._logged if "time" in row]
        log = _read_text(self.folder / "log.txt")
        memory = [int(m) for m in re.findall(r"max_mem: (\d+)M", log)]
        step = statistics.median(times) if times else None
        iterations = self.settings.get("SOLVER.MAX_ITER", 0)
        return {
            "seconds_per_iteration": step,
            "training_seconds": None if step is None else step * iterations,
            "gpu_memory_mb": max(memory) if memory else None,
            "host_memory_mb": self.record.get("host_memory_mb"),
            "side_by_side": self.record.get("jobs"),
        }

    def gradient_shares(self) -> dict[str, float | None]:
        """Return {group: percent of the classification gradient that its classes had}.

        The mean over the steps that were logged and the parts that have classes; None where none
        was logged.
        """
        from .engine.gradient_share import NAME

        shares = {}
        for group in GROUPS:
            end = f"/{NAME}_{group}"
            of_group = [v for row in self._logged for key, v in row.items() if key.endswith(end)]
            shares[group] = round(100 * statistics.fmean(of_group), 2) if of_group else None
        return shares

    def provenance(self) -> dict:
        """Return the command, commit and card, in words; None where the folder does not tell."""
        log = _read_text(self.folder / "log.txt")
        cards = re.findall(r"^GPU [\d,]+\s+(.+?)(?: \(arch=.*\))?$", log, re.MULTILINE)
        card = cards[-1].strip() if cards else None
        if self.settings.get("MODEL.DEVICE") == "cpu":
            card = self.record.get("processor", "CPU")
        return {
            "command": self.record.get("command"),
            "commit": self.record.get("commit"),
            "card": card,
            "protocol": self.protocol,
        }


def read_run(folder: str | os.PathLike, task: str = "bbox", test_set: str | None = None) -> Run:
    """Read the folder of a finished run.

    Args:
        folder: ``OUTPUT_DIR`` of ``train_net.py``.
        task: "bbox" or "segm".
        test_set: of ``DATASETS.TEST``; by default the first.

    Raises:
        InputError: it is no run's folder, or holds no results.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"'{folder}' is no folder of a run: it has no config.yaml.")
    settings = read_settings(folder)
    names = list(settings.get("DATASETS.TEST") or [])
    if not names:
        raise InputError(f"'{folder}' was not evaluated: its DATASETS.TEST is empty.")
    test_set = test_set or names[0]
    if test_set not in names:
        raise InputError(f"'{folder}' was not evaluated on '{test_set}': DATASETS.TEST is {names}.")
    _check_ended(folder, settings)
    inference = folder / "inference"
    if len(names) > 1:
        inference = inference / urllib.parse.quote(test_set, safe=" ")
    detections = next((inference / n for n in _DETECTIONS if (inference / n).is_file()), None)
    if detections is None:
        raise InputError(f"'{folder}' holds no results: there are no detections in '{inference}'.")
    content = _read_json(inference / "lvis_results.json") if "lvis" in detections.name else {}
    metrics: Any = content.get(task)
    if content and metrics is None:
        raise InputError(f"'{folder}' has no results for '{task}'.")
    protocol = (content.get("protocol") or {}).get(task)
    if protocol is None:
        protocol = {"protocol": "COCO", "iou_type": task, "max_dets_per_image": 100}
        metrics = _coco_metrics(folder, task)
    classes = list(enumerate(content.get("classes", ())))
    return Run(
        folder=folder,
        settings=settings,
        test_set=test_set,
        detections=detections,
        max_dets=protocol.get("max_dets_per_image"),
        metrics=metrics,
        groups={i: row["group"] for i, row in classes if row.get("group")},
        train_images={i: n for i, row in classes if (n := row.get("train_images")) is not None},
        protocol=protocol,
        record=read_record(folder),
    )


def _check_ended(folder, settings):
    """Refuse a run whose results may be those of an evaluation in the middle."""
    trained = [row["iteration"] + 1 for row in read_metrics(folder) if "iteration" in row]
    wanted = settings.get("SOLVER.MAX_ITER", 0)
    if trained and max(trained) < wanted and not (folder / "model_final.pth").is_file():
        raise InputError(
            f"'{folder}' was stopped at iteration {max(trained):,} of {wanted:,}: resume it first."
        )


def _coco_metrics(folder, task):
    """The last numbers of Detectron2's COCO evaluation in metrics.json."""
    rows = [row for row in read_metrics(folder) if f"{task}/AP" in row]
    if not rows:
        return {}
    return {k.partition("/")[2]: v for k, v in rows[-1].items() if k.startswith(f"{task}/")}


def annotation_file(settings: dict, name: str) -> str:
    """Return the annotation file of a data set that a config lists or Detectron2 knows."""
    from .data.registration import json_file_of  # which needs Detectron2

    return json_file_of(name, settings.get("BALANCE.DATASETS") or ())


def read_settings(folder: Path) -> dict:
    """Return {full key: value} of a run's config.yaml.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / "config.yaml"
    return settings_of_text(_read_text(path), f"'{path}'")


def settings_of_text(text: str, source: str) -> dict:
    """Return {full key: value} of a whole config as YAML; messages call it ``source``."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{source} holds no config.")
    return dict(_leaves(content))


def _leaves(node, prefix="") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_metrics(folder: Path) -> list[dict]:
    """Return the lines of a run's metrics.json; one that is being written is left out."""
    rows = []
    for line in _read_text(folder / "metrics.json").split("\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def read_record(folder: Path) -> dict:
    """Return what ``run.json`` holds; an empty dict where there is none."""
    content = _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    return content if isinstance(content, dict) else {}


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise InputError(f"'{path}' is no valid JSON.") from None


def _read_text(path):
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
