"""What lies over the cells of a heatmap: names of panels, brackets over subjects, gaps, outlines of sites.

Panels are counted from 0, row by row.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy.typing import NDArray

from lens_defense.plotting.theme import GREY, INK, plotly_text
from lens_defense.prompts.request import Role
from lens_defense.shown_text import truncate
from lens_defense.sites import Site

Effects = Float[NDArray[np.float64], "layer column"]
_CLEARLY, _DARK = 0.1, 0.6
"""Shares of the scale's end: from where a cell is seen to be coloured, and from where a black line is not."""
_LINES = {"site": ((5.0, "#ffffff"), (2.5, "#111111")), "significant": ((1.0, "#111111"),)}
"""Width and colour of the lines of an outline."""


def name_panel(figure: go.Figure, c: int, name: str, above: int) -> None:
    """Write a panel's name over it."""
    figure.add_annotation(
        text=f"<b>{plotly_text(name)}</b>",
        x=0,
        y=1,
        xref=f"{_axis('x', c)} domain",
        yref=f"{_axis('y', c)} domain",
        xanchor="left",
        yanchor="top",
        yshift=above,
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


def frame_gaps(figure: go.Figure, c: int, gaps: Mapping[int, str], rows: int) -> None:
    """Draw a white column where tokens are left out; its hover says how many."""
    for i, words in gaps.items():
        box = (i - 0.5, i + 0.5, -0.5, rows - 0.5)
        _draw(figure, c, "gap", box, width=1.0, colour="#bbbbbb", fillcolor="#ffffff")
        figure.add_annotation(
            name="gap",
            text="⋯",
            hovertext=words,
            x=i,
            y=(rows - 1) / 2,
            xref=_axis("x", c),
            yref=_axis("y", c),
            showarrow=False,
        )


def mark_negative(figure: go.Figure, c: int, effects: Effects, largest: float, cell: float) -> None:
    """Draw a minus into every cell that is clearly negative: in grey, a blue cell looks like a red one.

    Args:
        figure: the map.
        c: its panel.
        effects: of the panel.
        largest: where the scale ends.
        cell: pixels of a cell's width.
    """
    shares = np.nan_to_num(effects) / largest
    half = min(0.3, 4 / cell)
    for colour, cells in (("#ffffff", shares <= -_DARK), (INK, (shares <= -_CLEARLY) & (shares > -_DARK))):
        lines = [f"M{i - half:g},{j}L{i + half:g},{j}" for j, i in zip(*cells.nonzero(), strict=True)]
        _draw_path(figure, c, "negative", lines, colour)


def strike_untraced(figure: go.Figure, c: int, effects: Effects, gaps: Mapping[int, str]) -> None:
    """Draw a line across each run of cells that were not traced: in grey, they look like a weak effect."""
    lines = []
    for i in (i for i in range(effects.shape[1]) if i not in gaps):
        runs = _merged((j - 0.5, j + 0.5) for j in np.isnan(effects[:, i]).nonzero()[0].tolist())
        lines += [f"M{i - 0.5:g},{low:g}L{i + 0.5:g},{high:g}" for low, high in runs]
    _draw_path(figure, c, "untraced", lines, GREY)


def _draw_path(figure: go.Figure, c: int, name: str, lines: Sequence[str], colour: str) -> None:
    """Draw lines over panel c as one path."""
    if lines:
        axes = {"xref": _axis("x", c), "yref": _axis("y", c)}
        line = {"color": colour, "width": 1.2}
        figure.add_shape(type="path", name=name, path="".join(lines), line=line, **axes)


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
