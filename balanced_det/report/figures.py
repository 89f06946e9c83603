"""Figures as Vega-Lite specifications, plain dicts that hold their data.

A figure says what is drawn, the page how it looks: colours, fonts and sizes come from the page's
light or dark theme. Names are data in them and never markup. Numbers that are not finite are left
out when the page is written.

Source: https://vega.github.io/vega-lite/docs
"""

import math
from collections.abc import Sequence
from typing import Any

# Longest label of an axis, pixels; the hover has the whole name.
_LABEL_LIMIT = 140


def points(
    rows: Sequence[dict],
    x: str,
    y: str,
    *,
    color: str | None = None,
    order: Sequence[str] = (),
    log_x: bool = False,
    log_y: bool = False,
    height: int = 320,
) -> dict:
    """Draw a point a row; hovering shows every field of it.

    Args:
        rows: {field: value}; a field's name is also its title.
        x, y: fields of numbers. A logarithmic axis shows numbers above 0 only.
        color: a field of groups, with the ``order`` that they are listed in.
        log_x, log_y: draw powers of ten at equal distances.
        height: in pixels; the width is the page's.
    """
    if log_x:
        rows = [row for row in rows if row[x] and row[x] > 0]
    if log_y:
        rows = [row for row in rows if row[y] and row[y] > 0]
    encoding = {
        "x": _number(x, log_x, rows),
        "y": _number(y, log_y, rows),
        "tooltip": _hover(rows),
        **_color(color, order),
    }
    mark = {"type": "point", "filled": True, "size": 40, "opacity": 0.75}
    return _figure(rows, mark, encoding, height)


def bars(
    rows: Sequence[dict],
    x: str,
    y: str,
    *,
    color: str | None = None,
    order: Sequence[str] = (),
    log_y: bool = False,
    height: int = 260,
) -> dict:
    """Draw a bar a row, in the order of the rows, for a few categories or the bins of a histogram.

    Args:
        rows, color, order, height: as for :func:`points`.
        x: a field of texts, one a bar.
        y: a field of numbers from 0. Logarithmic, only bars above 0 are drawn, from 0.5.
        log_y: draw powers of ten at equal distances.
    """
    if log_y:
        rows = [{**row, "_base": 0.5} for row in rows if row[y] and row[y] > 0]
    encoding = {
        "x": {
            "field": _field(x),
            "type": "nominal",
            "sort": None,
            "title": x,
            "axis": {"labelLimit": _LABEL_LIMIT, "labelAngle": -40 if _is_wide(rows, x) else 0},
        },
        "y": _number(y, log_y, rows),
        "tooltip": _hover(rows),
        **_color(color, order),
    }
    if log_y:
        encoding["y2"] = {"field": "_base"}
        encoding["y"]["scale"] = {"type": "log", "domainMin": 0.5, "nice": False}
        # Bars count something: marks begin at 1.
        encoding["y"]["axis"] = _log_axis(1, max((row[y] for row in rows), default=1), least=1)
    return _figure(rows, {"type": "bar"}, encoding, height)


def lines(
    rows: Sequence[dict],
    x: str,
    y: str,
    *,
    color: str | None = None,
    order: Sequence[str] = (),
    log_x: bool = False,
    log_y: bool = False,
    height: int = 300,
) -> dict:
    """Draw a line a value of ``color`` through the rows; arguments are those of :func:`points`."""
    figure = points(rows, x, y, color=color, order=order, log_x=log_x, log_y=log_y, height=height)
    figure["mark"] = {"type": "line", "interpolate": "linear", "point": len(rows) <= 60}
    return figure


def heat(
    rows: Sequence[dict],
    x: str,
    y: str,
    value: str,
    *,
    order: Sequence[str] = (),
    height: int | None = None,
) -> dict:
    """Draw a cell a row, darker for a larger ``value``.

    Args:
        rows: {field: value}, as for :func:`points`.
        x, y: fields of texts: the column and the row of a cell.
        value: a field of numbers.
        order: the texts in the order of both axes.
        height: in pixels; by default a row of text for each entry of ``order``.
    """
    axis = {"labelLimit": _LABEL_LIMIT, "labelOverlap": False}
    # On a narrow page upright names are left out where they would touch.
    upright = {"labelAngle": -90, "labelOverlap": "greedy"} if len(order) > 2 else {"labelAngle": 0}
    encoding = {
        "x": {**_name(x, order), "axis": {**axis, **upright}},
        "y": {**_name(y, order), "axis": axis},
        "color": {
            "field": _field(value),
            "type": "quantitative",
            "title": value,
            "scale": {"domainMin": 0},
            "legend": {"orient": "top", "gradientLength": 160},
        },
        "tooltip": _hover(rows),
    }
    return _figure(rows, {"type": "rect"}, encoding, height or 240 + 18 * len(order))


def intervals(
    rows: Sequence[dict], value: str, low: str, high: str, name: str, *, zero: str = ""
) -> dict:
    """Draw a point and its interval a row, below each other in the order of the rows.

    Args:
        rows: {field: value}, as for :func:`points`.
        value, low, high: fields of numbers. A row without a low end has a point alone.
        name: a field of texts that differ.
        zero: the label of a dashed line at 0; without it there is none.
    """
    names = {
        **_name(name, [row[name] for row in rows]),
        "axis": {"labelLimit": _LABEL_LIMIT, "labelOverlap": False},
    }
    hover = _hover(rows)
    span = {
        "transform": [{"filter": f"isValid(datum['{_field(low)}'])"}],
        "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.45},
        "encoding": {
            "y": names,
            "x": {"field": _field(low), "type": "quantitative", "title": value},
            "x2": {"field": _field(high)},
            "tooltip": hover,
        },
    }
    encoding = {"y": names, "x": _number(value, False, rows), "tooltip": hover}
    mark = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    figure = _figure(rows, mark, encoding, 60 + 26 * len(rows))
    layers = [span, {key: figure.pop(key) for key in ("mark", "encoding")}]
    if zero:
        layers.append(_rule_layer({zero: 0.0}, "x"))
    return {**figure, "layer": layers}


def rules(figure: dict, lines_at: dict[str, float], axis: str = "x") -> dict:
    """Return ``figure`` with a dashed line for each {label: number} across the axis."""
    own = {key: figure[key] for key in ("mark", "encoding")}
    rest = {key: value for key, value in figure.items() if key not in own}
    return {**rest, "layer": [own, _rule_layer(lines_at, axis)]}


def _rule_layer(lines_at, axis):
    data = [{"value": value, "line": label} for label, value in lines_at.items()]
    return {
        "data": {"values": data},
        "mark": {"type": "rule", "strokeDash": [5, 4], "opacity": 0.6},
        "encoding": {
            axis: {"field": "value", "type": "quantitative"},
            "tooltip": [{"field": "line"}, {"field": "value"}],
        },
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Return names that differ, since an axis shows equal ones as one."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _figure(rows, mark, encoding, height):
    fields = {name: _field(name) for row in rows[:1] for name in row}
    return {
        "data": {"values": [{fields.get(k, k): v for k, v in row.items()} for row in rows]},
        "mark": mark,
        "encoding": encoding,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding", "resize": True},
    }


def _is_wide(rows, field):
    """Whether texts side by side are wider than a phone."""
    return len(rows) > 6 or sum(len(str(row[field])) for row in rows) > 40


def _field(name):
    """A field's name without the signs by which Vega-Lite reaches into an object."""
    return name.translate(str.maketrans({".": "_", "[": "(", "]": ")", "\\": "_", "'": "_"}))


def _number(name, log, rows):
    scale: dict[str, Any] = {"type": "log", "nice": False, "padding": 10} if log else {"zero": True}
    axis: dict[str, Any] = {"tickCount": 6}
    if log and rows:
        numbers = [row[name] for row in rows]
        axis = _log_axis(min(numbers), max(numbers))
    return {
        "field": _field(name),
        "type": "quantitative",
        "title": name,
        "scale": scale,
        "axis": axis,
    }


def _log_axis(low, high, least=10):
    """Mark powers of ten, below two of them 2 and 5 as well; below ``least`` Vega's own marks."""
    if high < least * low:
        return {"tickCount": 6}
    steps = (1,) if high >= 100 * low else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return {"format": "~s", "values": [step * 10.0**p for p in powers for step in steps]}


def _name(name, order):
    return {
        "field": _field(name),
        "type": "nominal",
        "title": None,
        "sort": list(order) or None,
        **({"scale": {"domain": list(order)}} if order else {}),
    }


def _color(name, order):
    if name is None:
        return {}
    return {
        "color": {
            "field": _field(name),
            "type": "nominal",
            "title": name,
            # Three side by side, since more are wider than a phone and would be cut off.
            "legend": {"orient": "top", "columns": 3, "labelLimit": 95},
            **({"scale": {"domain": list(order)}, "sort": list(order)} if order else {}),
        }
    }


def _hover(rows):
    names = [name for row in rows[:1] for name in row if not name.startswith("_")]
    return [
        {
            "field": _field(name),
            "title": name,
            # Without a type, a number as wide as it is; with it, four digits that tell.
            **(
                {"type": "quantitative", "format": ",.4~g"}
                if isinstance(rows[0][name], float)
                else {"type": "nominal"}
            ),
        }
        for name in names
    ]
