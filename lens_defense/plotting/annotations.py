"""What lies over the cells of a heatmap: names of panels, brackets over subjects, gaps, outlines of sites.

Panel c is the panel of the map's component c.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from lens_defense.plotting.theme import INK, component_words, plotly_text
from lens_defense.prompts.request import Role
from lens_defense.shown_text import truncate
from lens_defense.sites import Component, Site

_LINES = {"site": ((5.0, "#ffffff"), (2.5, "#111111")), "significant": ((1.0, "#111111"),)}
"""Width and colour of the lines of an outline."""


def name_panel(figure: go.Figure, c: int, component: Component, window: int, above: int) -> None:
    """Write the component over its panel, and how many layers are patched at once."""
    windows = "" if component == "resid_post" or window < 2 else f"<br>windows of {window} layers"
    figure.add_annotation(
        text=f"<b>{component_words(component)}</b>{windows}",
        x=0,
        y=1,
        xref=f"{_axis('x', c)} domain",
        yref=f"{_axis('y', c)} domain",
        xanchor="left",
        yanchor="top",
        yshift=above,
        align="left",
        showarrow=False,
    )


def bracket_subjects(
    figure: go.Figure, c: int, subjects: Sequence[tuple[int, int, str]], *, letters: int
) -> None:
    """Draw a bracket over each subject, from its first column to its last, with its text."""
    pixels = {"yref": f"{_axis('y', c)} domain", "ysizemode": "pixel", "yanchor": 1}
    for first, last, text in subjects:
        left, right = first - 0.42, last + 0.42
        for a, b, low, high in ((left, right, 8.0, 8.0), (left, left, 3.0, 8.0), (right, right, 3.0, 8.0)):
            _draw(figure, c, "subject", (a, b, low, high), width=1.5, colour=INK, type="line", **pixels)
        figure.add_annotation(
            text=plotly_text(truncate(text, letters)),
            x=(first + last) / 2,
            y=1,
            xref=_axis("x", c),
            yref=pixels["yref"],
            yanchor="bottom",
            yshift=9,
            showarrow=False,
        )


def frame_gaps(figure: go.Figure, c: int, roles: Sequence[Role | None], rows: int) -> None:
    """Draw a white column where tokens are left out."""
    for i in (i for i, role in enumerate(roles) if role is None):
        box = (i - 0.5, i + 0.5, -0.5, rows - 0.5)
        _draw(figure, c, "gap", box, width=1.0, colour="#bbbbbb", fillcolor="#ffffff")


def outline(
    figure: go.Figure,
    c: int,
    roles: Sequence[Role | None],
    layers: Sequence[int],
    sites: Sequence[Site],
    *,
    name: Literal["site", "significant"] = "site",
) -> None:
    """Outline each block of cells, a little inside so that no edge is cut."""
    for role in dict.fromkeys(site.role for site in sites):
        columns = _merged((i - 0.5, i + 0.5) for i, column_role in enumerate(roles) if column_role == role)
        rows = _merged(_extent(site.layer, layers) for site in sites if site.role == role)
        for (x0, x1), (y0, y1) in itertools.product(columns, rows):
            box = (x0 + 0.05, x1 - 0.05, y0 + 0.05, y1 - 0.05)
            for width, colour in _LINES[name]:
                _draw(figure, c, name, box, width=width, colour=colour)


def _draw(
    figure: go.Figure,
    c: int,
    name: str,
    box: tuple[float, float, float, float],
    *,
    width: float,
    colour: str,
    **more: Any,
) -> None:
    """Draw a shape over panel c; its box is x0, x1, y0, y1."""
    edges = dict(zip(("x0", "x1", "y0", "y1"), box, strict=True))
    shape = {"type": "rect", "xref": _axis("x", c), "yref": _axis("y", c), **edges}
    figure.add_shape(name=name, line={"color": colour, "width": width}, **(shape | more))


def _extent(layer: int, layers: Sequence[int]) -> tuple[float, float]:
    """The span of a layer on the axis: its own cell, or its share of the way between two traced layers."""
    if layer in layers:
        return layers.index(layer) - 0.5, layers.index(layer) + 0.5
    below, above = (layers[1] - layers[0], layers[-1] - layers[-2]) if len(layers) > 1 else (1, 1)
    traced = [layers[0] - below / 2, *layers, layers[-1] + above / 2]
    rows = [-0.5, *range(len(layers)), len(layers) - 0.5]
    low, high = np.interp([layer - 0.5, layer + 0.5], traced, rows).tolist()
    return low, high


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that touch or overlap."""
    merged: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1e-9:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _axis(letter: str, c: int) -> str:
    return letter if c == 0 else f"{letter}{c + 1}"
