"""ROME: the value is met exactly, one request after another; its formula with the inverse written out."""

from dataclasses import replace

import pytest
import torch
from helpers.key_groups import D_IN, D_OUT, delta_of, groups_of_several, one_key_each, small_problem

from lens_defense.editing.methods import EMMET, ROME, KeyGroup, rome


def plain_rome(key, residual, covariance, divisor_key=None):
    """The update of one fact: Lambda (C^-1 k)^T, with Lambda = r / (C^-1 k)^T k."""
    direction = torch.linalg.inv(covariance.double()) @ key.double()
    return torch.outer(
        residual.double() / (direction @ (key if divisor_key is None else divisor_key)), direction
    )


def test_one_fact_is_the_papers_formula():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    delta = delta_of(rome, one_key_each(keys[:1], residuals[:1]), covariance)
    torch.testing.assert_close(delta, plain_rome(keys[0], residuals[0], covariance))


def test_the_new_matrix_maps_the_key_to_the_value():
    keys, residuals, covariance = small_problem()
    matrix = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value = matrix @ keys[0].double() + residuals[0].double()
    delta = delta_of(rome, one_key_each(keys[:1], residuals[:1]), covariance)
    torch.testing.assert_close((matrix + delta) @ keys[0].double(), value)


def test_requests_are_written_one_after_another():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for key, residual in zip(keys, residuals, strict=True):
        delta = delta + plain_rome(key, residual - delta @ key, covariance)
    left, right, owners = rome.solve(one_key_each(keys, residuals), covariance)
    torch.testing.assert_close(left @ right, delta)
    torch.testing.assert_close(left @ right @ keys[-1], residuals[-1])
    assert (left @ right @ keys[0] - residuals[0]).norm() > 0.01, "those before are moved by those after"
    assert owners == tuple(frozenset([i]) for i in range(len(keys)))


def test_of_several_contexts_the_mean_key_is_exact_and_their_differences_are_kept_small():
    group, covariance = groups_of_several()[0], small_problem()[2]
    mean = group.keys.double().mean(0)
    delta = delta_of(rome, [group], covariance)
    torch.testing.assert_close(delta @ mean, group.residual.double())
    differences = group.keys.double() - mean
    widened = 1000.0 * covariance.double() + group.weight / len(differences) * differences.T @ differences
    torch.testing.assert_close(delta, plain_rome(mean, group.residual, widened))


def test_harmless_uses_count_as_c_does():
    groups, covariance = groups_of_several(), small_problem()[2].double()
    asked = [group for group in groups if not group.harmless]
    preserved = 1000.0 * covariance
    for group in groups:
        if group.harmless:
            keys = group.keys.double()
            preserved += group.weight / len(keys) * keys.T @ keys
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for group in asked:
        mean = group.keys.double().mean(0)
        spread = group.keys.double() - mean
        widened = preserved + group.weight / len(spread) * spread.T @ spread
        delta = delta + plain_rome(mean, group.residual - delta @ mean, widened)
    left, right, owners = rome.solve(groups, covariance)
    torch.testing.assert_close(left @ right, delta)
    assert owners == (frozenset([0]), frozenset([1])), "harmless uses have no rank"


def test_harmless_uses_take_less_when_they_are_given():
    groups, covariance = groups_of_several(), 1e-3 * small_problem()[2]
    harmful = [group for group in groups if not group.harmless]
    heavy = [replace(group, weight=1e4) if group.harmless else group for group in groups]
    keys = torch.cat([group.keys for group in groups if group.harmless]).double()
    leaks = [float((delta_of(rome, chosen, covariance) @ keys.T).norm()) for chosen in (heavy, harmful)]
    assert leaks[0] < 0.3 * leaks[1]


def test_one_request_is_emmets():
    groups, covariance = groups_of_several(), small_problem()[2]
    harmless = [replace(group, residual=torch.zeros(D_OUT)) for group in groups if group.harmless]
    for chosen in ([groups[0]], [groups[0], *harmless]):
        torch.testing.assert_close(delta_of(rome, chosen, covariance), delta_of(EMMET(), chosen, covariance))


def test_the_weight_of_c_cancels_without_harmless_uses():
    keys, residuals, covariance = small_problem()
    groups = one_key_each(keys, residuals)
    torch.testing.assert_close(delta_of(rome, groups, covariance), delta_of(rome, groups, 7.0 * covariance))


def test_the_releases_two_keys():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    contexts = keys[:3]
    group = KeyGroup(0, contexts.mean(0, keepdim=True), residuals[0], first_key=contexts[0])
    delta = delta_of(ROME(two_keys=True), [group], covariance)
    # compute_u: C^-1 of the mean key; compute_v: the residual over its product with the key of the prompt
    u = torch.linalg.inv(covariance) @ contexts.mean(0)
    u = u / u.norm()
    torch.testing.assert_close(delta, torch.outer(residuals[0] / (contexts[0] @ u), u))
    torch.testing.assert_close(delta @ contexts[0], residuals[0])
    assert (delta @ contexts.mean(0) - residuals[0]).norm() > 0.1


def test_two_keys_that_are_one_are_r_rome():
    keys, residuals, covariance = small_problem()
    groups = [replace(group, first_key=group.keys[0]) for group in one_key_each(keys, residuals)]
    one, two = (delta_of(ROME(two_keys=two_keys), groups, covariance) for two_keys in (False, True))
    torch.testing.assert_close(one, two)


def test_two_keys_that_hardly_agree_make_a_huge_change():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    direction = torch.linalg.inv(covariance) @ keys[0]
    apart = keys[1] - (keys[1] @ direction - 1e-6) / (keys[0] @ direction) * keys[0]
    group = KeyGroup(0, keys[:1], residuals[0], first_key=apart)
    one, two = (delta_of(ROME(two_keys=two_keys), [group], covariance) for two_keys in (False, True))
    assert two.norm() > 1e4 * one.norm()


def test_two_keys_need_the_second():
    keys, residuals, covariance = small_problem()
    with pytest.raises(ValueError, match=r"needs the key of each group's first prompt, first_key"):
        ROME(two_keys=True).solve(one_key_each(keys, residuals), covariance)


def test_the_middle_layer_is_edited():
    assert rome.layer_shares((3, 4, 5, 6, 7, 8)) == {5: 1.0}, "as the release edits GPT-J"
    assert rome.layer_shares((5, 6, 7, 8, 9)) == {7: 1.0}
    assert rome.layer_shares((4,)) == {4: 1.0}
