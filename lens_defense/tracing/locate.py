"""Locate: from a map to addresses, Sites that an edit can find in any other prompt."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import RoleMean, SiteMap

Rule = Literal["band", "cells", "threshold", "significant"]


def locate(
    trace: SiteMap,
    k: int = 5,
    *,
    by: Rule = "band",
    layers: Sequence[int] | None = None,
    roles: Sequence[Role] | None = None,
    least: float = 0.3,
    level: float = 0.05,
) -> tuple[Site, ...]:
    """The k strongest sites of a trace, as addresses that carry over to other prompts.

    "band": of the roles that have read the whole subject, the component and role with the largest mean
    effect over layers; then k consecutive layers, centred a third of the way up its plateau. The plateau is
    the run of layers around the strongest that reach four fifths of what the best k consecutive layers have
    on average, so that a single layer that sticks out of a flat top does not make it its own. Neither
    leaves the layers that were traced, nor the box; a box with a hole is looked in on the side of its
    strongest layer. A subject's first tokens are no address of a band: a key there answers to everything that
    begins alike. Layers between traced ones take the effect of the straight line between them.
    "cells": the raw top k of the map. "threshold": every cell from an effect on. "significant": every cell
    that is more than chance by `significance`. Never a site without a positive effect; the strongest first,
    ties go to the lower layer, then to the component and role that come first.

    Not the plateau's highest point, because the height of a flat top is chance; and not its middle,
    because edits higher up cost more: docs/results/defaults.md tells of both, on the tune split.

    Args:
        trace: the map.
        k: how many sites, for "band" and "cells".
        by: the rule.
        layers: the box that is looked in; None takes every layer that was traced.
        roles: the same for roles.
        least: the effect from which on "threshold" takes a cell.
        level: the q-value below which "significant" takes a cell.

    Raises:
        ValueError: k is not positive, `by` is another word, or nothing in the trace (in the box, by the rule)
            has a positive effect.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if by not in get_args(Rule):
        raise ValueError(f"by must be one of {', '.join(get_args(Rule))}, got {by!r}")
    means = [
        mean
        for mean in trace.role_means()
        if mean.role not in _NO_SITE and (roles is None or mean.role in roles)
    ]
    if by != "band":
        inside = (mean for mean in means if layers is None or mean.layer in layers)
        best = sorted(inside, key=lambda mean: (-mean.effect, mean.layer))
        few = ""
        if by == "significant":
            sure = {
                (row["component"], row["role"], row["layer"])
                for row in significance(trace).to_dict("records")
                if row["q"] < level
            }
            best = [mean for mean in best if (mean.component, mean.role, mean.layer) in sure]
            few = f" with q < {level:g}; fewer than six subjects can show none"
        elif by == "threshold":
            best = [mean for mean in best if mean.effect >= least]
            few = f" of {least:g} and more"
        else:
            best = best[:k]
        return _sites([(m.component, m.layer, m.role, m.effect, (m.low, m.high)) for m in best], few)
    curves: dict[tuple[Component, Role], list[RoleMean]] = defaultdict(list)
    for mean in means:
        if mean.role not in _HALF_READ:
            curves[mean.component, mean.role].append(mean)
    if not curves:
        raise ValueError("this trace has no role that an edit could address; trace more positions")
    rows = range(trace.layers[0], trace.layers[-1] + 1)
    box = [layer for layer in rows if layers is None or layer in layers]
    if not box:
        raise ValueError(f"the box has none of the layers {rows[0]} to {rows[-1]}, which were traced")

    def between(key: tuple[Component, Role], layer: int, field: str) -> float:
        curve = curves[key]
        return float(np.interp(layer, [m.layer for m in curve], [getattr(m, field) for m in curve]))

    component, role = best = max(
        curves, key=lambda key: float(np.mean([between(key, layer, "effect") for layer in box]))
    )

    def effect(layer: int) -> float:
        return between(best, layer, "effect")

    run = _run_of(box, max(box, key=effect))
    width = min(k, len(run))
    first, last = _plateau([effect(layer) for layer in run], width)
    middle = run[first] + (last - first) // 3
    low = min(max(run[0], middle - (width - 1) // 2), run[-1] + 1 - width)
    return _sites(
        [
            (component, at, role, effect(at), (between(best, at, "low"), between(best, at, "high")))
            for at in range(low, low + width)
        ]
    )


PLATEAU = 0.8
"""The share of the best band's mean effect from which on a layer belongs to its plateau."""
_HALF_READ: tuple[Role, ...] = ("subject_first", "subject_mid")
_NO_SITE: tuple[Role, ...] = ("template", "before", "after")
"""Roles of many tokens: no address that an edit could read a key at."""


def _plateau(effects: Sequence[float], width: int) -> tuple[int, int]:
    """Where the run around the strongest layer begins and ends that reaches four fifths of the best band."""
    first = last = int(np.argmax(effects))
    floor = PLATEAU * float(np.convolve(effects, np.full(width, 1 / width), "valid").max())
    while first > 0 and effects[first - 1] >= floor:
        first -= 1
    while last < len(effects) - 1 and effects[last + 1] >= floor:
        last += 1
    return first, last


def _run_of(box: Sequence[int], strongest: int) -> range:
    """The layers of a box that follow on each other around its strongest."""
    low = high = strongest
    while low - 1 in box:
        low -= 1
    while high + 1 in box:
        high += 1
    return range(low, high + 1)


def _sites(
    found: Sequence[tuple[Component, int, Role, float, tuple[float, float]]], few: str = ""
) -> tuple[Site, ...]:
    sites = tuple(Site(*fields) for fields in found if fields[3] > 0)
    if not sites:
        raise ValueError(f"nothing in this trace has a positive effect{few}; trace more roles or layers")
    return sites
