"""What an image file must be, before anything reads its pixels. Needs no Detectron2."""

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
    width, height, orientation = _header(path)
    return (height, width) if orientation >= 5 else (width, height)


def is_turned(path: str | os.PathLike) -> bool:
    """Return whether EXIF data turn or mirror an image; raises as :func:`upright_size`."""
    return _header(path)[2] > 1


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


def _header(path):
    """Return (width, height) as stored, and the EXIF orientation, 1 to 8."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"'{os.fspath(path)}' is no file, so it is no image.")
        with warnings.catch_warnings():
            # Large is no error: that begins at twice the size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode, (width, height) = image.mode, image.size
                orientation = _orientation(image)
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
    return width, height, orientation


def _orientation(image):
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be read turn nothing, as in Detectron2
        return 1
    return orientation if orientation in range(1, 9) else 1
