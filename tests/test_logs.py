"""What strangers write into files and names acts on no terminal, and reads no other in a log."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from detectron2.utils.logger import setup_logger

from balanced_det.logs import PrintableRecord, escape_log_records, escaped
from balanced_det.report import telling

ROOT = Path(__file__).parents[1]
# Turns text red, clears the screen, sets the window's title, turns the writing round, ends a line.
HOSTILE = "a\x1b[31m\x1b[2Jb\x1b]0;title\x07c\u202ed\re\x9bf"
# What Detectron2 puts before a line, and its word for a warning or an error.
OWN_COLOURS = re.compile(
    r"\x1b\[32m\[\d\d/\d\d \d\d:\d\d:\d\d [\w.]+\]: \x1b\[0m|(\x1b\[[45]m)*\x1b\[31m[A-Z]+\x1b\[0m"
)


def acting_characters(text):
    """Return what is left of a log that a terminal would not print as itself."""
    return {c for c in OWN_COLOURS.sub("", text) if not c.isprintable() and c not in "\n\t"}


def test_escaped_text_keeps_its_lines_and_loses_its_colours():
    assert escaped("\x1b[36mtable\n|\towl 🦉|\x1b[0m") == "table\n|\towl 🦉|"
    assert escaped("\x1b[2J\r\x00") == "\\x1b[2J\\r\\x00"


@pytest.fixture
def printable_records():
    before = logging.getLogRecordFactory()
    escape_log_records()
    yield
    logging.setLogRecordFactory(before)


def test_handlers_of_detectron2_write_nothing_raw(tmp_path, capsys, printable_records):
    logger = setup_logger(str(tmp_path), name="balanced_det_hostile", color=True)
    logger.info("Loading from %s", HOSTILE)
    logger.warning(f"Skip loading parameter '{HOSTILE}'")
    try:
        raise KeyError(HOSTILE)
    except KeyError:
        logger.exception("Exception during %s", HOSTILE)
    for handler in logger.handlers:
        handler.flush()
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.count("\\x1b[2J") >= 3
        assert "Traceback" in text
        assert not acting_characters(text)


def test_every_record_of_a_command_is_a_printable_one(printable_records):
    record = logging.getLogger("fvcore").makeRecord("fvcore", 20, "f", 1, HOSTILE, (), None)
    assert isinstance(record, PrintableRecord)
    assert not acting_characters(record.getMessage())


def test_signs_of_life_are_printable(capfd):
    with telling(f"Reading '{HOSTILE}'"):
        pass
    assert not acting_characters(capfd.readouterr().err)


@pytest.mark.slow
def test_training_on_hostile_names_shows_them_escaped_everywhere(tmp_path):
    data = runs.make_data(tmp_path)
    name, out = f"set {HOSTILE}", tmp_path / f"out{HOSTILE}"
    content = json.loads(data.train_json.read_text())
    content["categories"][0]["name"] = f"class {HOSTILE}"
    image = content["images"][0]
    renamed = Path(image["file_name"]).with_name(f"image {HOSTILE}.jpg")
    image["file_name"] = str(renamed)
    (data.image_root / renamed).write_bytes(b"no image")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    keys = {
        "BALANCE.DATASETS": [[name, str(path), str(data.image_root)]],
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (),
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": runs.CLASSES,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "SOLVER.IMS_PER_BATCH": 2,
        # Two epochs, so that the broken image comes at least once and is replaced.
        "SOLVER.MAX_ITER": 30,
        "SOLVER.STEPS": (),
        "BALANCE.SKIP_BROKEN_IMAGES": 9,
        "DATALOADER.NUM_WORKERS": 1,
        "OUTPUT_DIR": str(out),
    }
    arguments = [str(text) for pair in keys.items() for text in pair]
    command = [sys.executable, "train_net.py", "--config-file", "configs/quickstart.yaml"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    shown = (done.stdout + done.stderr).decode("utf-8", "surrogateescape")
    assert done.returncode == 0, shown
    assert "is missing or unreadable" in shown  # the broken image was named
    assert not acting_characters(shown)
    written = [out / "log.txt", out / "report.html", *out.glob("*.csv")]
    for file in written:
        assert not acting_characters(file.read_text()), file
