"""Heatmaps as vectors: on paper a cell is a rectangle, sharp at any size, and not a pixel of a picture.

Plotly draws a heatmap as a picture, in a PDF too. Here each colour becomes one path that holds all its cells.
On a screen the heatmap stays: a path has no hover.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy.typing import NDArray
from plotly.colors import hex_to_rgb

_OVERLAP = 0.5
"""Pixels of a line around each cell in its own colour: without it, hairs of white show between cells."""

_STEPS = 100
"""Colours from 0 to the end of the scale: no eye tells more apart, and each is a path in the file."""


def with_vector_cells(figure: go.Figure) -> go.Figure:
    """A copy of a figure whose maps are rectangles; heatmaps that are not this package's stay as they are."""
    copy: Any = go.Figure(figure)
    parts: list[Any] = []
    shapes: list[dict[str, Any]] = []
    for part in copy.data:
        if _is_map(part):
            shapes += _cells(part)
            parts += [_colour_bar(part)] if part.showscale else []
        else:
            parts.append(part)
    copy.layout.shapes = (*shapes, *copy.layout.shapes)
    kept = go.Figure(layout=copy.layout)
    kept.add_traces(parts)
    return kept


def _is_map(part: Any) -> bool:
    """Whether this is a heatmap of this package: cells at 0, 1, 2, ..., and a scale that ends."""
    if not isinstance(part, go.Heatmap) or part.zmax is None:
        return False
    axes: list[Any] = [part.x, part.y]
    return all(axis is not None and [*axis] == [*range(len(axis))] for axis in axes)


def _cells(part: Any) -> Iterator[dict[str, Any]]:
    """A path per colour, below all other shapes. Cells without a number are left out."""
    colours = cell_colours(np.asarray(part.z, float), part.zmax, [colour for _, colour in part.colorscale])
    paths: dict[str, list[str]] = defaultdict(list)
    for (row, column), colour in np.ndenumerate(colours):
        if colour:
            paths[colour].append(
                f"M{column - 0.5:g},{row - 0.5:g}H{column + 0.5:g}V{row + 0.5:g}H{column - 0.5:g}Z"
            )
    for colour in sorted(paths):
        yield {
            "type": "path",
            "name": "cells",
            "path": "".join(paths[colour]),
            "xref": part.xaxis or "x",
            "yref": part.yaxis or "y",
            "layer": "below",
            "fillcolor": colour,
            "line": {"color": colour, "width": _OVERLAP},
        }


def cell_colours(
    effects: Float[NDArray[np.float64], "layer column"], largest: float, scale: Sequence[str]
) -> NDArray[np.object_]:
    """The colour of every cell, on a scale of equal steps from -largest to largest; "" where is no number."""
    steps = np.round(effects / largest * _STEPS) / _STEPS
    stops = np.array([hex_to_rgb(colour) for colour in scale], float)
    places = np.linspace(-1, 1, len(scale))
    channels = np.stack([np.interp(steps, places, stops[:, channel]) for channel in range(3)], -1)
    colours = np.full(effects.shape, "", dtype=object)
    for cell in zip(*np.isfinite(effects).nonzero(), strict=True):
        colours[cell] = "#{:02x}{:02x}{:02x}".format(*channels[cell].round().astype(int))
    return colours


def _colour_bar(part: Any) -> go.Scatter:
    """A point that is nowhere, and has the heatmap's colour bar."""
    marker = {
        "color": [0],
        "colorscale": part.colorscale,
        "cmin": part.zmin,
        "cmax": part.zmax,
        "showscale": True,
        "colorbar": part.colorbar.to_plotly_json(),
    }
    axes = {"xaxis": part.xaxis, "yaxis": part.yaxis}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, **axes)
