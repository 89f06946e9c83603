"""Annotations of images that do not exist, for what reads no pixel."""

import math
import uuid

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from models import NUM_CLASSES


def make_records(count, seed=0):
    """Records of images that do not exist, of odd sizes, with 1 to 5 objects each and a crowd."""
    rng = np.random.RandomState(seed)
    records = []
    for i in range(count):
        height, width = (int(n) for n in rng.randint(80, 180, 2))
        annotations = []
        for j in range(rng.randint(2, 7)):
            size = np.exp(rng.uniform(math.log(8), math.log(76), 2))
            corner = rng.rand(2) * (np.array([width, height]) - size)
            annotations.append(
                {
                    "bbox": [*corner, *size],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": int(rng.randint(NUM_CLASSES)),
                    "iscrowd": int(j == 0),
                }
            )
        records.append(
            {
                "file_name": f"/nowhere/{i}.png",
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return records


def register(records):
    """Register records under a new name, since Detectron2's catalogs last; return the name."""
    name = f"test_{uuid.uuid4().hex}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = [f"class {i}" for i in range(NUM_CLASSES)]
    return name
