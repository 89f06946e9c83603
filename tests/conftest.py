"""Options and markers of the test run; pyproject.toml says what each marker means."""

import importlib.util
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parents[2] / "shared" / "data"
# Tests of what needs torch alone: of losses, operations and samplers. A machine with a card may
# have no more than that, and can import no other.
OF_TORCH_ALONE = (
    "test_losses.py",
    "test_nms.py",
    "test_ops.py",
    "test_roi_align.py",
    "test_samplers.py",
)
WITHOUT_DETECTRON2 = importlib.util.find_spec("detectron2") is None


def pytest_addoption(parser):
    parser.addoption(
        "--imports",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules or .py files to import first: the tests of all losses, samplers and box "
        "losses then run on those that they register, too",
    )


def pytest_configure(config):
    if modules := config.getoption("--imports"):
        from balanced_det.config.imports import import_modules

        import_modules(modules)


def pytest_report_header():
    if WITHOUT_DETECTRON2:
        return f"Detectron2 is not installed: of the tests only {', '.join(OF_TORCH_ALONE)} run"


def pytest_ignore_collect(collection_path):
    if WITHOUT_DETECTRON2 and collection_path.match("test_*.py"):
        return collection_path.name not in OF_TORCH_ALONE


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("data"):
        if not (DATA / marker.args[0]).exists():
            pytest.skip(f"{DATA / marker.args[0]} is not here")


@pytest.fixture
def undrawn_weights(monkeypatch):
    """Leave the weights of models as memory has them.

    Drawing them is most of the time of building a model of full size that is never run.
    """
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *_, **__: tensor)
