"""Inference about a trace: which mean effects are more than chance, and whether a map comes out again."""

from collections import defaultdict

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lens_defense.prompts.request import Role
from lens_defense.sites import Component
from lens_defense.statistics import false_discovery, rank_correlation, sign_flip_p_values
from lens_defense.tracing.site_map import ScoreMap, SiteMap
from lens_defense.tracing.trace_result import Trace

Address = tuple[Component, Role, int]
"""Component, role and layer of a mean effect."""


def significance(trace: SiteMap, *, seed: int = 0) -> pd.DataFrame:
    """How likely each mean effect is by chance: signs of the requests' effects flipped, a subject's together.

    Returns:
        component, role, layer, effect, n, p, q: two-sided p-values, and q-values for a false discovery
        rate over the whole map (Benjamini & Hochberg 1995). The least p of n subjects is 2 / 2^n, so that
        fewer than six can show nothing at 5%.

    Raises:
        ValueError: the cells are no effects, which by chance would have either sign (lenses.py).
    """
    if isinstance(trace, ScoreMap):
        raise ValueError(f"these cells are {trace.quantity}, never negative: no sign tells them from chance")
    addresses, values = request_effects(trace)
    p_values = sign_flip_p_values(np.nan_to_num(values), trace.subjects, seed=seed)
    rows = [
        (*address, float(np.nanmean(column)), int(np.isfinite(column).sum()), p, q)
        for address, column, p, q in zip(
            addresses, values.T, p_values, false_discovery(p_values), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=pd.Index(["component", "role", "layer", "effect", "n", "p", "q"]))


def reliability(trace: SiteMap, *, splits: int = 200, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Correlation of the maps of two random halves of the subjects, stepped up to all of them.

    Stepped up by Spearman's and Brown's formula, 2 r / (1 + r). Halves that agree no better than chance
    (r below 0, where the formula means nothing) and maps without any difference are not reliable: 0.

    Returns:
        The median over splits, and its 2.5% and 97.5% quantiles.

    Raises:
        ValueError: fewer than four subjects, of which no two halves can be made.
    """
    _, values = request_effects(trace)
    cluster, names = pd.factorize(np.asarray(trace.subjects, dtype=object))
    if len(names) < 4:
        raise ValueError(f"two halves want at least 4 subjects, and this trace has {len(names)}")
    rng = np.random.default_rng(seed)
    told = []
    for _ in range(splits):
        order = rng.permutation(len(names))
        first, second = (values[np.isin(cluster, part)] for part in np.array_split(order, 2))
        shared = np.isfinite(first).any(0) & np.isfinite(second).any(0)
        a, b = (np.nanmean(half[..., np.asarray(shared)], axis=0) for half in (first, second))
        varied = a.std() > 0 and b.std() > 0
        r = max(0.0, float(np.corrcoef(a, b)[0, 1])) if varied else 0.0
        told.append(2 * r / (1 + r))
    low, middle, high = np.quantile(told, (0.025, 0.5, 0.975))
    return float(middle), (float(low), float(high))


def agreement(estimate: SiteMap, measured: SiteMap, *, k: int = 10) -> tuple[float, float]:
    """How far one map is like another of the same requests and cells.

    Cells of the first that were verified count by their estimate.

    Returns:
        Spearman's rank correlation over all cells, and recall@k: the share of the k cells of the largest
        measured effects that are among the k largest estimated ones, mean over requests.

    Raises:
        ValueError: the maps are not of the same requests, components and layers.
    """
    same = [met.ids for met in estimate.prompts] == [met.ids for met in measured.prompts]
    if not same or (estimate.components, estimate.layers) != (measured.components, measured.layers):
        raise ValueError("the two traces are not of the same requests, components and layers")
    a, b = _estimated(estimate).flatten(1).numpy(), measured.effects.flatten(1).numpy()
    known = np.isfinite(a) & np.isfinite(b)
    rho, _ = rank_correlation(a[known].tolist(), b[known].tolist())
    shares = []
    for r in range(len(a)):
        some = np.flatnonzero(known[r])
        best = [set(some[np.argsort(-map_[r, some], kind="stable")[:k]].tolist()) for map_ in (a, b)]
        shares.append(len(best[0] & best[1]) / len(best[1]))
    return rho, float(np.mean(shares))


def _estimated(trace: SiteMap) -> Float[Tensor, "request component layer position"]:
    """The effects, those that were measured after all as they had been estimated."""
    effects = trace.effects.clone()
    for cell, estimate, _ in trace.verified if isinstance(trace, Trace) else ():
        effects[cell] = estimate
    return effects


def request_effects(trace: SiteMap) -> tuple[list[Address], NDArray[np.float64]]:
    """Every request's effect at every address, [request, address]; NaN where it lacks the role."""
    effects = trace.effects.numpy()
    sums: dict[Address, NDArray[np.float64]] = defaultdict(lambda: np.zeros((2, len(effects))))
    for r, c, j, t in np.argwhere(np.isfinite(effects)).tolist():
        address = (trace.components[c], trace.prompts[r].roles[t], trace.layers[j])
        sums[address][0, r] += effects[r, c, j, t]
        sums[address][1, r] += 1
    totals, counts = np.stack(list(sums.values()), 2)
    return list(sums), np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
