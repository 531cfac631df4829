"""Intervals and tests for rates and means: Wilson, McNemar, bootstrap; all of them by cluster.

Several rows about one subject are not several independent trials. A rate's interval is Wilson's at
the effective sample size n / deff (Kish 1965), where deff is the between-cluster variance of the
mean over the binomial one. The paired test flips the sign of a whole cluster's difference; with one
row a cluster this is McNemar's exact test.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

LEAST_FOR_BOOTSTRAP = 8
"""Fewer values than this give their range, not an interval."""
LEAST_FLIPPED = 16
"""Up to so many values all signs are flipped; of more, random ones."""


def wilson(hits: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927); n may be an effective size, not whole."""
    if n <= 0:
        return (0.0, 1.0)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_rate(hits: Sequence[bool], clusters: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """A rate and its 95% interval, rows of one cluster counted as related.

    Where the rate is 0 or 1 its spread between clusters is not known; then every cluster counts once.
    """
    values, sizes = _by_cluster(np.asarray(hits, dtype=float), clusters)
    n, k = float(sizes.sum()), len(sizes)
    if n == 0:
        return float("nan"), (0.0, 1.0)
    p = float(values.sum() / n)
    if k == n:
        return p, wilson(p * n, n)
    if k < 2 or p in (0.0, 1.0):
        return p, wilson(p * k, float(k))
    between = k / (k - 1) * float(((values - p * sizes) ** 2).sum()) / n**2
    effective = min(n, n / max(between / (p * (1 - p) / n), 1e-9))
    return p, wilson(p * effective, effective)


def paired_p_value(
    before: Sequence[bool], after: Sequence[bool], clusters: Sequence[str], *, seed: int = 0
) -> float:
    """Two-sided p-value that a change is none: signs of clusters' differences flipped.

    One row a cluster: McNemar's exact test.
    """
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    sums, _ = _by_cluster(change, clusters)
    return sign_flip_p_value(sums, seed=seed)


def sign_flip_p_value(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> float:
    """Two-sided p-value that values are as likely of either sign (Fisher 1935): signs flipped.

    Exact up to 16 values that are not 0, else 20,000 random flips.
    """
    sums = np.asarray(values, dtype=float)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    if len(set(np.abs(sums))) == 1:
        ups = int((sums > 0).sum())
        return float(stats.binomtest(ups, len(sums), 0.5).pvalue)
    return sign_flip_p_values(sums[:, None], seed=seed)[0]


def sign_flip_p_values(
    values: Float[np.ndarray, "request cell"],
    clusters: Sequence[str] | None = None,
    *,
    seed: int = 0,
    flips: int = 20_000,
) -> list[float]:
    """`sign_flip_p_value` of many columns, which share their flips; rows of a cluster flip together."""
    if clusters is not None:
        values = np.stack([_by_cluster(column, clusters)[0] for column in values.T], 1)
    n = len(values)
    exact = n <= LEAST_FLIPPED
    signs = (
        np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
        if exact
        else np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, n))
    )
    seen = np.abs(values.sum(0))
    extreme = np.zeros(values.shape[1])
    for part in np.array_split(signs, max(1, len(signs) // 4096)):
        extreme += (np.abs(part @ values) >= seen * (1 - 1e-12) - 1e-300).sum(0)
    told = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return [float(p) for p in told]


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """q-values: p-values adjusted for a false discovery rate (Benjamini & Hochberg 1995)."""
    return [float(q) for q in stats.false_discovery_control(p_values)] if len(p_values) else []


def mean_interval(
    values: Sequence[float] | NDArray[np.float64],
    clusters: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile bootstrap of the mean, by cluster, from 8 of them on; below that, the values' range."""
    every = np.asarray(values, dtype=float)
    known = np.isfinite(every)
    finite = every[known]
    if len(finite) == 0:
        return float("nan"), float("nan")
    names = range(len(every)) if clusters is None else clusters
    sums, sizes = _by_cluster(finite, [str(name) for name, yes in zip(names, known, strict=True) if yes])
    if len(sums) < LEAST_FOR_BOOTSTRAP:
        return float(finite.min()), float(finite.max())
    draws = np.random.default_rng(seed).integers(len(sums), size=(2000, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), (0.025, 0.975))
    return float(low), float(high)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], clusters: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Spearman's rank correlation, with a 95% percentile bootstrap over the pairs, or over clusters of them.

    Raises:
        ValueError: the lengths differ, or there are fewer than 3 pairs.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"as many values of both are wanted, at least 3, got {len(x)} and {len(y)}")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    cluster, names = pd.factorize(np.asarray(range(len(a)) if clusters is None else clusters, dtype=object))
    members = [np.flatnonzero(cluster == c) for c in range(len(names))]
    drawn = np.random.default_rng(seed).integers(len(members), size=(2000, len(members)))
    rhos = [
        _spearman(a[pairs], b[pairs]) for pairs in (np.concatenate([members[c] for c in i]) for i in drawn)
    ]
    low, high = np.nanquantile(rhos, (0.025, 0.975)) if np.isfinite(rhos).any() else (np.nan, np.nan)
    return _spearman(a, b), (float(low), float(high))


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rho; nan where one of the two does not vary."""
    u, v = (stats.rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = float(np.sqrt((u * u).sum() * (v * v).sum()))
    return float((u * v).sum()) / norm if norm else float("nan")


def _by_cluster(
    values: NDArray[np.float64], clusters: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster, in the order of their first appearance."""
    index, _ = pd.factorize(np.asarray(clusters, dtype=object))
    return np.bincount(index, weights=values).astype(float), np.bincount(index).astype(float)
