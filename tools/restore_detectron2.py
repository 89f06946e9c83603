#!/usr/bin/env python
"""Undo what the carrier of Detectron2 changed in it, where the change is wrong.

``make .venv`` runs this once Detectron2 is installed (requirements-detectron2.txt)::

    python tools/restore_detectron2.py FOLDER_OF_THE_PACKAGE_detectron2

Every file is known by its SHA-256 before and after, so a text that is not as expected stops the
set-up instead of passing; running it again changes nothing. What stays as the carrier has it:
zipped annotation files, polygons that are not in a list, and texts that are merely older.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Edit:
    """One text of one file, and what it becomes.

    Attributes:
        path: of the file, in the package.
        why: what goes wrong without the edit.
        old, new: the text, which occurs exactly once, and its replacement.
        before, after: SHA-256 of the whole file.
    """

    path: str
    why: str
    old: str
    new: str
    before: str
    after: str


EDITS = (
    Edit(
        path="data/detection_utils.py",
        why="photographs are read as the sensor saw them, not turned as their EXIF says",
        # The first statement of the function that turns them, and the one after it.
        old="    return image\n    if not hasattr(image",
        new="    if not hasattr(image",
        before="4b0f60d74137e0c7b78a31601b0c2fc40d10f2068af73c6e4b78f0989fc805da",
        after="79576cdad97b04c1f712eb8342b53d76880aea1c5e17eddb500307d2f42ec4b9",
    ),
    Edit(
        path="data/datasets/coco.py",
        why="reading COCO files needs a package that is not installed",
        old="HANDLE_KWCOCO_FORMATS = True\n",
        new="HANDLE_KWCOCO_FORMATS = False\n",
        before="b924b74bf8f328a42e67f333ac32943228c91a31995bffdc91960dec5dcd7f0f",
        after="c79d73ecb09bf7dcc6d662d701f33f1a190569528c29e34c9e5e5c0bdcdcdc14",
    ),
    Edit(
        path="data/build.py",
        why="the order of the training images does not follow SEED",
        old="sampler = TrainingSampler(len(dataset))\n            elif",
        new="sampler = TrainingSampler(len(dataset), seed=cfg.SEED)\n            elif",
        before="455e63f768ce0924993aed7467d6ae3ec3b0d521221c0ff89b6c99abb54c5898",
        after="2f5f8e498d7ccbf92e24076c04eeafa38507f0b476f952f0a51fe0b03968d6c8",
    ),
    Edit(
        path="data/common.py",
        why="Python 3.11 draws no sample from a set, so an image that a mapper skips ends the run",
        old="sample(self._fallback_candidates, k=1)",
        new="sample(sorted(self._fallback_candidates), k=1)",
        before="d9d31752a49a09180ea777725f52a66b05c64a0c8512bc59403de1ad6c101dcf",
        after="b8c24c352480ae11e65019ed8e19e2fced69b398f0aa98db7ed41359859ec984",
    ),
)


def restore(package: Path, edits: tuple[Edit, ...] = EDITS) -> list[str]:
    """Apply every edit to the package in ``package``; all or none of them.

    Returns:
        The paths that were changed; none when all were restored already.

    Raises:
        ValueError: a file is missing, or is neither the carrier's nor restored.
    """
    texts = {}
    for edit in edits:
        path = package / edit.path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from None
        found = _digest(content)
        if found == edit.after:
            continue
        if found != edit.before or content.count(edit.old.encode()) != 1:
            raise ValueError(
                f"'{path}' is not the text that this script restores (SHA-256 {found}): "
                f"without the edit, {edit.why}."
            )
        restored = content.replace(edit.old.encode(), edit.new.encode())
        if _digest(restored) != edit.after:
            raise ValueError(f"'{path}' did not become the text that it should.")
        texts[path] = restored
    for path, content in texts.items():
        path.write_bytes(content)
    return [str(path) for path in texts]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: list[str]) -> int:
    """Restore the package that the one argument names; return the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        changed = restore(Path(arguments[0]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in changed:
        print(f"restored {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
