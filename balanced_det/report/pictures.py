"""Boxes, masks and names drawn on photographs, and pictures that a page can hold.

Colours are chosen by class, so that one class looks the same in every picture. Names are drawn as
they are: a sign that the font lacks is a box.
"""

import base64
import colorsys
import functools
import importlib.util
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LONGEST_NAME = 40  # letters


def class_color(index: int) -> tuple[int, int, int]:
    """Return a class's colour, RGB: neighbours differ by the golden angle."""
    hue = index * 0.618034 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.95 if index % 2 else 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    masks: Sequence[np.ndarray] | None = None,
    least_side: int = 480,
) -> Image.Image:
    """Draw n objects, the first on top.

    Args:
        image: (H, W, 3) uint8, RGB; it is not changed.
        boxes: n corners x0, y0, x1, y1 in pixels.
        labels: n texts, written at the boxes' upper left corners.
        colors: n RGB.
        masks: n (H, W) bool, which are tinted, or None.
        least_side: an image whose longer side has fewer pixels is shown as many times larger as it
            takes, so that names can be read.
    """
    if masks is not None and len(masks):
        image = _tinted(image, masks, colors)
    picture = Image.fromarray(image)
    scale = max(1, math.ceil(least_side / max(picture.size)))
    if scale > 1:
        picture = picture.resize(
            (picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS
        )
    draw = ImageDraw.Draw(picture)
    size = max(11, round(min(picture.size) / 36))
    font, width = _font(size), max(2, size // 7)
    for box, label, color in reversed(list(zip(boxes, labels, colors, strict=True))):
        left, top, right, bottom = (scale * float(x) for x in box)
        right, bottom = max(left, right), max(top, bottom)
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        _write(draw, picture.size, (left, top), _shown(label), color, font)
    return picture


def as_data_url(picture: Image.Image, longest_side: int = 480, quality: int = 80) -> str:
    """Return a picture as the address of a JPEG that holds it, scaled down to a longest side."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest_side, longest_side))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _tinted(image, masks, colors):
    tinted = image.astype(np.float32)
    for mask, color in reversed(list(zip(masks, colors, strict=True))):
        tinted[mask] = 0.55 * tinted[mask] + 0.45 * np.array(color, dtype=np.float32)
    return tinted.astype(np.uint8)


def _write(draw, size, corner, text, color, font):
    """Write a text on a plate of its colour, above the corner or, at the upper edge, below it."""
    if not text:
        return
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    # Black or white, whichever is easier to read on it (luma of ITU-R BT.601).
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text((x + 3 - left, y + 3 - top), text, fill="black" if light else "white", font=font)


def _shown(text):
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


@functools.cache
def _font(size):
    if importlib.util.find_spec("matplotlib") is not None:  # its font has more alphabets
        from matplotlib import get_data_path

        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    return ImageFont.load_default(size)
