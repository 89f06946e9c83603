"""``configs/README.md``: its tables name every config and fragment, and each line of it loads."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from shipped_configs import BASES, CONFIGS, FILES, FITTING, FOLDER, FRAGMENTS, relative

from balanced_det.config import load_config, parse_args
from balanced_det.config.reads import leaves
from balanced_det.runs import parse_setup

ROOT = FOLDER.parent
TEXT = (FOLDER / "README.md").read_text()
ANCHORS = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", TEXT, re.MULTILINE))
LINKS = set(re.findall(r"\]\(([^)\s]+)\)", TEXT))
# `configs/a.yaml --with b`, in the text and in tables
LINES = sorted({*re.findall(r"`(configs/[^`\s]+\.yaml(?: [^`]+)?)`", TEXT)})
TRAINING = "train_net.py --config-file "
COMMANDS = re.findall(r"^python (.+)$", TEXT, re.MULTILINE)


def rows(title):
    """Return the cells of each row of the tables under a title, without their heads."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[1]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# {name: (what it is, region heads, RetinaNet, FCOS)}
TABLE = {
    cells[0].strip("`"): cells[1:]
    for cells in rows("Fragments")
    if len(cells) == 5 and cells[0].startswith("`") and "--" not in cells[0]
}
# (file, the same as a line)
RESULTS = [
    (re.search(r"\((\S+\.yaml)\)", cells[0])[1], cells[1].strip("`"))
    for cells in rows("Published results, and those of this repository")[2:]
]


def load_line(line, monkeypatch):
    """Return the config that ``train_net.py --config-file LINE`` reads."""
    monkeypatch.chdir(ROOT)
    args = parse_args(["--config-file", *shlex.split(line)])
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    return load_config(args.config_file, opts, fragments=args.fragments)


@pytest.mark.parametrize("name", ANCHORS)
def test_an_abbreviated_link_leads_to_a_title(name):
    path, _, anchor = ANCHORS[name].partition("#")
    titles = re.findall(r"^#+ (.+)$", (FOLDER / path).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_abbreviated_link_is_explained_and_used():
    assert set(re.findall(r"\]\[([\w-]+)\]", TEXT)) == ANCHORS.keys()


def test_the_tables_name_every_file():
    paths = [*FILES, *FOLDER.glob("lazy/*.py"), FOLDER / "resnet101.yaml"]
    files = {relative(path) for path in paths}
    assert files == {link for link in LINKS if link.endswith((".yaml", ".py"))}


def test_a_config_is_a_base_or_a_result():
    bases = {f"{base}.yaml" for names in BASES.values() for base in names}
    results = {file for file, _ in RESULTS}
    assert {relative(path) for path in CONFIGS} <= bases | results


def test_the_bases_stand_in_the_rows_of_their_detectors():
    bases = {base for names in BASES.values() for base in names}
    for detector, *cells in rows("Bases")[2:]:
        name = detector.lower().replace("-", "").replace(" ", "_")
        for link in re.findall(r"\((\S+)\.yaml\)", " ".join(cells)):
            assert link in bases and Path(link).name.startswith(name)


def test_the_table_of_fragments_names_every_fragment():
    assert TABLE.keys() == {path.stem for path in FRAGMENTS.rglob("*.yaml")}


@pytest.mark.parametrize("fragment", TABLE)
def test_the_table_refuses_what_the_command_line_does(fragment):
    _, *cells = TABLE[fragment]
    fitting = [fragment in FITTING[detector] for detector in ("rcnn", "retinanet", "fcos")]
    assert [cell != "-" for cell in cells] == fitting
    measured = re.compile(r"not run|\[[\w ]+\]\[[\w-]+\](, \[[\w ]+\]\[[\w-]+\])*")
    assert all(measured.fullmatch(cell) for cell in cells if cell != "-")


@pytest.mark.parametrize("line", LINES)
def test_a_line_loads(line, monkeypatch):
    load_line(line, monkeypatch)


@pytest.mark.parametrize("file, line", RESULTS, ids=[file for file, _ in RESULTS])
def test_the_file_of_a_result_is_the_line_beside_it(file, line, monkeypatch):
    assert line in LINES
    expected = leaves(load_line(line, monkeypatch), "")
    assert leaves(load_line(f"configs/{file}", monkeypatch), "") == expected


def test_the_list_of_bases_is_what_the_command_line_gives(tmp_path, monkeypatch):
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    content["_BASE_"] = [str(ROOT / base) for base in content["_BASE_"]]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    command = next(c for c in COMMANDS if "DATALOADER.REPEAT_THRESHOLD" in c)
    expected = load_line(command.removeprefix(TRAINING), monkeypatch)
    assert leaves(load_line(str(path), monkeypatch), "") == leaves(expected, "")


# Pages and lists of runs that name configs of this repository.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    FOLDER / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks" / "evidence").glob("*.txt")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_config_that_a_page_names_loads(page, monkeypatch):
    text = page.read_text()
    words = [
        word
        for word in re.findall(r"(?<![\w/.])(?:configs|benchmarks/evidence)/[\w./{},+=-]+", text)
        if re.search(r"\.(yaml|py)\b", word)
        and "lazy/common" not in word
        and not re.match(r"benchmarks/.*\.py", word)  # a program
    ]
    # A shell writes out a.yaml{,+b,+c}.
    shell = ["bash", "-c", f"printf '%s\\n' {' '.join(words)}"]
    expanded = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split()
    assert len(expanded) >= len(words)
    monkeypatch.chdir(ROOT)
    for word in sorted(set(expanded)):
        setup = parse_setup(word.rstrip(".,"))
        load_config(setup.config_file, setup.opts, fragments=setup.fragments)
