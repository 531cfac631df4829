"""Significance against SciPy's permutation test; reliability of maps that do and do not repeat."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.handmade import a_prompt, a_request, a_trace, lamp_prompts
from scipy import stats

from lens_defense.models.fingerprint import Fingerprint
from lens_defense.statistics import sign_flip_p_value, sign_flip_p_values
from lens_defense.tracing.map_statistics import reliability, request_effects, significance
from lens_defense.tracing.site_map import ScoreMap


def trace_of(effects):
    """A trace of one role with these effects, [request, layer]."""
    effects = torch.as_tensor(effects, dtype=torch.float64)
    prompts = lamp_prompts(len(effects))
    trace = a_trace(prompts, layers=range(effects.shape[1]), roles=["subject_last"], samples=1)
    position = prompts[0].positions("subject_last")[0]
    trace.patched[:, 0, :, position, 0] = effects - 1  # clean 0, corrupted -1
    return trace


def test_request_effects_are_the_traces_own():
    values = np.random.default_rng(0).normal(size=(5, 3))
    addresses, effects = request_effects(trace_of(values))
    assert addresses == [("resid_post", "subject_last", layer) for layer in range(3)]
    np.testing.assert_allclose(effects, values, atol=1e-12)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_p_values_are_those_of_a_permutation_test(n):
    values = np.random.default_rng(n).normal(0.2, 1, size=(n, 4))
    table = significance(trace_of(values))
    for column, p in zip(values.T, table["p"], strict=True):
        expected = stats.permutation_test(
            (column,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
        )
        assert p == pytest.approx(expected.pvalue, abs=1e-9 if n <= 12 else 0.012)
        assert p == pytest.approx(sign_flip_p_value(column), abs=0.012)
    np.testing.assert_allclose(table["q"], stats.false_discovery_control(table["p"]))
    assert list(table["n"]) == [n] * 4


def test_few_requests_can_show_nothing():
    table = significance(trace_of(np.full((4, 2), 0.9) + np.random.default_rng(0).normal(0, 0.01, (4, 2))))
    assert (table["p"] == 2 / 2**4).all()


def test_columns_share_flips_and_zero_is_never_significant():
    values = np.stack([np.zeros(20), np.ones(20) + np.arange(20) / 100], 1)
    zeros, ones = sign_flip_p_values(values)
    assert zeros == 1.0 and ones < 0.001


def test_reliability_is_high_where_requests_agree_and_none_where_they_do_not():
    rng = np.random.default_rng(0)
    shape = np.linspace(0, 1, 12)
    alike, (low, high) = reliability(trace_of(shape + rng.normal(0, 0.1, (30, 12))))
    assert alike > 0.95 and low <= alike <= high
    chance = [reliability(trace_of(rng.normal(size=(30, 12)))) for _ in range(20)]
    assert all(0 <= low <= middle <= high <= 1 for middle, (low, high) in chance)
    assert np.median([middle for middle, _ in chance]) < 0.3
    assert reliability(trace_of(np.ones((6, 4)))) == (0, (0, 0)), "a map that is flat tells nothing"
    with pytest.raises(ValueError, match="at least 4 subjects"):
        reliability(trace_of(np.ones((3, 4))))


def related(times):
    """Ten subjects, each in so many requests with the same effects."""
    effects = np.random.default_rng(1).normal(0.3, 1, size=(10, 4))
    trace = trace_of(np.repeat(effects, times, axis=0))
    subjects = [f"pipe {i // times}" for i in range(10 * times)]
    prompts = [
        a_prompt(request=a_request(id=f"{i}", text=f"a {subject}", subject=subject))
        for i, subject in enumerate(subjects)
    ]
    return replace(trace, prompts=tuple(prompts))


def test_requests_of_one_subject_are_one_draw():
    once, five = related(1), related(5)
    for mean, again in zip(once.role_means(), five.role_means(), strict=True):
        assert (again.low, again.high) == pytest.approx((mean.low, mean.high))
        assert again.n == 5 * mean.n
    np.testing.assert_allclose(significance(five)["p"], significance(once)["p"])
    middle, _ = reliability(five)
    assert middle < 0.95, "no subject is in both halves"


def test_what_has_no_sign_has_no_significance():
    trace = related(1)
    scores = ScoreMap(
        prompts=trace.prompts,
        components=trace.components,
        layers=trace.layers,
        model="tiny",
        model_layers=4,
        fingerprint=Fingerprint(""),
        scores=trace.effects,
        quantity="the logit lens",
    )
    with pytest.raises(ValueError, match="never negative"):
        significance(scores)
