"""The documentation: its commands, configs, links, quoted messages and generated parts are right.

A command of a page is run as far as it is cheap: small programs wholly, on small data; a training
up to its model, built; a comparison up to its first training; any other program up to what its
parser accepts. A block that cannot be tried has ``<!-- not run: why -->`` in the line above it.
"""

import argparse
import ast
import importlib
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from balanced_det import cli, compare
from balanced_det.build import build_model
from balanced_det.config import load_config, parse_args
from balanced_det.config.keys import SLOTS
from balanced_det.data import shapes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "datasets" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += sorted(ROOT.glob("configs/README.md"))
# Its blocks are files and commands of one project, which tests/test_extend.py writes and runs.
TRIED_ELSEWHERE = {"docs/extend.md"}
PROGRAMS = ("python", "balanced-det", "make", "pip")
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *kinds):
    """Return (line, text) of the code blocks of a page that are to be tried."""
    text = page.read_text(encoding="utf-8")
    if name_of(page) in TRIED_ELSEWHERE:
        return []
    return [
        (text[: found.start("text")].count("\n") + 1, found["text"])
        for found in FENCE.finditer(text)
        if found["kind"] in kinds and not found["why"]
    ]


def prose(page):
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands():
    """Return every command of every page once."""
    distinct = {}
    for param in _commands():
        distinct.setdefault(tuple(param.values[0]), param)
    return list(distinct.values())


def _commands():
    """Yield the commands of blocks and of lines of text."""
    for page in PAGES:
        before = []
        for line, text in blocks(page, "", "sh", "text"):
            for offset, written in enumerate(re.sub(r"\\\n", " ", text).splitlines()):
                if written.split(" ")[0] in PROGRAMS:
                    words = expanded(shlex.split(written, comments=True))
                    before = continued(words, before)
                    yield pytest.param(before, id=f"{name_of(page)}:{line + offset}")
        pattern = rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`"
        if name_of(page) in TRIED_ELSEWHERE:
            continue
        for number, written in enumerate(re.findall(pattern, prose(page))):
            words = continued(expanded(shlex.split(written)), [])
            yield pytest.param(words, id=f"{name_of(page)}, in text, {number}")


def continued(words, before):
    """Replace "..." by what it stands for: the setups of the command before, or more keys."""
    if "..." not in words:
        return words
    index = words.index("...")
    setups = itertools.takewhile(lambda word: not word.startswith("--"), before[index:])
    return [*words[:index], *setups, *words[index + 1 :]]


def expanded(words):
    """Expand braces as a reader's shell does."""
    found = []
    for word in words:
        if re.search(r"\{.*,.*\}", word) and " " not in word:
            shell = ["bash", "-fc", f"printf '%s\\n' {word}"]
            found += subprocess.run(shell, capture_output=True, text=True).stdout.splitlines()
        else:
            found.append(word)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Make a folder that looks as the pages take it: a checkout, and photographs in my_data."""
    home = tmp_path_factory.mktemp("docs")
    for name in ("configs", "benchmarks", "train_net.py"):
        (home / name).symlink_to(ROOT / name)
    (home / "datasets").mkdir()
    (home / "datasets" / "convert.py").symlink_to(ROOT / "datasets" / "convert.py")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (home / "my_data" / kind / split).mkdir(parents=True)
        for number in range(6):
            image = Image.new("RGB", (64, 48), (40 * number, 90, 120))
            image.save(home / "my_data" / "images" / split / f"{number}.jpg")
            label = home / "my_data" / "labels" / split / f"{number}.txt"
            label.write_text(f"{number % 2} 0.5 0.5 0.4 0.5\n")
    (home / "my_data" / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: [cup, spoon]\n"
    )
    shapes.generate(home / "datasets" / "shapes", classes=20, train=40, val=20, size=32)
    for page in PAGES:
        for _, text in blocks(page, ""):
            if named := re.match(r"# (\w+\.txt)\n", text):
                (home / named[1]).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        # What own_data.md begins with, from its own lines.
        walk = shlex.split(blocks(ROOT / "docs" / "own_data.md", "sh")[0][1])
        starts = [index for index, word in enumerate(walk) if word == "python"]
        for start, end in itertools.pairwise([*starts, len(walk)]):
            if walk[start + 1 : start + 3] == ["-m", "balanced_det.predict"]:
                break  # needs a training
            if walk[start + 1] != "train_net.py":
                assert not main_of(walk[start:end], patch)()
        truth = json.loads((home / "datasets" / "my_data" / "val.json").read_text())
        found = [
            {k: box[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for box in truth["annotations"]
        ]
        for name, content in {"GT": truth, "TRAIN": truth, "DETECTIONS": found}.items():
            (home / f"{name}.json").write_text(json.dumps(content))
    return home


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


class Stopped(Exception):
    """A program has read its command line, or comes to its first training."""


def main_of(words, monkeypatch):
    """Return a function that runs the Python program of a command in this process."""
    match words:
        case ["balanced-det", name, *arguments]:
            module = cli._COMMANDS[name][0]
        case ["python", "-m", module, *arguments]:
            pass
        case ["python", script, *arguments]:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.syspath_prepend(str(Path(script).resolve().parent))
            return runpy.run_path(script, run_name="docs")["main"]
    main = importlib.import_module(
        f"{module}.__main__" if module == "balanced_det.evaluation" else module
    ).main
    return lambda: main(arguments)


def train(arguments):
    """Do what a training does up to its model, which refuses keys that it does not read."""
    args = parse_args(arguments)
    cfg = load_config(args.config_file, args.opts, fragments=args.fragments)
    build_model(cfg, count=False)


def stop_at_training(runs, jobs):
    assert runs
    for run in runs:
        if run.seed == 0:
            train(list(run.command[run.command.index("--config-file") :]))
    raise Stopped


def stop_after_parsing(parser, *given, parse_args=argparse.ArgumentParser.parse_args):
    parse_args(parser, *given)
    raise Stopped


@pytest.mark.usefixtures("undrawn_weights")
@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_documentation_works(words, at_home, monkeypatch):
    match words:
        case ["make", target]:
            assert re.search(
                rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE
            )
        case ["pip", "install", *what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            named = re.findall(r"(?:balanced_det|\.)\[(.*?)\]", " ".join(what))
            extras = {extra for names in named for extra in names.split(",")}
            assert extras <= project["optional-dependencies"].keys()
            assert extras or what == ["-e", "."]
        case ["balanced-det", name]:  # as a text calls it
            assert name in cli._COMMANDS
        case ["python", "-m", module]:
            assert importlib.import_module(module)
        case ["python", "train_net.py", *arguments] | ["balanced-det", "train", *arguments]:
            train(arguments)
        case ["python", "-m", "balanced_det.compare", *_] | ["balanced-det", "compare", *_]:
            monkeypatch.setattr(compare, "train_all", stop_at_training)
            with pytest.raises(Stopped):
                main_of(words, monkeypatch)()
        case ["python", "-m", "balanced_det.evaluation", *_]:
            assert main_of(words, monkeypatch)() in (0, None)
        case _:
            main = main_of(words, monkeypatch)
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
            with pytest.raises(Stopped):
                main()


def test_a_block_of_commands_holds_commands_alone():
    for page in PAGES:
        for line, text in blocks(page, "sh"):
            for written in re.sub(r"\\\n", " ", text).splitlines():
                assert shlex.split(written)[0] in PROGRAMS, f"{name_of(page)}:{line}: {written}"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        pytest.param(page, text, id=f"{name_of(page)}:{line}")
        for page in PAGES
        for line, text in blocks(page, "yaml")
    ],
)
def test_a_config_of_the_documentation_is_read(page, text, at_home):
    (at_home / "block.yaml").write_text(text, encoding="utf-8")
    load_config("block.yaml")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"{name_of(page)}:{line}")
        for page in PAGES
        for line, text in blocks(page, "python")
    ],
)
def test_python_of_the_documentation_finds_what_it_imports(text):
    imports = [
        node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert imports
    exec(compile(ast.Module(imports, []), "the documentation", "exec"), {})


# --- Links ----------------------------------------------------------------------------------------


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    found, text = {}, FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", bare).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, last in found.items() for n in range(last + 1)}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of
)
def test_links_of_the_documentation_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}"


def test_every_page_can_be_reached_from_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in site


# --- What is quoted and generated -----------------------------------------------------------------


def test_messages_that_troubleshooting_explains_are_messages_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = page[page.index("## Messages") : page.index("## Questions")]
    quoted = re.findall(r"^### `(.+)`$", messages, re.MULTILINE)
    assert len(quoted) > 10
    said = "\0".join(
        node.value
        for path in ROOT.glob("balanced_det/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    for message in quoted:
        for part in message.split("…"):
            assert part.strip() in said, message


@pytest.fixture(scope="module")
def site_tools():
    """Import the modules that the site is built with, of tools/docs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "docs"))
        yield {name: importlib.import_module(name) for name in ("figures", "keys")}
        for name in ("figures", "keys", "text", "walk"):
            sys.modules.pop(name, None)


def marked(kind):
    """Return what the pages' comments ``<!-- kind: ... -->`` hold, as words."""
    found = (
        re.findall(rf"<!-- {kind}: (.*?) -->", page.read_text(encoding="utf-8"), re.DOTALL)
        for page in PAGES
    )
    return [text.split() for text in itertools.chain.from_iterable(found)]


def test_every_method_has_a_page():
    named = {word for words in marked("keys") for word in words}
    methods = {
        name
        for registry in SLOTS.values()
        for name, method in registry
        if method.__module__.startswith("balanced_det.")  # other tests register theirs
    }
    assert methods <= named, "a method needs a page in docs/methods with <!-- keys: Name -->"


def test_tables_of_keys_are_made_of_what_the_code_has(site_tools):
    for names in marked("keys"):
        site_tools["keys"].table(names)
    everything = site_tools["keys"].table(["all"])
    assert "| <code>BALANCE.<wbr>FocalLoss.<wbr>GAMMA</code> | `2.0` | exponent of" in everything


def test_every_key_has_a_meaning(site_tools):
    empty = [key for key, text in site_tools["keys"].meanings().items() if not text]
    assert empty == []


def test_every_figure_is_shown_and_drawn(site_tools):
    pytest.importorskip("matplotlib")
    shown = [words[0].rstrip(":") for words in marked("figure")]
    assert sorted(shown) == sorted(site_tools["figures"].names())
    for name in shown:
        assert "</svg>" in site_tools["figures"].svg(name)


def test_every_module_has_its_place_in_the_reference():
    named = {word for words in marked("modules") for word in words}
    for path in ROOT.glob("balanced_det/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1].startswith("_") or parts[1] == "configs":
            continue
        assert {".".join(parts), ".".join(parts[:-1])} & named, f"{'.'.join(parts)} is nowhere"
