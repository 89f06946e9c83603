import copy
import json
import logging
import uuid
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.lvis import load_lvis_json
from detectron2.structures import BoxMode

from balanced_det.data import registration, shapes
from balanced_det.data.registration import (
    check_masks,
    check_num_classes,
    check_same_classes,
    load_detections,
    num_classes,
    register_datasets,
    training_statistics,
)
from balanced_det.data.statistics import dataset_statistics
from balanced_det.errors import InputError

LVIS_V05 = Path(__file__).parents[2] / "shared" / "data" / "lvis_v0.5_val_100.json"

CONTENT = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "owl"}],
    "images": [
        {"id": 20, "file_name": "b.jpg", "height": 50, "width": 40},
        {"id": 10, "file_name": "a.jpg", "height": 100, "width": 200},
    ],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 90, "bbox": [1, 2, 30, 40], "iscrowd": 0},
        {"id": 2, "image_id": 20, "category_id": 2, "bbox": [0, 0, 40, 50]},
    ],
}


def name():
    """A data set name not used before: Detectron2's catalogs last as long as the process."""
    return f"test_{uuid.uuid4().hex}"


def write(folder, content=CONTENT, images=True):
    """Write an annotation file and empty image files; only their names are looked at."""
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    if images:
        for image in CONTENT["images"]:
            (folder / image["file_name"]).touch()
    return path


def changed(change):
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


def config(*entries, train=(), test=()):
    cfg = get_cfg()
    cfg.BALANCE = CfgNode({"DATASETS": [list(entry) for entry in entries]})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    return cfg


def move_builtin(monkeypatch, dataset, json_file, image_root):
    """Let a data set of Detectron2 lie elsewhere for one test; returns its metadata."""
    metadata = copy.copy(MetadataCatalog.get(dataset))
    vars(metadata).update(json_file=str(json_file), image_root=str(image_root))
    monkeypatch.setitem(MetadataCatalog.data, dataset, metadata)
    monkeypatch.setitem(DatasetCatalog.data, dataset, DatasetCatalog[dataset])
    monkeypatch.setattr(registration, "_registered", {})
    return metadata


def test_coco_format_is_read(tmp_path):
    first, second = load_detections(write(tmp_path), tmp_path)
    assert first == {
        "file_name": str(tmp_path / "a.jpg"),
        "height": 100,
        "width": 200,
        "image_id": 10,
        "annotations": [
            {
                "bbox": [1, 2, 30, 40],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 2,
                "iscrowd": 0,
            }
        ],
    }
    assert second["image_id"] == 20
    assert second["annotations"][0]["category_id"] == 0


def test_metadata_is_set(tmp_path):
    dataset = name()
    path = write(tmp_path)
    load_detections(path, tmp_path, dataset)
    metadata = MetadataCatalog.get(dataset)
    assert metadata.thing_classes == ["cat", "dog", "owl"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 7: 1, 90: 2}
    assert (metadata.json_file, metadata.image_root) == (str(path), str(tmp_path))
    assert metadata.evaluator_type == "lvis"
    assert not hasattr(metadata, "class_image_count")


def test_generated_lvis_v1_data_is_read_like_detectron2_does(tmp_path):
    paths = shapes.generate(tmp_path / "shapes", classes=5, train=10, val=5, size=48)
    dataset = name()
    ours = load_detections(paths.train_json, paths.image_root, dataset)
    theirs = load_lvis_json(str(paths.train_json), f"{paths.image_root}/")
    for image in theirs:
        for annotation in image["annotations"]:
            annotation["iscrowd"] = 0  # Detectron2's reader drops it
    assert ours == theirs
    counts = {
        c["id"]: c["image_count"] for c in json.loads(paths.train_json.read_text())["categories"]
    }
    assert MetadataCatalog.get(dataset).class_image_count == [
        {"id": i, "image_count": counts[i]} for i in range(1, 6)
    ]
    statistics = dataset_statistics(ours, 5)
    assert statistics.image_count.tolist() == [counts[i] for i in range(1, 6)]


@pytest.mark.data(LVIS_V05.name)
def test_real_lvis_v05_annotations_are_read_like_detectron2_does():
    ours = load_detections(LVIS_V05, None)
    theirs = load_lvis_json(str(LVIS_V05), "root/")
    for image, other in zip(ours, theirs, strict=True):
        for key in ("image_id", "height", "width"):
            assert image[key] == other[key]
        assert image["neg_category_ids"] == other["neg_category_ids"]
        assert image["not_exhaustive_category_ids"] == other["not_exhaustive_category_ids"]
        assert image["annotations"] == [{**a, "iscrowd": 0} for a in other["annotations"]]
    statistics = dataset_statistics(ours, 1230)
    assert statistics.num_images == 100
    assert statistics.instance_count.sum() == 977
    assert (statistics.image_count > 0).sum() == 190


@pytest.mark.data(LVIS_V05.name)
def test_detectron2s_own_name_is_registered_with_our_reader(tmp_path, monkeypatch):
    dataset = "lvis_v0.5_val_rand_100"
    (tmp_path / "lvis").mkdir()
    metadata = move_builtin(monkeypatch, dataset, LVIS_V05, f"{tmp_path}/coco/")
    classes = metadata.thing_classes
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    for image in json.loads(LVIS_V05.read_text())["images"]:
        (tmp_path / "coco" / "val2017" / image["coco_url"].split("/")[-1]).touch()

    register_datasets(config(test=[dataset]))
    register_datasets(config(test=[dataset]))
    dicts = DatasetCatalog.get(dataset)
    # The file names of v0.5 are those of COCO 2014; the images lie where coco_url says.
    assert dicts[0]["file_name"].startswith(f"{tmp_path}/coco/val2017/0000")
    assert metadata.thing_classes is classes and len(classes) == 1230
    assert metadata.evaluator_type == "lvis"
    assert num_classes(config(test=[dataset])) == 1230


def test_detectron2s_coco_names_keep_classes_and_evaluation(tmp_path, monkeypatch):
    dataset = "coco_2017_val_100"
    ids = sorted(MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id)
    content = changed(lambda c: c.update(categories=[{"id": i, "name": f"class {i}"} for i in ids]))
    path = write(tmp_path, content)
    metadata = move_builtin(monkeypatch, dataset, path, tmp_path)
    register_datasets(config(test=[dataset]))
    annotations = [a for image in DatasetCatalog.get(dataset) for a in image["annotations"]]
    assert [a["category_id"] for a in annotations] == [ids.index(90), ids.index(2)]
    assert metadata.thing_classes[:2] == ["person", "bicycle"]
    assert metadata.evaluator_type == "coco"


def test_lvis_v1_images_are_found_by_their_address(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "0001.jpg").touch()
    image = {"id": 1, "coco_url": "http://host/train2017/0001.jpg", "height": 9, "width": 9}
    path = write(tmp_path, {**CONTENT, "images": [image], "annotations": []})
    (record,) = load_detections(path, tmp_path)
    assert record["file_name"] == str(tmp_path / "train2017" / "0001.jpg")
    assert record["annotations"] == []


def test_test_sets_need_no_annotations(tmp_path):
    content = {key: CONTENT[key] for key in ("categories", "images")}
    path = tmp_path / "lvis_v1_image_info_test_dev.json"
    path.write_text(json.dumps(content))
    assert [r["annotations"] for r in load_detections(path, None)] == [[], []]


POLYGON = [0, 0, 9, 0, 9, 9]
COMPRESSED = {"size": [100, 200], "counts": "12m`c0"}  # 1, 2 and 19997 pixels


@pytest.mark.parametrize(
    "segmentation, read",
    [
        ([POLYGON], [POLYGON]),
        (POLYGON, [POLYGON]),
        ([POLYGON, [1, 2, 3, 4]], [POLYGON]),
        ([[1, 2, 3, 4]], "skipped"),
        ([], None),
        (None, None),
        (COMPRESSED, COMPRESSED),
        ({"size": [100, 200], "counts": [1, 2, 19997]}, {**COMPRESSED, "counts": b"12m`c0"}),
    ],
)
def test_masks_are_read(tmp_path, segmentation, read):
    content = changed(lambda c: c["annotations"][0].update(segmentation=segmentation))
    annotations = load_detections(write(tmp_path, content), None)[0]["annotations"]
    if read == "skipped":
        assert annotations == []
    else:
        assert annotations[0].get("segmentation") == read


def test_crowds_are_kept_and_marked(tmp_path):
    content = changed(lambda c: c["annotations"][0].update(iscrowd=1))
    records = load_detections(write(tmp_path, content), None)
    assert [r["annotations"][0]["iscrowd"] for r in records] == [1, 0]


def test_bad_boxes_are_skipped_or_clipped_and_counted(tmp_path, caplog):
    boxes = {
        (10, 10, 0, 5): None,
        (10, 10, 5, -1): None,
        (200, 10, 5, 5): None,
        (10, 100, 5, 5): None,
        (-9, 10, 9, 5): None,
        (float("nan"), 1, 2, 3): None,
        (-5, -5, 10, 10): [0, 0, 5, 5],
        (190, 95, 20, 10): [190, 95, 10, 5],
        (0, 0, 200, 100): [0, 0, 200, 100],
    }
    content = {
        **CONTENT,
        "annotations": [
            {"id": i, "image_id": 10, "category_id": 2, "bbox": box} for i, box in enumerate(boxes)
        ],
    }
    with caplog.at_level(logging.WARNING):
        record = load_detections(write(tmp_path, content), None)[0]
    assert [a["bbox"] for a in record["annotations"]] == [b for b in boxes.values() if b]
    (warning,) = (r.getMessage() for r in caplog.records if r.name == registration.__name__)
    assert "6 boxes without area or outside" in warning
    assert "2 reaching outside clipped" in warning
    assert "annotations.json" in warning


def test_sound_files_give_no_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_detections(write(tmp_path), tmp_path)
    assert not caplog.records


def without(key, index=None):
    return changed(lambda c: (c[key][index[0]] if index else c).pop(index[1] if index else key))


BAD_FILES = {
    "truncated": (json.dumps(CONTENT)[:-30], "no valid JSON"),
    "empty": ("", "no valid JSON"),
    "a list": ("[]", "does not hold a JSON object"),
    "no categories": (without("categories"), "has no list 'categories'"),
    "no images": (without("images"), "has no list 'images'"),
    "no annotations": (without("annotations"), "has no list 'annotations'"),
    "empty categories": ({**CONTENT, "categories": []}, "empty list 'categories'"),
    "unlisted category": (
        changed(lambda c: c["annotations"][1].update(category_id=3)),
        "annotation 2 uses category id 3, which 'categories' does not list",
    ),
    "unlisted image": (
        changed(lambda c: c["annotations"][1].update(image_id=3)),
        "annotation 2 uses image id 3, which 'images' does not list",
    ),
    "category twice": (
        changed(lambda c: c["categories"].append({"id": 2, "name": "x"})),
        "lists category id 2 twice",
    ),
    "no size": (without("images", (1, "height")), "the image {'id': 10.* has no 'height'"),
    "no box": (without("annotations", (0, "bbox")), "the annotation {'id': 1.* has no 'bbox'"),
    "no file name": (
        without("images", (0, "file_name")),
        "image 20 has neither 'file_name' nor 'coco_url'",
    ),
    "size of zero": (
        changed(lambda c: c["images"][0].update(width=0)),
        "the 'width' of image 20 is 0, not a number above 0",
    ),
    "broken mask": (
        changed(lambda c: c["annotations"][0].update(segmentation={"points": 3})),
        "the 'segmentation' of annotation 1 is neither polygons nor RLE",
    ),
    "broken box": (
        changed(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])),
        r"the 'bbox' of annotation 1 is not four numbers but \[1, 2, 3\]",
    ),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_are_explained_in_a_sentence(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as error:
        load_detections(path, tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.json' does not exist"):
        load_detections(tmp_path / "absent.json", None)
    with pytest.raises(InputError, match="cannot be read"):
        load_detections(tmp_path, None)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    path = write(tmp_path)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(InputError, match="1 of the 2 images of .*b.jpg'"):
        load_detections(path, tmp_path)
    with pytest.raises(InputError, match="2 of the 2 images"):
        load_detections(path, tmp_path / "nowhere")
    assert len(load_detections(path, None)) == 2


def test_own_data_is_registered_from_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "pets").mkdir()
    write(tmp_path / "pets")
    dataset = name()
    cfg = config((dataset, "pets/annotations.json", "pets"), train=[dataset])
    register_datasets(cfg)
    register_datasets(cfg)
    assert num_classes(cfg) == 3
    assert DatasetCatalog.get(dataset)[0]["file_name"] == str(tmp_path / "pets" / "a.jpg")
    assert MetadataCatalog.get(dataset).json_file == str(tmp_path / "pets" / "annotations.json")
    check_num_classes(cfg, 3, "MODEL.ROI_HEADS.NUM_CLASSES")
    with pytest.raises(InputError) as error:
        check_num_classes(cfg, 80, "MODEL.ROI_HEADS.NUM_CLASSES")
    assert str(error.value) == (
        f"MODEL.ROI_HEADS.NUM_CLASSES is 80, but data set '{dataset}' has 3 classes."
    )


def test_annotations_can_be_registered_without_images(tmp_path):
    dataset = name()
    path = write(tmp_path, images=False)
    register_datasets(config((dataset, str(path), ""), test=[dataset]))
    assert len(DatasetCatalog.get(dataset)) == 2


def test_same_name_with_other_paths_is_refused(tmp_path):
    dataset = name()
    register_datasets(config((dataset, "a.json", "images")))
    with pytest.raises(InputError, match=f"'{dataset}' .*b.json.* registered already"):
        register_datasets(config((dataset, "b.json", "images")))
    with pytest.raises(InputError, match="'coco_2014_val' is known with the json_file"):
        register_datasets(config(("coco_2014_val", "b.json", "images")))
    with pytest.raises(InputError, match="'voc_2007_train', but a data set of this name"):
        register_datasets(config(("voc_2007_train", "b.json", "images")))


@pytest.mark.parametrize(
    "entry",
    ["text", ["name", "file.json"], ["name", "file.json", 3], ["", "file.json", "root"]],
)
def test_entries_of_another_form_are_refused(entry):
    cfg = config()
    cfg.BALANCE.DATASETS = [entry]
    with pytest.raises(InputError, match="Each entry of BALANCE.DATASETS must be"):
        register_datasets(cfg)


@pytest.mark.parametrize("key", ["train", "test"])
def test_unknown_names_are_refused(key):
    with pytest.raises(InputError, match=f"DATASETS.{key.upper()} names 'lvis_v2_train'"):
        register_datasets(config(**{key: ["lvis_v2_train"]}))


def test_training_statistics_follow_the_filter(tmp_path):
    dataset = name()
    content = changed(lambda c: c["annotations"][1].update(iscrowd=1))
    cfg = config((dataset, str(write(tmp_path, content)), str(tmp_path)), train=[dataset])
    register_datasets(cfg)
    statistics = training_statistics(cfg)
    assert statistics.num_images == 1  # the other image holds nothing but a crowd
    assert statistics.image_count.tolist() == [0, 0, 1]
    assert training_statistics(cfg) is statistics
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert training_statistics(cfg).num_images == 2


def test_training_statistics_join_data_sets(tmp_path):
    first, second = name(), name()
    entries = [(n, str(write(tmp_path)), str(tmp_path)) for n in (first, second)]
    cfg = config(*entries, train=[first, second])
    register_datasets(cfg)
    assert training_statistics(cfg).instance_count.tolist() == [2, 0, 2]


def test_training_sets_with_different_classes_are_refused(tmp_path):
    first, second = name(), name()
    (tmp_path / "other").mkdir()
    other = changed(lambda c: c["categories"][0].update(name="wolf"))
    cfg = config(
        (first, str(write(tmp_path)), ""),
        (second, str(write(tmp_path / "other", other)), ""),
        train=[first, second],
    )
    register_datasets(cfg)
    with pytest.raises(InputError, match="differ in their classes"):
        training_statistics(cfg)


def test_classes_of_several_sets_are_compared_each_with_the_first(tmp_path):
    names = [name() for _ in range(4)]
    changes = [None, None, lambda c: c["categories"].pop(), lambda c: c["categories"].reverse()]
    entries = []
    for each, change in zip(names, changes):
        (tmp_path / each).mkdir()
        content = changed(change) if change else changed(lambda c: None)
        content["annotations"] = []
        entries.append((each, str(write(tmp_path / each, content)), ""))
    register_datasets(config(*entries))
    check_same_classes([])
    check_same_classes(names[:1])
    check_same_classes(names[:2])
    # Listed backwards, the ids still tell the order.
    check_same_classes([names[0], names[3]])
    with pytest.raises(
        InputError, match="class 2, .* is '.*' in the first and absent in the second"
    ):
        check_same_classes(names)


def test_a_test_set_whose_classes_stand_under_other_ids_is_refused(tmp_path):
    trained, tested = name(), name()
    (tmp_path / "other").mkdir()

    def swap(content):
        content["categories"][0]["name"], content["categories"][1]["name"] = "cat", "dog"

    cfg = config(
        (trained, str(write(tmp_path)), ""),
        (tested, str(write(tmp_path / "other", changed(swap))), ""),
        train=[trained],
        test=[tested],
    )
    register_datasets(cfg)
    check_num_classes(cfg, 3, "MODEL.RETINANET.NUM_CLASSES", [trained])
    message = f"'{trained}' and '{tested}' differ in .* class 0, .* is 'cat' in the first and 'dog'"
    with pytest.raises(InputError, match=message):
        check_num_classes(cfg, 3, "MODEL.RETINANET.NUM_CLASSES", [tested])
    # Other ids in the same order are the same classes to a model.
    shifted = changed(lambda c: [k.update(id=k["id"] + 100) for k in c["categories"]])
    shifted["annotations"] = []
    third = name()
    (tmp_path / "third").mkdir()
    cfg = config(
        (trained, str(tmp_path / "annotations.json"), ""),
        (third, str(write(tmp_path / "third", shifted)), ""),
        train=[trained],
        test=[third],
    )
    register_datasets(cfg)
    check_num_classes(cfg, 3, "MODEL.RETINANET.NUM_CLASSES", [third])


def test_without_a_training_set_no_classes_are_compared(tmp_path):
    gone, tested = name(), name()
    path = write(tmp_path)
    cfg = config((gone, "gone.json", ""), (tested, str(path), ""), train=[gone], test=[tested])
    register_datasets(cfg)
    check_num_classes(cfg, 3, "MODEL.RETINANET.NUM_CLASSES", [tested])


@pytest.mark.parametrize(
    "with_mask, as_training, as_test",
    [((), "annotation 1", None), ((0,), "annotation 2", "annotation 2"), ((0, 1), None, None)],
    ids=["no masks", "one mask", "all masks"],
)
def test_masks_are_there_before_anything_is_trained(tmp_path, with_mask, as_training, as_test):
    def give(content):
        for index in with_mask:
            content["annotations"][index]["segmentation"] = [POLYGON]

    dataset = name()
    path = write(tmp_path, changed(give))
    for key, missing in (("train", as_training), ("test", as_test)):
        cfg = config((dataset, str(path), ""), **{key: [dataset]})
        register_datasets(cfg)
        check_masks(cfg)  # boxes alone need none
        cfg.MODEL.MASK_ON = True
        if missing is None:
            check_masks(cfg)
        else:
            with pytest.raises(InputError, match=f"MASK_ON is True, but .* {missing} has no mask"):
                check_masks(cfg)


def test_ignored_objects_are_not_trained_on(tmp_path):
    content = changed(lambda c: c["annotations"][0].update(ignore=1))
    records = load_detections(write(tmp_path, content), None)
    assert [r["annotations"][0]["iscrowd"] for r in records] == [1, 0]


def test_image_names_that_no_file_system_has_are_missing_images(tmp_path):
    for file_name in ("a\0b/c.jpg", "\ud800/c.jpg"):
        content = changed(lambda c, n=file_name: c["images"][0].update(file_name=n))
        with pytest.raises(InputError, match="1 of the 2 images"):
            load_detections(write(tmp_path, content), tmp_path)


def test_a_training_set_is_needed_to_count(tmp_path):
    with pytest.raises(InputError, match="DATASETS.TRAIN is empty"):
        training_statistics(config())
    with pytest.raises(InputError, match="both empty"):
        num_classes(config())
    dataset = name()
    path = write(tmp_path, {**CONTENT, "annotations": []})
    cfg = config((dataset, str(path), ""), train=[dataset])
    register_datasets(cfg)
    with pytest.raises(InputError, match=f"No image of DATASETS.TRAIN \\({dataset}\\)"):
        training_statistics(cfg)


def test_changed_classes_of_a_known_data_set_are_refused(tmp_path):
    dataset = name()
    path = write(tmp_path)
    load_detections(path, None, dataset)
    write(tmp_path, changed(lambda c: c["categories"].append({"id": 91, "name": "ant"})))
    with pytest.raises(InputError, match="4 categories other than the 3"):
        load_detections(path, None, dataset)


def test_detectron2_maps_what_is_read_to_training_examples(tmp_path):
    paths = shapes.generate(tmp_path / "shapes", classes=3, train=4, val=2, size=64)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    mapper = DatasetMapper(cfg, is_train=True)
    for record in load_detections(paths.train_json, paths.image_root):
        example = mapper(copy.deepcopy(record))
        assert example["image"].shape == (3, 64, 64)
        instances = example["instances"]
        assert instances.gt_classes.tolist() == [a["category_id"] for a in record["annotations"]]
        # A polygon's own box is the annotated one, both written in hundredths of a pixel.
        boxes, masks = instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor
        assert (boxes - masks).abs().max() <= 0.02
