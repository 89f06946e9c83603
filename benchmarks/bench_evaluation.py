"""Time of LVIS evaluation beside `lvis` and `faster-coco-eval`, and its size at LVIS's own.

    python benchmarks/bench_evaluation.py

Generated annotations and detections like LVIS's (1,203 classes by Zipf's law, 12 objects an image,
300 detections an image), seeded. First all three from the same lists, in turns, in one run; their
numbers must agree. Then LVIS's 20,000 images, given image by image as the evaluator gives them.
"""

import argparse
import contextlib
import io
import json
import logging
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from balanced_det.data.annotations import read_annotations
from balanced_det.evaluation import METRICS, Matcher, evaluate_lvis

CLASSES = 1203
OBJECTS = 12  # of an image, in the mean
DETECTIONS = 300
SIZE = 480, 640


def annotations(images, generator):
    """Boxes of generated images in LVIS format."""
    # Class c is the c-th most frequent. Rare classes are rare here, too.
    share = 1 / np.arange(1, CLASSES + 1)
    share /= share.sum()
    counts = generator.poisson(OBJECTS, images)
    classes = generator.choice(CLASSES, counts.sum(), p=share) + 1
    boxes = random_boxes(counts.sum(), generator)
    of_image = np.split(np.arange(counts.sum()), counts.cumsum()[:-1])
    content = {"images": [], "annotations": [], "categories": []}
    for c in range(CLASSES):
        group = "f" if c < 405 else "c" if c < 866 else "r"  # LVIS's 405, 461 and 337
        content["categories"].append({"id": c + 1, "name": f"class {c + 1}", "frequency": group})
    for index, objects in enumerate(of_image):
        content["images"].append(
            {
                "id": index + 1,
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": (generator.choice(CLASSES, 10, replace=False) + 1).tolist(),
                "not_exhaustive_category_ids": np.unique(classes[objects])[:1].tolist(),
            }
        )
        for i in objects.tolist():
            x, y, width, height = box = boxes[i].tolist()
            content["annotations"].append(
                {
                    "id": i + 1,
                    "image_id": index + 1,
                    "category_id": int(classes[i]),
                    "bbox": box,
                    "area": width * height,
                }
            )
    return content


def random_boxes(count, generator):
    """(count, 4) x, y, width, height within the image; sides of 4 to 300 pixels by a power law."""
    sides = np.exp(generator.uniform(np.log(4), np.log(300), (count, 2)))
    corners = generator.random((count, 2)) * (SIZE[1] - 300, SIZE[0] - 300)
    return np.concatenate([corners, sides], axis=1).round(2)


def detections(truth, image, generator):
    """Classes (300,), scores and boxes of an image: its objects found, in a flood of others."""
    objects = truth[image]
    category = generator.integers(CLASSES, size=DETECTIONS)
    boxes = random_boxes(DETECTIONS, generator)
    scores = generator.random(DETECTIONS) ** 8
    # In a model's flood, many are of the classes that are there.
    if len(objects[0]):
        chosen = generator.integers(len(objects[0]), size=DETECTIONS // 3)
        near = slice(0, len(chosen))
        category[near] = objects[0][chosen]
        noise = generator.normal(0, 0.1, (len(chosen), 4)) * np.tile(objects[1][chosen, 2:], 2)
        boxes[near] = np.maximum(objects[1][chosen] + noise, 1).round(2)
        scores[near] = generator.random(len(chosen))
    return category, scores, boxes


def by_image(data):
    """Classes and boxes of each image."""
    order = np.argsort(data.image, kind="stable")
    bounds = np.searchsorted(data.image[order], np.arange(1, len(data.images)))
    return [(data.category[rows], data.boxes[rows]) for rows in np.split(order, bounds)]


def as_rows(data, generator):
    """Detections of all images as dictionaries."""
    truth = by_image(data)
    rows = []
    for image, entry in enumerate(data.images):
        for c, score, box in zip(*detections(truth, image, generator)):
            rows.append(
                {
                    "image_id": entry.id,
                    "category_id": int(c) + 1,
                    "bbox": box.tolist(),
                    "score": float(score),
                }
            )
    return rows


def by_lvis(path, rows):
    """The `lvis` package; its name of numpy's float is gone from numpy."""
    np.float = float
    import lvis

    truth = lvis.LVIS(path)
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, rows), "bbox")
    evaluation.run()
    return {name.partition("@")[0]: value for name, value in evaluation.get_results().items()}


def by_faster_coco_eval(path, rows):
    """`faster_coco_eval` in its LVIS mode."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(path)
    evaluation = COCOeval_faster(
        truth, truth.loadRes(rows), "bbox", lvis_style=True, print_function=str
    )
    evaluation.params.maxDets = [300]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, 0]
    return {"AP": precision[precision > -1].mean()}


def compare(images, seed):
    """Print the times of all three on the same lists; their AP must agree."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "annotations.json")
        content = annotations(images, np.random.default_rng(seed))
        Path(path).write_text(json.dumps(content))
        rows = as_rows(read_annotations(content), np.random.default_rng(seed + 1))
        sides = {
            "ours": lambda rows: evaluate_lvis(path, rows),
            "faster-coco-eval": lambda rows: by_faster_coco_eval(path, rows),
            "lvis": lambda rows: by_lvis(path, rows),
        }
        times, cpu, numbers = {name: [] for name in sides}, {name: [] for name in sides}, {}
        # In turns, so that a machine that changes its pace is seen; the slow one less often.
        quick = ["ours", "faster-coco-eval"] * 3
        for name in [*quick, "lvis", *quick, "lvis", *quick]:
            copies = [dict(row) for row in rows]  # the others write into what they get
            start, cpu_start = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                numbers[name] = sides[name](copies)
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)  # of all threads
    for name, found in numbers.items():
        for metric in METRICS if name == "lvis" else ("AP",):
            # Another order of the same sum of float64.
            assert abs(found[metric] - numbers["ours"][metric]) < 1e-9, (name, metric)
    ours = np.median(times["ours"])
    cpu_of_ours = np.median(cpu["ours"])
    table = [
        [name, np.median(t), min(t), max(t), np.median(t) / ours]
        + [np.median(cpu[name]), np.median(cpu[name]) / cpu_of_ours]
        for name, t in times.items()
    ]
    print(f"{images} images x {DETECTIONS} detections, AP {100 * numbers['ours']['AP']:.3f}:")
    headers = ["", "median s", "from", "to", "of ours", "median CPU s", "of ours"]
    print(tabulate(table, headers=headers, tablefmt="github", floatfmt=".2f"))


def at_full_size(images, seed):
    """Print time and memory of an evaluation that is given image by image."""
    data = read_annotations(annotations(images, np.random.default_rng(seed)))
    truth = by_image(data)
    generator = np.random.default_rng(seed + 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matching = 0.0
    matcher = Matcher(data, "bbox")
    for image in range(images):
        found = detections(truth, image, generator)  # not timed: the model's work
        start = time.perf_counter()
        matcher.update(image, *found)
        matching += time.perf_counter() - start
    start = time.perf_counter()
    state, _ = matcher.to_bytes()
    matcher.result()
    finish = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{images} images x {DETECTIONS} detections x {CLASSES} classes: {matching:.1f} s of "
        f"updates, {finish:.1f} s to finish, {len(state) / 2**20:.0f} MiB of state, peak memory "
        f"{after / 2**20:.2f} GiB, {before / 2**20:.2f} GiB of it before the first update"
    )


def main():
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000, help="of the comparison")
    parser.add_argument("--full", type=int, default=20_000, help="of the full size; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.full:
        # First: the peak of memory is the process's.
        at_full_size(options.full, options.seed)
    if options.images:
        compare(options.images, options.seed)


if __name__ == "__main__":
    main()
