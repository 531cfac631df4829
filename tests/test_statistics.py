"""Intervals and tests against scipy, and against enumeration where rows come in clusters."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lens_defense.statistics import (
    clustered_rate,
    mean_interval,
    paired_p_value,
    rank_correlation,
    sign_flip_p_values,
    wilson,
)

quick = settings(deadline=None, max_examples=50)
outcomes = st.lists(st.booleans(), min_size=1, max_size=40)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
rows = st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), min_size=1, max_size=40)


def alone(values):
    """Clusters of one row each."""
    return [str(i) for i in range(len(values))]


@pytest.mark.parametrize("hits, n", [(0, 10), (5, 10), (10, 10), (1, 24), (79, 80)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(hits, n, confidence):
    known = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert wilson(float(hits), float(n), confidence) == pytest.approx((known.low, known.high), abs=1e-12)


def test_wilson_known_values():
    assert wilson(5.0, 10.0) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 0.0) == (0.0, 1.0)


@quick
@given(outcomes)
def test_one_row_a_cluster_is_wilson(hits):
    rate, interval = clustered_rate(hits, alone(hits))
    assert rate == pytest.approx(sum(hits) / len(hits))
    assert interval == pytest.approx(wilson(float(sum(hits)), float(len(hits))))


@quick
@given(rows)
def test_clusters_never_make_an_interval_narrower(given_rows):
    hits, clusters = zip(*given_rows, strict=True)
    rate, (low, high) = clustered_rate(hits, clusters)
    apart = wilson(float(sum(hits)), float(len(hits)))
    assert low - 1e-12 <= rate <= high + 1e-12
    assert high - low >= apart[1] - apart[0] - 1e-12


def test_copies_of_a_row_add_nothing():
    hits = [True, False, True, True, False, False, True, False, True, True]
    once = clustered_rate(hits, alone(hits))[1]
    copies = clustered_rate(hits * 6, alone(hits) * 6)[1]
    assert copies[1] - copies[0] == pytest.approx(once[1] - once[0], rel=0.06)
    assert copies[1] - copies[0] > 1.8 * np.diff(wilson(36.0, 60.0))[0]


@quick
@given(pairs)
def test_paired_is_mcnemars_exact_test(given_pairs):
    before, after = zip(*given_pairs, strict=True)
    ups = sum(b < a for b, a in given_pairs)
    downs = sum(b > a for b, a in given_pairs)
    known = stats.binomtest(ups, ups + downs, 0.5).pvalue if ups + downs else 1.0
    assert paired_p_value(before, after, alone(before)) == pytest.approx(known)


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcdefg")), min_size=1))
def test_paired_is_enumeration_of_the_clusters_signs(given_rows):
    before, after, clusters = zip(*given_rows, strict=True)
    sums = {}
    for b, a, cluster in given_rows:
        sums[cluster] = sums.get(cluster, 0) + a - b
    observed = abs(sum(sums.values()))
    flips = itertools.product((-1, 1), repeat=len(sums))
    extreme = [abs(np.dot(signs, list(sums.values()))) >= observed for signs in flips]
    p = paired_p_value(before, after, clusters)
    assert p == pytest.approx(np.mean(extreme))
    assert p == paired_p_value(after, before, clusters)


def test_many_unequal_clusters_are_drawn_the_same_every_time():
    clusters = [str(i // 2) for i in range(60)]
    before = [False] * 60
    after = [i % 5 != 0 for i in range(60)]
    p = paired_p_value(before, after, clusters)
    assert p == paired_p_value(before, after, clusters) == paired_p_value(after, before, clusters)
    assert 0 < p < 0.001


def test_few_values_give_their_range():
    assert mean_interval([3.0, 1.0, float("nan"), 2.0]) == (1.0, 3.0)
    assert np.isnan(mean_interval([float("nan")])).all()


def test_bootstrap_is_near_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert mean_interval(values) == (low, high)
    assert mean_interval([1.0] * 8) == (1.0, 1.0)


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_is_scipys(clustered):
    rng = np.random.default_rng(1)
    values = rng.normal(size=60)
    clusters = [str(i) for i in rng.integers(12, size=60)] if clustered else alone(values)
    names = list(dict.fromkeys(clusters))
    sums = np.array([sum(v for v, c in zip(values, clusters, strict=True) if c == name) for name in names])
    sizes = np.array([clusters.count(name) for name in names])
    known = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert mean_interval(values, clusters) == pytest.approx((known.low, known.high), abs=1e-12)


def test_exact_flips_are_scipys():
    values = np.random.default_rng(2).normal(0.4, 1.0, (9, 3))
    known = stats.permutation_test(
        (values,),
        lambda x, axis: np.abs(x.sum(axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert sign_flip_p_values(values) == pytest.approx(known, abs=1e-12)


def test_rank_correlation_is_spearmans_and_its_interval_holds_it():
    generator = np.random.default_rng(3)
    x = generator.normal(size=40)
    y = x + generator.normal(size=40)
    rho, (low, high) = rank_correlation(x.tolist(), y.tolist())
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert low < rho < high < 1
    rho, interval = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0])
    assert (rho, *interval) == pytest.approx((1, 1, 1))
    assert np.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[0])
    with pytest.raises(ValueError, match="at least 3"):
        rank_correlation([1.0, 2.0], [1.0, 2.0])
