"""Heatmaps of a Trace or ScoreMap, with sites outlined. They need no model.

The colours are a diverging scale around 0, and reach as far as the largest value of the map.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_defense.plotting.annotations import bracket_subjects, frame_gaps, name_panel, outline
from lens_defense.plotting.map_view import MapView, hover_lines, map_words, view
from lens_defense.plotting.theme import FONT, ROLE_WORDS, label_margins, theme
from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site, head_index
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import SiteMap
from lens_defense.tracing.trace_result import Trace

SCALE = ("#2166ac", "#67a9cf", "#d1e5f0", "#ffffff", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue, white, red: ColorBrewer's RdBu turned round, told apart by all common forms of colour blindness."""
_THIN = ((1.0, "#111111"),)
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
    shown, words, single = view(site_map), map_words(site_map), len(site_map.prompts) == 1
    panels, columns, rows = len(site_map.components), len(shown.labels), len(site_map.layers)
    flat = not single and panels * columns <= 14
    cell = min(30 if single else 38, max(14, 1100 // (panels * columns)))
    if flat:
        cell = 64 if columns < 5 else 54
    width, height = max(170, columns * cell), _height(rows)
    across = panels * width + _BETWEEN * (panels - 1)
    figure = make_subplots(cols=panels, shared_yaxes=True, horizontal_spacing=_BETWEEN / across)
    largest = float(np.abs(shown.effects[np.isfinite(shown.effects)]).max(initial=0.0)) or 1.0
    above = 54 if set(site_map.components) == {"resid_post"} or words.window < 2 else 70
    significant_sites = [] if significant is None or single else _significant_sites(site_map, significant)
    for c, component in enumerate(site_map.components):
        panel = _panel(shown, c, largest, words.scale, last=c == panels - 1)
        figure.add_trace(panel, row=1, col=c + 1)
        name_panel(figure, c, component, words.window, above)
        bracket_subjects(figure, c, shown.subjects, letters=width // 8)
        frame_gaps(figure, c, shown.roles, rows)
        outline(
            figure,
            c,
            shown.roles,
            site_map.layers,
            _of(significant_sites, component),
            name="significant",
            lines=_THIN,
        )
        outline(figure, c, shown.roles, site_map.layers, _of(sites, component))
    angle = 0 if flat else -45 if cell > 20 else -90
    labels = [text.replace(" ", "<br>") if flat else text for text in shown.labels]
    figure.update_xaxes(tickvals=[*range(columns)], ticktext=labels, tickangle=angle)
    figure.update_xaxes(range=[-0.5, columns - 0.5], ticklabeloverflow="allow")
    stride = -(-rows // 30)
    layers = [str(layer) for layer in site_map.layers[::stride]]
    figure.update_yaxes(tickvals=[*range(0, rows, stride)], ticktext=layers, range=[-0.5, rows - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    aside, below = label_margins(shown.labels, angle)
    return theme(
        figure,
        title=_title(site_map, shown, sites, significant),
        plot=(across, height),
        left=max(62, aside - cell // 2),
        right=108,
        above=above,
        below=below,
    )


def head_heatmap(trace: Trace, role: Role | None = None) -> go.Figure:
    """Mean effects of single heads at one role, or at all tokens together: layers x heads.

    Args:
        trace: a trace of heads (components "z" or "z.3").
        role: which role. None is the subject's last token or, of a trace with `together`, where its cells stand.

    Raises:
        ValueError: the trace has no heads, or not at this role.
    """
    together, words = trace.settings.together, map_words(trace)
    of_heads = [mean for mean in trace.role_means() if head_index(mean.component) is not None]
    role = role or (of_heads[0].role if of_heads and together else "subject_last")
    means = [mean for mean in of_heads if mean.role == role]
    if not means:
        raise ValueError(f'this trace has no heads at {role}; ld.trace(model, requests, components=["z"])')
    heads = sorted({head_index(mean.component) or 0 for mean in means})
    effects = np.full((1, len(trace.layers), len(heads)), np.nan)
    hover = np.full(effects.shape, "", dtype=object)
    for mean in means:
        cell = (0, trace.layers.index(mean.layer), heads.index(head_index(mean.component) or 0))
        effects[cell] = mean.effect
        hover[cell] = hover_lines(asdict(mean), words.cell, mean.n, "requests")
    shown = MapView(tuple(map(str, heads)), (None,) * len(heads), effects, hover, ())
    largest = float(np.nanmax(np.abs(effects))) or 1.0
    figure = go.Figure(_panel(shown, 0, largest, words.scale, last=True))
    figure.update_xaxes(tickvals=[*range(len(heads))], ticktext=list(map(str, heads)), title_text="head")
    layers = [str(layer) for layer in trace.layers]
    figure.update_yaxes(tickvals=[*range(len(layers))], ticktext=layers, title_text="layer")
    where = "at all tokens together" if together else f"at the {ROLE_WORDS[role]}"
    title = f"{trace.model}: {words.quantity}, single heads {where}"
    plot = (max(170, len(heads) * 30), _height(len(layers)))
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


def _of(sites: Sequence[Site], component: Component) -> list[Site]:
    return [site for site in sites if site.component == component]


def _significant_sites(site_map: SiteMap, level: float) -> list[Site]:
    """Where the mean effect's q-value is below a level."""
    return [
        Site(row["component"], row["layer"], row["role"])
        for row in significance(site_map).to_dict("records")
        if row["q"] < level
    ]


def _height(rows: int) -> int:
    """Pixels of a panel of so many layers."""
    return max(190, rows * min(26, max(12, 420 // rows)))


def _panel(shown: MapView, c: int, largest: float, scale: str, *, last: bool) -> go.Heatmap:
    return go.Heatmap(
        x=[*range(len(shown.labels))],
        y=[*range(shown.effects.shape[1])],
        z=shown.effects[c],
        hovertext=shown.hover[c],
        hoverinfo="text",
        hoverongaps=False,
        colorscale=list(SCALE),
        zmid=0,
        zmin=-largest,
        zmax=largest,
        showscale=last,
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
    many = "" if single else f", mean over {len(site_map.prompts)} requests"
    notes = ["outlined: the sites"] if any(site.component in site_map.components for site in sites) else []
    blank = np.isnan(shown.effects).all((0, 1)) & np.array([role is not None for role in shown.roles])
    notes += ["grey: not traced"] if blank.any() else []
    notes += [f"thin lines: q < {significant:g}"] if significant is not None and not single else []
    notes += words.notes
    return "\n".join((f"{site_map.model}: {words.quantity}{answer}{many}", "; ".join(notes))).strip()
