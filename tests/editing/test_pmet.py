"""PMET: MEMIT's least squares, spread by square roots."""

import math

import pytest
import torch
from helpers.key_groups import delta_of, groups_of_several, one_key_each, small_problem

from lens_defense.editing.methods import MEMIT, PMET, pmet
from lens_defense.editing.solving.layer_spread import layer_shares


def test_it_is_the_authors_formula():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    for left_to_go in (5, 2, 1):  # pmet_main.py, with layer_ks in columns
        columns, targets = keys.T, residuals.T
        upd_matrix = (
            (targets / math.sqrt(left_to_go))
            @ columns.T
            @ torch.linalg.inv(columns @ columns.T + 3.0 * covariance)
        )
        share = layer_shares(PMET(3.0), tuple(range(left_to_go)))[0]
        delta = delta_of(PMET(3.0), one_key_each(keys, share * residuals), covariance)
        torch.testing.assert_close(delta, upd_matrix)


def test_lower_layers_write_more_than_the_higher_ones():
    shares = layer_shares(pmet, (5, 6, 7, 8, 9))
    assert list(shares) == [5, 6, 7, 8, 9] and shares[9] == 1
    missing, written = 1.0, []
    for share in shares.values():
        written.append(share * missing)
        missing -= written[-1]
    assert written == sorted(written, reverse=True) and sum(written) == pytest.approx(1)
    assert written[0] == pytest.approx(1 / math.sqrt(5))


def test_one_layer_is_memits():
    groups, covariance = groups_of_several(), small_problem()[2]
    assert layer_shares(pmet, (4,)) == layer_shares(MEMIT(), (4,)) == {4: 1.0}
    torch.testing.assert_close(delta_of(pmet, groups, covariance), delta_of(MEMIT(), groups, covariance))


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="mom2_update_weight must be above 0, got 0"):
        PMET(mom2_update_weight=0.0)
