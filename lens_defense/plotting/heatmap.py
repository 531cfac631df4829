"""Heatmaps of a Trace or ScoreMap, with sites outlined. They need no model.

The colours diverge around 0 and reach as far as the largest value of the map, the same for all panels unless
each is given a scale of its own. Figures are as wide as a paper's column or its page (`print_size`).
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import plotly.graph_objects as go

from lens_defense.arguments import wrong_argument
from lens_defense.plotting.map_panels import Panel, Scale, draw_panels
from lens_defense.plotting.map_view import MapWords, head_view, map_origin, map_words, view, views
from lens_defense.plotting.panel_grid import LEFT
from lens_defense.plotting.print_size import Width
from lens_defense.plotting.reddest_column import why_not_reddest
from lens_defense.plotting.theme import ROLE_WORDS, component_words, theme
from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site, resolve_sites
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import SiteMap
from lens_defense.tracing.trace_result import Trace


def heatmap(
    site_map: SiteMap,
    sites: Sequence[Site] = (),
    *,
    after: SiteMap | None = None,
    width: Width | float | None = None,
    scale: Scale = "shared",
    fold: bool = True,
    significant: float | None = None,
) -> go.Figure:
    """A map of effects: layers x tokens for one request, layers x roles for many; a panel per component.

    Columns are the tokens that were traced and the subject; tokens left out show as one narrow column, whose
    hover counts them. The subject is bracketed. Sites are outlined where the map has their component and
    role; a site's layer that was not traced lies between its neighbours. Where another column is redder than
    theirs, a note says why an edit does not go there. A minus marks what is clearly below 0, for prints in
    grey.

    Args:
        site_map: a Trace, or a ScoreMap (ld.lenses).
        sites: what to outline.
        after: a second map of the same requests, as of an edited model: before, after and what changed stand
            side by side, on one scale.
        width: what it is drawn for: a paper's "column" (3.25 inches), its "page" (6.75), or inches; panels
            that do not fit wrap. None takes a column where the panels fit into it, else a page.
        scale: "shared" colours all panels alike, "panel" each by its own largest value.
        fold: of one request, draw tokens before the subject that have no effect as one column.
        significant: of many requests, draw a thin line around the means whose q-value is below this
            (see `ld.map_statistics.significance`).

    Raises:
        ValueError: there is no such width or scale; `after` is of other requests, components or layers; or
            `significant` is given for a ScoreMap, whose cells have no sign that could tell them from chance.
    """
    call = "ld.heatmap(trace, sites)"
    if not isinstance(site_map, SiteMap):
        raise wrong_argument(call, "the map must be a Trace or a ScoreMap", site_map)
    if after is not None and not isinstance(after, SiteMap):
        raise wrong_argument("ld.heatmap(before, after=after)", "after must be a Trace or a ScoreMap", after)
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    sites, words = resolve_sites(sites, call), map_words(site_map)
    panels = _panels(site_map, after, sites, significant, fold=fold)
    figure, grid, below = draw_panels(panels, site_map.layers, words, width, scale)
    return theme(
        figure,
        title=_title(site_map, words, change=after is not None),
        note=" ".join(_notes(site_map, panels, words, significant)),
        plot=grid.size,
        left=LEFT,
        right=grid.right,
        above=grid.above,
        below=below,
    ).update_layout(meta=map_origin(site_map))


def head_heatmap(trace: Trace, role: Role | None = None, *, width: Width | float | None = None) -> go.Figure:
    """Mean effects of single heads at one role, or at all tokens together: layers x heads.

    Args:
        trace: a trace of heads (components "z" or "z.3").
        role: which role. None is the subject's last token or, of a trace with `together`, the role that its
            cells stand at.
        width: as of `heatmap`.

    Raises:
        ValueError: the trace has no heads, or not at this role; or there is no such width.
    """
    together, words = trace.settings.together, map_words(trace)
    role = role or (trace.role_means()[0].role if together else "subject_last")
    place = "at all tokens together" if together else f"at the {ROLE_WORDS[role]}"
    panel = Panel("", head_view(trace, role), 0, (), ())
    figure, grid, below = draw_panels([panel], trace.layers, words, width, "shared", above=8)
    figure.update_xaxes(title_text="head")
    title = f"{trace.model}: {words.title}, single heads {place}"
    figure = theme(
        figure,
        title=title,
        plot=grid.size,
        left=LEFT,
        right=grid.right,
        above=grid.above,
        below=below + 22,
    )
    return figure.update_layout(meta=map_origin(trace))


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


def _panels(
    before: SiteMap, after: SiteMap | None, sites: Sequence[Site], significant: float | None, *, fold: bool
) -> list[Panel]:
    """A panel per component or, of two maps, three: before, after, and the difference."""
    maps = [before] if after is None else [before, after, after - before]
    shown_maps = views(maps, fold=fold)
    single = len(before.prompts) == 1
    sure_sites = [] if significant is None or single else _significant_sites(before, significant)
    times = [""] if after is None else ["before", "after", "after − before"]  # noqa: RUF001
    panels = []
    for c, component in enumerate(before.components):
        for when, shown_map in zip(times, shown_maps, strict=True):
            named = component_words(component)
            name = named if not when else when if len(before.components) == 1 else f"{named}, {when}"
            panels.append(
                Panel(name, shown_map, c, _of(sites, component), _of(sure_sites, component) * (not when))
            )
    return panels


def _of(sites: Sequence[Site], component: Component) -> list[Site]:
    return [site for site in sites if site.component == component]


def _significant_sites(site_map: SiteMap, level: float) -> list[Site]:
    """Where the mean effect's q-value is below a level."""
    rows = significance(site_map).to_dict("records")
    return [Site(row["component"], row["layer"], row["role"]) for row in rows if row["q"] < level]


def _title(site_map: SiteMap, words: MapWords, *, change: bool) -> str:
    """What is shown, of which model and how many requests."""
    single = len(site_map.prompts) == 1
    parts = [f"{site_map.model}: {words.title}", *words.notes]
    parts += ["before and after"] if change else []
    parts += [] if single else [f"mean over {len(site_map.prompts)} requests"]
    if single and isinstance(site_map, Trace) and site_map.answers[0]:
        parts.append(f"answer “{site_map.answers[0]}”")
    return ", ".join(parts)


def _notes(
    site_map: SiteMap, panels: Sequence[Panel], words: MapWords, significant: float | None
) -> list[str]:
    """What the marks of a map mean, each a sentence."""
    notes, outlined = [], [panel for panel in panels if panel.sites]
    if outlined:
        notes.append("Outlined: the sites.")
    if outlined and isinstance(site_map, Trace):
        reason = why_not_reddest(outlined[0].effects, outlined[0].view.roles, outlined[0].sites)
        notes += [reason] if reason else []
    if significant is not None and len(site_map.prompts) > 1:
        notes.append(f"Thin lines: q < {significant:g}.")
    if words.window > 1 and {"mlp_out", "attn_out"} & {*site_map.components}:
        notes.append(f"MLP and attention outputs: windows of {words.window} layers.")
    if any(panel.is_partly_untraced for panel in panels):
        notes.append("Grey: not traced.")
    return notes
