"""Set-up undoes what the carrier changed in Detectron2, or says that it cannot."""

import importlib.util
from pathlib import Path

import detectron2
import pytest
from detectron2.data import detection_utils

SCRIPT = Path(__file__).parents[1] / "tools" / "restore_detectron2.py"
_spec = importlib.util.spec_from_file_location("restore_detectron2", SCRIPT)
restore_detectron2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(restore_detectron2)

PACKAGE = Path(detectron2.__file__).parent
EDITS = restore_detectron2.EDITS

pytestmark = pytest.mark.skipif(
    "geowatch_tpl" not in PACKAGE.parts, reason="Detectron2 is not the one that make installs"
)


@pytest.fixture
def carried(tmp_path):
    """Return a copy of the files as the carrier has them."""
    for edit in EDITS:
        text = (PACKAGE / edit.path).read_text()
        path = tmp_path / edit.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(edit.new, edit.old) if edit.old not in text else text)
    return tmp_path


def test_installed_detectron2_is_restored():
    assert restore_detectron2.restore(PACKAGE) == []


def test_carried_files_become_the_installed_ones(carried):
    assert len(restore_detectron2.restore(carried)) == len(EDITS)
    for edit in EDITS:
        assert (carried / edit.path).read_bytes() == (PACKAGE / edit.path).read_bytes()
    assert restore_detectron2.restore(carried) == []


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.path)
def test_any_other_text_stops_the_set_up_and_changes_nothing(carried, edit, capsys):
    path = carried / edit.path
    path.write_text(path.read_text() + "\n")
    before = {e.path: (carried / e.path).read_bytes() for e in EDITS}
    assert restore_detectron2.main([str(carried)]) == 1
    assert f"{path}' is not the text that this script restores" in capsys.readouterr().err
    assert {e.path: (carried / e.path).read_bytes() for e in EDITS} == before


def test_missing_file_stops_the_set_up(carried, capsys):
    (carried / EDITS[0].path).unlink()
    assert restore_detectron2.main([str(carried)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_photographs_are_turned_by_the_installed_detectron2():
    assert Path(detection_utils.__file__) == PACKAGE / "data" / "detection_utils.py"
    assert EDITS[0].old not in Path(detection_utils.__file__).read_text()
