"""The recipes of CONTRIBUTING.md, executed as they stand in a copy of the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## Recipe: (.*?)\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE))
_FILE = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^```sh\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of what a recipe's files and commands need of this checkout."""
    for name in ("balanced_det", "tests"):
        # Links stay links: the package's configs are those of the checkout.
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_recipes_are_for_a_loss_a_sampler_and_a_detector():
    assert list(RECIPES) == ["a loss", "a sampler", "a detector"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_works_as_it_is_written(recipe, checkout):
    files, commands = _FILE.findall(RECIPES[recipe]), _COMMAND.findall(RECIPES[recipe])
    assert len(files) == 2 and len(commands) == 1
    for name, content in files:
        assert not (checkout / name).exists()
        (checkout / name).write_text(content, encoding="utf-8")
    program, *arguments = shlex.split(commands[0])
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "-p", "no:cacheprovider"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The recipe's own test ran, and where all methods of a kind are tested those tests as well.
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 2 or recipe == "a detector"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_passes_the_linter(recipe, checkout):
    names = []
    for name, content in _FILE.findall(RECIPES[recipe]):
        (checkout / name).write_text(content, encoding="utf-8")
        names.append(name)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *names],
            cwd=checkout,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
