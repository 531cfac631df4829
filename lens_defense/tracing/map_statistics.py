"""Statistics of a map: which mean effects are more than chance, and whether a map comes out again."""

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
    """How likely each mean effect is by chance: the signs of the requests' effects are flipped.

    The effects of one subject flip together.

    Args:
        trace: a Trace, whose effects have either sign by chance.
        seed: of the flips, where there are too many to try all.

    Returns:
        component, role, layer, effect, n, p, q: two-sided p-values, and q-values for a false discovery
        rate over the whole map (Benjamini & Hochberg 1995). The least p of n subjects is 2 / 2^n, so
        fewer than six can show nothing at 5%.

    Raises:
        ValueError: the map is a ScoreMap.
    """
    if isinstance(trace, ScoreMap):
        raise ValueError(f"these cells are {trace.quantity}, never negative: no sign tells them from chance")
    addresses, effects = request_effects(trace)
    p_values = sign_flip_p_values(np.nan_to_num(effects), trace.subjects, seed=seed)
    q_values = false_discovery(p_values)
    rows = [
        (*address, float(np.nanmean(column)), int(np.isfinite(column).sum()), p, q)
        for address, column, p, q in zip(addresses, effects.T, p_values, q_values, strict=True)
    ]
    return pd.DataFrame(rows, columns=pd.Index(["component", "role", "layer", "effect", "n", "p", "q"]))


def reliability(site_map: SiteMap, *, splits: int = 200, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Correlation of the maps of two random halves of the subjects, stepped up to all subjects.

    Stepped up by the Spearman-Brown formula, 2 r / (1 + r). The reliability is 0 where the halves agree no
    better than chance (r below 0, where the formula means nothing), and where a half's map is flat.

    Args:
        site_map: a Trace, or any other map.
        splits: how many random splits into halves.
        seed: of the splits.

    Returns:
        The median over splits, and its 2.5% and 97.5% quantiles.

    Raises:
        ValueError: fewer than four subjects, too few for two halves.
    """
    _, effects = request_effects(site_map)
    clusters, subjects = pd.factorize(np.asarray(site_map.subjects, dtype=object))
    if len(subjects) < 4:
        raise ValueError(f"two halves want at least 4 subjects, and this trace has {len(subjects)}")
    rng = np.random.default_rng(seed)
    reliabilities = []
    for _ in range(splits):
        order = rng.permutation(len(subjects))
        first, second = (effects[np.isin(clusters, half)] for half in np.array_split(order, 2))
        shared = np.asarray(np.isfinite(first).any(0) & np.isfinite(second).any(0))
        x, y = (np.nanmean(half[..., shared], axis=0) for half in (first, second))
        varied = x.std() > 0 and y.std() > 0
        r = max(0.0, float(np.corrcoef(x, y)[0, 1])) if varied else 0.0
        reliabilities.append(2 * r / (1 + r))
    low, median, high = np.quantile(reliabilities, (0.025, 0.5, 0.975))
    return float(median), (float(low), float(high))


def agreement(estimate: SiteMap, measured: SiteMap, *, k: int = 10) -> tuple[float, float]:
    """How well one map predicts another of the same requests and cells.

    Cells of the estimate that were verified count by their estimate.

    Returns:
        Spearman's rank correlation over all cells; and recall@k, the share of the k largest measured cells
        that are among the k largest estimated ones, mean over requests.

    Raises:
        ValueError: the maps are not of the same requests, components and layers.
    """
    same_prompts = [p.ids for p in estimate.prompts] == [p.ids for p in measured.prompts]
    same_axes = (estimate.components, estimate.layers) == (measured.components, measured.layers)
    if not (same_prompts and same_axes):
        raise ValueError("the two traces are not of the same requests, components and layers")
    x, y = _estimated_effects(estimate).flatten(1).numpy(), measured.effects.flatten(1).numpy()
    known = np.isfinite(x) & np.isfinite(y)
    rho, _ = rank_correlation(x[known].tolist(), y[known].tolist())
    recalls = []
    for r in range(len(x)):
        cells = np.flatnonzero(known[r])
        top_x, top_y = (
            set(cells[np.argsort(-effects[r, cells], kind="stable")[:k]].tolist()) for effects in (x, y)
        )
        recalls.append(len(top_x & top_y) / len(top_y))
    return rho, float(np.mean(recalls))


def request_effects(site_map: SiteMap) -> tuple[list[Address], NDArray[np.float64]]:
    """The effect of every request at every address, [request, address]; NaN where it lacks the role."""
    effects = site_map.effects.numpy()
    sums: dict[Address, NDArray[np.float64]] = defaultdict(lambda: np.zeros((2, len(effects))))
    for r, c, j, t in np.argwhere(np.isfinite(effects)).tolist():
        address = (site_map.components[c], site_map.prompts[r].roles[t], site_map.layers[j])
        sums[address][0, r] += effects[r, c, j, t]
        sums[address][1, r] += 1
    totals, counts = np.stack(list(sums.values()), 2)
    return list(sums), np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _estimated_effects(site_map: SiteMap) -> Float[Tensor, "request component layer position"]:
    """The effects; of verified cells, the estimate in the place of what was measured."""
    estimates = site_map.estimates if isinstance(site_map, Trace) else None
    return site_map.effects if estimates is None else estimates.where(estimates.isfinite(), site_map.effects)
