"""Split annotations in two: ``python benchmarks/evidence/hold_out.py TRAIN.json A.json B.json``.

Schedules and learning rates are chosen by training on A and evaluating on B, so that no number that
is reported comes of images that something was chosen by. B is the last third of the images of each
source (the beginning of a file's name, up to "_"): neighbouring frames of a video stay together.
"""

import itertools
import json
import sys


def main(source, first, second):
    """Write the two files."""
    with open(source) as file:
        content = json.load(file)
    images = sorted(content["images"], key=lambda image: image["file_name"])
    parts = ([], [])
    for _, group in itertools.groupby(images, lambda image: image["file_name"].partition("_")[0]):
        of_source = list(group)
        cut = len(of_source) - len(of_source) // 3
        parts[0].extend(of_source[:cut])
        parts[1].extend(of_source[cut:])
    for path, part in zip((first, second), parts):
        ids = {image["id"] for image in part}
        own = [a for a in content["annotations"] if a["image_id"] in ids]
        with open(path, "w") as file:
            json.dump({**content, "images": part, "annotations": own}, file)
        print(f"{path}: {len(part)} images, {len(own)} objects")


if __name__ == "__main__":
    main(*sys.argv[1:])
