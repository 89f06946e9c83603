"""One HTML file with sentences, figures and tables, readable in light and dark, on a phone too.

Figures are drawn in the browser by Vega-Lite, whose code stands in the file (0.9 MB): it is carried
by the package ``vl-convert-python``. Every text that is given is escaped.
"""

import base64
import functools
import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import __version__
from ..errors import InputError
from ..logs import escaped
from .files import finite, write_whole

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
_STATIC = Path(__file__).with_name("static")


class Page:
    """Collects what a page shows, in order.

    Usage::

        page = Page("What train.json holds")
        page.section("Classes")
        page.say("292 images, 3 classes.")
        page.figure(figures.bars(rows, "class", "images"), "Images of each class")
        page.write("report.html")

    Args:
        title: heading and name of the page.
        subtitle: a line below it.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self._body: list[str] = []
        self._figures: list[dict] = []
        self._sections: list[tuple[str, str]] = []  # anchor and title
        self._subtitle = subtitle

    def section(self, title: str) -> None:
        """Begin a section, which the list at the top of the page leads to."""
        anchor = f"section-{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._body.append(f'<h2 id="{anchor}">{_text(title)}</h2>')

    def say(self, *sentences: str) -> None:
        """Add a paragraph."""
        self._body.append(f"<p>{_text(' '.join(sentences))}</p>")

    def conclude(self, sentence: str, numbers: str = "", kind: str = "note") -> None:
        """Add a conclusion, set off from the text, and below it the numbers that it rests on.

        Args:
            sentence: what follows.
            numbers: what was counted for it.
            kind: "note", "do" (a suggestion) or "warn".
        """
        if kind not in ("note", "do", "warn"):
            raise ValueError(f"kind is {kind!r}, not 'note', 'do' or 'warn'.")
        below = f"<small>{_text(numbers)}</small>" if numbers else ""
        self._body.append(f'<p class="conclusion {kind}">{_text(sentence)}{below}</p>')

    def code(self, text: str) -> None:
        """Add text as it is, lines and blanks included."""
        self._body.append(f"<pre>{_text(text)}</pre>")

    def tiles(self, numbers: dict[str, str]) -> None:
        """Add a few large numbers, {what they count: the number}."""
        tiles = "".join(
            f"<div><b>{_text(number)}</b><span>{_text(label)}</span></div>"
            for label, number in numbers.items()
        )
        self._body.append(f'<div class="tiles">{tiles}</div>')

    def figure(self, specification: dict, caption: str) -> None:
        """Add a figure of :mod:`.figures`; one without a row of data is told and not drawn."""
        if not specification["data"]["values"]:
            self.say(f"{caption} There is nothing to draw.")
            return
        self._body.append(
            f'<figure><div class="figure" id="figure-{len(self._figures)}" role="img" '
            f'aria-label="{_text(caption)}"></div><figcaption>{_text(caption)}</figcaption></figure>'
        )
        self._figures.append(finite(specification))

    def image(self, path: str | os.PathLike, caption: str) -> None:
        """Add a picture, PNG, JPEG or SVG; the page holds it.

        Raises:
            InputError: the file is missing or of another kind.
        """
        path = Path(path)
        if path.suffix.lower() not in _MIME:
            raise InputError(f"'{path}' is no picture for a page: {', '.join(_MIME)} are.")
        try:
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise InputError(f"The picture '{path}' cannot be read: {error.strerror}.") from None
        self._body.append(
            f'<figure><img alt="{_text(caption)}" src="data:{_MIME[path.suffix.lower()]};base64,'
            f'{data}"><figcaption>{_text(caption)}</figcaption></figure>'
        )

    def pictures(self, pictures: Sequence[tuple[str, str]]) -> None:
        """Add pictures side by side, where there is room.

        Args:
            pictures: addresses ``data:image/...`` that hold them, each with a caption.
        """
        shown = "".join(
            f'<figure><img alt="{_text(caption)}" src="{_text(address)}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
            for address, caption in pictures
        )
        self._body.append(f'<div class="pictures">{shown}</div>')

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence], summary: str | None = None
    ) -> None:
        """Add a table. Numbers stand at the right, None is a dash.

        Args:
            header: a title a column.
            rows: a text, number or None a cell.
            summary: where given, the table is folded away behind this text.
        """
        head = "".join(f"<th>{_text(title)}</th>" for title in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        table = (
            f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            "</table></div>"
        )
        if summary is not None:
            table = f"<details><summary>{_text(summary)}</summary>{table}</details>"
        self._body.append(table)

    def write(self, path: str | os.PathLike) -> Path:
        """Write the page, whole or not at all, and return its path.

        Raises:
            InputError: the place cannot be written, or the drawing library is not installed.
        """
        return write_whole(path, str(self))

    def __len__(self) -> int:
        """How many parts were added."""
        return len(self._body)

    def __str__(self) -> str:
        contents = "".join(
            f'<a href="#{anchor}">{_text(title)}</a>' for anchor, title in self._sections
        )
        scripts = ""
        if self._figures:
            scripts = (
                f"<script>{_drawing_library()}</script>\n"
                f'<script type="application/json" id="figures">{_json(self._figures)}</script>\n'
                f"<script>{_static('page.js')}</script>"
            )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f'<meta name="generator" content="balanced_det {_text(__version__)}">\n'
            '<link rel="icon" href="data:,">\n'  # none, and no request for one
            f"<title>{_text(self.title)}</title>\n<style>{_static('page.css')}</style></head>\n"
            f"<body><main><h1>{_text(self.title)}</h1>\n"
            f'<p class="subtitle">{_text(self._subtitle)}</p>\n<nav>{contents}</nav>\n'
            + "\n".join(self._body)
            + f"\n</main>\n{scripts}\n</body></html>\n"
        )


def _text(text):
    """Escape a text, also what a browser, or a terminal that shows the file, would act on."""
    return html.escape(escaped(str(text)))


def _cell(value):
    if value is None:
        return "<td>–</td>"
    if isinstance(value, int | float):
        number = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        return f'<td class="number">{number}</td>'
    return f"<td>{_text(value)}</td>"


def _json(content):
    """JSON inside a script: "<" could end it, or begin a comment."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


@functools.cache
def _static(name):
    return (_STATIC / name).read_text(encoding="utf-8")


@functools.cache
def _drawing_library():
    """Vega, Vega-Lite and Vega-Embed as one script."""
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise InputError(
            "Pages with figures need the package vl-convert-python: "
            "pip install 'balanced_det[report]'."
        ) from None
    return vl_convert.javascript_bundle().replace("</script", "<\\/script")
