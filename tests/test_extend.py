"""What docs/extend.md shows, step by step, in a folder of one's own beside a checkout."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from balanced_det.config import load_config
from balanced_det.config.keys import SLOTS
from balanced_det.data import shapes
from balanced_det.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^```sh\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)
CLASSES = 5


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Write the page's files into a folder beside a link to the checkout."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "balanced_det").symlink_to(ROOT)
    project = folder / "my_project"
    project.mkdir()
    for name, content in FILES.items():
        (project / name).write_text(content, encoding="utf-8")
    return project


@pytest.fixture(scope="module")
def small(project):
    """Return KEY VALUE pairs that make the page's training one of seconds, on data of its own."""
    paths = shapes.generate(project / "data", classes=CLASSES, train=12, val=4, size=64)
    sets = [[str(p), str(p), str(paths.image_root)] for p in (paths.train_json, paths.val_json)]
    return [
        *("BALANCE.DATASETS", str(sets)),
        *("DATASETS.TRAIN", str((sets[0][0],)), "DATASETS.TEST", str((sets[1][0],))),
        *("DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", str(CLASSES)),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    ]


def run(command, folder, *more):
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, *more],
        cwd=folder,
        capture_output=True,
        text=True,
        # The package of this checkout, wherever another one is installed.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_the_files_and_commands_that_are_tried_here():
    names = {"my_losses.py", "my_samplers.py", "my_detectors.py", "my_lazy.py", "by_hand.py"}
    assert FILES.keys() == {*names, "my_detector.yaml", "my_plain.yaml"}
    assert [command.split()[1:4:2] for command in COMMANDS] == [
        ["../balanced_det/train_net.py", "my_detector.yaml"],
        ["../balanced_det/train_net.py", "my_plain.yaml"],
        ["../balanced_det/train_net.py", "my_lazy.py"],
        ["-m", "../balanced_det/tests/test_losses.py"],
    ]


def test_the_pages_detector_trains(project, small):
    stdout = run(COMMANDS[0], project, *small)
    assert "Written to" in stdout
    lines = (project / "output" / "my_detector" / "metrics.json").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert any(step.get("loss_cls", 0) > 0 for step in steps)
    log = (project / "output" / "my_detector" / "log.txt").read_text()
    assert "ObjectnessLoss" in log and "NearMissSampler" in log
    written = (project / "output" / "my_detector" / "config.yaml").read_text()
    assert "SMOOTHING: 0.1" in written and "JITTER: 0.05" in written
    # K class logits and two more.
    assert f"out_features={CLASSES + 2}" in log


def test_the_pages_dense_detector_trains_with_what_it_never_heard_of(project, small):
    keys = ["MODEL.RETINANET.NUM_CLASSES", str(CLASSES)]
    stdout = run(COMMANDS[1], project, *small, *keys)
    assert "Written to" in stdout
    log = (project / "output" / "my_plain" / "log.txt").read_text()
    assert "the optimal prior is" in log
    # Three sizes and three ratios of anchors, K class logits and two more each.
    assert f"Conv2d(16, {9 * (CLASSES + 2)}, kernel_size=(1, 1)" in log


def test_the_pages_python_config_is_checked_and_built(project):
    from balanced_det.build import build_model

    shown = load_config(str(project / "my_lazy.py"), ["train.max_iter=1000", "train.device=cpu"])
    assert shown.SOLVER.MAX_ITER == 1000
    loss = build_model(shown, count=False).roi_heads.box_predictor.criterion.classification_loss
    assert (type(loss).__name__, loss.gamma, loss.num_classes) == ("FocalLoss", 1.5, 1203)


def test_the_tests_of_all_losses_find_the_pages_loss(project):
    collected = run(COMMANDS[3], project, "--collect-only", "-q", "-p", "no:cacheprovider")
    assert "[ObjectnessLoss" in collected


def test_the_pages_objects_work_by_hand(project):
    printed = run("python by_hand.py", project)
    # Two rows of each image: log 2 of objectness each, log 4 of the class on two, over 4; and the
    # L1 distance of 8 numbers, over 4.
    assert printed.strip() == "{'loss_cls': 1.3863, 'loss_box_reg': 2.0}"


# --- Imports, in the loader alone -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def registries_as_before():
    """Take back what a test registers, which other tests of this process would find."""
    before = {registry: dict(registry._methods) for registry in SLOTS.values()}
    modules = set(sys.modules)
    yield
    for registry, methods in before.items():
        registry._methods = methods
    for name in set(sys.modules) - modules:
        if name.startswith("balanced_det_import_"):
            del sys.modules[name]


def write(folder, name, content):
    path = folder / name
    path.write_text(textwrap.dedent(content))
    return path


def test_a_box_loss_and_a_threshold_from_outside_have_keys(tmp_path):
    write(
        tmp_path,
        "more.py",
        """
        from balanced_det.losses import BOX_LOSSES, BoxLoss
        from balanced_det.thresholds import SCORE_THRESHOLDS, ScoreThreshold

        @BOX_LOSSES.register
        class CubicLoss(BoxLoss):
            def __init__(self, scale=2.0):
                super().__init__()
                self.scale = scale

            def loss_sum(self, pred, target):
                return self.scale * (pred - target).abs().pow(3).sum()

        @SCORE_THRESHOLDS.register
        class HalfThreshold(ScoreThreshold):
            def __init__(self, fixed, num_classes, factor=0.5):
                super().__init__(fixed * factor, num_classes)
        """,
    )
    path = write(tmp_path, "config.yaml", "BALANCE: {IMPORTS: [more.py], CubicLoss: {SCALE: 3}}")
    keys = ["BALANCE.RPN.BOX_LOSS", "CubicLoss", "BALANCE.RPN.CubicLoss.SCALE", "4"]
    for _ in range(2):  # a second time nothing is registered twice
        balance = load_config(str(path), keys).BALANCE
        assert (balance.CubicLoss.SCALE, balance.RPN.CubicLoss.SCALE) == (3.0, 4)
        assert balance.HalfThreshold.FACTOR == 0.5


def test_a_relative_import_stays_right_when_the_config_is_written_elsewhere(tmp_path):
    (tmp_path / "far").mkdir()
    module = write(tmp_path / "far", "nothing.py", "")
    write(tmp_path / "far", "base.yaml", "BALANCE: {IMPORTS: [nothing.py]}")
    path = write(tmp_path, "config.yaml", "_BASE_: far/base.yaml")
    assert [str(module)] == load_config(str(path)).BALANCE.IMPORTS


@pytest.mark.parametrize(
    ("imports", "mentioned"),
    [
        ("[no_such_file.py]", "'no_such_file.py': the file does not exist"),
        ("[no_such_module]", "'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("[broken.py]", "cannot be imported: SyntaxError"),
        ("[raising.py]", "cannot be imported: ZeroDivisionError"),
        ("[taken.py]", "A sampler named 'RandomSampler' is registered already"),
        ("broken.py", "a list of modules"),
        ("[3]", "a list of modules"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_sentence(tmp_path, imports, mentioned):
    write(tmp_path, "broken.py", "def")
    write(tmp_path, "raising.py", "1 / 0")
    write(
        tmp_path,
        "taken.py",
        """
        from balanced_det.selection import SAMPLERS, Sampler

        @SAMPLERS.register
        class RandomSampler(Sampler): ...
        """,
    )
    path = write(tmp_path, "config.yaml", f"BALANCE: {{IMPORTS: {imports}}}")
    with pytest.raises(InputError, match="BALANCE.IMPORTS") as caught:
        load_config(str(path))
    assert mentioned in str(caught.value)
    assert "\n" not in str(caught.value)
