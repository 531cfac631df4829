"""Curves of mean effects over layers at one role, several maps in one plot, with 95% intervals.

The severed graphs of Meng et al. 2022 (figure 3) are three of them: nothing severed, later MLP outputs, later
attention outputs.
"""

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from lens_defense.arguments import wrong_argument
from lens_defense.plotting.map_view import map_origin, map_words
from lens_defense.plotting.print_size import FONT, Width, print_pixels
from lens_defense.plotting.theme import COLOURS, ROLE_WORDS, component_words, plotly_text, theme
from lens_defense.prompts.request import Role
from lens_defense.sites import Component
from lens_defense.tracing.site_map import RoleMean, SiteMap

_LEFT, _RIGHT, _LINE = 66, 14, 19
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""In grey, lines are told apart by these."""


def effect_curves(
    maps: Mapping[str, SiteMap],
    role: Role = "subject_last",
    *,
    component: Component | None = None,
    width: Width | float = "column",
) -> go.Figure:
    """Mean effects by layer at one role, a curve per map, with their 95% intervals as bands.

    Args:
        maps: traces or other maps by name, as in {"nothing severed": trace, "MLP outputs severed": severed}.
        role: at which tokens.
        component: of which component. None takes each map's first.
        width: what it is drawn for: "column", "page" or inches.

    Raises:
        ValueError: there is no map; or one has nothing at this role, or not of this component.
    """
    if not maps:
        raise ValueError("no map was given; ld.trace makes one")
    figure, curves = go.Figure(), []
    for name, site_map in maps.items():
        if not isinstance(site_map, SiteMap):
            call = 'ld.plots.effect_curves({"nothing severed": trace})'
            raise wrong_argument(call, f"{name!r} must be a Trace or a ScoreMap", site_map)
        curves.append(_curve(name, site_map, role, component or site_map.components[0]))
    for i, curve in enumerate(curves):  # all bands lie below all curves
        low, high = [mean.low for mean in curve], [mean.high for mean in curve]
        add_band(figure, [mean.layer for mean in curve], low, high, COLOURS[i % len(COLOURS)])
    for i, (name, curve) in enumerate(zip(maps, curves, strict=True)):
        _add_curve(figure, name, curve, COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)])
    first = next(iter(maps.values()))
    words = map_words(first)
    figure.update_xaxes(title_text="layer", gridcolor="#eeeeee")
    figure.update_yaxes(title_text=words.scale, gridcolor="#e3e3e3", rangemode="tozero")
    legend = {"x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal", "font": {"size": FONT}}
    figure.update_layout(legend=legend, meta=map_origin(first))
    title = f"{first.model}: {words.title}, {component_words(component or first.components[0])}"
    title += f" at the {ROLE_WORDS[role]}, mean over {len(first.prompts)} requests"
    plot = (print_pixels(width) - _LEFT - _RIGHT, 210)
    return theme(
        figure,
        title=title,
        plot=plot,
        left=_LEFT,
        right=_RIGHT,
        above=12 + _LINE * len(maps),
        below=46,
    )


def _curve(name: str, site_map: SiteMap, role: Role, component: Component) -> list[RoleMean]:
    """The means of one component at one role, by layer."""
    means = site_map.role_means()
    curve = [mean for mean in means if mean.role == role and mean.component == component]
    if not curve:
        known = dict.fromkeys(f"{mean.component} at {mean.role}" for mean in means)
        raise ValueError(f"the map {name!r} has no {component} at {role}; it has {', '.join(known)}")
    return curve


def _add_curve(figure: go.Figure, name: str, curve: list[RoleMean], colour: str, dash: str) -> None:
    """A line over layers."""
    hover = [
        f"<b>{plotly_text(name)}</b><br>layer {mean.layer}<br>{mean.effect:.3f}, "
        f"{mean.low:.3f} to {mean.high:.3f}, {mean.n} requests"
        for mean in curve
    ]
    figure.add_scatter(
        x=[mean.layer for mean in curve],
        y=[mean.effect for mean in curve],
        mode="lines",
        name=plotly_text(name),
        line={"color": colour, "width": 2, "dash": dash},
        hovertext=hover,
        hoverinfo="text",
    )


def add_band(
    figure: go.Figure, x: list[int], low: list[float], high: list[float], colour: str, **panel: int
) -> None:
    """Draw an interval as a pale band between two curves.

    Args:
        figure: where to.
        x: of both curves.
        low: the lower one.
        high: the upper one.
        colour: as "#rrggbb".
        panel: row and col of a figure of several panels.
    """
    red, green, blue = hex_to_rgb(colour)
    bounds = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, **panel}
    shade = f"rgba({red},{green},{blue},.15)"
    figure.add_scatter(x=x, y=high, **bounds)
    figure.add_scatter(x=x, y=low, fill="tonexty", fillcolor=shade, **bounds)
