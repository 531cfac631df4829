"""The front of a search: refusals against over-refusal, with the KL as colour."""

from typing import Any

import plotly.graph_objects as go

from lens_defense.plotting.print_size import Width, print_pixels
from lens_defense.plotting.theme import COLOURS, GREY, INK, plotly_text, theme
from lens_defense.searching.edit_search import EditSearch
from lens_defense.searching.outcome import Outcome, knee

_LEFT, _RIGHT = 58, 96


def search_front(search: EditSearch, *, width: Width | float = "column") -> go.Figure:
    """Every edit that was tried: up is more refusals in unseen words, left is less over-refusal.

    Large marks are on the front, which counts the KL too; the knee has a ring.

    Args:
        search: what was tried.
        width: what it is drawn for: a paper's "column", its "page", or inches.

    Raises:
        ValueError: no edit could be planned.
    """
    front = search.front()
    best = knee(front)
    others = [one for one in search.outcomes if not one.failure and one not in front]
    figure = go.Figure()
    largest = max(one.kl for one in [*front, *others])
    for name, outcomes, size in (("front", front, 12), ("others", others, 6)):
        marker = {"size": size, "color": [one.kl for one in outcomes], "coloraxis": "coloraxis"}
        figure.add_trace(_marks(name, outcomes, marker | {"line": {"color": INK, "width": 1}}))
    ring = {"size": 20, "color": "rgba(0,0,0,0)", "line": {"color": COLOURS[5], "width": 2}}
    figure.add_trace(_marks("knee", [best], ring))
    figure.update_layout(
        showlegend=False,
        coloraxis={
            "colorscale": [[0, "#f2f2f2"], [1, COLOURS[0]]],
            "cmin": 0,
            "cmax": largest or 1,
            "colorbar": {"title": {"text": "KL"}, "thickness": 10, "outlinecolor": GREY},
        },
    )
    figure.update_xaxes(title_text="harmless questions newly refused", tickformat=".0%", gridcolor="#e3e3e3")
    figure.update_yaxes(title_text="refused, unseen words", tickformat=".0%", gridcolor="#e3e3e3")
    across = print_pixels(width) - _LEFT - _RIGHT
    return theme(figure, title="", plot=(across, 200), left=_LEFT, right=_RIGHT, above=14, below=48)


def _marks(name: str, outcomes: list[Outcome], marker: dict[str, Any]) -> go.Scatter:
    words = [
        f"{one.candidate.method}, layers {one.layer_words}, "
        f"strength {one.candidate.strength:.2f}; KL {one.kl:.2g}"
        for one in outcomes
    ]
    return go.Scatter(
        name=name,
        x=[one.over_refusal for one in outcomes],
        y=[one.refusals for one in outcomes],
        mode="markers",
        marker=marker,
        text=list(map(plotly_text, words)),
        hovertemplate="%{text}<br>refused %{y:.0%}, over-refusal %{x:.0%}<extra></extra>",
    )
