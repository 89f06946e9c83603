"""Detections in columns, and the file that holds them.

The file is a JSON list as LVIS and COCO take it: ``{"image_id", "category_id", "bbox", "score"}``
and, for masks, ``"segmentation"`` in run lengths, with the data set's own ids. Ours has the
detections of an image on one line, and ends in ``]`` after every image that is written, so that
whatever interrupts a run leaves a whole list of what was found until then.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import columns
from ..data.annotations import (
    Annotations,
    box,
    integer,
    number,
    read_bytes,
    without_garbage_collection,
)
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Detections:
    """Checked detections.

    Attributes:
        image: (n,) int64, indices in the annotations' ``images``.
        category: (n,) int64, classes 0 ... K-1.
        scores: (n,) float64, finite.
        boxes: (n, 4) float64, x, y, width, height in pixels, finite; or None.
        masks: n run lengths, or None.
    """

    image: np.ndarray
    category: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None
    masks: list | None

    def __len__(self) -> int:
        """n."""
        return len(self.image)

    def take(self, rows: np.ndarray) -> "Detections":
        """Return the detections at the indices ``rows``."""
        return Detections(
            self.image[rows],
            self.category[rows],
            self.scores[rows],
            None if self.boxes is None else self.boxes[rows],
            None if self.masks is None else [self.masks[i] for i in rows],
        )


def read_detections(
    rows: Iterable[Mapping], truth: Annotations, iou_type: str, first: int = 0
) -> Detections:
    """Check detections and return what the evaluation of ``iou_type`` reads, in columns.

    Args:
        rows: dictionaries in the form of the file; they are not changed.
        truth: the annotations, which list their images and classes.
        iou_type: "bbox" reads boxes, "segm" masks.
        first: what messages call the first row.

    Raises:
        InputError: a detection is of an image or class that is not listed, has no finite score, or
            no box or mask. It is named by its position.
    """
    rows = rows if isinstance(rows, (list, tuple)) else list(rows)
    plain = _plain_columns(rows, truth, iou_type)
    return plain if plain is not None else _checked_columns(rows, truth, iou_type, first)


def _index_by_id(truth: Annotations) -> tuple[dict[int, int], dict[int, int]]:
    """Where each image id, and each category id, stands in the annotations."""
    return (
        columns.index(image.id for image in truth.images),
        columns.index(category.id for category in truth.categories),
    )


def _plain_columns(rows: Sequence[Mapping], truth: Annotations, iou_type: str) -> Detections | None:
    """What :func:`_checked_columns` returns for rows of plain integers and floats; else None.

    A column at a time: six million detections are read in seconds.
    """
    images, classes = _index_by_id(truth)
    try:
        found, masks = [], []
        for part in columns.parts(rows):
            image = columns.positions(columns.field(part, "image_id"), images)
            category = columns.positions(columns.field(part, "category_id"), classes)
            scores = columns.numbers(columns.field(part, "score"))
            if iou_type == "bbox":
                shapes = columns.boxes(columns.field(part, "bbox"))
            else:
                shapes = np.empty((len(part), 0))
                masks += [_run_lengths(row["segmentation"], None) for row in part]
            if not (np.isfinite(scores).all() and np.isfinite(shapes).all()):
                return None
            found.append((image, category, scores, shapes))
    except columns.NOT_PLAIN:
        return None
    image, category, scores, boxes = columns.joined(found)
    is_box = iou_type == "bbox"
    return Detections(image, category, scores, boxes if is_box else None, None if is_box else masks)


def _checked_columns(
    rows: Sequence[Any], truth: Annotations, iou_type: str, first: int = 0
) -> Detections:
    """Check one detection after the other, and name the first that is wrong."""
    images, classes = _index_by_id(truth)
    image, category, scores, boxes, masks = [], [], [], [], []
    for index, row in enumerate(rows, start=first):
        if not isinstance(row, Mapping):
            raise InputError(f"Detection {index} is no dictionary.")
        image.append(_listed(row, "image_id", images, index, truth))
        category.append(_listed(row, "category_id", classes, index, truth))
        score = number(row.get("score"))
        if score is None or not math.isfinite(score):
            raise InputError(f"Detection {index} has no finite `score`.")
        scores.append(score)
        if iou_type == "bbox":
            numbers = box(row.get("bbox"))
            if numbers is None or not all(map(math.isfinite, numbers)):
                raise InputError(f"Detection {index} has no `bbox` of four finite numbers.")
            boxes.append(numbers)
        else:
            masks.append(_run_lengths(row.get("segmentation"), index))
    return Detections(
        np.array(image, dtype=np.int64),
        np.array(category, dtype=np.int64),
        np.array(scores, dtype=np.float64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4) if iou_type == "bbox" else None,
        masks if iou_type == "segm" else None,
    )


def _listed(
    row: Mapping, key: str, known: Mapping[int, int], index: int, truth: Annotations
) -> int:
    own = integer(row.get(key))
    found = None if own is None else known.get(own)
    if found is None:
        raise InputError(
            f"Detection {index} has {key} {row.get(key)}, which {truth.source} does not list."
        )
    return found


_COMPRESSED = re.compile("[0-o]*")  # six bits a character, from 48 on


def _run_lengths(mask: Any, index: int | None) -> dict[str, Any]:
    if not isinstance(mask, Mapping) or not {"size", "counts"} <= mask.keys():
        raise InputError(f"Detection {index} has no `segmentation` in run lengths.")
    size, counts = mask["size"], mask["counts"]
    if not isinstance(size, (list, tuple, np.ndarray)) or len(size) != 2:
        raise InputError(f"Detection {index} has a `segmentation` without height and width.")
    if isinstance(counts, np.ndarray):
        counts = counts.tolist()
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str) and not _COMPRESSED.fullmatch(counts):
        raise InputError(f"Detection {index} has a `segmentation` whose counts are no run lengths.")
    return {"size": [integer(side) for side in size], "counts": counts}


def read_detection_file(path: str | os.PathLike) -> list:
    """Return the list that a detection file holds.

    Raises:
        InputError: the file cannot be read, or holds no JSON list; a file that was cut short is
            named with the byte at which it ends.
    """
    path = os.fspath(path)
    raw = read_bytes(path, "detection file")
    try:
        text = raw.decode("utf-8-sig")
        rows = json.loads(text)
    except RecursionError:
        raise InputError(f"The detection file '{path}' is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"The detection file '{path}' is no valid JSON: byte {error.start} is not UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode("utf-8"))
        reason = error.msg.removesuffix(" at")
        cut = f"it is cut short at byte {len(raw)}: " if not _is_closed(raw) else ""
        raise InputError(
            f"The detection file '{path}' is no valid JSON, {cut}{reason} at byte {byte}."
        ) from None
    except ValueError as error:  # integers of thousands of digits
        raise InputError(f"The detection file '{path}' is no valid JSON: {error}.") from None
    if not isinstance(rows, list):
        raise InputError(f"The detection file '{path}' does not hold a JSON list.")
    return rows


def _is_closed(raw: bytes) -> bool:
    return raw.rstrip().endswith(b"]")


@without_garbage_collection()
def read_detection_files(
    paths: Iterable[str | os.PathLike], truth: Annotations, iou_type: str
) -> Detections:
    """Return the detections of files in columns, as :func:`read_detections` does.

    A file as we write it is read a part at a time: as dictionaries, the six million detections of
    LVIS take 5 GB.
    """
    parts, first = [read_detections([], truth, iou_type)], 0
    for path in paths:
        for rows in _row_batches(os.fspath(path), _PART):
            parts.append(read_detections(rows, truth, iou_type, first))
            first += len(rows)
    return Detections(
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.category for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([b for part in parts if (b := part.boxes) is not None])
        if iou_type == "bbox"
        else None,
        [mask for part in parts for mask in part.masks or ()] if iou_type == "segm" else None,
    )


def first_row(path: str | os.PathLike) -> Any:
    """Return the first entry of a detection file, None where there is none."""
    batches = _row_batches(os.fspath(path), 1)  # a line at a time: no more than an image
    return next((rows[0] for rows in batches if rows), None)


_PART = 1 << 25  # bytes


def _row_batches(path: str, size: int) -> Iterator[list]:
    """Yield the rows of a file: of one as we write it ``size`` bytes or a line, of others all."""
    if not _is_as_we_write_it(path):
        yield read_detection_file(path)
        return
    given = 0
    try:
        with open(path, "rb") as file:
            while lines := file.readlines(size):
                texts = (line.strip().strip(b",") for line in lines)
                rows = json.loads(b"[%b]" % b",".join(t for t in texts if t not in (b"[", b"]")))
                given += len(rows)
                yield rows
    except (ValueError, RecursionError):  # broken, or written by another after all
        yield read_detection_file(path)[given:]


def _is_as_we_write_it(path: str) -> bool:
    start = b'[\n{"image_id"'
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            if file.read(len(start)) != start:
                return False
            file.seek(-2, os.SEEK_END)
            return file.read() == b"\n]"
    except (OSError, ValueError):
        return False  # whoever reads it says why


def lines_of_detection_file(path: str | os.PathLike) -> Iterator[list[dict]]:
    """Yield the rows of our own file image by image, as lists, without holding all of them."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.strip().strip(",")
            if line not in ("[", "]"):
                yield json.loads(f"[{line}]")


class DetectionWriter:
    """Writes detections to a file that is a whole JSON list after every image.

    Args:
        path: the file, which is replaced.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failure(error) from None
        self._is_empty = True
        self._put(0, b"[\n]")
        self._end = 1  # of the last image's detections

    def write(self, rows: Iterable[str]) -> None:
        """Append an image's detections, each as JSON text, in one piece."""
        text = ",".join(rows).encode("ascii")
        if not text:
            return
        text = (b"\n" if self._is_empty else b",\n") + text
        self._put(self._end, text + b"\n]")
        self._end += len(text)
        self._is_empty = False

    def close(self) -> None:
        """Close the file, which is whole."""
        self._file.close()

    def _put(self, position: int, text: bytes) -> None:
        try:
            self._file.seek(position)
            written = 0
            while written < len(text):
                written += self._file.write(text[written:])
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> InputError:
        return InputError(f"The detections cannot be written to '{self.path}': {error.strerror}.")


def join_detection_files(paths: Iterable[str], path: str | os.PathLike) -> None:
    """Join files of :class:`DetectionWriter` into one, whole or not at all, and remove them."""
    paths = list(paths)
    joined = paths[0]
    if len(paths) > 1:
        joined = f"{os.fspath(path)}.joining"
        writer = DetectionWriter(joined)
        for part in paths:
            with open(part, encoding="ascii") as file:
                for line in file:
                    line = line.strip().strip(",")
                    if line not in ("[", "]"):
                        writer.write([line])
        writer.close()
    os.replace(joined, path)
    for part in paths:
        if os.path.exists(part):
            os.remove(part)


def texts_of(numbers: np.ndarray) -> list[str]:
    """Return each number as short as its type allows: nine digits give back any float32."""
    form = "%.9g" if numbers.dtype.itemsize <= 4 else "%.17g"
    return [form % number for number in numbers.ravel().tolist()]


def row_text(
    image_id: int,
    category_id: int,
    box_texts: Sequence[str],
    score_text: str,
    mask: Mapping | None = None,
) -> str:
    """Return one detection as JSON text, without a space."""
    text = (
        f'{{"image_id":{json.dumps(image_id)},"category_id":{json.dumps(category_id)},'
        f'"bbox":[{",".join(box_texts)}],"score":{score_text}'
    )
    if mask is not None:
        height, width = mask["size"]
        counts = mask["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        text += f',"segmentation":{{"size":[{height},{width}],"counts":{json.dumps(counts)}}}'
    return text + "}"
