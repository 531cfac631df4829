"""Losses behind a prefix cache equal one plain forward per row; the fit descends inside its ball."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

from lens_defense.editing.solving.target_value import HARD_LOSS, FitSettings, _turns, fit_target_values
from lens_defense.editing.solving.value_batch import (
    FitRow,
    make_batches,
    merge_batches,
    select_requests,
    token_losses,
)
from lens_defense.sites import component_hook

FIT = {
    "shared_num_grad_steps": 6,
    "shared_lr": 0.5,
    "v_num_grad_steps": 6,
    "v_lr": 0.3,
    "clamp_norm_factor": 2.0,
}
FIT |= {"kl_factor": 0.0, "contexts_per_step": 4, "min_share": 1.0, "extra_rounds": 0}
families = pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen3", "neox", "mistral", "gptj", "bloom", "mpt", "neo", "short mistral"]
)


def rows(n=6, *, like=False):
    """Ragged rows of one owner each: targets of two lengths, and essence prompts without."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return tuple(torch.randint(3, 300, (count,), generator=generator).tolist())

    fit_rows = []
    for owner in range(n):
        length = 9 if like else 5 + 2 * owner
        target = () if owner % 3 == 2 else draw(3 + owner % 3)
        fit_rows.append(FitRow(owner, draw(length), length - 1 - owner % 5, target=target))
    return fit_rows


def plain(model, row, layer, vector):
    """The loss of one row by a whole forward of the model, without a cache and without padding."""

    def add(state, **_):
        state = state.clone()
        state[:, row.position] += vector.to(state.dtype)
        return state

    ids = torch.tensor([[*row.ids, *row.target[:-1]]])
    with model.hooks(fwd_hooks=[(component_hook("resid_post", layer), add)]):
        log_probs = model(ids)[0].double().log_softmax(-1)
    if row.target:
        target = torch.tensor(row.target)[:, None]
        return -log_probs[-len(row.target) :].gather(1, target).mean()
    clean = model(ids)[0, -1].double().log_softmax(-1)
    return (log_probs[-1].exp() * (log_probs[-1] - clean)).sum()


def losses_of(model, fit_rows, layer, vectors, batch_size=4):
    """The losses of the fast way, by owner."""
    with torch.no_grad():
        batches = merge_batches(model, make_batches(model, fit_rows, layer, 2), batch_size)
    losses = torch.zeros(len(vectors))
    for batch in batches:
        losses = losses.index_put(
            (batch.owners,),
            token_losses(model, batch, layer, vectors, torch.ones(len(batch.ids))).mean(1).float(),
        )
    return losses


@torch.no_grad()
def test_the_rows_of_some_requests_say_what_they_said_among_all():
    model = tiny_model("llama").to(torch.float32)
    fit_rows = rows(like=True)
    vectors = vectors_for(model, len(fit_rows), scale=3.0)
    all_losses = losses_of(model, fit_rows, 1, vectors)
    batches = select_requests(make_batches(model, fit_rows, 1, 4), {1, 4})
    assert sorted(owner for batch in batches for owner in batch.owners.tolist()) == [1, 4]
    for batch in batches:
        losses = token_losses(model, batch, 1, vectors, torch.ones(len(batch.ids))).mean(1)
        torch.testing.assert_close(losses, all_losses[batch.owners], rtol=1e-5, atol=1e-6)
    assert not select_requests(batches, {0})


def vectors_for(model, n, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(n, model.cfg.d_model, generator=generator)


@torch.no_grad()
@families
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_losses_are_those_of_plain_forwards(family, layer):
    model = tiny_model(family).to(torch.float32)
    fit_rows = rows()
    vectors = vectors_for(model, len(fit_rows), scale=3.0)
    slow = torch.stack([plain(model, r, layer, v) for r, v in zip(fit_rows, vectors, strict=True)])
    assert slow[5] > 0.01
    torch.testing.assert_close(
        losses_of(model, fit_rows, layer, vectors).double(), slow, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_rows_that_are_alike_beyond_the_edited_token():
    model = tiny_model("llama").to(torch.float32)
    fit_rows = [FitRow(i, (5, 9, 120, 33, 7, 41, end), 3, target=(8, 12)) for i, end in enumerate((60, 61))]
    vectors = vectors_for(model, 2, scale=3.0)
    slow = torch.stack([plain(model, row, 1, v) for row, v in zip(fit_rows, vectors, strict=True)])
    torch.testing.assert_close(losses_of(model, fit_rows, 1, vectors).double(), slow, rtol=1e-4, atol=1e-5)


@families
def test_gradients_are_finite_differences(family):
    model, layer, fit_rows = tiny_model(family), 1, rows(like=True)
    vectors = vectors_for(model, len(fit_rows)).double().requires_grad_()
    (slope,) = torch.autograd.grad(losses_of(model, fit_rows, layer, vectors, batch_size=2).sum(), vectors)
    directions = vectors_for(model, 2 * len(fit_rows))[len(fit_rows) :].double()
    with torch.no_grad():
        for row, vector, direction, gradient in zip(fit_rows, vectors, directions, slope, strict=True):
            up, down = (plain(model, row, layer, vector + step * direction) for step in (3e-3, -3e-3))
            assert float(gradient @ direction) == pytest.approx(float(up - down) / 6e-3, rel=5e-3, abs=1e-3)


def two_contexts_each():
    """Three requests of two contexts each."""
    fit_rows = [row for row in rows(9) if row.target]
    target = fit_rows[0].target
    return [FitRow(i // 2, row.ids, row.position, i % 2, target) for i, row in enumerate(fit_rows)]


def fit(model, fit_rows, layer=1, **changes):
    return fit_target_values(model, fit_rows, layer, FitSettings(**{**FIT, **changes}))


def mean_loss(model, fit_rows, vectors, layer=1):
    with torch.no_grad():
        losses = [float(plain(model, row, layer, vectors[row.owner])) for row in fit_rows]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fit_descends_and_leaves_the_model_alone(family):
    model, fit_rows, step_losses = tiny_model(family).to(torch.float32), two_contexts_each(), []
    original_weights = copy_weights(model)
    vectors, losses = fit_target_values(model, fit_rows, 1, FitSettings(**FIT), progress=step_losses.append)
    assert vectors.shape == (3, 32) and losses.shape == (3,)
    start, end = mean_loss(model, fit_rows, torch.zeros(3, 32)), mean_loss(model, fit_rows, vectors)
    assert end < start - 0.2
    first_context = [row for row in fit_rows if row.turn == 0]
    assert step_losses[0] == pytest.approx(mean_loss(model, first_context, torch.zeros(3, 32)), rel=1e-4)
    assert len(step_losses) == 12
    assert end < float(losses.mean()) < start
    assert weights_equal(model, original_weights)
    assert all(p.requires_grad and p.grad is None for p in model.original_model.parameters())
    assert not any("forward" in vars(block) for block in model.blocks)


def test_the_clamp_is_respected():
    model, fit_rows = tiny_model("llama").to(torch.float32), two_contexts_each()
    states = {}
    hook = component_hook("resid_post", 1)
    for row in fit_rows:
        _, cache = model.run_with_cache(torch.tensor([row.ids]), names_filter=hook)
        states.setdefault(row.owner, []).append(cache[hook][0, row.position].norm())
    limits = 0.1 * torch.stack([torch.stack(norms).mean() for _, norms in sorted(states.items())])
    vectors, _ = fit(model, fit_rows, clamp_norm_factor=0.1)
    torch.testing.assert_close(vectors.norm(dim=1), limits, rtol=1e-4, atol=0)


def test_shared_steps_alone_give_one_vector_and_steps_separate_them():
    model, fit_rows = tiny_model("llama").to(torch.float32), two_contexts_each()
    shared, losses = fit(model, fit_rows, v_num_grad_steps=0, clamp_norm_factor=100.0)
    assert shared.norm() > 0.1
    assert torch.equal(shared, shared[:1].expand(3, -1))
    assert losses.min() > 0, "losses of 0 would claim a perfect fit"
    separate, _ = fit(model, fit_rows, clamp_norm_factor=100.0)
    assert torch.pdist(separate).min() > 0.1


def test_the_first_step_goes_against_the_mean_gradient():
    model, fit_rows = tiny_model("llama").to(torch.float32), two_contexts_each()
    stepped, _ = fit(model, fit_rows, shared_num_grad_steps=0, v_num_grad_steps=1, clamp_norm_factor=100.0)
    start = torch.zeros(3, 32, requires_grad=True)
    sum(plain(model, row, 1, start[row.owner]) for row in fit_rows).backward()
    assert torch.equal(stepped.sign(), -start.grad.sign())
    torch.testing.assert_close(stepped.abs(), torch.full((3, 32), 0.3 * 1.05), rtol=1e-2, atol=0)


def test_kl_holds_the_essence():
    model = tiny_model("llama").to(torch.float32)
    essence = [FitRow(i, (40 + i, 7, 9), 0) for i in range(3)]
    free, constrained = (fit(model, two_contexts_each() + essence, kl_factor=w)[0] for w in (0.0, 20.0))
    assert mean_loss(model, essence, constrained) < 0.3 * mean_loss(model, essence, free)


def test_contexts_take_turns():
    model, fit_rows, step_losses = tiny_model("llama").to(torch.float32), two_contexts_each(), []
    settings = FitSettings(**{**FIT, "contexts_per_step": 1, "shared_lr": 1e-9, "v_lr": 1e-9})
    fit_target_values(model, fit_rows, 1, settings, progress=step_losses.append)
    zeros = torch.zeros(3, 32)
    turns = [mean_loss(model, [r for r in fit_rows if r.turn == turn], zeros) for turn in (0, 1)]
    assert step_losses == pytest.approx(turns * 6, rel=1e-4)


@pytest.mark.parametrize("per_step", [1, 2, 3, 9])
def test_the_request_as_asked_is_in_every_second_step_and_the_others_take_turns(per_step):
    turns = _turns(6, per_step)
    assert {context for turn in turns for context in turn} == set(range(6))
    assert all(len(turn) <= per_step for turn in turns)
    others = [context for turn in turns for context in turn if context]
    assert len(others) == len(set(others))
    if per_step > 1:
        assert [turn.count(0) for turn in turns] == [1 - i % 2 for i in range(len(turns))]


def test_hard_requests_get_the_steps_again_by_themselves():
    model, fit_rows = tiny_model("llama").to(torch.float32), two_contexts_each()
    owners = {row.owner for row in fit_rows}
    step_losses, more_step_losses = [], []
    first, losses = fit_target_values(model, fit_rows, 1, FitSettings(**FIT), progress=step_losses.append)
    hard = [owner for owner in owners if losses[owner] > HARD_LOSS]
    assert hard, "a tiny model's targets are hard"
    settings = FitSettings(**{**FIT, "extra_rounds": 1})
    more, more_losses = fit_target_values(model, fit_rows, 1, settings, progress=more_step_losses.append)
    assert len(more_step_losses) == len(step_losses) + FIT["v_num_grad_steps"] // 2
    for owner in owners:
        if owner in hard:
            assert more_losses[owner] < losses[owner]
        else:
            torch.testing.assert_close(more[owner], first[owner])
