"""Random annotations with all that LVIS's protocol knows, and copies of their images."""

import numpy as np

CLASSES = 7


def federated(seed, images=12, ties=False):
    """Annotations with all that LVIS's protocol knows, and detections near their objects."""
    rng = np.random.default_rng(seed)
    annotations, entries, detections = [], [], []
    for image_id in range(1, images + 1):
        present = rng.choice(CLASSES - 1, 3, replace=False) + 1  # the last class never occurs
        others = [c for c in range(1, CLASSES + 1) if c not in present]
        entries.append(
            {
                "id": image_id,
                "height": 200,
                "width": 200,
                "file_name": f"{image_id}.png",
                "neg_category_ids": others[:2],
                "not_exhaustive_category_ids": [int(present[0])],
            }
        )
        for category_id in present:
            for _ in range(rng.integers(1, 4)):
                box = [*rng.integers(0, 120, 2).tolist(), *rng.integers(20, 80, 2).tolist()]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(category_id),
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(rng.random() < 0.1),
                        "ignore": int(rng.random() < 0.1),
                    }
                )
        boxes = [a for a in annotations if a["image_id"] == image_id]
        for _ in range(25):
            near = boxes[rng.integers(len(boxes))]
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": near["category_id"]
                    if rng.random() < 0.8
                    else int(rng.integers(1, CLASSES + 1)),
                    "bbox": (np.array(near["bbox"]) + rng.normal(0, 4, 4)).clip(1).tolist(),
                    "score": float(rng.integers(1, 5) / 5 if ties else rng.random()),
                }
            )
    categories = [
        {"id": c, "name": f"class {c}", "frequency": "rcf"[c % 3]} for c in range(1, CLASSES + 1)
    ]
    return {"images": entries, "annotations": annotations, "categories": categories}, detections


def copied(truth, detections, weights):
    """The data set in which each image stands as often as its weight says."""
    images, annotations, found = [], [], []
    for image, weight in zip(truth["images"], weights):
        for _ in range(int(weight)):
            new = len(images) + 1
            images.append({**image, "id": new})
            for a in truth["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append({**a, "id": len(annotations) + 1, "image_id": new})
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == image["id"]]
    return {**truth, "images": images, "annotations": annotations}, found
