"""Heatmaps of a Trace or ScoreMap, with sites outlined. They need no model.

The colours diverge around 0 and reach as far as the largest value of the map, the same for all panels.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_defense.arguments import wrong_argument
from lens_defense.plotting.annotations import bracket_subjects, frame_gaps, name_panel, outline
from lens_defense.plotting.map_view import MapView, head_view, map_words, view
from lens_defense.plotting.theme import FONT, ROLE_WORDS, label_margins, theme
from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site, resolve_sites
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import SiteMap
from lens_defense.tracing.trace_result import Trace

_SCALE = ("#2166ac", "#67a9cf", "#d1e5f0", "#ffffff", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue, white, red: ColorBrewer's RdBu reversed, told apart by all common forms of colour blindness."""
_BETWEEN = 24
"""Pixels from panel to panel."""


def heatmap(site_map: SiteMap, sites: Sequence[Site] = (), *, significant: float | None = None) -> go.Figure:
    """A map of effects: layers x tokens for one request, layers x roles for many; a panel per component.

    Columns are the tokens that were traced and the subject; tokens left out between them show as a gap. The
    subject is bracketed. Sites are outlined where the map has their component and role; a site's layer that
    was not traced lies between its neighbours.

    Args:
        site_map: a Trace, or a ScoreMap (ld.lenses).
        sites: what to outline.
        significant: of many requests, draw a thin line around the means whose q-value is below this
            (see `ld.map_statistics.significance`).

    Raises:
        ValueError: `significant` of a ScoreMap, whose cells have no sign that could tell them from chance.
    """
    call = "ld.heatmap(trace, sites)"
    if not isinstance(site_map, SiteMap):
        raise wrong_argument(call, "the map must be a Trace or a ScoreMap", site_map)
    sites = resolve_sites(sites, call)
    shown, words, single = view(site_map), map_words(site_map), len(site_map.prompts) == 1
    panels, columns, rows = len(site_map.components), len(shown.labels), len(site_map.layers)
    flat = not single and panels * columns <= 14
    cell = min(30 if single else 38, max(14, 1100 // (panels * columns)))
    if flat:
        cell = 64 if columns < 5 else 54
    width, height = max(170, columns * cell), _height(rows)
    across = panels * width + _BETWEEN * (panels - 1)
    figure = make_subplots(cols=panels, shared_yaxes=True, horizontal_spacing=_BETWEEN / across)
    above = 54 if set(site_map.components) == {"resid_post"} or words.window < 2 else 70
    sure_sites = [] if significant is None or single else _significant_sites(site_map, significant)
    for c, component in enumerate(site_map.components):
        figure.add_trace(_panel(shown, c, words.scale), row=1, col=c + 1)
        name_panel(figure, c, component, words.window, above)
        bracket_subjects(figure, c, shown.subjects, letters=width // 8)
        frame_gaps(figure, c, shown.roles, rows)
        outline(figure, c, shown.roles, site_map.layers, _of(sure_sites, component), name="significant")
        outline(figure, c, shown.roles, site_map.layers, _of(sites, component))
    angle = 0 if flat else -45 if cell > 20 else -90
    labels = [text.replace(" ", "<br>") if flat else text for text in shown.labels]
    figure.update_xaxes(tickvals=[*range(columns)], ticktext=labels, tickangle=angle)
    figure.update_xaxes(range=[-0.5, columns - 0.5], ticklabeloverflow="allow")
    stride = -(-rows // 30)
    layers = [str(layer) for layer in site_map.layers[::stride]]
    figure.update_yaxes(tickvals=[*range(0, rows, stride)], ticktext=layers, range=[-0.5, rows - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    beside, below = label_margins(shown.labels, angle)
    left = max(62, beside - cell // 2)
    title = _title(site_map, shown, sites, significant)
    return theme(figure, title=title, plot=(across, height), left=left, right=108, above=above, below=below)


def head_heatmap(trace: Trace, role: Role | None = None) -> go.Figure:
    """Mean effects of single heads at one role, or at all tokens together: layers x heads.

    Args:
        trace: a trace of heads (components "z" or "z.3").
        role: which role. None is the subject's last token or, of a trace with `together`, the role that its
            cells stand at.

    Raises:
        ValueError: the trace has no heads, or not at this role.
    """
    together, words = trace.settings.together, map_words(trace)
    role = role or (trace.role_means()[0].role if together else "subject_last")
    shown = head_view(trace, role)
    columns, layers = len(shown.labels), [str(layer) for layer in trace.layers]
    figure = go.Figure(_panel(shown, 0, words.scale))
    figure.update_xaxes(tickvals=[*range(columns)], ticktext=[*shown.labels], title_text="head")
    figure.update_yaxes(tickvals=[*range(len(layers))], ticktext=layers, title_text="layer")
    place = "at all tokens together" if together else f"at the {ROLE_WORDS[role]}"
    title = f"{trace.model}: {words.title}, single heads {place}"
    plot = (max(170, columns * 30), _height(len(layers)))
    return theme(figure, title=title, plot=plot, left=62, right=108, above=40, below=52)


def site_cells(site_map: SiteMap) -> list[tuple[list[int], list[int], tuple[Site, ...]]]:
    """For each panel of a map's heatmap, its cells' columns, rows, and the sites that they stand for."""
    shown, panels = view(site_map), []
    for c, component in enumerate(site_map.components):
        rows, columns = np.isfinite(shown.effects[c]).nonzero()
        sites = tuple(
            Site(component, site_map.layers[j], role, float(shown.effects[c, j, i]))
            for j, i in zip(rows, columns, strict=True)
            if (role := shown.roles[i]) is not None
        )
        panels.append((columns.tolist(), rows.tolist(), sites))
    return panels


def _height(rows: int) -> int:
    """Pixels of a panel of so many layers."""
    return max(190, rows * min(26, max(12, 420 // rows)))


def _of(sites: Sequence[Site], component: Component) -> list[Site]:
    return [site for site in sites if site.component == component]


def _significant_sites(site_map: SiteMap, level: float) -> list[Site]:
    """Where the mean effect's q-value is below a level."""
    rows = significance(site_map).to_dict("records")
    return [Site(row["component"], row["layer"], row["role"]) for row in rows if row["q"] < level]


def _panel(shown: MapView, c: int, scale: str) -> go.Heatmap:
    finite = shown.effects[np.isfinite(shown.effects)]
    largest = float(np.abs(finite).max(initial=0.0)) or 1.0
    return go.Heatmap(
        x=[*range(len(shown.labels))],
        y=[*range(shown.effects.shape[1])],
        z=shown.effects[c],
        hovertext=shown.hover[c],
        hoverinfo="text",
        hoverongaps=False,
        colorscale=list(_SCALE),
        zmid=0,
        zmin=-largest,
        zmax=largest,
        showscale=c == len(shown.effects) - 1,
        colorbar={
            "title": {"text": scale, "side": "right", "font": {"size": FONT}},
            "thickness": 12,
            "outlinewidth": 0,
            "ypad": 0,
        },
    )


def _title(site_map: SiteMap, shown: MapView, sites: Sequence[Site], significant: float | None) -> str:
    words, single = map_words(site_map), len(site_map.prompts) == 1
    answer = f" on the answer “{site_map.answers[0]}”" if single and isinstance(site_map, Trace) else ""
    requests = "" if single else f", mean over {len(site_map.prompts)} requests"
    notes = ["outlined: the sites"] if any(site.component in site_map.components for site in sites) else []
    blank = np.isnan(shown.effects).all((0, 1)) & np.array([role is not None for role in shown.roles])
    notes += ["grey: not traced"] if blank.any() else []
    notes += [f"thin lines: q < {significant:g}"] if significant is not None and not single else []
    title = f"{site_map.model}: {words.title}{answer}{requests}"
    return "\n".join((title, "; ".join([*notes, *words.notes]))).strip()
