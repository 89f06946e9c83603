"""The documentation's tables are those that the committed numbers make."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks/evidence"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import by_class  # noqa: E402
import plot_losses  # noqa: E402
import tables  # noqa: E402

from balanced_det.runs import distinct_names, parse_setup  # noqa: E402

EVIDENCE = ROOT / "benchmarks/evidence"
RUNS = EVIDENCE / "photos_rcnn_runs.jsonl"
COMPARISON = EVIDENCE / "photos_rcnn_comparison.jsonl"


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_made_of_the_committed_numbers(name):
    text = (ROOT / name).read_text()
    assert "<!-- table: " in text
    assert tables.filled(text) == text


def test_every_table_of_committed_numbers_is_shown():
    text = "".join((ROOT / name).read_text() for name in tables.FILES)
    there = [name for name, (file, *_) in tables.TABLES.items() if (EVIDENCE / file).exists()]
    assert [name for name in there if f"<!-- table: {name} -->" not in text] == []


def test_every_committed_comparison_has_a_table():
    files = {file for file, *_ in tables.TABLES.values()}
    assert {path.name for path in EVIDENCE.glob("*_comparison.jsonl")} <= files


def test_a_page_cannot_show_a_table_without_numbers(monkeypatch):
    monkeypatch.setitem(
        tables.TABLES, "none", ("none_comparison.jsonl", *tables.TABLES["photos"][1:])
    )
    with pytest.raises(FileNotFoundError, match="none_comparison.jsonl"):
        tables.filled("<!-- table: none -->\n<!-- end of table -->")


def test_a_table_that_names_its_setups_names_those_of_the_list():
    lines = (EVIDENCE / "shapes200_rcnn.txt").read_text().splitlines()
    listed = [parse_setup(line).name for line in lines if not line.startswith("#")]
    assert list(tables.TABLES["shapes200"][3].values()) == listed


def test_a_setup_is_called_by_what_it_adds_to_the_first():
    setups = [
        "base",
        "base+cosine+rfs+DATALOADER.REPEAT_THRESHOLD=0.05",
        "base+eql+BALANCE.EqualizationLoss.TAIL_THRESHOLD=0.005",
        "base+BALANCE.ROI_HEADS.CLASSIFIER=CosineLinear",
        "base+SOLVER.BASE_LR=0.01",
        "base+MODEL.WEIGHTS={out}/first_seed{seed}/model_final.pth",
    ]
    assert tables.labels("softmax", setups) == {
        "softmax": setups[0],
        "cosine classifier, repeat-factor sampling": setups[1],
        "EQL, tail below 0.005": setups[2],
        "cosine classifier": setups[3],
        "`SOLVER.BASE_LR=0.01`": setups[4],
        "`MODEL.WEIGHTS={out}/first_seed{seed}/model_final.pth`": setups[5],
    }


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.txt")), ids=lambda path: path.name)
def test_the_rows_of_a_list_have_labels_of_their_own(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    names = [setup.name for setup in distinct_names(list(map(parse_setup, lines)))]
    assert sorted(tables.labels("first", names).values()) == sorted(names)


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


def test_a_loss_is_averaged_over_each_so_many_iterations():
    curve = ([20, 40, 60, 80, 100], [5.0, 3.0, 2.0, 1.0, 0.5])
    assert plot_losses.means_of(curve, 40) == {40: 4.0, 80: 1.5, 120: 0.5}


def test_losses_are_neither_drawn_nor_printed_in_silence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_losses.py", "output/run"])
    with pytest.raises(SystemExit):
        plot_losses.main()
    assert "nothing to do without --out or --every" in capsys.readouterr().err
