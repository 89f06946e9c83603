"""Config files and command lines: bases, fragments, imports, and files that a stranger wrote."""

import os
import textwrap

import pytest
import yaml

from balanced_det.build import build_model
from balanced_det.config import load_config
from balanced_det.config.files import read_layers
from balanced_det.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file beside the others and returns its path."""

    def write(content, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(textwrap.dedent(content), encoding="utf-8")
        return str(path)

    return write


def refuse(path, *mentioned, opts=(), **options):
    with pytest.raises(InputError) as caught:
        load_config(path, opts, **options)
    message = str(caught.value)
    for words in mentioned:
        assert str(words) in message
    assert "\n" not in message


# --- Bases ----------------------------------------------------------------------------------------


def test_a_later_base_wins_over_an_earlier_one_and_the_file_over_all(write):
    write("SOLVER: {MAX_ITER: 1, STEPS: [1], BASE_LR: 1.0}", "a.yaml")
    write("SOLVER: {MAX_ITER: 2, STEPS: [2]}", "b.yaml")
    solver = load_config(write("_BASE_: [a.yaml, b.yaml]\nSOLVER: {MAX_ITER: 3}")).SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.BASE_LR) == (3, (2,), 1.0)


def test_a_base_is_relative_to_the_file_that_names_it(write):
    write("SEED: 7", "far/a.yaml")
    write("_BASE_: a.yaml", "far/b.yaml")
    assert load_config(write("_BASE_: far/b.yaml")).SEED == 7


@pytest.mark.parametrize("base", ["config.yaml", "[other.yaml]"])
def test_a_file_that_has_itself_as_its_base_is_refused(write, base):
    write("_BASE_: config.yaml", "other.yaml")
    path = write(f"_BASE_: {base}")
    refuse(path, path, "itself")


@pytest.mark.parametrize("base", ["https://example.invalid/a.yaml", "detectron2://a.yaml"])
def test_a_base_from_an_address_is_refused_unless_the_command_line_allows_it(write, base):
    path = write(f"_BASE_: '{base}'\nBALANCE: {{BASE_FROM_URL: True}}")
    refuse(path, path, base, "BALANCE.BASE_FROM_URL")


def test_an_allowed_address_is_read_as_a_file_is(write, tmp_path):
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    class Here(PathHandler):
        def _get_supported_prefixes(self):
            return ["here://"]

        def _open(self, path, mode="r", buffering=-1, **_):
            return open(tmp_path / path.removeprefix("here://"), mode)

    PathManager.register_handler(Here(), allow_override=True)
    write("SEED: 7", "a.yaml")
    path = write("_BASE_: 'here://a.yaml'")
    assert load_config(path, ["BALANCE.BASE_FROM_URL", "True"]).SEED == 7
    refuse(
        write("_BASE_: 'here://no.yaml'"), "no.yaml", "read", opts=["BALANCE.BASE_FROM_URL", "True"]
    )


@pytest.mark.parametrize("base", ["3", "{a: b}", "[a.yaml, 3]", "''", "[[a.yaml]]"])
def test_a_base_that_is_no_path_is_refused(write, base):
    write("SEED: 7", "a.yaml")
    path = write(f"_BASE_: {base}")
    refuse(path, path, "_BASE_")


# --- What YAML would take in silence --------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key", "lines"),
    [
        ("SEED: 1\nSEED: 2", "'SEED'", "lines 1 and 2"),
        ("BALANCE:\n  IMPORTS: []\nSEED: 1\nBALANCE: {}", "'BALANCE'", "lines 1 and 4"),
        ("MODEL:\n  RPN:\n    NMS_THRESH: 0.1\n    NMS_THRESH: 0.1", "'MODEL.RPN.NMS_THRESH'", "3"),
        ('SEED: 1\n"SEED": 2', "'SEED'", "1 and 2"),
    ],
)
def test_a_key_that_stands_twice_in_one_file_is_refused(write, content, key, lines):
    path = write(content)
    refuse(path, path, key, "twice", lines)


def test_a_key_twice_in_a_base_is_refused_too(write):
    base = write("SEED: 1\nSEED: 1", "base.yaml")
    refuse(write("_BASE_: base.yaml"), base, "'SEED'")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_a_byte_order_mark_tells_are_read(write, encoding):
    path = write("OUTPUT_DIR: './Ausgaben für Änne'".encode(encoding))
    assert load_config(path).OUTPUT_DIR == "./Ausgaben für Änne"


def alias_bomb(levels=12, width=10):
    lines = ["a0: &a0 [1, 2]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


HOSTILE = {
    "aliases that multiply": (alias_bomb(), "aliases"),
    "an alias inside itself": ("SEED: &a [*a]", "itself"),
    "deep nesting": ("SEED: " + "[" * 5000 + "]" * 5000, "deep"),
    "latin-1": ("OUTPUT_DIR: für".encode("latin-1"), "no valid YAML"),
    "a control character": (b"OUTPUT_DIR: '\x07'", "no valid YAML"),
    "two documents": ("SEED: 1\n---\nSEED: 2", "no valid YAML"),
    "an impossible date": ("OUTPUT_DIR: 2020-13-45", "cannot be read"),
    "a number as a key": ("1: 2", "1"),
    "a key with dots": ("MODEL.MASK_ON: True", "'MODEL.MASK_ON'"),
    "code": ("OUTPUT_DIR: !!python/object/apply:os.getcwd []", "no valid YAML"),
    "a file of megabytes": ("SEED: 1\n" + "#" * 1_100_000, "bytes"),
    "an empty node": ("MODEL:", "MODEL"),
    "a value for a node": ("MODEL: 3", "MODEL"),
    "a node for a value": ("SEED: {A: 1}", "SEED"),
    "text that is deep": ("OUTPUT_DIR: '" + "(" * 100_000 + "'", ""),
}


@pytest.mark.parametrize("content, mentioned", HOSTILE.values(), ids=HOSTILE)
def test_what_a_stranger_may_write_is_one_sentence_or_read(write, content, mentioned):
    path = write(content)
    if not mentioned:
        load_config(path)
        return
    refuse(path, path, mentioned)


def test_a_named_pipe_is_no_config_file(tmp_path):
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    refuse(str(path), path)


def test_layers_say_which_file_set_what(write):
    base = write("SEED: 1\nMODEL: {MASK_ON: True}", "base.yaml")
    path = write("_BASE_: base.yaml\nSEED: 2")
    layers = [(layer.source, layer.values) for layer in read_layers(path)]
    assert layers == [(base, {"SEED": 1, "MODEL.MASK_ON": True}), (path, {"SEED": 2})]


# --- Values ---------------------------------------------------------------------------------------


def test_a_whole_number_serves_where_a_float_is_wanted(write):
    content = "SOLVER: {BASE_LR: 1}\nBALANCE: {EqualizationLoss: {TAIL_SHARE: 0.5}}"
    cfg = load_config(write(content), ["BALANCE.RPN.BOX_WEIGHT", "2"], BALANCE__FocalLoss__GAMMA=1)
    values = (cfg.SOLVER.BASE_LR, cfg.BALANCE.RPN.BOX_WEIGHT, cfg.BALANCE.FocalLoss.GAMMA)
    assert values == (1.0, 2.0, 1.0)
    assert all(isinstance(value, float) for value in values)


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("BALANCE.COUNT", "False", "argument 'count' of balanced_det.build.build_model"),
        (
            "BALANCE.SoftmaxEqualizationLoss.KEEP_PROBABILITY",
            "0.5",
            "BALANCE.SoftmaxEqualizationLoss.DROP_PROBABILITY",
        ),
        ("BALANCE.DENSE.SCORE_THRESHOLD_FLOOR", "0.1", "BALANCE.ClassAdaptiveThreshold.FLOOR"),
    ],
)
def test_an_old_key_is_refused_in_a_sentence_that_names_the_new_one(write, old, value, new):
    refuse(write("SEED: 1"), old, new, opts=[old, value])
    nested = value
    for part in reversed(old.split(".")):
        nested = {part: nested}
    path = write(yaml.safe_dump(nested))
    refuse(path, path, old, new)


def test_the_version_of_another_time_is_refused(write):
    path = write("VERSION: 1\nMODEL: {WEIGHT: ''}")
    refuse(path, path, "VERSION is 1")


# --- Layers of one method over another ------------------------------------------------------------

RETINANET = """
    MODEL:
      META_ARCHITECTURE: "BalancedRetinaNet"
      DEVICE: "cpu"
      BACKBONE: {NAME: "build_retinanet_resnet_fpn_backbone"}
      RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: ["res3", "res4", "res5"]}
      FPN: {IN_FEATURES: ["res3", "res4", "res5"], OUT_CHANNELS: 16}
      RETINANET: {NUM_CLASSES: 5, NUM_CONVS: 1}
    DATASETS: {TRAIN: [], TEST: []}
"""


def build(path, *opts, **options):
    return build_model(load_config(path, opts, **options))


def test_a_parameter_whose_method_a_later_file_exchanged_is_allowed(write):
    write(RETINANET, "base.yaml")
    write("_BASE_: base.yaml\nBALANCE: {SmoothL1Loss: {BETA: 0.11}}", "parent.yaml")
    child = write("_BASE_: parent.yaml\nBALANCE: {DENSE: {BOX_LOSS: GIoULoss}}")
    assert type(build(child).criterion.box_losses[0]).__name__ == "GIoULoss"
    assert (
        build(child, "BALANCE.DENSE.BOX_LOSS", "SmoothL1Loss").criterion.box_losses[0].beta == 0.11
    )


def test_a_parameter_that_had_no_effect_where_it_was_set_is_refused(write):
    write(RETINANET, "base.yaml")
    content = "_BASE_: base.yaml\nBALANCE: {DENSE: {BOX_LOSS: GIoULoss}, SmoothL1Loss: {BETA: 0.1}}"
    path = write(content, "parent.yaml")
    with pytest.raises(InputError, match="BALANCE.SmoothL1Loss.BETA is 0.1, set by .*parent.yaml"):
        build(path)
    with pytest.raises(InputError, match="SmoothL1Loss.BETA.*parent.yaml"):
        build(write("_BASE_: parent.yaml\nBALANCE: {DENSE: {BOX_LOSS: BalancedL1Loss}}"))


def test_a_parameter_on_the_command_line_that_has_no_effect_is_refused(write):
    path = write(RETINANET)
    with pytest.raises(InputError, match="BalancedL1Loss.BETA is 0.1, set by the command line"):
        build(path, "BALANCE.BalancedL1Loss.BETA", "0.1")


def test_a_slot_of_the_base_that_the_childs_detector_does_not_read_is_refused(write):
    write(RETINANET, "base.yaml")
    write("_BASE_: base.yaml\nBALANCE: {DENSE: {GUIDED_LOSS: True}}", "parent.yaml")
    path = write("_BASE_: parent.yaml\nMODEL: {META_ARCHITECTURE: RetinaNet}")
    with pytest.raises(InputError, match="BALANCE.DENSE.GUIDED_LOSS is True, set by .*parent.yaml"):
        build(path)
