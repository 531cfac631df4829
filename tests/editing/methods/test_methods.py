"""The solvers against the authors' formulas in plain float64, and against their own equations."""

import pytest
import torch

from lens_defense.editing.methods import DELMAN, MEMIT, delman, find_method, memit

N, D_IN, D_OUT = 5, 12, 7


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(N, D_IN, generator=generator)
    residuals = torch.randn(N, D_OUT, generator=generator)
    corpus = torch.randn(40, D_IN, generator=generator)
    return keys, residuals, 3.0 * corpus.T @ corpus / 40


def rank_one(key, residual, moment):
    """ROME's and DELMAN's update of one key, written out: r (C + k k^T)^-1 k, as an outer product."""
    inverse = torch.linalg.inv(moment + torch.outer(key, key))
    return torch.outer(residual, inverse @ key)


def test_memit_is_the_authors_formula(tensors):
    keys, residuals, moment = (t.double() for t in tensors)
    columns = keys.T  # memit_main.py: layer_ks, one column a request
    adj_k = torch.linalg.solve(moment + columns @ columns.T, columns)
    left, right = MEMIT(1.0).solve(*tensors)
    assert left.dtype == right.dtype == torch.float64
    assert (left.shape, right.shape) == ((D_OUT, N), (N, D_IN))
    torch.testing.assert_close(left @ right, residuals.T @ adj_k.T)


def test_memit_meets_the_normal_equations(tensors):
    keys, residuals, moment = (t.double() for t in tensors)
    left, right = MEMIT(1.0).solve(*tensors)
    delta = left @ right
    torch.testing.assert_close(delta @ (moment + keys.T @ keys), residuals.T @ keys)


def test_memit_minimises_its_loss(tensors):
    keys, residuals, moment = (t.double() for t in tensors)
    left, right = MEMIT(1.0).solve(*tensors)
    delta = (left @ right).requires_grad_()
    elsewhere = torch.einsum("oi,ij,oj->", delta, moment, delta)
    loss = (keys @ delta.T - residuals).square().sum() + elsewhere
    (slope,) = torch.autograd.grad(loss, delta)
    assert slope.abs().max() < 1e-6


def test_memit_reaches_the_residual_where_nothing_else_counts(tensors):
    keys, residuals, moment = tensors
    left, right = MEMIT(1.0).solve(keys, residuals, moment * 1e-9)
    reached = keys.double() @ right.T @ left.T
    torch.testing.assert_close(reached, residuals.double(), rtol=1e-5, atol=1e-5)


def test_delman_of_one_batch_is_one_update_of_the_means(tensors):
    keys, residuals, moment = (t.double() for t in tensors)
    left, right = DELMAN(N, 1.0).solve(*tensors)
    assert left.shape[1] == right.shape[0] == 1
    torch.testing.assert_close(left @ right, rank_one(keys.mean(0), residuals.mean(0), moment))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_delman_is_its_batches_one_after_another(tensors, batch):
    keys, residuals, moment = (t.double() for t in tensors)
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for start in range(0, N, batch):
        key = keys[start : start + batch].mean(0)
        missing = residuals[start : start + batch].mean(0) - delta @ key
        delta = delta + rank_one(key, missing, moment)
    left, right = DELMAN(batch, 1.0).solve(*tensors)
    assert left.shape[1] == -(-N // batch)
    torch.testing.assert_close(left @ right, delta)


def test_one_request_is_the_same_for_all(tensors):
    keys, residuals, moment = tensors
    one = keys[:1], residuals[:1], moment
    (a, b), (c, d) = MEMIT(1.0).solve(*one), DELMAN(1, 1.0).solve(*one)
    torch.testing.assert_close(a @ b, c @ d)


def test_methods_are_found_by_name_and_objects_are_handed_back():
    assert find_method("memit") is memit and find_method("delman") is delman
    assert find_method(memit) is memit
    with pytest.raises(ValueError, match="must be one of memit, delman"):
        find_method("rome")


def test_ranks_belong_to_requests():
    assert [MEMIT().rank_of(i) for i in range(3)] == [0, 1, 2]
    assert [DELMAN(batch_size=2).rank_of(i) for i in range(5)] == [0, 0, 1, 1, 2]


def test_the_covariance_is_weighted(tensors):
    keys, residuals, moment = tensors
    for method in (MEMIT, DELMAN):
        a, b = method(mom2_update_weight=4.0).solve(keys, residuals, moment)
        c, d = method(mom2_update_weight=1.0).solve(keys, residuals, 4.0 * moment)
        torch.testing.assert_close(a @ b, c @ d)
