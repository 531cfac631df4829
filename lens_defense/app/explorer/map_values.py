"""A trace as the page draws it: a view per request and one of their mean, as plain numbers and texts.

A view has columns (tokens of one request, roles of the mean) and, by component, a grid of rows (layers) of
cells: [effect, low, high], or None where nothing was traced. A cell that was estimated has no interval.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lens_defense.app.explorer.page_values import layer_words
from lens_defense.plotting.reddest_column import why_not_reddest
from lens_defense.plotting.theme import ROLE_WORDS, component_words
from lens_defense.prompts.prompt import Prompt
from lens_defense.prompts.request import READING_ORDER, Role
from lens_defense.shown_text import shown, visible_token
from lens_defense.sites import COMPONENTS, Component, Site
from lens_defense.statistics import LEAST_FOR_BOOTSTRAP, mean_interval
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import SiteMap
from lens_defense.tracing.trace_result import Trace

Grid = list[list[list[float] | None]]
"""[layer][column]"""
ROLES_OF_SITES: tuple[Role, ...] = ("subject_first", "subject_mid", "subject_last", "next", "last")
"""Roles that an edit can address; the others stand for many tokens."""
_AFTER = " After the edit the same answers are read, on the same scale; blue states drive them away."
_LEVEL = 0.05
"""The q-value below which a mean cell is outlined."""


def reddest_column_sentence(known: SiteMap | None, sites: Sequence[Site]) -> str:
    """Why the chosen cells are not in the reddest column of their component's mean, where they are not."""
    if known is None or not sites or sites[0].component not in known.components:
        return ""
    means = known.only(sites[0].component).role_means()
    roles: list[Role] = list(dict.fromkeys(mean.role for mean in means))
    effects = np.full((known.model_layers, len(roles)), np.nan)
    for mean in means:
        effects[mean.layer, roles.index(mean.role)] = mean.effect
    return why_not_reddest(effects, roles, sites)


def with_effect(site: Site, known: SiteMap | None) -> Site:
    """The site with its mean effect, where a map has it and the site has none."""
    if known is None or site.component not in known.components or site.effect is not None:
        return site
    for mean in known.only(site.component).role_means():
        if (mean.layer, mean.role) == (site.layer, site.role):
            return replace(site, effect=mean.effect, interval=(mean.low, mean.high))
    return site


def site_values(site: Site) -> dict[str, Any]:
    """A site as the page lists it."""
    return {
        "component": site.component,
        "layer": site.layer,
        "role": site.role,
        "words": f"{component_words(site.component)}, layer {site.layer}, {ROLE_WORDS[site.role]}",
        "effect": _rounded(site.effect),
        "interval": None if site.interval is None else [*map(_rounded, site.interval)],
    }


def sites_part(sites: Sequence[Site], reason: str) -> dict[str, Any]:
    """The chosen cells, why these, and which layers an edit there changes."""
    return {
        "sites": [site_values(site) for site in sites],
        "reason": reason,
        "layers": layer_words(sorted({site.layer for site in sites})),
    }


def component_choices() -> list[tuple[Component, str, bool]]:
    """Components by name, in words, and whether their cells can be chosen for an edit."""
    return [(name, component_words(name), editable(name)) for name in COMPONENTS]


def editable(component: Component) -> bool:
    """Whether cells of a component can be chosen: an edit writes what the stream or an MLP holds."""
    return component in ("resid_pre", "resid_post", "mlp_out")


def columns_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The columns of one request: its tokens from the subject on.

    Those before it are folded into one: nothing that is patched there can matter.
    """
    first = min(prompt.subject_positions, default=0)
    folded = [_folded(first)] if first else []
    return folded + [
        {
            "position": position,
            "text": visible_token(prompt.token_texts[position], letters=16),
            "role": prompt.roles[position],
            "words": ROLE_WORDS[prompt.roles[position]],
            "subject": position in prompt.subject_positions,
            "site": prompt.roles[position] in ROLES_OF_SITES,
        }
        for position in range(first, len(prompt.ids))
    ]


def map_part(measured: SiteMap | None, estimate: Trace | None, after: Trace | None) -> dict[str, Any]:
    """The maps with all their views, and how they were made; nothing where there is no map yet.

    Args:
        measured: the map, cell by cell.
        estimate: the map by attribution patching, for cells that were not measured.
        after: the map of the edited model, made with the answers of before; drawn on the scale of before.
    """
    known = measured or estimate
    if known is None:
        return {}
    views = [_mean_view(measured, estimate)]
    views += [_request_view(measured, estimate, i) for i in range(len(known))]
    if after is not None and isinstance(known, Trace):
        after = after.on_scale_of(known)
        of_after = [_mean_view(after, None), *(_request_view(after, None, i) for i in range(len(after)))]
        for view, other in zip(views, of_after, strict=True):
            view["after"] = other["grids"]
    return {
        "views": views,
        "components": list(known.components),
        "layers": known.model_layers,
        "how": _how(known) + (_AFTER if after is not None else ""),
        "measured": measured is not None,
        "after": after is not None,
    }


def _how(known: SiteMap) -> str:
    """What a cell says."""
    if not isinstance(known, Trace):
        return f"A cell shows {known.quantity}."  # type: ignore[attr-defined]
    what = {
        "denoising": "the share of the answer that comes back when this one state is restored in the run "
        "with a corrupted subject (denoising)",
        "noising": "the share of the answer that is lost when this one state of the corrupted run is put "
        "into the clean run (noising)",
    }[known.settings.direction]
    window = known.settings.window
    wide = " Cells of MLP and attention outputs cover " + f"{window} layers each." if window > 1 else ""
    blocks = {"mlp_out", "attn_out"} & set(known.components)
    return f"A cell shows {what}. Corruption: {known.corruption}.{wide if blocks else ''}"


def _request_view(trace: SiteMap | None, estimate: Trace | None, index: int) -> dict[str, Any]:
    """The view of one request: what was measured, over what was estimated."""
    either = trace or estimate
    assert either is not None
    prompt = either.prompts[index]
    columns = columns_of(prompt)
    return {
        "id": shown(prompt.request.id),
        "text": shown(prompt.request.text, 400),
        "answer": shown(either.answers[index], 400) if isinstance(either, Trace) else "",
        "columns": columns,
        "grids": {
            component: _over(
                _request_grid(estimate, index, component, columns, interval=False),
                _request_grid(trace, index, component, columns, interval=True),
            )
            for component in either.components
        },
    }


def _mean_view(trace: SiteMap | None, estimate: Trace | None) -> dict[str, Any]:
    """The view of the mean over requests: a column per role."""
    either = trace or estimate
    assert either is not None
    roles: list[Role] = [
        role
        for role in READING_ORDER
        if role in ROLES_OF_SITES and any(role in prompt.roles for prompt in either.prompts)
    ]
    columns = [
        {
            "position": None,
            "text": ROLE_WORDS[role],
            "role": role,
            "words": ROLE_WORDS[role],
            "subject": role.startswith("subject"),
            "site": True,
        }
        for role in roles
    ]
    number = len(either.prompts)
    return {
        "id": "mean",
        "text": f"the mean of {number} request{'s' * (number > 1)}",
        "answer": "",
        "columns": columns,
        "grids": {
            component: _over(
                _mean_grid(estimate, component, roles, interval=False),
                _mean_grid(trace, component, roles, interval=True),
            )
            for component in either.components
        },
        "significant": _significant(trace),
    }


def _request_grid(
    trace: SiteMap | None, index: int, component: Component, columns: Sequence[dict[str, Any]], interval: bool
) -> Grid | None:
    if trace is None or component not in trace.components:
        return None
    c = trace.components.index(component)
    values = trace.values[index, c]
    means, lows, highs = values.mean(-1).tolist(), values.amin(-1).tolist(), values.amax(-1).tolist()
    many = values.shape[-1] >= LEAST_FOR_BOOTSTRAP
    grid: Grid = [[None] * len(columns) for _ in range(trace.model_layers)]
    for i, layer in enumerate(trace.layers):
        for column, about in enumerate(columns):
            position = about["position"]
            if position is None or means[i][position] != means[i][position]:
                continue
            low, high = lows[i][position], highs[i][position]
            if interval and many:
                low, high = mean_interval(values[i, position].numpy())
            cell = [means[i][position], *((low, high) if interval else ())]
            grid[layer][column] = [round(number, 3) for number in cell]
    return grid


def _mean_grid(
    trace: SiteMap | None, component: Component, roles: Sequence[Role], interval: bool
) -> Grid | None:
    if trace is None or component not in trace.components:
        return None
    grid: Grid = [[None] * len(roles) for _ in range(trace.model_layers)]
    for mean in trace.only(component).role_means():
        if mean.role in roles:
            cell = [mean.effect, *((mean.low, mean.high) if interval else ())]
            grid[mean.layer][roles.index(mean.role)] = [round(number, 3) for number in cell]
    return grid


def _over(estimated: Grid | None, measured: Grid | None) -> Grid:
    """What was measured, and what was estimated where nothing was."""
    if estimated is None or measured is None:
        return measured or estimated or []
    return [
        [exact or guess for exact, guess in zip(exact_row, guess_row, strict=True)]
        for exact_row, guess_row in zip(measured, estimated, strict=True)
    ]


def _significant(trace: SiteMap | None) -> list[list[Any]]:
    """Addresses of the mean cells that are more than chance: component, layer, role."""
    if not isinstance(trace, Trace) or len(set(trace.subjects)) < 2:
        return []
    table = significance(trace)
    return [
        [row["component"], row["layer"], row["role"]] for row in table.to_dict("records") if row["q"] < _LEVEL
    ]


def _folded(number: int) -> dict[str, Any]:
    words = f"{number} tokens before the subject: nothing that is patched there can change the answer"
    return {"position": None, "text": "⋯", "role": "", "words": words, "subject": False, "site": False}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 3)
