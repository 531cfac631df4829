"""Significance against SciPy's permutation test; reliability of maps that do and do not repeat."""

import numpy as np
import pytest
import torch
from nouns import a_prompt, a_trace
from scipy import stats

from lens_defense.inferences import reliability, request_effects, significance
from lens_defense.intervals import sign_flip_p_value, sign_flip_p_values


def a_map(values):
    """A trace of one role whose effects are these, [request, layer]."""
    values = torch.as_tensor(values, dtype=torch.float64)
    prompts = [a_prompt() for _ in values]
    told = a_trace(prompts, layers=range(values.shape[1]), roles=["subject_last"], samples=1)
    at = prompts[0].positions("subject_last")[0]
    told.patched[:, 0, :, at, 0] = values - 1  # clean 0, corrupted -1
    return told


def test_request_effects_are_the_traces_own():
    values = np.random.default_rng(0).normal(size=(5, 3))
    addresses, told = request_effects(a_map(values))
    assert addresses == [("residual", "subject_last", layer) for layer in range(3)]
    np.testing.assert_allclose(told, values, atol=1e-12)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_p_values_are_those_of_a_permutation_test(n):
    values = np.random.default_rng(n).normal(0.2, 1, size=(n, 4))
    table = significance(a_map(values))
    for column, p in zip(values.T, table["p"], strict=True):
        wanted = stats.permutation_test(
            (column,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
        )
        assert p == pytest.approx(wanted.pvalue, abs=1e-9 if n <= 12 else 0.012)
        assert p == pytest.approx(sign_flip_p_value(column), abs=0.012)
    np.testing.assert_allclose(table["q"], stats.false_discovery_control(table["p"]))
    assert list(table["n"]) == [n] * 4


def test_few_requests_can_show_nothing():
    table = significance(a_map(np.full((4, 2), 0.9) + np.random.default_rng(0).normal(0, 0.01, (4, 2))))
    assert (table["p"] == 2 / 2**4).all()


def test_columns_share_flips_and_zero_is_never_significant():
    values = np.stack([np.zeros(20), np.ones(20) + np.arange(20) / 100], 1)
    null, sure = sign_flip_p_values(values)
    assert null == 1.0 and sure < 0.001


def test_reliability_is_high_where_requests_agree_and_none_where_they_do_not():
    rng = np.random.default_rng(0)
    shape = np.linspace(0, 1, 12)
    agreed, (low, high) = reliability(a_map(shape + rng.normal(0, 0.1, (30, 12))))
    assert agreed > 0.95 and low <= agreed <= high
    chance, _ = reliability(a_map(rng.normal(size=(30, 12))))
    assert chance < 0.7
    with pytest.raises(ValueError, match="at least 4 requests"):
        reliability(a_map(np.ones((3, 4))))
