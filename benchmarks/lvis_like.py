"""Images and annotations of LVIS v1's size and form, drawn at random, at LVIS's own paths.

    python benchmarks/lvis_like.py FOLDER [--train 4000] [--val 2000]

Writes ``FOLDER/lvis/lvis_v1_{train,val}.json`` and the JPEG files that they name in
``FOLDER/coco/{train,val}2017``; with DETECTRON2_DATASETS set to FOLDER they are Detectron2's
``lvis_v1_train`` and ``lvis_v1_val``. Images are 640 x 480 and hold 12 objects on average, as many
as LVIS's, with polygons of 24 corners; the 1,203 classes follow Zipf's law. There is nothing to
learn in them: they measure how fast a training or an evaluation runs.
"""

import argparse
import functools
import json
import multiprocessing
from pathlib import Path

import numpy as np
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from PIL import Image, ImageDraw

WIDTH, HEIGHT, CORNERS = 640, 480, 24


def draw(path, seed):
    """Draw the image ``path`` and return its objects, without ids.

    Args:
        path: of the JPEG file.
        seed: of all that is random.
    """
    random = np.random.default_rng(seed)
    # Smooth colours, as in photographs: noise would take longer to decode than they do.
    coarse = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.BICUBIC)
    canvas = ImageDraw.Draw(image)
    objects = []
    for rank in random.zipf(1.3, 1 + random.poisson(11)):
        size = 8 + np.array([WIDTH, HEIGHT]) * 0.6 * random.random(2) ** 2
        corner = random.random(2) * (np.array([WIDTH, HEIGHT]) - size)
        angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
        circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) / 2 + 0.5
        polygon = (corner + size * circle).round(2)
        canvas.polygon([tuple(p) for p in polygon], fill=tuple(random.integers(0, 255, 3).tolist()))
        objects.append(
            {
                "category_id": int((rank - 1) % len(LVIS_CATEGORIES)) + 1,
                "bbox": [round(float(x), 2) for x in (*corner, *size)],
                "area": round(float(np.pi / 4 * size.prod()), 2),
                "segmentation": [polygon.flatten().tolist()],
            }
        )
    image.save(path, quality=90)
    return objects


def write(folder, split, num_images, first_id, workers):
    """Write one split; ids of images start at ``first_id``."""
    images_folder = folder / "coco" / f"{split}2017"
    images_folder.mkdir(parents=True, exist_ok=True)
    ids = range(first_id, first_id + num_images)
    paths = [images_folder / f"{i:012}.jpg" for i in ids]
    with multiprocessing.Pool(workers) as pool:
        drawn = pool.starmap(draw, zip(paths, ids), chunksize=32)
    categories = [{**c, "frequency": "f"} for c in LVIS_CATEGORIES]
    counts = np.zeros(len(categories) + 1, dtype=int)
    for objects in drawn:
        counts[list({o["category_id"] for o in objects})] += 1
    for category in categories:
        count = int(counts[category["id"]])
        category["image_count"] = count
        category["frequency"] = "r" if count <= 10 else "c" if count <= 100 else "f"
    annotations = [{"image_id": i, **o} for i, objects in zip(ids, drawn) for o in objects]
    annotations = [{"id": i + 1, **a} for i, a in enumerate(annotations)]
    # As in LVIS, an image is searched for its own classes and a few others.
    random = np.random.default_rng(first_id)
    images = [
        {
            "id": i,
            "width": WIDTH,
            "height": HEIGHT,
            "coco_url": f"http://images.cocodataset.org/{split}2017/{path.name}",
            "neg_category_ids": sorted(random.choice(len(LVIS_CATEGORIES), 10, False) + 1),
            "not_exhaustive_category_ids": [],
        }
        for i, path in zip(ids, paths)
    ]
    for image, objects in zip(images, drawn):
        present = {o["category_id"] for o in objects}
        image["neg_category_ids"] = [int(c) for c in image["neg_category_ids"] if c not in present]
    data = {"images": images, "annotations": annotations, "categories": categories}
    target = folder / "lvis" / f"lvis_v1_{split}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(data))


def main():
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--val", type=int, default=2000, help="validation images")
    parser.add_argument("--workers", type=int, help="processes; default all cores")
    args = parser.parse_args()
    split = functools.partial(write, args.folder, workers=args.workers)
    split("train", args.train, 1)
    split("val", args.val, 1 + args.train)


if __name__ == "__main__":
    main()
