"""What a heatmap shows of a map: a column per token of one request, or per role of many.

The words that depend on the kind of map (denoising, noising, a score) stand here, once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens_defense.plotting.theme import ROLE_WORDS, component_words, token_label
from lens_defense.prompts.request import READING_ORDER, Role
from lens_defense.statistics import LEAST_FOR_BOOTSTRAP
from lens_defense.tracing.site_map import ScoreMap, SiteMap
from lens_defense.tracing.trace_result import Trace


@dataclass(frozen=True, slots=True, eq=False)
class MapView:
    """The columns of a heatmap and what stands in them."""

    labels: tuple[str, ...]
    roles: tuple[Role | None, ...]
    """None is a gap."""
    effects: NDArray[np.float64]
    """component layer column"""
    hover: NDArray[np.object_]
    subjects: tuple[tuple[int, int, str], ...]
    """First column, last column and text of each bracket."""


@dataclass(frozen=True, slots=True)
class MapWords:
    """What a map is called."""

    quantity: str
    """What a cell says, as in the title."""
    cell: str
    """The same in one word, as in a hover."""
    scale: str
    """The title of the colour bar."""
    notes: tuple[str, ...] = ()
    """How it was measured, where that is not the default."""
    window: int = 1
    """Layers that one cell of mlp_out or attn_out covers."""


def map_words(site_map: SiteMap) -> MapWords:
    """The words of a trace by its settings, of another map by its quantity."""
    if isinstance(site_map, ScoreMap):
        return MapWords(site_map.quantity, "share", "share")
    assert isinstance(site_map, Trace)
    settings = site_map.settings
    notes = [f"later {settings.severed} held (severed)"] if settings.severed else []
    notes += ["all tokens together, drawn at the last"] if settings.together else []
    notes += [] if settings.exact else ["estimated by attribution patching"]
    quantity, scale = {
        "denoising": ("effect of restoring one state (denoising)", "share of the answer restored"),
        "noising": ("effect of corrupting one state (noising)", "share of the answer lost"),
    }[settings.direction]
    return MapWords(quantity, "effect", scale, tuple(notes), settings.window)


def view(site_map: SiteMap) -> MapView:
    """Layers x tokens of one request, layers x roles of many."""
    return _token_view(site_map) if len(site_map.prompts) == 1 else _role_view(site_map)


def hover_lines(cell: Mapping[Any, Any], quantity: str, n: int, unit: str) -> str:
    """The lines of a hover: address, value, and the interval over n units where there are several."""
    interval = "95% interval" if n >= LEAST_FOR_BOOTSTRAP else "range"
    lines = [
        f"{ROLE_WORDS[cell['role']]}, layer {cell['layer']}, {component_words(cell['component'])}",
        f"{quantity} <b>{cell['effect']:.3f}</b>",
        f"{interval} {cell['low']:.3f} to {cell['high']:.3f}, {n} {unit}",
    ]
    return "<br>".join(lines if n > 1 else lines[:2])


def _token_view(site_map: SiteMap) -> MapView:
    prompt = site_map.prompts[0]
    effects = site_map.effects[0].numpy()
    traced = np.flatnonzero(np.isfinite(effects).any((0, 1))).tolist()
    columns: list[int | None] = []
    for position in sorted({*traced, *prompt.subject_positions}):
        if columns and columns[-1] != position - 1:
            columns.append(None)
        columns.append(position)
    column_of = {position: i for i, position in enumerate(columns) if position is not None}
    values = np.full((*effects.shape[:2], len(columns)), np.nan)
    values[:, :, list(column_of.values())] = effects[:, :, list(column_of)]
    hover = np.full(values.shape, "", dtype=object)
    word, samples = map_words(site_map).cell, site_map.values.shape[-1]
    for cell in site_map.to_dataframe().to_dict("records"):
        c, j = site_map.components.index(cell["component"]), site_map.layers.index(cell["layer"])
        token = f"<b>{token_label(cell['token'], cell['role'], 40)}</b><br>position {cell['position']}"
        hover[c, j, column_of[cell["position"]]] = f"{token}<br>{hover_lines(cell, word, samples, 'samples')}"
    return MapView(
        labels=tuple(
            "⋯" if t is None else token_label(prompt.token_texts[t], prompt.roles[t], 12) for t in columns
        ),
        roles=tuple(None if t is None else prompt.roles[t] for t in columns),
        effects=values,
        hover=hover,
        subjects=tuple(
            (column_of[start], column_of[stop - 1], prompt.request.subject or "")
            for start, stop in prompt.subject_spans
        ),
    )


def _role_view(site_map: SiteMap) -> MapView:
    word, means = map_words(site_map).cell, site_map.by_role().to_dict("records")
    roles: list[Role] = [role for role in READING_ORDER if any(mean["role"] == role for mean in means)]
    values = np.full((len(site_map.components), len(site_map.layers), len(roles)), np.nan)
    hover = np.full(values.shape, "", dtype=object)
    for mean in means:
        c, j = site_map.components.index(mean["component"]), site_map.layers.index(mean["layer"])
        values[c, j, roles.index(mean["role"])] = mean["effect"]
        hover[c, j, roles.index(mean["role"])] = hover_lines(mean, word, mean["n"], "requests")
    subject_columns = [i for i, role in enumerate(roles) if role.startswith("subject")]
    names = {prompt.request.subject or "" for prompt in site_map.prompts}
    name = names.pop() if len(names) == 1 else "subject"
    return MapView(
        labels=tuple(ROLE_WORDS[role] for role in roles),
        roles=tuple(roles),
        effects=values,
        hover=hover,
        subjects=((subject_columns[0], subject_columns[-1], name),) if subject_columns else (),
    )
