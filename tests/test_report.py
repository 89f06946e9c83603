"""Pages and the files beside them: whole, escaped, self-contained, drawn."""

import csv
import ctypes
import html.parser
import json
import math
import os
import re
import time

import numpy as np
import pytest
from browser import open_page

from balanced_det.errors import InputError
from balanced_det.logs import escaped
from balanced_det.report import (
    Page,
    figures,
    telling,
    write_csv,
    write_json,
    write_json_lines,
    write_whole,
)
from balanced_det.report.files import finite

NAMES = [
    "plain",
    "<b>bold</b>",
    "</script><script>document.title='taken'</script>",
    "<!-- comment",
    "quote \" and ' and &amp;",
    "comma, and / slash",
    "emoji 😀 and ü",
    "x" * 80,
    "line\nbreak",
    "\ud800 half of a sign",
    "[0].field\\path",
    "",
]
ROWS = [
    {"class": name, "images. all": 10 ** (k % 4), "share": k / 7, "group": "ab"[k % 2]}
    for k, name in enumerate(NAMES)
]
FIGURES = {
    "points": figures.points(
        ROWS, "images. all", "share", color="group", order=("a", "b"), log_x=True, log_y=True
    ),
    "bars": figures.bars(ROWS, "class", "images. all", color="group", log_y=True),
    "plain bars": figures.bars(ROWS, "class", "share"),
    "lines": figures.lines(ROWS, "images. all", "share", color="group", log_x=True),
    "heat": figures.heat(
        [{"a": a, "b": b, "value": len(a + b)} for a in NAMES for b in NAMES],
        "a",
        "b",
        "value",
        order=NAMES,
    ),
    "intervals": figures.intervals(
        [
            {"name": name, "the value": k, "low.": math.nan if k == 3 else k - 1.5, "high": k + k}
            for k, name in enumerate(dict.fromkeys(NAMES))
        ],
        "the value",
        "low.",
        "high",
        "name",
        zero="<i>none</i>",
    ),
    "rules": figures.rules(figures.points(ROWS, "images. all", "share"), {"limit <b>": 10}),
}
EMPTY = [
    figures.points([], "x", "y", color="z", log_x=True),
    figures.bars([{"x": "a", "y": 0}], "x", "y", log_y=True),
]


class Elements(html.parser.HTMLParser):
    """The tags, addresses, and text of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.scripts = [], [], [], []
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        (self.scripts if self._inside in ("script", "style") else self.text).append(data)


def full_page():
    page = Page(NAMES[2], NAMES[1])
    for name in NAMES:
        page.section(name)
        page.say(name, name)
        page.conclude(name, name, kind="warn")
        page.code(name)
        page.tiles({name: name})
    for figure in [*FIGURES.values(), *EMPTY]:
        page.figure(figure, NAMES[1])
    page.table([*NAMES], [[*NAMES]], summary=NAMES[1])
    return page


# --- Escaping -------------------------------------------------------------------------------------


def test_no_name_becomes_a_tag():
    elements = Elements(str(full_page()))
    # Tiles write their numbers bold, one for each name, and a name writes none.
    assert elements.tags.count("b") == len(NAMES)
    # The drawing library, the figures, and what draws them.
    assert elements.tags.count("script") == 3
    shown = "".join(elements.text)
    for name in NAMES:
        assert escaped(name) in shown


def test_figures_of_a_page_are_read_back_as_they_were_given():
    scripts = re.findall(
        r'<script type="application/json" id="figures">(.*?)</script>', str(full_page()), re.S
    )
    assert len(scripts) == 1
    read = json.loads(scripts[0])
    assert read == finite(list(FIGURES.values()))


def test_a_page_asks_for_nothing_outside_itself():
    addresses = Elements(str(full_page())).addresses
    assert addresses  # of its sections
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in str(full_page()) and "url(" not in str(full_page()).split("<body>")[0]


def test_a_picture_stands_in_the_page(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    page = Page("title")
    page.image(tmp_path / "a.png", "<i>")
    assert 'src="data:image/png;base64,iVBORw=="' in str(page)
    assert "<i>" not in str(page)
    with pytest.raises(InputError, match="missing.png' cannot be read"):
        page.image(tmp_path / "missing.png", "")
    with pytest.raises(InputError, match="a.exe' is no picture"):
        page.image(tmp_path / "a.exe", "")


def test_a_page_without_figures_carries_no_drawing_library():
    page = Page("title")
    page.say("text")
    assert len(str(page)) < 10_000


# --- Figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_valid_specification(name):
    compiler = pytest.importorskip("vl_convert")
    figure = json.loads(json.dumps(finite(FIGURES[name])).replace('"container"', "300"))
    assert compiler.vegalite_to_svg(figure).startswith("<svg")


def test_an_interval_without_ends_is_a_point_alone():
    compiler = pytest.importorskip("vl_convert")
    rows = [{"n": "a", "v": 5, "l": 4, "h": 6}, {"n": "b", "v": 9, "l": math.nan, "h": math.nan}]
    figure = figures.intervals(rows, "v", "l", "h", "n")
    drawn = compiler.vegalite_to_svg(finite({**figure, "width": 300}))
    assert drawn.count('aria-roledescription="point"') == 2
    assert drawn.count('aria-roledescription="rule mark"') == 1


def test_a_figure_without_a_row_is_told_and_not_drawn():
    assert "".join(Elements(str(full_page())).text).count("There is nothing to draw.") == len(EMPTY)


def test_hovering_shows_every_field_by_its_name():
    hover = FIGURES["points"]["encoding"]["tooltip"]
    assert [entry["title"] for entry in hover] == list(ROWS[0])
    # A point in a field's name would be read as "the field all of the object images".
    assert "." not in "".join(entry["field"] for entry in hover)


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show():
    rows = [{"x": x, "y": 1} for x in (0, -1, None, 3)]
    kept = figures.points(rows, "x", "y", log_x=True)["data"]["values"]
    assert kept == [{"x": 3, "y": 1}]


@pytest.mark.parametrize(
    "numbers, marks",
    [
        ([0.003, 5000], [10.0**p for p in range(-3, 5)]),
        ([1, 60], [1, 2, 5, 10, 20, 50, 100, 200, 500]),
        ([3, 4], None),
    ],
)
def test_marks_of_a_logarithmic_axis_suit_its_range(numbers, marks):
    rows = [{"x": x, "y": 1} for x in numbers]
    axis = figures.points(rows, "x", "y", log_x=True)["encoding"]["x"]["axis"]
    assert axis.get("values") == (None if marks is None else pytest.approx(marks))


def test_bars_of_counts_have_no_mark_below_one():
    figure = figures.bars([{"x": "a", "y": 3}], "x", "y", log_y=True)
    assert min(figure["encoding"]["y"]["axis"]["values"]) == 1


@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (1200, False)])
def test_a_browser_draws_every_figure_without_an_error(width, dark, tmp_path):
    path = full_page().write(tmp_path / "page.html")
    drawn, content_width, messages = open_page(path, tmp_path, width, dark)
    assert messages == []
    assert drawn == len(FIGURES)
    assert content_width <= width  # nothing to scroll sideways to


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "a.html"
    write_whole(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_rights_of_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    written = write_whole(tmp_path / "a", "text")
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/a' cannot be written"):
        write_whole(tmp_path / "file" / "a", "text")


def test_names_survive_csv(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["class", "n"], [[name, 1] for name in NAMES])
    names = [name.replace("\ud800", "?") for name in NAMES]  # which UTF-8 cannot hold
    with path.open(newline="", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == names


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["class"], [["=1+1"], [-3], [None]])
    assert path.read_text() == 'class\n\'=1+1\n-3\n""\n'


def test_json_holds_arrays_and_no_number_that_is_none(tmp_path):
    content = {"a": np.array([1.5, np.nan, np.inf]), 3: (np.int64(2), None), "ü": True}
    path = write_json(tmp_path / "a.json", content)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": [1.5, None, None],
        "3": [2, None],
        "ü": True,
    }


def test_json_lines_hold_a_row_each_whatever_its_texts(tmp_path):
    rows = [{"name": name, "value": math.nan} for name in NAMES]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    names = [name.replace("\ud800", "?") for name in NAMES]
    assert [json.loads(line) for line in lines] == [{"name": n, "value": None} for n in names]


# --- Progress -------------------------------------------------------------------------------------


def test_work_that_never_lets_go_of_python_still_shows_signs_of_life(capfd):
    # A call of PyDLL keeps Python's lock, as the reading of JSON does. The process that speaks
    # starts in some 30 ms, so that 2 s are enough beside much other work.
    with telling("Waiting", period=0.05):
        ctypes.PyDLL(None).usleep(2_000_000)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Waiting ..."
    assert len(lines) > 2 and all(re.fullmatch(r"  Waiting: .*\d s", line) for line in lines[1:])


def test_the_signs_end_with_the_work(capfd):
    with pytest.raises(ValueError), telling("Failing", period=0.02):
        raise ValueError
    capfd.readouterr()
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
