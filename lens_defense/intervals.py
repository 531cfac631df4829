"""Intervals and tests for rates and means: Wilson, McNemar, bootstrap; all of them by cluster.

Several rows about one subject are not several independent trials. A rate's interval is Wilson's at
the effective sample size n / deff (Kish 1965), where deff is the between-cluster variance of the
mean over the binomial one. The paired test flips the sign of a whole cluster's difference; with one
row a cluster this is McNemar's exact test.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEAST_FOR_BOOTSTRAP = 8
"""Fewer values than this give their range, not an interval (DESIGN: from n = 8 on)."""


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

    Exact up to 16 clusters that differ, else 20,000 random flips. One row a cluster: McNemar's exact.
    """
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    sums, _ = _by_cluster(change, clusters)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    if len(set(np.abs(sums))) == 1:
        ups = int((sums > 0).sum())
        return float(stats.binomtest(ups, len(sums), 0.5).pvalue)
    if len(sums) <= 16:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).mean())
    signs = np.random.default_rng(seed).choice((-1, 1), size=(20_000, len(sums)))
    extreme = (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).sum()
    return float((extreme + 1) / (len(signs) + 1))


def mean_interval(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap of the mean from 8 values on; below that, the range of the values."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    if len(finite) < LEAST_FOR_BOOTSTRAP:
        return float(finite.min()), float(finite.max())
    draws = np.random.default_rng(seed).integers(len(finite), size=(2000, len(finite)))
    low, high = np.quantile(finite[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Spearman's rank correlation, with a 95% percentile bootstrap over the pairs.

    Raises:
        ValueError: the lengths differ, or there are fewer than 3 pairs.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"as many values of both are wanted, at least 3, got {len(x)} and {len(y)}")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(a), size=(2000, len(a)))
    varied = drawn[[len(set(a[i])) > 1 and len(set(b[i])) > 1 for i in drawn]]
    if len(set(a)) < 2 or len(set(b)) < 2 or not len(varied):
        return float("nan"), (float("nan"), float("nan"))
    ranks = [stats.rankdata(values[varied], axis=1) for values in (a, b)]
    (u, v) = (r - r.mean(1, keepdims=True) for r in ranks)
    rhos = (u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1))
    low, high = np.quantile(rhos, (0.025, 0.975))
    rho: Any = stats.spearmanr(a, b)
    return float(rho.statistic), (float(low), float(high))


def _by_cluster(
    values: NDArray[np.float64], clusters: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster."""
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return np.bincount(index, weights=values).astype(float), np.bincount(index).astype(float)
