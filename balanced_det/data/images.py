"""What an image file must be, before anything reads its pixels. Needs no Detectron2."""

import dataclasses
import functools
import io
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

# Of more than 8 bits a channel, which a conversion to RGB would clip to white.
_DEEP_MODES = ("I", "F")
_EXIF_ORIENTATION = 0x0112


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return (width, height) of an image as a person sees it: turned as its EXIF data say.

    Only the header is read.

    Raises:
        InputError: there is no such image, it cannot be read, has more than 8 bits a channel, or
            more pixels than Pillow takes for honest.
    """
    header = _header(path)
    width, height = header.size
    is_upright = header.kind == "TIFF" and _pillow_and_tiff().size_is_upright
    return (height, width) if header.orientation >= 5 and not is_upright else (width, height)


def is_turned(path: str | os.PathLike) -> bool:
    """Return whether EXIF data turn or mirror an image; raises as :func:`upright_size`."""
    return _header(path).orientation > 1


def is_turned_by_pillow(path: str | os.PathLike) -> bool:
    """Return whether Pillow turns or mirrors an image by itself when it loads the pixels.

    It does so with a TIFF, where whoever asked for the orientation before would turn it once more.
    """
    header = _header(path)
    return header.orientation > 1 and header.kind == "TIFF" and _pillow_and_tiff().load_turns


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Return an image as (H, W, 3) uint8, RGB, turned upright.

    Raises:
        InputError: it cannot be read.
    """
    upright_size(path)  # refuses what is no image, in a sentence
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise InputError(f"The image '{os.fspath(path)}' is broken: {reason}.") from None


@dataclasses.dataclass(frozen=True)
class _Header:
    kind: str  # as Pillow calls the format
    size: tuple[int, int]  # width, height, as Pillow has them before the pixels
    orientation: int  # of the EXIF data, 1 to 8


@dataclasses.dataclass(frozen=True)
class _PillowAndTiff:
    size_is_upright: bool
    load_turns: bool


@functools.cache
def _pillow_and_tiff() -> _PillowAndTiff:
    """Return what this version of Pillow does with a turned TIFF."""
    image, file = Image.new("L", (2, 1)), io.BytesIO()
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    image.save(file, "TIFF", exif=exif)
    with Image.open(file) as opened:
        before = opened.size
        opened.load()
        return _PillowAndTiff(before == (1, 2), opened.size == (1, 2))


def _header(path):
    """Return what stands before an image's pixels."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"'{os.fspath(path)}' is no file, so it is no image.")
        with warnings.catch_warnings():
            # Large is no error: that begins at twice the size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode = image.mode
                header = _Header(image.format or "", image.size, _orientation(image))
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken bytes
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The image '{os.fspath(path)}' is missing or unreadable: {reason}."
        ) from None
    if mode.split(";")[0] in _DEEP_MODES:
        raise InputError(
            f"The image '{os.fspath(path)}' has more than 8 bits a channel (Pillow's mode {mode}), "
            "which RGB would clip: scale it to 8 bits first."
        )
    return header


def _orientation(image):
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be read turn nothing, as in Detectron2
        return 1
    return orientation if orientation in range(1, 9) else 1
