"""What is published beside the code: the wheel, the command, and the files that name versions."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import balanced_det
from balanced_det import cli, losses, samplers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel of a copy, since building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "output", "datasets", "build", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    done = subprocess.run([*pip, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_every_module_config_and_page_part(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.css", "*.js", "*.typed")
        for path in (ROOT / "balanced_det").rglob(pattern)
    }
    configs = {
        f"balanced_det/configs/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert len(modules) > 30 and len(configs) > 30
    assert modules | configs <= packed
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in packed)


@pytest.mark.slow
def test_an_installed_wheel_analyses_data_and_writes_a_config_in_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--target", site, wheel], check=True)
    # Dependencies are this environment's; the package is the wheel's alone.
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = site / "bin" / "balanced-det"

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import balanced_det; print(balanced_det.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site))
    # Its configs and the fragments of --with are found without a checkout.
    fragments = (
        "from balanced_det.config import load_config; from balanced_det.new import CONFIGS; "
        "cfg = load_config(str(CONFIGS / 'quickstart_softmax.yaml'), fragments=['eql']); "
        "print(cfg.BALANCE.ROI_HEADS.CLASSIFICATION_LOSS)"
    )
    found = subprocess.run(
        [sys.executable, "-c", fragments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "EqualizationLoss\n", found.stderr
    run("shapes", "--out", "data", "--classes", "4", "--train", "12", "--val", "4", "--size", "64")
    run("analyze", "--data", "data/train.json", "--row-images", "3", "--out", "analysis")
    assert (tmp_path / "analysis" / "analysis.html").stat().st_size > 100_000
    run("new", "--train", "data/train.json", "--val", "data/val.json", "--out", "detector.yaml")
    config = yaml.safe_load((tmp_path / "detector.yaml").read_text())
    assert config["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 4

    # Training, comparing, serving a checkpoint and making its page, by the wheel alone.
    short = "SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
    run("train", "--config-file", "detector.yaml", *short.split(), "OUTPUT_DIR", "out")
    run("compare", "detector.yaml", "out", "--seeds", "1", "--out", "compared", *short.split())
    assert (tmp_path / "compared" / "compare.html").stat().st_size > 100_000
    shown = run("predict", "out/model_final.pth", "data/images", "--out", "found")
    assert "objects in 16 files, threshold best-f1" in shown
    assert len(list((tmp_path / "found").rglob("*.jpg"))) == 16
    run("report", "out")
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


def test_the_command_lists_what_it_can_do(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("analyze", "new", "shapes"):
        assert f"\n  {name} " in shown
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"balanced_det {balanced_det.__version__}\n"


def test_an_unknown_subcommand_lists_the_known_ones(capsys):
    assert cli.main(["analyse"]) == 2
    assert "there is no 'analyse'; known are: analyze, new" in capsys.readouterr().err


def test_every_listed_subcommand_can_be_run(capsys):
    for name, (module, _) in cli._available().items():
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0, (name, module)
        assert "usage:" in capsys.readouterr().out


def test_a_version_is_written_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == balanced_det.__version__
    assert citation["license"] == PROJECT["license"]["text"] == "Apache-2.0"
    assert f"## {balanced_det.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_papers_are_cited():
    cited = {
        entry["url"] for entry in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    }
    numbers = ("2003.05176", "1909.04868", "1811.05181", "1904.02701")
    assert cited == {f"https://arxiv.org/abs/{number}" for number in numbers}


def test_commits_are_linted_by_the_version_that_make_installs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revision = next(hook["rev"] for hook in hooks if "ruff" in hook["repo"])
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "requirements.txt").read_text()


def test_the_oldest_supported_python_is_tested_and_linted_for():
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    oldest, *newer = job["strategy"]["matrix"]["include"]
    version = PROJECT["requires-python"].removeprefix(">=")
    assert oldest == {"python": version, "options": "OLDEST=1"}
    assert newer and not any(run["options"] for run in newer)
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == "py" + version.replace(".", "")
    assert tools["mypy"]["python_version"] == version
    assert job["steps"][-1]["run"].startswith("make test-all")


def test_the_oldest_torch_that_is_tested_is_the_oldest_that_is_required():
    (required,) = (d for d in PROJECT["dependencies"] if d.startswith("torch>"))
    tested = re.search(r"^torch==(\d+\.\d+)", (ROOT / "requirements-oldest.txt").read_text(), re.M)
    assert required == f"torch>={tested[1]}"


def test_every_dependency_is_pinned_for_tests():
    pinned = {
        re.split(r"[=<>]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    optional = PROJECT["optional-dependencies"]
    extras = [name for extra in ("report", "pretrained", "dev") for name in optional[extra]]
    named = {
        re.split(r"[=<>]", requirement)[0].lower().replace("_", "-")
        for requirement in [*PROJECT["dependencies"], *extras]
    }
    assert named <= pinned


@pytest.mark.parametrize(
    ("package", "registries"),
    [
        (losses, (losses.CLASSIFICATION_LOSSES, losses.BOX_LOSSES)),
        (samplers, (samplers.SAMPLERS,)),
    ],
    ids=["losses", "samplers"],
)
def test_type_checkers_see_every_registered_method(package, registries):
    tree = ast.parse(Path(package.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: f"{package.__name__}.{node.module}" for node in imports for alias in node.names
    }
    for registry in registries:
        for name, method in registry:
            if method.__module__.startswith(package.__name__):  # not one of another test
                assert seen.get(name) == method.__module__, f"{name} is not imported for checkers"
