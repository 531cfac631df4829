"""Intervals and tests for rates and means whose rows are related: Wilson, McNemar, bootstrap, all by cluster.

Several rows about one subject are not several independent trials, so rows of one cluster count as related.
A rate's interval is Wilson's at the effective sample size n / deff (Kish 1965), where deff is the variance of
the rate between clusters over the binomial variance. A paired test flips the sign of a whole cluster's
difference; with one row per cluster this is McNemar's exact test. A bootstrap draws whole clusters.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

LEAST_FOR_BOOTSTRAP = 8
"""Fewer clusters than this give the range of their values instead of an interval."""
_EXACT_FLIPS = 16
"""Up to this many clusters all flips of signs are counted; beyond, random ones."""


def wilson(hits: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927); n may be an effective size, not whole."""
    if n <= 0:
        return (0.0, 1.0)
    ends = np.array(proportion_confint(hits, n, alpha=1 - confidence, method="wilson"), dtype=float)
    low, high = np.clip(ends, 0.0, 1.0).tolist()
    return low, high


def clustered_rate(hits: Sequence[bool], clusters: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """A rate and its 95% interval, rows of one cluster counted as related.

    A rate of 0 or 1 says nothing of its variance between clusters; then every cluster counts as one trial.
    """
    sums, sizes = _by_cluster(np.asarray(hits, dtype=float), clusters)
    n, k = float(sizes.sum()), len(sizes)
    if n == 0:
        return float("nan"), (0.0, 1.0)
    rate = float(sums.sum() / n)
    if k == n:
        effective = n
    elif k < 2 or rate in (0.0, 1.0):
        effective = float(k)
    else:
        between = k / (k - 1) * float(((sums - rate * sizes) ** 2).sum()) / n**2
        effective = min(n, n / max(between / (rate * (1 - rate) / n), 1e-9))
    return rate, wilson(rate * effective, effective)


def paired_p_value(
    before: Sequence[bool], after: Sequence[bool], clusters: Sequence[str], *, seed: int = 0
) -> float:
    """Two-sided p-value of a change, by flipping the signs of clusters' differences (McNemar's test)."""
    sums, _ = _by_cluster(np.asarray(after, dtype=float) - np.asarray(before, dtype=float), clusters)
    return sign_flip_p_value(sums, seed=seed)


def sign_flip_p_value(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> float:
    """Two-sided p-value that values are as likely of either sign (Fisher 1935): signs are flipped.

    Exact up to 16 values that are not 0, and where all are of one size; else of 20,000 random flips.
    """
    nonzero = np.asarray(values, dtype=float)
    nonzero = nonzero[nonzero != 0]
    if len(nonzero) == 0:
        return 1.0
    if len(set(np.abs(nonzero))) == 1:
        return float(stats.binomtest(int((nonzero > 0).sum()), len(nonzero), 0.5).pvalue)
    return sign_flip_p_values(nonzero[:, None], seed=seed)[0]


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
    exact = n <= _EXACT_FLIPS
    if exact:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, n))
    observed = np.abs(values.sum(0)) * (1 - 1e-12) - 1e-300
    as_extreme = np.zeros(values.shape[1])
    for batch in np.array_split(signs, max(1, len(signs) // 4096)):
        as_extreme += (np.abs(batch @ values) >= observed).sum(0)
    # of random flips, the observed signs count as one more (Phipson & Smyth 2010)
    p_values = as_extreme / len(signs) if exact else (as_extreme + 1) / (len(signs) + 1)
    return [float(p) for p in p_values]


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """q-values: p-values adjusted for a false discovery rate (Benjamini & Hochberg 1995)."""
    return [float(q) for q in stats.false_discovery_control(p_values)] if len(p_values) else []


def mean_interval(
    values: Sequence[float] | NDArray[np.float64],
    clusters: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile bootstrap of the mean over clusters; of fewer than 8 clusters, the values' range."""
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    if not finite.any():
        return float("nan"), float("nan")
    names = np.asarray(range(len(array)) if clusters is None else clusters, dtype=object)
    sums, sizes = _by_cluster(array[finite], names[finite])
    if len(sums) < LEAST_FOR_BOOTSTRAP:
        return float(array[finite].min()), float(array[finite].max())
    drawn = _bootstrap_draws(len(sums), seed)
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
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
    pairs = np.array([x, y], dtype=float)
    index, names = pd.factorize(np.asarray(range(len(x)) if clusters is None else clusters, dtype=object))
    members = [np.flatnonzero(index == i) for i in range(len(names))]
    drawn = _bootstrap_draws(len(members), seed)
    rhos = [_spearman(pairs[:, np.concatenate([members[i] for i in draw])]) for draw in drawn]
    low, high = np.nanquantile(rhos, (0.025, 0.975)) if np.isfinite(rhos).any() else (np.nan, np.nan)
    return _spearman(pairs), (float(low), float(high))


def _spearman(pairs: Float[np.ndarray, "2 n"]) -> float:
    """Spearman's rho; NaN where one of the two does not vary."""
    ranks = stats.rankdata(pairs, axis=1)
    return float(np.corrcoef(ranks)[0, 1]) if np.ptp(ranks, axis=1).all() else float("nan")


def _bootstrap_draws(k: int, seed: int) -> Int[np.ndarray, "draw k"]:
    """Indices of clusters, drawn with replacement; the draws of scipy.stats.bootstrap at this seed."""
    return np.random.default_rng(seed).integers(k, size=(2000, k))


def _by_cluster(
    values: NDArray[np.float64], clusters: Sequence[str] | NDArray[np.object_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster, in the order of their first appearance."""
    index, _ = pd.factorize(np.asarray(clusters, dtype=object))
    return np.bincount(index, weights=values).astype(float), np.bincount(index).astype(float)
