"""What a heatmap shows of a map: a column per token of one request, per role of many, or per attention head.

The words that depend on the kind of map (denoising, noising, a score) stand here, once.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lens_defense.plotting.theme import ROLE_WORDS, component_words, token_label
from lens_defense.prompts.request import READING_ORDER, Role
from lens_defense.shown_text import shown
from lens_defense.sites import head_index
from lens_defense.statistics import LEAST_FOR_BOOTSTRAP
from lens_defense.tracing.site_map import RoleMean, ScoreMap, SiteMap
from lens_defense.tracing.trace_result import Trace


class MapView(NamedTuple):
    """The columns of a heatmap and what stands in them."""

    labels: tuple[str, ...]
    roles: tuple[Role | None, ...]
    """None is a gap, or a head."""
    effects: NDArray[np.float64]
    """[component, layer, column]"""
    hover: NDArray[np.object_]
    """[component, layer, column]"""
    subjects: tuple[tuple[int, int, str], ...] = ()
    """First column, last column and text of each bracket."""
    gaps: Mapping[int, str] = {}
    """By column of a gap, which tokens it stands for, in words."""


class MapWords(NamedTuple):
    """What a map is called: in the title, in a hover, at the colour bar; and how it was measured."""

    title: str
    hover: str
    scale: str
    notes: tuple[str, ...] = ()
    window: int = 1
    """Layers that one cell of mlp_out or attn_out covers."""


def map_words(site_map: SiteMap) -> MapWords:
    """The words of a trace by its settings, of a ScoreMap by its quantity."""
    if isinstance(site_map, ScoreMap):
        return MapWords(site_map.quantity, site_map.quantity, "share")
    assert isinstance(site_map, Trace)
    settings = site_map.settings
    notes = [f"later {component_words(settings.severed)} severed"] if settings.severed else []
    notes += ["all tokens together, drawn at the last"] if settings.together else []
    notes += [] if settings.exact else ["estimated by attribution patching"]
    scale = {"denoising": "share of the answer restored", "noising": "share of the answer lost"}
    title = f"activation patching ({settings.direction})"
    return MapWords(title, "effect", scale[settings.direction], tuple(notes), settings.window)


def map_origin(site_map: SiteMap) -> dict[str, str]:
    """What a figure says of its data, for its sidecar."""
    origin = {"model": shown(site_map.model), "weights": site_map.fingerprint.weights}
    if isinstance(site_map, Trace):
        origin |= {"corruption": site_map.corruption, "metric": site_map.metric}
    return origin


def view(site_map: SiteMap, *, fold: bool = True) -> MapView:
    """Layers x tokens of one request, layers x roles of many.

    Args:
        site_map: the map.
        fold: of one request, draw tokens before the subject that change nothing as one column.
    """
    return views([site_map], fold=fold)[0]


def views(site_maps: Sequence[SiteMap], *, fold: bool = True) -> list[MapView]:
    """Several maps of the same requests, with the same columns."""
    if len(site_maps[0].prompts) > 1:
        means = [site_map.role_means() for site_map in site_maps]
        traced = {mean.role for of_map in means for mean in of_map}
        roles: list[Role] = [role for role in READING_ORDER if role in traced]
        return [_role_view(*pair, roles) for pair in zip(site_maps, means, strict=True)]
    columns = _token_columns(site_maps, fold=fold)
    return [_token_view(site_map, columns) for site_map in site_maps]


def head_view(trace: Trace, role: Role) -> MapView:
    """Layers x heads at one role, as one component.

    Raises:
        ValueError: the trace has no heads at this role.
    """
    means = [mean for mean in trace.role_means() if head_index(mean.component) is not None]
    rows = [asdict(mean) for mean in means if mean.role == role]
    if not rows:
        raise ValueError(f'this trace has no heads at {role}; ld.trace(model, requests, components=["z"])')
    heads = sorted({head_index(row["component"]) or 0 for row in rows})
    columns = [heads.index(head_index(row["component"]) or 0) for row in rows]
    effects, hover = _fill(trace, rows, columns, (1, len(heads)), "requests")
    return MapView(tuple(map(str, heads)), (None,) * len(heads), effects, hover)


_NO_EFFECT = 0.005
"""What is smaller than this is white on any map: half of the last digit that is read from one."""


def _token_columns(site_maps: Sequence[SiteMap], *, fold: bool) -> list[int | range]:
    """The columns of one request's maps: a token's position, or the positions of tokens that are left out.

    Left out is what was not traced and, where `fold` says so, what stands before the subject and has no
    effect: a token sees nothing of what comes after it.
    """
    prompt = site_maps[0].prompts[0]
    effects = [site_map.effects[0].flatten(0, 1) for site_map in site_maps]
    traced = {t for effect in effects for t in effect.isfinite().any(0).nonzero().flatten().tolist()}
    drawn = {*traced, *prompt.subject_positions}
    if fold:
        largest = torch.stack([effect.abs().nan_to_num(0).amax(0) for effect in effects]).amax(0)
        before = range(min(prompt.subject_positions, default=0))
        idle = {position for position in before if largest[position] < _NO_EFFECT}
        drawn -= {position for position in idle if {position - 1, position + 1} & idle}
    columns: list[int | range] = []
    next_position = 0
    for position in sorted(drawn):
        if position > next_position:
            columns.append(range(next_position, position))
        columns.append(position)
        next_position = position + 1
    return columns


def _left_out(positions: range, traced: Set[int]) -> str:
    """What a gap stands for."""
    tokens = f"{len(positions)} token{'s' if len(positions) > 1 else ''}"
    folded = traced & {*positions}
    return f"{tokens} before the subject, without effect" if folded else f"{tokens}, not traced"


def _token_view(site_map: SiteMap, columns: Sequence[int | range]) -> MapView:
    prompt = site_map.prompts[0]
    traced = {*site_map.effects[0].isfinite().any(0).any(0).nonzero().flatten().tolist()}
    column_of = {position: i for i, position in enumerate(columns) if isinstance(position, int)}
    table = site_map.to_dataframe().assign(n=site_map.values.shape[-1])
    rows = [row for row in table.to_dict("records") if row["position"] in column_of]
    row_columns = [column_of[row["position"]] for row in rows]
    effects, hover = _fill(site_map, rows, row_columns, (len(site_map.components), len(columns)), "samples")
    # the map's own means: those of the table may differ in the last bit
    effects[:, :, [*column_of.values()]] = site_map.effects[0][:, :, [*column_of]].numpy()
    return MapView(
        labels=tuple(
            token_label(prompt.token_texts[t], prompt.roles[t], 12) if isinstance(t, int) else "⋯"
            for t in columns
        ),
        roles=tuple(prompt.roles[t] if isinstance(t, int) else None for t in columns),
        effects=effects,
        hover=hover,
        subjects=tuple(
            (column_of[start], column_of[stop - 1], prompt.request.subject or "")
            for start, stop in prompt.subject_spans
        ),
        gaps={i: _left_out(t, traced) for i, t in enumerate(columns) if isinstance(t, range)},
    )


def _role_view(site_map: SiteMap, means: Sequence[RoleMean], roles: Sequence[Role]) -> MapView:
    rows = [asdict(mean) for mean in means]
    row_columns = [roles.index(row["role"]) for row in rows]
    effects, hover = _fill(site_map, rows, row_columns, (len(site_map.components), len(roles)), "requests")
    columns = [i for i, role in enumerate(roles) if role.startswith("subject")]
    names = {prompt.request.subject or "" for prompt in site_map.prompts}
    bracket = names.pop() if len(names) == 1 else "subject"
    subjects = ((columns[0], columns[-1], bracket),) if columns else ()
    return MapView(tuple(ROLE_WORDS[role] for role in roles), tuple(roles), effects, hover, subjects)


def _fill(
    site_map: SiteMap,
    rows: Sequence[Mapping[Any, Any]],
    columns: Sequence[int],
    size: tuple[int, int],
    unit: str,
) -> tuple[NDArray[np.float64], NDArray[np.object_]]:
    """Effects and hovers [component, layer, column] of a table's rows, each of which stands in one column.

    A hover has the interval over n units, where n is more than 1.
    """
    panels, width = size
    effects = np.full((panels, len(site_map.layers), width), np.nan)
    hover = np.full(effects.shape, "", dtype=object)
    quantity = map_words(site_map).hover
    for row, column in zip(rows, columns, strict=True):
        lines = [
            f"{ROLE_WORDS[row['role']]}, layer {row['layer']}, {component_words(row['component'])}",
            f"{quantity} <b>{row['effect']:.3f}</b>",
        ]
        if "token" in row:
            token = token_label(row["token"], row["role"], 40)
            lines = [f"<b>{token}</b>", f"position {row['position']}", *lines]
        if row["n"] > 1:
            interval = "95% interval" if row["n"] >= LEAST_FOR_BOOTSTRAP else "range"
            lines.append(f"{interval} {row['low']:.3f} to {row['high']:.3f}, {row['n']} {unit}")
        panel = site_map.components.index(row["component"]) if panels > 1 else 0
        cell = (panel, site_map.layers.index(row["layer"]), column)
        effects[cell], hover[cell] = row["effect"], "<br>".join(lines)
    return effects, hover
