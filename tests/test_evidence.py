"""The documentation's tables are those that the committed numbers make."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/evidence"))

import by_class  # noqa: E402
import tables  # noqa: E402

RUNS = ROOT / "benchmarks/evidence/photos_rcnn_runs.jsonl"
COMPARISON = ROOT / "benchmarks/evidence/photos_rcnn_comparison.jsonl"


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_made_of_the_committed_numbers(name):
    text = (ROOT / name).read_text()
    assert "<!-- table: " in text
    assert tables.filled(text) == text


def test_every_table_is_shown():
    text = "".join((ROOT / name).read_text() for name in tables.FILES)
    assert [name for name in tables.TABLES if f"<!-- table: {name} -->" not in text] == []


def test_a_changed_number_changes_the_document(monkeypatch, tmp_path):
    rows = [json.loads(line) for line in COMPARISON.read_text().splitlines()]
    rows[0]["mean"] += 1
    (tmp_path / "changed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, *rest = tables.TABLES["photos"]
    monkeypatch.setitem(tables.TABLES, "photos", (tmp_path / "changed.jsonl", *rest))
    text = (ROOT / "docs/results.md").read_text()
    assert tables.filled(text) != text


def test_the_comparison_of_classes_is_made_of_the_committed_runs(tmp_path):
    by_class.compare(RUNS, tmp_path / "made.jsonl", "photos_rcnn")
    assert (tmp_path / "made.jsonl").read_text() == COMPARISON.read_text()


def test_a_setup_that_is_compared_with_itself_differs_by_nothing(tmp_path):
    rows = [json.loads(line) for line in RUNS.read_text().splitlines()]
    same = [row for row in rows if row["setup"] == "photos_rcnn+bce"]
    copies = [{**row, "setup": "copy"} for row in same]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, same + copies)))
    by_class.compare(tmp_path / "runs.jsonl", tmp_path / "made.jsonl", "photos_rcnn+bce")
    found = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    for row in found:
        if row["setup"] == "copy":
            # The same classes are drawn for both, so what is left are the seeds.
            assert row["difference"] == 0 and row["shown"] == ""
            assert row["difference_low"] == pytest.approx(-row["difference_high"], rel=0.2)
