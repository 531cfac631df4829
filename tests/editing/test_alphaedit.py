"""AlphaEdit: nothing is written that C knows, against its formula with the projection written out."""

import pytest
import torch
from helpers.key_groups import (
    D_IN,
    D_OUT,
    delta_of,
    groups_of_several,
    one_key_each,
    small_problem,
    weighted_loss,
)

from lens_defense.editing.methods import MEMIT, AlphaEdit, KeyGroup, alphaedit


def graded_problem():
    """Keys, residuals, a C whose eigenvalues differ as those of models do, and its eigenvectors."""
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    vectors = torch.linalg.eigh(covariance)[1]
    eigenvalues = 10.0 ** torch.linspace(-4, 1, D_IN, dtype=torch.float64)
    return keys, residuals, (vectors * eigenvalues) @ vectors.T, vectors


def projection(covariance, share):
    """Onto the smallest eigenvectors, one by one, as long as they hold no more than a share of the trace."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    held, onto = 0.0, torch.zeros_like(covariance)
    for eigenvalue, vector in zip(eigenvalues, vectors.T, strict=True):
        held += float(eigenvalue)
        if held > share * float(eigenvalues.sum()):
            break
        onto += torch.outer(vector, vector)
    return onto


@pytest.mark.parametrize("share", [1e-4, 0.02, 0.3])
def test_it_is_the_authors_formula(share):
    keys, residuals, covariance, _ = graded_problem()
    onto, columns = projection(covariance, share), keys.T
    assert 0 < round(float(onto.trace())) < D_IN
    l2 = 10.0 * float(covariance.trace()) / D_IN
    # AlphaEdit_main.py, with layer_ks in columns, and without earlier edits
    moments = onto @ columns @ columns.T + l2 * torch.eye(D_IN, dtype=torch.float64)
    upd_matrix = torch.linalg.solve(moments, onto @ columns @ residuals)
    delta = delta_of(AlphaEdit(share, l2=10.0), one_key_each(keys, residuals), covariance)
    torch.testing.assert_close(delta, upd_matrix.T)


def test_keys_that_are_kept_are_mapped_to_nothing():
    keys, residuals, _ = (tensor.double() for tensor in small_problem())
    known_keys = torch.randn(6, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    covariance = known_keys.T @ known_keys / 6  # of rank 6: the other 6 directions are free
    for share in (1e-9, 1e-3):
        delta = delta_of(AlphaEdit(share, l2=1e-9), one_key_each(keys, residuals), covariance)
        assert (delta @ known_keys.T).abs().max() < 1e-9 * float(delta.abs().max())
        torch.testing.assert_close(keys @ delta.T, residuals, rtol=1e-5, atol=1e-5)


def test_of_what_c_knows_the_change_sees_its_share_at_most():
    keys, residuals, covariance, _ = graded_problem()
    for share in (1e-3, 0.02, 0.2):
        delta = delta_of(AlphaEdit(share), one_key_each(keys, residuals), covariance)
        rows = torch.linalg.svd(delta, full_matrices=False)[2]
        seen = torch.einsum("ri,ij,rj->", rows[: len(keys)], covariance, rows[: len(keys)])
        assert float(seen) <= share * float(covariance.trace()) * (1 + 1e-9)


def test_it_is_the_same_in_other_units():
    keys, residuals, covariance, _ = graded_problem()
    delta = delta_of(alphaedit, one_key_each(keys, residuals), covariance)
    scaled = delta_of(alphaedit, one_key_each(8.0 * keys, residuals), 64.0 * covariance)
    torch.testing.assert_close(8.0 * scaled, delta)


def test_where_c_is_even_and_all_is_free_it_is_memit():
    keys, residuals, _ = small_problem()
    even = 2.0 * torch.eye(D_IN)
    groups = one_key_each(keys, residuals)
    share = 1 - 0.5 / D_IN  # all but one direction, which no key has
    flat = [KeyGroup(g.owner, g.keys * (torch.arange(D_IN) < D_IN - 1), g.residual) for g in groups]
    even[-1, -1] = 100.0 * D_IN
    l2 = 3.0 * 2.0 / float(even.diagonal().mean())
    rest = AlphaEdit(min(share, 2.0 * (D_IN - 1) / float(even.trace()) + 1e-6), l2=l2)
    torch.testing.assert_close(delta_of(rest, flat, even), delta_of(MEMIT(3.0), flat, even))


def test_harmless_uses_are_rows_of_the_least_squares():
    groups, covariance = groups_of_several(), graded_problem()[2]
    method = AlphaEdit(0.3, l2=0.5)
    onto = projection(covariance, 0.3)
    inside = [KeyGroup(g.owner, g.keys.double() @ onto, g.residual, g.weight, g.harmless) for g in groups]
    delta = delta_of(method, groups, covariance).requires_grad_()
    ridge = 0.5 * covariance.trace() / D_IN * torch.eye(D_IN, dtype=torch.float64)
    (slope,) = torch.autograd.grad(weighted_loss(delta, inside, ridge), delta)
    assert slope.abs().max() < 1e-9
    torch.testing.assert_close(delta @ onto, delta)


def test_a_lighter_norm_writes_more():
    keys, residuals, covariance, _ = graded_problem()
    arrived = [
        float(
            (keys[0] @ delta_of(AlphaEdit(l2=l2), one_key_each(keys[:1], residuals[:1]), covariance).T).norm()
        )
        for l2 in (100.0, 1.0, 1e-6)
    ]
    assert arrived[0] < arrived[1] < arrived[2] == pytest.approx(float(residuals[0].norm()), rel=1e-3)


def test_a_covariance_without_a_null_space_is_refused():
    keys, residuals, _ = small_problem()
    with pytest.raises(
        ValueError, match=r"every direction of C holds more than .* nullspace_share above 0\.083"
    ):
        alphaedit.solve(one_key_each(keys, residuals), torch.eye(D_IN))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"nullspace_share": 0.0}, "nullspace_share must be above 0 and below 1, got 0.0"),
        ({"nullspace_share": 1.0}, "nullspace_share must be above 0 and below 1, got 1.0"),
        ({"l2": 0.0}, "l2 must be above 0, got 0.0"),
        ({"l2": float("nan")}, "l2 must be above 0, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        AlphaEdit(**fields)


def test_ranks_know_their_requests():
    left, right, owners = AlphaEdit(0.3).solve(groups_of_several(), graded_problem()[2])
    assert (left.shape, right.shape) == ((D_OUT, 4), (4, D_IN))
    assert owners == (frozenset([0]), frozenset([1]), frozenset([0]), frozenset([1]))
