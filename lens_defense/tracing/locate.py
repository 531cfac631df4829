"""Locate: from a map to addresses, Sites that an edit can find in any other prompt."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lens_defense.arguments import did_you_mean, wrong_argument
from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site
from lens_defense.tracing.map_statistics import significance
from lens_defense.tracing.site_map import RoleMean, SiteMap

Rule = Literal["band", "cells", "threshold", "significant"]
PLATEAU = 0.8
"""The share of the best band's mean effect from which on a layer belongs to the plateau."""

_ROLES_OF_MANY_TOKENS: tuple[Role, ...] = ("template", "before", "after")
"""No addresses: an edit could not read a key there."""
_ROLES_WITHIN_SUBJECT: tuple[Role, ...] = ("subject_first", "subject_mid")
"""No addresses of a band: a key there answers to everything that begins alike."""


def locate(
    site_map: SiteMap,
    k: int = 5,
    *,
    by: Rule = "band",
    layers: Sequence[int] | None = None,
    roles: Sequence[Role] | None = None,
    least: float = 0.3,
    level: float = 0.05,
) -> tuple[Site, ...]:
    """The strongest sites of a map, as addresses that carry over to other prompts.

    - "band": k consecutive layers at one role, a third of the way up the plateau.
    - "cells": the k cells of the largest mean effects.
    - "threshold": every cell with an effect of at least `least`.
    - "significant": every cell that `significance` gives a q-value below `level`.

    No rule returns a site without a positive effect. A band is in the order of its layers. The other rules
    put the strongest first; ties go to the lower layer, then to the component and role that come first.

    Args:
        site_map: a Trace, or any other map.
        k: how many sites, for "band" and "cells".
        by: the rule.
        layers: look only at these; None takes every layer that was traced.
        roles: look only at these; None takes every role that was traced.
        least: the least effect, for "threshold".
        level: the q-value, for "significant".

    Raises:
        ValueError: k is not positive, `by` is no rule, or the rule finds nothing with a positive effect.
    """
    if not isinstance(site_map, SiteMap):
        raise wrong_argument("ld.locate(trace)", "the map must be a Trace or a ScoreMap", site_map)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if by not in _RULES:
        raise ValueError(f"by must be one of {', '.join(_RULES)}, got {by!r}{did_you_mean(by, [*_RULES])}")
    means = [
        mean
        for mean in site_map.role_means()
        if mean.role not in _ROLES_OF_MANY_TOKENS and (roles is None or mean.role in roles)
    ]
    if not means and roles is not None:
        known = dict.fromkeys(mean.role for mean in site_map.role_means())
        raise ValueError(
            f"this map has none of the roles {', '.join(roles)}; it has {', '.join(known)}. Trace others by "
            "positions=, as in ld.trace(model, requests, positions=['subject_last']); a subject that ends a "
            "plain prompt has the role 'last'"
        )
    sites = _RULES[by](_Query(site_map, means, k, layers, least, level))
    positive = tuple(site for site in sites if site.effect is not None and site.effect > 0)
    if not positive:
        limits = {
            "threshold": f" of {least:g} and more",
            "significant": f" with q < {level:g}; fewer than six subjects can show none",
        }
        raise ValueError(
            f"nothing in this trace has a positive effect{limits.get(by, '')}; trace more roles or layers"
        )
    return positive


@dataclass(frozen=True, slots=True)
class _Query:
    """What a rule looks at."""

    site_map: SiteMap
    means: Sequence[RoleMean]
    """Of the roles to look at."""
    k: int
    layers: Sequence[int] | None
    least: float
    level: float

    def allows(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def strongest_first(self) -> list[RoleMean]:
        allowed = (mean for mean in self.means if self.allows(mean.layer))
        return sorted(allowed, key=lambda mean: (-mean.effect, mean.layer))


def _band(query: _Query) -> list[Site]:
    """Consecutive layers of the component and role with the largest mean effect over layers.

    They are centred a third of the way up the plateau. Not on its highest point, because which layer of a
    flat top is the highest is chance; not on its middle, because edits higher up cost more
    (docs/results/defaults.md has the runs on the tune split). The band leaves neither the traced nor the
    allowed layers. Where the allowed layers have a gap, it stays on the side of the strongest. Between traced
    layers effects are interpolated.
    """
    curves: dict[tuple[Component, Role], list[RoleMean]] = defaultdict(list)
    for mean in query.means:
        if mean.role not in _ROLES_WITHIN_SUBJECT:
            curves[mean.component, mean.role].append(mean)
    if not curves:
        raise ValueError("this trace has no role that an edit could address; trace more positions")
    lowest, highest = query.site_map.layers[0], query.site_map.layers[-1]
    layers = [layer for layer in range(lowest, highest + 1) if query.allows(layer)]
    if not layers:
        raise ValueError(f"the box has none of the layers {lowest} to {highest}, which were traced")

    def mean_effect(curve: Sequence[RoleMean]) -> float:
        return float(np.mean([_interpolated(curve, layer, "effect") for layer in layers]))

    component, role = max(curves, key=lambda address: mean_effect(curves[address]))
    curve = curves[component, role]
    effects = {layer: _interpolated(curve, layer, "effect") for layer in layers}
    run = _consecutive_around(max(layers, key=lambda layer: effects[layer]), layers)
    width = min(query.k, len(run))
    first, last = _plateau([effects[layer] for layer in run], width)
    centre = run[first] + (last - first) // 3
    start = min(max(run[0], centre - (width - 1) // 2), run[-1] + 1 - width)
    return [
        Site(
            component,
            layer,
            role,
            effects[layer],
            (_interpolated(curve, layer, "low"), _interpolated(curve, layer, "high")),
        )
        for layer in range(start, start + width)
    ]


def _cells(query: _Query) -> list[Site]:
    return [_site(mean) for mean in query.strongest_first()[: query.k]]


def _threshold(query: _Query) -> list[Site]:
    return [_site(mean) for mean in query.strongest_first() if mean.effect >= query.least]


def _significant(query: _Query) -> list[Site]:
    table = significance(query.site_map)
    significant = {
        (row["component"], row["role"], row["layer"])
        for row in table.to_dict("records")
        if row["q"] < query.level
    }
    return [
        _site(mean)
        for mean in query.strongest_first()
        if (mean.component, mean.role, mean.layer) in significant
    ]


_RULES: dict[str, Callable[[_Query], list[Site]]] = {
    "band": _band,
    "cells": _cells,
    "threshold": _threshold,
    "significant": _significant,
}


def _site(mean: RoleMean) -> Site:
    return Site(mean.component, mean.layer, mean.role, mean.effect, (mean.low, mean.high))


def _interpolated(curve: Sequence[RoleMean], layer: int, field: Literal["effect", "low", "high"]) -> float:
    """A field of a curve over layers; between traced layers, on the straight line."""
    return float(np.interp(layer, [mean.layer for mean in curve], [getattr(mean, field) for mean in curve]))


def _consecutive_around(layer: int, layers: Sequence[int]) -> range:
    """The longest run of consecutive layers that holds this one."""
    low = high = layer
    while low - 1 in layers:
        low -= 1
    while high + 1 in layers:
        high += 1
    return range(low, high + 1)


def _plateau(effects: Sequence[float], width: int) -> tuple[int, int]:
    """The first and the last index of the run around the largest effect that reaches the plateau's height.

    The height is the share PLATEAU of the best mean of `width` consecutive effects. So one effect that sticks
    out of a flat top is no plateau by itself.
    """
    first = last = int(np.argmax(effects))
    height = PLATEAU * float(np.convolve(effects, np.full(width, 1 / width), "valid").max())
    while first > 0 and effects[first - 1] >= height:
        first -= 1
    while last < len(effects) - 1 and effects[last + 1] >= height:
        last += 1
    return first, last
