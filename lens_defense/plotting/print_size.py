"""How large a figure is printed: a column or a page of a paper, with letters of 8 points.

A figure is laid out in pixels with letters of FONT pixels. At PIXELS_PER_INCH these letters are 8 points
high, so a figure that is as many pixels wide as its print width wants is printed as it stands.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import plotly.graph_objects as go

FONT = 13
"""Pixels of a letter."""
POINTS, LEAST_POINTS = 8.0, 6.0
"""The height of letters in print, and the least that can be read there."""
PIXELS_PER_INCH = FONT * 72 / POINTS
Width = Literal["column", "page"]
_INCHES: dict[str, float] = {"column": 3.25, "page": 6.75}
_PLOTLY_WIDTH, _PLOTLY_FONT = 700, 12
"""What Plotly takes where a figure does not say."""


def print_inches(width: Width | float) -> float:
    """The inches of a width: "column", "page", or a number of them.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(width, str) and width in _INCHES:
        return _INCHES[width]
    if isinstance(width, int | float) and not isinstance(width, bool) and 0 < width < math.inf:
        return float(width)
    names = ", ".join(f'"{name}" ({_INCHES[name]:g} in)' for name in get_args(Width))
    raise ValueError(f"width must be {names} or a number of inches, got {width!r}")


def print_pixels(width: Width | float) -> int:
    """How many pixels wide a figure is laid out for a print width."""
    return math.floor(print_inches(width) * PIXELS_PER_INCH)


def fitting_width(figure: go.Figure) -> Width:
    """The narrower of the two widths that a figure goes into as it is laid out."""
    return "column" if laid_out_pixels(figure) <= print_pixels("column") else "page"


def laid_out_pixels(figure: go.Figure) -> float:
    """How many pixels wide a figure is."""
    layout: Any = figure.layout
    return float(layout.width or _PLOTLY_WIDTH)


def smallest_letters(figure: go.Figure, inches: float) -> float:
    """Points of the smallest letters of a figure that is printed so many inches wide."""
    layout = figure.layout.to_plotly_json()
    sizes = [layout.get("font", {}).get("size", _PLOTLY_FONT), *_font_sizes(layout)]
    parts: Any = figure.data
    sizes += [size for part in parts for size in _font_sizes(part.to_plotly_json())]
    return min(sizes) * inches * 72 / laid_out_pixels(figure)


def _font_sizes(part: Any, name: str = "") -> Iterator[float]:
    """Sizes of all fonts inside a figure's part; a hover is not printed."""
    if isinstance(part, dict):
        if name.endswith("font") and isinstance(part.get("size"), int | float):
            yield part["size"]
        for key, value in part.items():
            if key not in ("hoverlabel", "template"):
                yield from _font_sizes(value, key)
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _font_sizes(item)
