"""EMMET: every request's residual arrives exactly, against its formula with the inverses written out."""

from dataclasses import replace

import pytest
import torch
from helpers.key_groups import (
    D_IN,
    D_OUT,
    N,
    delta_of,
    groups_of_several,
    one_key_each,
    small_problem,
    weighted_loss,
)

from lens_defense.editing.methods import MEMIT, KeyGroup, emmet


def test_it_is_the_papers_formula():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    inverse, columns = torch.linalg.inv(covariance), keys.T  # emmet_main.py: C_inv, and layer_ks in columns
    adj_k = (torch.linalg.inv(columns.T @ inverse @ columns) @ columns.T @ inverse).T
    delta = delta_of(emmet, one_key_each(keys, residuals), covariance)
    torch.testing.assert_close(delta, residuals.T @ adj_k.T)


def test_every_residual_arrives_exactly():
    keys, residuals, covariance = small_problem()
    delta = delta_of(emmet, one_key_each(keys, residuals), covariance)
    torch.testing.assert_close(keys.double() @ delta.T, residuals.double())


def test_no_other_change_that_meets_them_writes_less_elsewhere():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    delta = delta_of(emmet, one_key_each(keys, residuals), covariance)
    # a change that adds nothing at the keys is orthogonal to the best one, in the metric of C
    free = torch.eye(D_IN, dtype=torch.float64) - torch.linalg.pinv(keys) @ keys
    assert (delta @ covariance @ free).abs().max() < 1e-10


def test_memit_tends_to_it():
    keys, residuals, covariance = small_problem()
    groups = one_key_each(keys, residuals)
    exact = delta_of(emmet, groups, covariance)
    distances = [
        float((delta_of(MEMIT(weight), groups, covariance) - exact).norm()) for weight in (1.0, 1e-2, 1e-6)
    ]
    assert distances[0] > 10 * distances[1] > 1e4 * distances[2]


def test_the_releases_emmet_lambda_makes_it_memit():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    inverse = torch.linalg.inv(4.0 * covariance)  # mom2_update_weight
    softened = keys @ inverse @ keys.T + 0.1 * torch.eye(N).double()  # emmet_lambda
    release = residuals.T @ torch.linalg.inv(softened) @ keys @ inverse
    torch.testing.assert_close(release, delta_of(MEMIT(0.4), one_key_each(keys, residuals), covariance))


def test_with_harmless_uses_it_is_memits_loss_under_the_constraint():
    groups, covariance = groups_of_several(), small_problem()[2].double()
    delta = delta_of(emmet, groups, covariance).requires_grad_()
    means = torch.stack([group.keys.double().mean(0) for group in groups if not group.harmless])
    residuals = torch.stack([group.residual.double() for group in groups if not group.harmless])
    torch.testing.assert_close(means @ delta.T, residuals)
    (slope,) = torch.autograd.grad(weighted_loss(delta, groups, 1000.0 * covariance), delta)
    free = torch.eye(D_IN, dtype=torch.float64) - torch.linalg.pinv(means) @ means
    assert (slope @ free).abs().max() < 1e-8 < slope.abs().max(), (
        "no step that keeps the constraint is downhill"
    )


def test_what_the_uses_ask_for_arrives_as_far_as_the_constraint_lets_it():
    groups, covariance = groups_of_several(), 1e-6 * small_problem()[2]
    single = [replace(group, keys=group.keys[:1]) for group in groups]
    delta = delta_of(emmet, single, covariance)
    for group in single:  # keys that are independent, and nearly nothing else that counts
        torch.testing.assert_close(
            delta @ group.keys[0].double(), group.residual.double(), rtol=1e-2, atol=1e-2
        )


def test_equal_keys_share_what_is_asked_of_them():
    keys, residuals, covariance = small_problem()
    twice = torch.stack([keys[0], keys[0], keys[1]])
    once = delta_of(emmet, one_key_each(twice[1:], residuals[[0, 1]]), covariance)
    torch.testing.assert_close(delta_of(emmet, one_key_each(twice, residuals[[0, 0, 1]]), covariance), once)
    delta = delta_of(emmet, one_key_each(twice, residuals[:3]), covariance)
    torch.testing.assert_close(delta @ keys[0].double(), residuals[:2].double().mean(0))
    torch.testing.assert_close(delta @ keys[1].double(), residuals[2].double())


@pytest.mark.parametrize("n", [1, N])
def test_ranks_know_their_requests(n):
    keys, residuals, covariance = small_problem()
    assert emmet.solve(one_key_each(keys[:n], residuals[:n]), covariance).owners == tuple(
        frozenset([i]) for i in range(n)
    )
    uses = [KeyGroup(3, keys[-2:], torch.zeros(D_OUT), harmless=True)]
    assert emmet.solve([*one_key_each(keys[:1], residuals[:1]), *uses], covariance).owners == (
        frozenset([0]),
        frozenset([3]),
    )


def test_a_dead_neuron_makes_no_difference():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    asleep = torch.ones(D_IN, dtype=torch.float64)
    asleep[3] = 0.0
    delta = delta_of(emmet, one_key_each(keys * asleep, residuals), covariance * torch.outer(asleep, asleep))
    torch.testing.assert_close((keys * asleep) @ delta.T, residuals)
    assert delta.isfinite().all()
