"""The panels of a map, drawn: cells, labels, colour bars, and what lies over them."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lens_defense.plotting.annotations import (
    bracket_subjects,
    frame_gaps,
    mark_negative,
    name_panel,
    outline,
    strike_untraced,
)
from lens_defense.plotting.map_view import MapView, MapWords
from lens_defense.plotting.panel_grid import PanelGrid, column_labels, panel_grid
from lens_defense.plotting.print_size import FONT, Width
from lens_defense.sites import Site

Scale = Literal["shared", "panel"]
ABOVE = 50
"""Pixels over a panel: its name, and the bracket over the subject."""
_SCALE = ("#2166ac", "#67a9cf", "#d1e5f0", "#ffffff", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue, white, red: ColorBrewer's RdBu reversed, told apart by all common forms of colour blindness."""


class Panel(NamedTuple):
    """One panel of a map: a component of it."""

    name: str
    view: MapView
    component: int
    """Index of the component in the view."""
    sites: Sequence[Site]
    significant: Sequence[Site]

    @property
    def effects(self) -> NDArray[np.float64]:
        """Of the component [layer, column]."""
        return self.view.effects[self.component]

    @property
    def is_partly_untraced(self) -> bool:
        """Whether a column that stands for a token or role was not traced."""
        columns = [i for i in range(self.effects.shape[1]) if i not in self.view.gaps]
        return bool(np.isnan(self.effects[:, columns]).all(0).any())


def draw_panels(
    panels: Sequence[Panel],
    layers: Sequence[int],
    words: MapWords,
    width: Width | float | None,
    scale: Scale,
    *,
    above: int = ABOVE,
) -> tuple[go.Figure, PanelGrid, int]:
    """The panels in their grid, and the pixels that their columns' labels need below."""
    shown_map, rows = panels[0].view, len(layers)
    labels, columns = shown_map.labels, len(shown_map.labels)
    grid = panel_grid(len(panels), labels, rows, width, own_bars=scale == "panel", above=above)
    figure = make_subplots(cols=len(panels), rows=1)
    largest = _largest([panel.effects for panel in panels])
    for i, panel in enumerate(panels):
        reach = largest if scale == "shared" else _largest([panel.effects])
        x, y = grid.domain(i)
        bar = _colour_bar(words.scale, grid, i, scale)
        figure.add_trace(_cells(panel, reach, bar), row=1, col=i + 1)
        figure.update_xaxes(domain=x, showticklabels=grid.is_lowest(i), col=i + 1)
        figure.update_yaxes(domain=y, showticklabels=grid.is_first(i), col=i + 1)
        if grid.is_first(i):
            figure.update_yaxes(title_text="layer", col=i + 1)
        if panel.name:
            name_panel(figure, i, panel.name, above)
        bracket_subjects(figure, i, panel.view.subjects, letters=max(8, grid.width // 8))
        strike_untraced(figure, i, panel.effects, panel.view.gaps)
        mark_negative(figure, i, panel.effects, reach, grid.width / columns)
        frame_gaps(figure, i, panel.view.gaps, rows)
        outline(figure, i, panel.view.roles, layers, panel.significant, name="significant")
        outline(figure, i, panel.view.roles, layers, panel.sites)
    look = column_labels(grid, labels)
    texts = [text.replace(" ", "<br>") if look.angle == 0 else text for text in labels]
    ticks = [*range(0, columns, look.stride)]
    figure.update_xaxes(tickvals=ticks, ticktext=[texts[i] for i in ticks], tickangle=look.angle)
    figure.update_xaxes(tickfont={"size": look.font}, ticklabeloverflow="allow", range=[-0.5, columns - 0.5])
    stride = -(-(FONT + 2) * rows // grid.height)
    numbers = [str(layer) for layer in layers[::stride]]
    figure.update_yaxes(tickvals=[*range(0, rows, stride)], ticktext=numbers, range=[-0.5, rows - 0.5])
    return figure, grid, look.pixels(labels)


def _largest(effects: Sequence[NDArray[np.float64]]) -> float:
    """Where a scale ends: at the largest value of either sign."""
    return max(float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) for values in effects) or 1.0


def _cells(panel: Panel, largest: float, bar: dict[str, Any] | None) -> go.Heatmap:
    return go.Heatmap(
        x=[*range(panel.effects.shape[1])],
        y=[*range(panel.effects.shape[0])],
        z=panel.effects,
        hovertext=panel.view.hover[panel.component],
        hoverinfo="text",
        hoverongaps=False,
        colorscale=list(_SCALE),
        zmid=0,
        zmin=-largest,
        zmax=largest,
        showscale=bar is not None,
        colorbar=bar,
    )


def _colour_bar(title: str, grid: PanelGrid, panel: int, scale: Scale) -> dict[str, Any] | None:
    """The colour bar beside all panels, or beside each; its words stand at the last."""
    last = panel == grid.panels - 1
    if scale == "shared" and not last:
        return None
    (_, right), (bottom, top) = grid.domain(panel) if scale == "panel" else ((0, 1), (0, 1))
    place = {"x": right, "xpad": 8, "y": bottom, "yanchor": "bottom", "len": top - bottom, "ypad": 0}
    words = {"text": title, "side": "right", "font": {"size": FONT}}
    look = {"thickness": 10, "outlinewidth": 0, "nticks": 6}
    return {**place, **look} | ({"title": words} if last else {})
