"""Losses behind a prefix cache equal one plain forward a row; the fit descends inside its ball."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

from lens_defense.editing.target_value import HARD_LOSS, FitSettings, _turns, fit_target_values
from lens_defense.editing.value_batch import (
    FitRow,
    make_batches,
    merge_batches,
    select_requests,
    token_losses,
)
from lens_defense.sites import component_hook

PLAN = {
    "shared_num_grad_steps": 6,
    "shared_lr": 0.5,
    "v_num_grad_steps": 6,
    "v_lr": 0.3,
    "clamp_norm_factor": 2.0,
}
PLAN |= {"kl_factor": 0.0, "contexts_per_step": 4, "min_share": 1.0, "extra_rounds": 0}
families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "neox", "mistral"])


def rows(n=6, *, like=False):
    """Ragged rows of one owner each: targets of two lengths, and essence prompts without."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())

    made = []
    for owner in range(n):
        length = 9 if like else 5 + 2 * owner
        target = () if owner % 3 == 2 else draw(3 + owner % 3)
        made.append(FitRow(owner, draw(length), length - 1 - owner % 5, target=target))
    return made


def plain(model, row, layer, vector):
    """The loss of one row by a whole forward of the model, without a cache and without padding."""

    def add(state, **_):
        state = state.clone()
        state[:, row.position] += vector.to(state.dtype)
        return state

    ids = torch.tensor([[*row.ids, *row.target[:-1]]])
    with model.hooks(fwd_hooks=[(component_hook("resid_post", layer), add)]):
        told = model(ids)[0].double().log_softmax(-1)
    if row.target:
        wanted = torch.tensor(row.target)[:, None]
        return -told[-len(row.target) :].gather(1, wanted).mean()
    before = model(ids)[0, -1].double().log_softmax(-1)
    return (told[-1].exp() * (told[-1] - before)).sum()


def told(model, some, layer, vectors, batch=4):
    """The losses of the fast way, by owner."""
    with torch.no_grad():
        parts = merge_batches(make_batches(model, some, layer, 2), batch)
    losses = torch.zeros(len(vectors))
    for part in parts:
        losses = losses.index_put(
            (part.owners,),
            token_losses(model, part, layer, vectors, torch.ones(len(part.ids))).mean(1).float(),
        )
    return losses


@torch.no_grad()
def test_the_rows_of_some_requests_say_what_they_said_among_all():
    model = tiny_model("llama").to(torch.float32)
    some = rows(like=True)
    vectors = vectors_for(model, len(some), scale=3.0)
    every = told(model, some, 1, vectors)
    parts = select_requests(make_batches(model, some, 1, 4), {1, 4})
    assert sorted(owner for part in parts for owner in part.owners.tolist()) == [1, 4]
    for part in parts:
        again = token_losses(model, part, 1, vectors, torch.ones(len(part.ids))).mean(1)
        torch.testing.assert_close(again, every[part.owners], rtol=1e-5, atol=1e-6)
    assert not select_requests(parts, {0})


def vectors_for(model, n, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(n, model.cfg.d_model, generator=generator)


@torch.no_grad()
@families
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_losses_are_those_of_plain_forwards(family, layer):
    model = tiny_model(family).to(torch.float32)
    some = rows()
    vectors = vectors_for(model, len(some), scale=3.0)
    slow = torch.stack([plain(model, r, layer, v) for r, v in zip(some, vectors, strict=True)])
    assert slow[5] > 0.01
    torch.testing.assert_close(told(model, some, layer, vectors).double(), slow, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_alike_beyond_the_edited_token():
    model = tiny_model("llama").to(torch.float32)
    made = [FitRow(i, (5, 9, 120, 33, 7, 41, end), 3, target=(8, 12)) for i, end in enumerate((60, 61))]
    vectors = vectors_for(model, 2, scale=3.0)
    slow = torch.stack([plain(model, row, 1, v) for row, v in zip(made, vectors, strict=True)])
    torch.testing.assert_close(told(model, made, 1, vectors).double(), slow, rtol=1e-4, atol=1e-5)


@families
def test_gradients_are_finite_differences(family):
    model, layer, some = tiny_model(family), 1, rows(like=True)
    vectors = vectors_for(model, len(some)).double().requires_grad_()
    (slope,) = torch.autograd.grad(told(model, some, layer, vectors, batch=2).sum(), vectors)
    way = vectors_for(model, 2 * len(some))[len(some) :].double()
    with torch.no_grad():
        for row, vector, along, got in zip(some, vectors, way, slope, strict=True):
            up, down = (plain(model, row, layer, vector + e * along) for e in (3e-3, -3e-3))
            assert float(got @ along) == pytest.approx(float(up - down) / 6e-3, rel=5e-3, abs=1e-3)


def asked():
    """Three requests of two contexts each."""
    made = [row for row in rows(9) if row.target]
    target = made[0].target
    return [FitRow(i // 2, row.ids, row.position, i % 2, target) for i, row in enumerate(made)]


def fit(model, some, layer=1, **changes):
    return fit_target_values(model, some, layer, FitSettings(**{**PLAN, **changes}))


def mean_loss(model, some, vectors, layer=1):
    with torch.no_grad():
        each = [float(plain(model, row, layer, vectors[row.owner])) for row in some]
    return sum(each) / len(each)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fit_descends_and_leaves_the_model_alone(family):
    model, some, seen = tiny_model(family).to(torch.float32), asked(), []
    held = copy_weights(model)
    vectors, losses = fit_target_values(model, some, 1, FitSettings(**PLAN), progress=seen.append)
    assert vectors.shape == (3, 32) and losses.shape == (3,)
    start, end = mean_loss(model, some, torch.zeros(3, 32)), mean_loss(model, some, vectors)
    assert end < start - 0.2
    first = [row for row in some if row.turn == 0]
    assert seen[0] == pytest.approx(mean_loss(model, first, torch.zeros(3, 32)), rel=1e-4)
    assert len(seen) == 12
    assert end < float(losses.mean()) < start
    assert weights_equal(model, held)
    assert all(p.requires_grad and p.grad is None for p in model.original_model.parameters())
    assert not any("forward" in vars(block) for block in model.blocks)


def test_the_clamp_is_respected():
    model, some = tiny_model("llama").to(torch.float32), asked()
    states = {}
    hook = component_hook("resid_post", 1)
    for row in some:
        _, cache = model.run_with_cache(torch.tensor([row.ids]), names_filter=hook)
        states.setdefault(row.owner, []).append(cache[hook][0, row.position].norm())
    limits = 0.1 * torch.stack([torch.stack(norms).mean() for _, norms in sorted(states.items())])
    vectors, _ = fit(model, some, clamp_norm_factor=0.1)
    torch.testing.assert_close(vectors.norm(dim=1), limits, rtol=1e-4, atol=0)


def test_shared_steps_alone_give_one_vector_and_steps_part_them():
    model, some = tiny_model("llama").to(torch.float32), asked()
    shared, losses = fit(model, some, v_num_grad_steps=0, clamp_norm_factor=100.0)
    assert shared.norm() > 0.1
    assert torch.equal(shared, shared[:1].expand(3, -1))
    assert losses.min() > 0, "losses of nought would claim a perfect fit"
    parted, _ = fit(model, some, clamp_norm_factor=100.0)
    assert torch.pdist(parted).min() > 0.1


def test_the_first_step_goes_against_the_mean_gradient():
    model, some = tiny_model("llama").to(torch.float32), asked()
    stepped, _ = fit(model, some, shared_num_grad_steps=0, v_num_grad_steps=1, clamp_norm_factor=100.0)
    start = torch.zeros(3, 32, requires_grad=True)
    sum(plain(model, row, 1, start[row.owner]) for row in some).backward()
    assert torch.equal(stepped.sign(), -start.grad.sign())
    torch.testing.assert_close(stepped.abs(), torch.full((3, 32), 0.3 * 1.05), rtol=1e-2, atol=0)


def test_kl_holds_the_essence():
    model = tiny_model("llama").to(torch.float32)
    essence = [FitRow(i, (40 + i, 7, 9), 0) for i in range(3)]
    free, held = (fit(model, asked() + essence, kl_factor=w)[0] for w in (0.0, 20.0))
    assert mean_loss(model, essence, held) < 0.3 * mean_loss(model, essence, free)


def test_contexts_take_turns():
    model, some, seen = tiny_model("llama").to(torch.float32), asked(), []
    plan = FitSettings(**{**PLAN, "contexts_per_step": 1, "shared_lr": 1e-9, "v_lr": 1e-9})
    fit_target_values(model, some, 1, plan, progress=seen.append)
    zeros = torch.zeros(3, 32)
    turns = [mean_loss(model, [r for r in some if r.turn == turn], zeros) for turn in (0, 1)]
    assert seen == pytest.approx(turns * 6, rel=1e-4)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_the_request_as_asked_is_in_every_second_step_and_the_others_take_turns(at_once):
    turns = _turns(6, at_once)
    assert {context for turn in turns for context in turn} == set(range(6))
    assert all(len(turn) <= at_once for turn in turns)
    others = [context for turn in turns for context in turn if context]
    assert len(others) == len(set(others))
    if at_once > 1:
        assert [turn.count(0) for turn in turns] == [1 - i % 2 for i in range(len(turns))]


def test_hard_requests_get_the_steps_again_by_themselves():
    model, some = tiny_model("llama").to(torch.float32), asked()
    owners = {row.owner for row in some}
    once, again = [], []
    first, losses = fit_target_values(model, some, 1, FitSettings(**PLAN), progress=once.append)
    hard = [owner for owner in owners if losses[owner] > HARD_LOSS]
    assert hard, "a tiny model's targets are hard"
    plan = FitSettings(**{**PLAN, "extra_rounds": 1})
    more, after = fit_target_values(model, some, 1, plan, progress=again.append)
    assert len(again) == len(once) + PLAN["v_num_grad_steps"] // 2
    for owner in owners:
        if owner in hard:
            assert after[owner] < losses[owner]
        else:
            torch.testing.assert_close(more[owner], first[owner])
