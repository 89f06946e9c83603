"""Every config file of the project loads and builds its model; no data set is needed."""

import pytest
from detectron2.data import MetadataCatalog
from shipped_configs import CONFIGS, FILES, FOLDER, FRAGMENTS, load, relative

from balanced_det.build import build_model
from balanced_det.config import load_config
from balanced_det.config.files import read_layers
from balanced_det.config.reads import leaves
from balanced_det.engine import check_model_classes, train_only
from balanced_det.errors import InputError
from balanced_det.new import STARTS


def load_file(path):
    return load(relative(path).removesuffix(".yaml"))


def own_keys(path):
    """Return {full key: value as text} of a file alone, without its bases."""
    return {key: str(value) for key, value in read_layers(str(path))[-1].values.items()}


def all_keys(path):
    """Return {full key: value as text} of a file and its bases."""
    layers = read_layers(str(path))
    return {key: str(value) for layer in layers for key, value in layer.values.items()}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_config_loads(path):
    assert load_file(path).VERSION == 2


@pytest.mark.usefixtures("undrawn_weights")
@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_builds_its_model(path):
    cfg = load_file(path)
    # Classes are counted in data sets, which are not here; whoever trains has them.
    model = build_model(cfg, count=False)
    train_only(model, cfg.BALANCE.TRAIN_ONLY)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_names_its_data(path):
    cfg = load_file(path)
    assert len(cfg.DATASETS.TRAIN) == len(cfg.DATASETS.TEST) == 1


# Detectron2 knows the classes of LVIS and COCO without their files.
@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.parent.name.startswith(("coco", "lvis"))],
    ids=relative,
)
def test_config_has_as_many_classes_as_its_data(path):
    cfg = load_file(path)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    assert all(MetadataCatalog.get(name).thing_classes for name in names)
    check_model_classes(cfg, names)


def test_no_two_configs_are_the_same():
    contents = [leaves(load_file(path), "") for path in CONFIGS]
    same = [
        (relative(CONFIGS[i]), relative(CONFIGS[j]))
        for j in range(len(CONFIGS))
        for i in range(j)
        if contents[i] == contents[j]
    ]
    assert not same


# What a new config is a copy of, so that it stands for itself.
WHOLE = {FOLDER / start.base for start in STARTS.values()}


@pytest.mark.parametrize("path", sorted(WHOLE), ids=relative)
def test_what_new_configs_are_copies_of_has_no_base(path):
    assert len(read_layers(str(path))) == 1


@pytest.mark.parametrize("path", sorted({*FOLDER.rglob("*.yaml")} - WHOLE), ids=relative)
def test_a_config_names_its_fragments_and_copies_none(path):
    keys = own_keys(path)
    for fragment in FRAGMENTS.rglob("*.yaml"):
        # A fragment of another detector may set the same of Detectron2's keys.
        strange = FRAGMENTS in path.parents and fragment.parent not in (path.parent, FRAGMENTS)
        if fragment != path and not strange:
            assert not all_keys(fragment).items() <= keys.items(), relative(fragment)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=relative)
def test_a_config_says_what_it_is(path):
    assert path.read_text().startswith("# ")


def test_config_file_cannot_run_code(tmp_path):
    path, proof = tmp_path / "unsafe.yaml", tmp_path / "proof"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{proof}"]\n')
    with pytest.raises(InputError, match="unsafe.yaml"):
        load_config(str(path))
    assert not proof.exists()
