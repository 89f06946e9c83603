import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from balanced_det.data import annotations, columns
from balanced_det.data.annotations import MAX_SIDE, read_annotations
from balanced_det.data.run_lengths import check_run_lengths, counts_of
from balanced_det.errors import InputError, printable

ROOT = Path(__file__).parents[1]


def changed(change, content=fuzz.lvis_content):
    content = content()
    change(content)
    return content


def of_first(key, **values):
    """Annotations whose first entry of ``key`` is changed."""
    return changed(lambda content: content[key][0].update(values))


# --- Whatever is in a file ------------------------------------------------------------------------

VALUES = st.recursive(
    st.sampled_from(fuzz.ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@st.composite
def edited(draw, content):
    """A sound file's content with some of its values replaced or taken away."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(fuzz._places(content))
        if places:
            owner, key = draw(st.sampled_from(places))
            if draw(st.booleans()):
                owner[key] = copy.deepcopy(draw(VALUES))
            else:
                del owner[key]
    return content


# What is edited are values: of files that are no pictures.
OF_JSON = sorted(name for name, reader in fuzz.READERS.items() if reader.suffix == ".json")


@pytest.mark.parametrize("name", OF_JSON)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_edited_file_is_used_or_refused_in_a_sentence(name, data):
    reader = fuzz.READERS[name]
    content = data.draw(edited(json.loads(data.draw(st.sampled_from(reader.seeds())))))
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        path.write_bytes(text)
        fuzz.read(reader, path)


@pytest.mark.parametrize("name", sorted(fuzz.READERS))
def test_spoiled_files_are_used_or_refused_in_a_sentence(name, tmp_path):
    path = tmp_path / "file.json"
    accepted = 0
    for seed in range(300):
        path.write_bytes(fuzz.spoiled(fuzz.READERS[name], random.Random(seed)))
        accepted += fuzz.read(fuzz.READERS[name], path)
    assert 10 < accepted < 290  # neither side of the rule is left untried


def test_the_fuzzer_finds_a_reader_that_fails(tmp_path, capsys):
    broken = fuzz.Reader("broken", ".json", fuzz.annotation_seeds, lambda path: json.loads("["))
    with pytest.raises(ValueError):
        fuzz.fuzz({"broken": broken}, 10, 5, tmp_path)
    assert "'broken' failed at --seed 5" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1  # the input is kept


# --- The rules ------------------------------------------------------------------------------------

REFUSED = {
    "a text as id": (of_first("images", id="20"), "image id '20' is not an integer"),
    "true as id": (of_first("categories", id=True), "category id True is not an integer"),
    "a fraction as id": (of_first("images", id=20.5), "image id 20.5 is not an integer"),
    "a huge id": (of_first("images", id=2**64), "is not an integer"),
    "a text as annotation id": (of_first("annotations", id="a"), "at position 0 is 'a', not an"),
    "an annotation id twice": (of_first("annotations", id=2), "lists annotation id 2 twice"),
    "an image id twice": (of_first("images", id=21), "lists image id 21 twice"),
    "a text as reference": (of_first("annotations", image_id="20"), "1 uses image id '20', which"),
    "true as reference": (of_first("annotations", category_id=True), "uses category id True"),
    "a list as reference": (of_first("annotations", category_id=[7]), r"uses category id \[7\]"),
    "a null box": (
        of_first("annotations", bbox=None),
        "'bbox' of annotation 1 .* None",
    ),
    "a box of texts": (of_first("annotations", bbox=["1"] * 4), "'bbox' of annotation 1 is not"),
    "a box of booleans": (of_first("annotations", bbox=[True] * 4), "'bbox' of annotation 1"),
    "a negative area": (of_first("annotations", area=-1), "'area' of annotation 1 is -1, not a"),
    "an area of NaN": (of_first("annotations", area=float("nan")), "'area' of annotation 1 is nan"),
    "a crowd of 2": (of_first("annotations", iscrowd=2), "'iscrowd' of annotation 1 is 2, neither"),
    "ignore as text": (of_first("annotations", ignore="no"), "'ignore' of annotation 1 is 'no'"),
    "a frequency": (of_first("categories", frequency="x"), "category 7 has frequency 'x'"),
    "a frequency of 1": (of_first("categories", frequency=1), "category 7 has frequency 1"),
    "a number as name": (of_first("categories", name=3), "'name' of category 7 is 3, not a text"),
    "an image count": (of_first("categories", image_count=-1), "'image_count' of category 7 is -1"),
    "null negatives": (of_first("images", neg_category_ids=None), "image 20 are None, not a list"),
    "text negatives": (of_first("images", neg_category_ids=["2"]), r"image 20 are \['2'\], not"),
    "a side of text": (of_first("images", width="60"), "'width' of image 20 is '60', not a number"),
    "half a pixel": (of_first("images", width=60.5), "60.5, not a whole number of pixels"),
    "a huge side": (of_first("images", width=10**9), f"1000000000, more than {MAX_SIDE} pixels"),
    "a side of NaN": (of_first("images", width=float("nan")), "'width' of image 20 is nan"),
    "a number as file name": (of_first("images", file_name=3), "'file_name' of image 20 is 3"),
    "an image of null": (changed(lambda c: c["images"].append(None)), "image None has no 'id'"),
    "a null annotation": (
        changed(lambda c: c["annotations"].append(None)),
        "annotation None is no",
    ),
    "a null list": (changed(lambda c: c.update(annotations=None)), "has no list 'annotations'"),
}
POLYGON = [0, 0, 9, 0, 9, 9]
WRONG_MASKS = {
    "text": ("polygon", "neither a list nor an object"),
    "a number in a list of polygons": ([POLYGON, 3], "a polygon is no list of numbers"),
    "a text in a polygon": ([[0, 0, 9, 0, 9, "9"]], "something that is no number"),
    "a corner of NaN": ([[0, 0, 9, float("nan"), 9, 9]], "a corner is not within"),
    "a far corner": ([[0, 0, 10**9, 0, 9, 9]], "a corner is not within"),
    "another size": ({"size": [2, 2], "counts": [1, 3]}, r"size is not the image's, \[40, 60\]"),
    "no counts": ({"size": [40, 60]}, "need 'size' and 'counts'"),
    "too few pixels": ({"size": [40, 60], "counts": [1, 2]}, "add up to 3 pixels instead of 2400"),
    "too many pixels": ({"size": [40, 60], "counts": [0, 2401]}, "add up to 2401 pixels"),
    "negative runs": ({"size": [40, 60], "counts": [2401, -1]}, "a run is negative"),
    "too long runs": ({"size": [40, 60], "counts": [2**50]}, "a run is too long"),
    "counts cut off": ({"size": [40, 60], "counts": "P"}, "its counts are cut off"),
    "strange counts": ({"size": [40, 60], "counts": "é~"}, "a character that run lengths do not"),
    "texts as counts": ({"size": [40, 60], "counts": ["1"]}, "neither text nor a list of integers"),
}
REFUSED |= {
    f"a mask of {name}": (of_first("annotations", segmentation=mask), message)
    for name, (mask, message) in WRONG_MASKS.items()
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_breaks_a_rule_is_named_with_its_file_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        read_annotations(path)
    assert str(error.value).startswith(f"'{path}'")
    assert str(error.value).endswith(".")


def read_first(**values):
    data = read_annotations(of_first("annotations", **values))
    return data, data.segmentation[0]


def test_numbers_with_a_zero_behind_the_point_are_integers():
    content = of_first("images", id=20.0, width=60.0, height=40.0)
    content["annotations"][0].update(image_id=20.0, category_id=7.0, id=1.0)
    content["categories"][0].update(id=7.0)
    data = read_annotations(content)
    assert (data.images[0].id, data.images[0].width, data.images[0].height) == (20, 60, 40)
    assert type(data.images[0].width) is int
    assert (data.image[0], data.category[0], data.ids[0]) == (0, 1, 1)


def test_classes_are_numbered_by_ascending_id_with_gaps():
    data = read_annotations(fuzz.lvis_content())
    assert [(c.id, c.name) for c in data.categories] == [(2, "cat"), (7, "dog"), (90, "owl")]
    assert data.category.tolist() == [1, 0, 2, 1]


def test_a_null_area_is_one_that_is_not_given():
    assert np.isnan(read_first(area=None)[0].area[0])


def test_a_box_of_nan_is_no_object():
    data, _ = read_first(bbox=[float("nan"), 1, 2, 3])
    assert data.finite().tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    "given, kept",
    [
        (None, None),
        ([], None),
        (POLYGON, [POLYGON]),
        ([POLYGON, [1, 2, 3, 4], [0] * 7], [POLYGON]),
        ([[1, 2, 3, 4]], []),
        (np.array([POLYGON]), [POLYGON]),
        ([np.array(POLYGON)], [POLYGON]),
    ],
)
def test_masks_keep_the_polygons_that_have_corners(given, kept):
    assert read_first(segmentation=given)[1] == kept


def test_names_are_made_printable():
    names = {"\x1b[31mred\n": r"\x1b[31mred\n", "\ud800": r"\ud800", "猫 \u202ex": "猫 \\u202ex"}
    for name, shown in names.items():
        assert printable(name) == shown
        assert printable(shown) == shown
        content = of_first("categories", name=name)
        assert read_annotations(content).categories[1].name == shown
    assert str(InputError("no '\x1b[2J' here\n")) == r"no '\x1b[2J' here\n"


def test_the_dictionary_is_left_as_it_was():
    content = fuzz.lvis_content()
    read_annotations(content)
    assert content == fuzz.lvis_content()


def outcome_of(read, content):
    """The columns that a reader returns, or the sentence with which it refuses."""
    entries = (annotations._categories(content["categories"], "here"),)
    entries += (annotations._images(content["images"], "here"),)
    try:
        return read(content["annotations"], *entries, "here")
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("content", [fuzz.lvis_content, fuzz.coco_content])
def test_objects_read_by_column_are_those_read_one_by_one(content, monkeypatch):
    monkeypatch.setattr(columns, "PART", 3)
    found = outcome_of(annotations._plain_objects, content())
    np.testing.assert_equal(found, outcome_of(annotations._checked_objects, content()))
    assert found is not None


@pytest.mark.parametrize(
    "key", ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"]
)
def test_one_object_that_is_not_plain_is_read_or_refused_as_if_it_stood_alone(key, monkeypatch):
    monkeypatch.setattr(columns, "PART", 2)

    def check(change):
        content = changed(lambda c: change(c["annotations"][2]))
        with monkeypatch.context() as alone:
            alone.setattr(annotations, "_plain_objects", lambda *_: None)
            expected = outcome_of(annotations._objects, content)
        np.testing.assert_equal(outcome_of(annotations._objects, content), expected)
        return isinstance(expected, str)

    boxes = [[1, 2, 3, value] for value in fuzz.ODD_VALUES]
    values = [*fuzz.ODD_VALUES, np.int64(7), np.float32(7), np.True_, Decimal(7), *boxes]
    refused = sum(check(lambda entry, v=value: entry.update({key: v})) for value in values)
    assert refused
    check(lambda entry: entry.pop(key, None))


# --- Files ----------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(fuzz.coco_content()), encoding="utf-8-sig")
    assert len(read_annotations(path)) == 4


@pytest.mark.parametrize(
    "raw, message",
    [
        (json.dumps(fuzz.coco_content()).encode("utf-16"), "byte 0 is not UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"images": ' + b"9" * 5_000 + b"}", "is no valid JSON"),
        (b"", "is no valid JSON"),
        (b"null", "does not hold a JSON object"),
    ],
)
def test_files_that_are_no_json_of_utf_8_are_refused(tmp_path, raw, message):
    path = tmp_path / "annotations.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_a_pipe_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="it is no regular file"):
            read_annotations(path)


# --- Run lengths ----------------------------------------------------------------------------------


def test_compressed_counts_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for _ in range(300):
        shape = generator.integers(1, 60, 2)
        mask = np.asfortranarray(generator.random(shape) < generator.random(), dtype=np.uint8)
        if generator.random() < 0.5:  # longer runs
            mask = np.asfortranarray(np.kron(mask, np.ones((1, 90), dtype=np.uint8)))
        rle = mask_util.encode(mask)
        counts = counts_of(rle["counts"])
        pixels = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(pixels, mask.ravel("F"))
        check_run_lengths(rle, *mask.shape)
        check_run_lengths({"size": rle["size"], "counts": counts.tolist()}, *mask.shape)


def test_reading_needs_neither_torch_nor_detectron2():
    code = (
        "import sys; import balanced_det.data.annotations, balanced_det.evaluation; "
        "assert not {'torch', 'detectron2'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
