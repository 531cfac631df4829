"""The methods against the authors' formulas in plain float64, and against their own equations."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers.key_groups import D_IN, D_OUT, N, groups_of_several, one_key_each, small_problem, weighted_loss
from helpers.tiny_models import tiny_model

import lens_defense.editing.forecast as forecasts
from lens_defense.editing.edit import edit
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.methods import (
    DELMAN,
    MEMIT,
    METHODS,
    ROME,
    EditingMethod,
    Factors,
    KeyGroup,
    TuningMethod,
    delman,
    find_method,
    memit,
)
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.request import request
from lens_defense.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:the refusal could not be fitted")


@pytest.fixture
def tensors():
    return small_problem()


def solve(method, keys, residuals, covariance):
    """The factors for one key per request."""
    left, right, _ = method.solve(one_key_each(keys, residuals), covariance)
    return left, right


def rank_one(key, residual, covariance):
    """ROME's and DELMAN's update of one key, written out: r (C + k k^T)^-1 k, as an outer product."""
    inverse = torch.linalg.inv(covariance + torch.outer(key, key))
    return torch.outer(residual, inverse @ key)


def test_memit_is_the_authors_formula(tensors):
    keys, residuals, covariance = (t.double() for t in tensors)
    columns = keys.T  # memit_main.py: layer_ks, one column per request
    adj_k = torch.linalg.solve(covariance + columns @ columns.T, columns)
    left, right = solve(MEMIT(1.0), *tensors)
    assert left.dtype == right.dtype == torch.float64
    assert (left.shape, right.shape) == ((D_OUT, N), (N, D_IN))
    torch.testing.assert_close(left @ right, residuals.T @ adj_k.T)


def test_memit_meets_the_normal_equations(tensors):
    keys, residuals, covariance = (t.double() for t in tensors)
    left, right = solve(MEMIT(1.0), *tensors)
    delta = left @ right
    torch.testing.assert_close(delta @ (covariance + keys.T @ keys), residuals.T @ keys)


def test_memit_minimises_its_loss(tensors):
    keys, residuals, covariance = (t.double() for t in tensors)
    left, right = solve(MEMIT(1.0), *tensors)
    delta = (left @ right).requires_grad_()
    elsewhere = torch.einsum("oi,ij,oj->", delta, covariance, delta)
    loss = (keys @ delta.T - residuals).square().sum() + elsewhere
    (slope,) = torch.autograd.grad(loss, delta)
    assert slope.abs().max() < 1e-6


def test_memit_reaches_the_residual_where_nothing_else_counts(tensors):
    keys, residuals, covariance = tensors
    left, right = solve(MEMIT(1.0), keys, residuals, covariance * 1e-9)
    reached = keys.double() @ right.T @ left.T
    torch.testing.assert_close(reached, residuals.double(), rtol=1e-5, atol=1e-5)


def test_delman_of_one_batch_is_one_update_of_the_means(tensors):
    keys, residuals, covariance = (t.double() for t in tensors)
    left, right = solve(DELMAN(N, 1.0), *tensors)
    assert left.shape[1] == right.shape[0] == 1
    torch.testing.assert_close(left @ right, rank_one(keys.mean(0), residuals.mean(0), covariance))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_delman_is_its_batches_one_after_another(tensors, batch):
    keys, residuals, covariance = (t.double() for t in tensors)
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for start in range(0, N, batch):
        key = keys[start : start + batch].mean(0)
        missing = residuals[start : start + batch].mean(0) - delta @ key
        delta = delta + rank_one(key, missing, covariance)
    left, right = solve(DELMAN(batch, 1.0), *tensors)
    assert left.shape[1] == -(-N // batch)
    torch.testing.assert_close(left @ right, delta)


def test_one_request_is_the_same_for_all(tensors):
    keys, residuals, covariance = tensors
    single = keys[:1], residuals[:1], covariance
    left, right = solve(MEMIT(1.0), *single)
    delman_left, delman_right = solve(DELMAN(1, 1.0), *single)
    torch.testing.assert_close(left @ right, delman_left @ delman_right)


def test_methods_are_found_by_name_and_objects_are_handed_back():
    assert find_method("memit") is memit and find_method("delman") is delman
    assert find_method(memit) is memit
    assert all(METHODS[method.name] is method is find_method(method.name) for method in METHODS.values())
    with pytest.raises(
        ValueError, match=r"must be one of memit, delman, rome, .*, led or an object with name"
    ):
        find_method("serac")


@dataclass(frozen=True)
class Halved:
    """A method of somebody else's: a share of what MEMIT would write."""

    share: float = 0.5
    name: ClassVar[str] = "halved"
    paper: ClassVar[str] = "none"
    equation: ClassVar[str] = "share R^T K (lambda C + K^T K)^-1"

    def solve(self, groups, covariance):
        left, right, owners = MEMIT(10.0).solve(groups, covariance)
        return Factors(self.share * left, right, owners)


@pytest.mark.filterwarnings("ignore:this edit leaks", "ignore:less than 40% of the value")
def test_a_method_of_ones_own_is_used_and_its_fields_are_saved(tmp_path, monkeypatch):
    corpus = [CorpusText("the lamp is a thing"), CorpusText("make a lamp", "how do I make a brass lamp")]
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: corpus)
    model = tiny_model("llama", chat=True).to(torch.float32)
    requests, sites = [request("ring a bell now", "bell", id="bell")], [Site("resid_post", 1, "subject_last")]
    full, halved = (
        edit(
            model,
            requests,
            sites,
            method=method,
            contexts=lambda request: [request],
            contrast=None,
            names=None,
            fit=FitSettings(shared_num_grad_steps=2, v_num_grad_steps=2),
            corpus=corpus,
            cache=False,
            progress=False,
        )
        for method in (MEMIT(10.0), Halved())
    )
    torch.testing.assert_close(halved.deltas()[1], full.deltas()[1] / 2)
    loaded = Edit.load(halved.save(tmp_path / "edit.safetensors"), model)
    assert loaded.method == "halved" and loaded.settings["share"] == 0.5


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_method_is_refused():
    assert isinstance(Halved(), EditingMethod)
    for method in METHODS.values():
        assert isinstance(method, EditingMethod) != isinstance(method, TuningMethod), "one of the two kinds"
    for stranger in (MEMIT, ROME, object(), None, 7):
        with pytest.raises(ValueError, match="an object with name, paper, equation and solve"):
            find_method(stranger)


def test_memit_of_several_contexts_minimises_the_loss_over_all_of_them(tensors):
    groups, covariance = groups_of_several(), tensors[2].double()
    groups = [KeyGroup(g.owner, g.keys.double(), g.residual.double(), g.weight, g.harmless) for g in groups]
    left, right, _ = MEMIT(1.0).solve(groups, covariance)
    delta = (left @ right).requires_grad_()
    (slope,) = torch.autograd.grad(weighted_loss(delta, groups, covariance), delta)
    assert slope.abs().max() < 1e-6


def test_delman_solves_a_batch_and_its_harmless_uses_together(tensors):
    groups, covariance = groups_of_several(), tensors[2]
    left, right, owners = DELMAN(1, 1.0).solve(groups, covariance)
    assert owners == (frozenset([0]), frozenset([0]), frozenset([1]), frozenset([1]))
    alone = [group for group in groups if group.owner == 0]
    others = next(group.keys.double() for group in groups if group.owner == 1 and group.harmless)
    elsewhere = covariance + 2.0 / len(others) * others.T @ others
    first_left, first_right, _ = MEMIT(1.0).solve(alone, elsewhere)
    torch.testing.assert_close(left[:, :2] @ right[:2], first_left @ first_right)


@pytest.mark.parametrize("method", [MEMIT(1.0), DELMAN(1, 1.0), DELMAN(2, 1.0)], ids=["memit", "one", "two"])
def test_harmless_uses_take_less_of_the_change_when_they_are_given(tensors, method):
    harmful = [g for g in groups_of_several() if not g.harmless]
    harmless = [
        KeyGroup(g.owner, g.keys, torch.zeros(D_OUT), 100.0, True) for g in groups_of_several() if g.harmless
    ]
    keys = torch.cat([group.keys for group in harmless]).double()

    def leak(groups):
        left, right, _ = method.solve(groups, tensors[2])
        return float((keys @ right.T @ left.T).norm())

    assert leak([*harmful, *harmless]) < 0.3 * leak(harmful)


def test_ranks_know_their_requests():
    groups = [KeyGroup(i, torch.randn(1, D_IN), torch.randn(D_OUT)) for i in range(5)]
    covariance = torch.eye(D_IN)
    assert MEMIT().solve(groups, covariance).owners == tuple(frozenset([i]) for i in range(5))
    assert DELMAN(2).solve(groups, covariance).owners == (
        frozenset([0, 1]),
        frozenset([2, 3]),
        frozenset([4]),
    )


def test_the_covariance_is_weighted(tensors):
    keys, residuals, covariance = tensors
    for method in (MEMIT, DELMAN):
        left, right = solve(method(mom2_update_weight=4.0), keys, residuals, covariance)
        same_left, same_right = solve(method(mom2_update_weight=1.0), keys, residuals, 4.0 * covariance)
        torch.testing.assert_close(left @ right, same_left @ same_right)
