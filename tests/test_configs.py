"""Every config file of the project loads and builds its model; no data set is needed."""

from pathlib import Path

import pytest
import yaml
from detectron2.data import MetadataCatalog

from balanced_det.build import build_model
from balanced_det.engine import check_model_classes, load_config, train_only
from balanced_det.errors import InputError

FOLDER = Path(__file__).parents[1] / "configs"
FRAGMENTS = FOLDER / "methods"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if FRAGMENTS not in path.parents)
METHODS = [path for path in FILES if not path.name.startswith("Base-")]
# "A few lines over a base": what a method and detector changes, with its comment.
MAX_LINES = 25


def relative(path):
    return str(path.relative_to(FOLDER))


def load(path):
    return load_config(str(path), MODEL__DEVICE="cpu")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_config_loads(path):
    assert load(path).VERSION == 2


@pytest.mark.parametrize("path", METHODS, ids=relative)
def test_config_is_a_few_lines_over_a_base(path):
    content = path.read_text()
    assert (path.parent / yaml.safe_load(content)["_BASE_"]).resolve() in FILES
    assert len(content.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", METHODS, ids=relative)
def test_config_builds_its_model(path):
    cfg = load(path)
    # Classes are counted in data sets, which are not here; whoever trains has them.
    model = build_model(cfg, count=False)
    train_only(model, cfg.BALANCE.TRAIN_ONLY)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("path", METHODS, ids=relative)
def test_config_has_as_many_classes_as_its_data(path):
    cfg = load(path)
    # Detectron2 knows the classes of LVIS and COCO without their files.
    known = [
        name
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        if MetadataCatalog.get(name).get("thing_classes") is not None
    ]
    if not known:
        pytest.skip("a generated data set")
    check_model_classes(cfg, known)


def test_config_file_cannot_run_code(tmp_path):
    path, proof = tmp_path / "unsafe.yaml", tmp_path / "proof"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{proof}"]\n')
    with pytest.raises(InputError, match="unsafe.yaml"):
        load_config(str(path))
    assert not proof.exists()
