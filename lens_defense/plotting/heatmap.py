"""A map of a Trace with its Sites: how much of the answer each state brings back. No model is known here.

One request is layers x tokens, many are layers x roles; the numbers are the Trace's own.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lens_defense.plotting.annotations import (
    bracket_subjects,
    frame_gaps,
    name_panel,
    outline,
    outline_significant,
)
from lens_defense.plotting.theme import FONT, ROLE_WORDS, component_words, label_margins, theme, token_label
from lens_defense.prompts.prompt import READING_ORDER, Role
from lens_defense.sites import Site, head_index
from lens_defense.statistics import LEAST_FOR_BOOTSTRAP
from lens_defense.tracing.trace_result import Trace

SCALE = ("#2166ac", "#67a9cf", "#d1e5f0", "#ffffff", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue, white, red: ColorBrewer's RdBu turned round, told apart by all common forms of colour blindness."""
_WHAT = {"denoising": "what one restored state brings back", "noising": "what one spoiled state takes away"}
_SCALE_WORDS = {"denoising": "share of the answer restored", "noising": "share of the answer lost"}
_BETWEEN = 24
"""Pixels from panel to panel."""


def heatmap(trace: Trace, sites: Sequence[Site] = (), *, significant: float | None = None) -> go.Figure:
    """A map of effects: layers x tokens for one request, layers x roles for many; a panel a component.

    Columns are the tokens that were traced and the subject; tokens left out between them show as a
    gap. The subject is bracketed. Sites are outlined where the map has their component and role; a
    site's layer that was not traced lies between its neighbours.

    Args:
        trace: what is drawn.
        sites: what is outlined.
        significant: of many requests, a thin line goes around the means whose q-value (see `significance`) is
            below this.
    """
    one = len(trace.prompts) == 1
    shown = _of_tokens(trace) if one else _of_roles(trace)
    panels, columns, rows = len(trace.components), len(shown.labels), len(trace.layers)
    flat = not one and panels * columns <= 14
    cell = (
        (64 if columns < 5 else 54) if flat else min(30 if one else 38, max(14, 1100 // (panels * columns)))
    )
    width, height = max(170, columns * cell), max(190, rows * min(26, max(12, 420 // rows)))
    across = panels * width + _BETWEEN * (panels - 1)
    figure = make_subplots(cols=panels, shared_yaxes=True, horizontal_spacing=_BETWEEN / across)
    finite = np.abs(shown.effects[np.isfinite(shown.effects)])
    most = float(finite.max(initial=0.0)) or 1.0
    above = 54 if set(trace.components) == {"resid_post"} or trace.window < 2 else 70
    for c, component in enumerate(trace.components):
        figure.add_trace(_panel(shown, c, most, _scale_words(trace), last=c == panels - 1), row=1, col=c + 1)
        name_panel(figure, c, component, trace.window, above)
        bracket_subjects(figure, c, shown.subjects, letters=width // 8)
        frame_gaps(figure, c, shown.roles, rows)
        if significant is not None and not one:
            outline_significant(figure, c, component, shown.roles, trace, significant)
        outline(figure, c, shown.roles, trace.layers, [s for s in sites if s.component == component])
    angle = 0 if flat else -45 if cell > 20 else -90
    labels = [text.replace(" ", "<br>") if flat else text for text in shown.labels]
    figure.update_xaxes(tickvals=[*range(columns)], ticktext=labels, tickangle=angle)
    figure.update_xaxes(range=[-0.5, columns - 0.5], ticklabeloverflow="allow")
    every = -(-rows // 30)
    named = [str(layer) for layer in trace.layers[::every]]
    figure.update_yaxes(tickvals=[*range(0, rows, every)], ticktext=named, range=[-0.5, rows - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    aside, below = label_margins(shown.labels, angle)
    return theme(
        figure,
        title=_heatmap_title(trace, shown, sites, significant),
        plot=(across, height),
        left=max(62, aside - cell // 2),
        right=108,
        above=above,
        below=below,
    )


def head_heatmap(trace: Trace, role: Role | None = None) -> go.Figure:
    """Mean effects of single heads at one role, or at all tokens together: layers x heads.

    Args:
        trace: what is drawn; its components are "z".
        role: where; None is the subject's last token or, of a trace with `together`, where its cells stand.

    Raises:
        ValueError: the trace has no heads, or not at this role.
    """
    every = [m for m in trace.role_effects() if head_index(m.component) is not None]
    role = role or (every[0].role if every and trace.together else "subject_last")
    means = [m for m in every if m.role == role]
    if not means:
        raise ValueError(f'this trace has no heads at {role}; ld.trace(model, requests, components=["z"])')
    heads = sorted({head_index(mean.component) or 0 for mean in means})
    effects = np.full((1, len(trace.layers), len(heads)), np.nan)
    hover = np.full(effects.shape, "", dtype=object)
    for mean in means:
        cell = (0, trace.layers.index(mean.layer), heads.index(head_index(mean.component) or 0))
        effects[cell] = mean.effect
        hover[cell] = _about({**asdict(mean)}, mean.n, "requests")
    shown = _Map(tuple(map(str, heads)), (None,) * len(heads), effects, hover, ())
    most = float(np.nanmax(np.abs(effects))) or 1.0
    figure = go.Figure(_panel(shown, 0, most, _scale_words(trace), last=True))
    figure.update_xaxes(tickvals=[*range(len(heads))], ticktext=list(map(str, heads)), title_text="head")
    named = [str(layer) for layer in trace.layers]
    figure.update_yaxes(tickvals=[*range(len(named))], ticktext=named, title_text="layer")
    plot = (max(170, len(heads) * 30), max(190, len(named) * min(26, max(12, 420 // len(named)))))
    where = "at all tokens together" if trace.together else f"at the {ROLE_WORDS[role]}"
    title = f"{trace.model}: {_WHAT[trace.direction]} of the answer, single heads {where}"
    return theme(figure, title=title, plot=plot, left=62, right=108, above=40, below=52)


def site_cells(trace: Trace) -> list[tuple[list[int], list[int], tuple[Site, ...]]]:
    """For each panel of a trace's heatmap, its cells' columns, rows, and the sites that they stand for."""
    shown = _of_tokens(trace) if len(trace.prompts) == 1 else _of_roles(trace)
    panels = []
    for c, component in enumerate(trace.components):
        rows, columns = np.isfinite(shown.effects[c]).nonzero()
        sites = tuple(
            Site(component, trace.layers[j], role, float(shown.effects[c, j, i]))
            for j, i in zip(rows, columns, strict=True)
            if (role := shown.roles[i]) is not None
        )
        panels.append((columns.tolist(), rows.tolist(), sites))
    return panels


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """What a heatmap shows: a column a token or a role."""

    labels: tuple[str, ...]
    roles: tuple[Role | None, ...]
    """None is a gap."""
    effects: NDArray[np.float64]
    """component layer column"""
    hover: NDArray[np.object_]
    subjects: tuple[tuple[int, int, str], ...]
    """First column, last column and text of each bracket."""


def _of_tokens(trace: Trace) -> _Map:
    met = trace.prompts[0]
    effects = trace.effects[0].numpy()
    traced = np.flatnonzero(np.isfinite(effects).any((0, 1))).tolist()
    columns: list[int | None] = []
    for position in sorted({*traced, *met.corrupted}):
        if columns and columns[-1] != position - 1:
            columns.append(None)
        columns.append(position)
    at = {position: i for i, position in enumerate(columns) if position is not None}
    values = np.full((*effects.shape[:2], len(columns)), np.nan)
    values[:, :, list(at.values())] = effects[:, :, list(at)]
    hover = np.full(values.shape, "", dtype=object)
    samples = trace.patched.shape[-1]
    for cell in trace.to_dataframe().to_dict("records"):
        c, j = trace.components.index(cell["component"]), trace.layers.index(cell["layer"])
        where = f"<b>{token_label(cell['word'], cell['role'], 40)}</b><br>position {cell['position']}"
        hover[c, j, at[cell["position"]]] = f"{where}<br>{_about(cell, samples, 'noise draws')}"
    return _Map(
        labels=tuple("⋯" if t is None else token_label(met.words[t], met.roles[t], 12) for t in columns),
        roles=tuple(None if t is None else met.roles[t] for t in columns),
        effects=values,
        hover=hover,
        subjects=tuple((at[a], at[b - 1], met.request.subject or "") for a, b in met.subjects),
    )


def _of_roles(trace: Trace) -> _Map:
    means = trace.by_role().to_dict("records")
    roles: list[Role] = [role for role in READING_ORDER if any(mean["role"] == role for mean in means)]
    values = np.full((len(trace.components), len(trace.layers), len(roles)), np.nan)
    hover = np.full(values.shape, "", dtype=object)
    for mean in means:
        cell = trace.components.index(mean["component"]), trace.layers.index(mean["layer"])
        values[*cell, roles.index(mean["role"])] = mean["effect"]
        hover[*cell, roles.index(mean["role"])] = _about(mean, mean["n"], "requests")
    subject = [i for i, role in enumerate(roles) if role.startswith("subject")]
    names = {met.request.subject or "" for met in trace.prompts}
    name = names.pop() if len(names) == 1 else "subject"
    return _Map(
        labels=tuple(ROLE_WORDS[role] for role in roles),
        roles=tuple(roles),
        effects=values,
        hover=hover,
        subjects=((subject[0], subject[-1], name),) if subject else (),
    )


def _about(cell: Mapping[Hashable, Any], n: int, things: str) -> str:
    """The lines of a hover that tokens and roles share."""
    interval = "95% interval" if n >= LEAST_FOR_BOOTSTRAP else "range"
    lines = [
        f"{ROLE_WORDS[cell['role']]}, layer {cell['layer']}, {component_words(cell['component'])}",
        f"effect <b>{cell['effect']:.3f}</b>",
        f"{interval} {cell['low']:.3f} to {cell['high']:.3f}, {n} {things}",
    ]
    return "<br>".join(lines if n > 1 else lines[:2])


def _panel(shown: _Map, c: int, most: float, scale: str, *, last: bool) -> go.Heatmap:
    return go.Heatmap(
        x=[*range(len(shown.labels))],
        y=[*range(shown.effects.shape[1])],
        z=shown.effects[c],
        hovertext=shown.hover[c],
        hoverinfo="text",
        hoverongaps=False,
        colorscale=list(SCALE),
        zmid=0,
        zmin=-most,
        zmax=most,
        showscale=last,
        colorbar={
            "title": {"text": scale, "side": "right", "font": {"size": FONT}},
            "thickness": 12,
            "outlinewidth": 0,
            "ypad": 0,
        },
    )


def _heatmap_title(trace: Trace, shown: _Map, sites: Sequence[Site], significant: float | None = None) -> str:
    answer = f" “{trace.answers[0]}”" if len(trace.prompts) == 1 else ""
    many = "" if answer else f", mean over {len(trace.prompts)} requests"
    notes = ["outlined: the sites"] if any(site.component in trace.components for site in sites) else []
    blank = np.isnan(shown.effects).all((0, 1)) & np.array([role is not None for role in shown.roles])
    notes += ["grey: not traced"] if blank.any() else []
    notes += [f"thin lines: q < {significant:g}"] if significant is not None and not answer else []
    notes += [f"later {trace.severed} outputs held"] if trace.severed else []
    notes += ["all tokens together, drawn at the last"] if trace.together else []
    notes += [] if trace.exact else ["estimated by a gradient"]
    what = f"{trace.measure or _WHAT[trace.direction] + ' of the answer'}{answer}{many}"
    return "\n".join((f"{trace.model}: {what}", "; ".join(notes))).strip()


def _scale_words(trace: Trace) -> str:
    return "share" if trace.measure else _SCALE_WORDS[trace.direction]
