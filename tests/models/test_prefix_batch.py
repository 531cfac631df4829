"""A batch behind a shared prefix gives each row the states of a plain run of that row alone."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, PADDING_COUNTS, SINGLE_PRECISION, tiny_model

from lens_defense.models.forward import forward
from lens_defense.models.prefix_batch import left_pad, run_shared_prefix, states_of_rows
from lens_defense.sites import component_hook, key_hook

SHARED = (5, 9, 120, 33)
RAGGED = [SHARED + tail for tail in [(7, 8, 41), (99,), (41, 7, 250, 3, 17, 60, 61), (7, 8), (200, 14)]]
HOOKS = [key_hook(1), component_hook("resid_post", 1)]
cases = pytest.mark.parametrize(
    "rows",
    [RAGGED, [(7, 8), (9, 8, 7)], [SHARED] * 3, [SHARED, SHARED[:2]], [(7,), (7, 9)]],
    ids=["ragged", "nothing shared", "the same", "one inside the other", "one token"],
)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *PADDING_COUNTS])
@pytest.mark.parametrize("stop", [2, None])
def test_states_are_those_of_plain_runs(family, stop):
    model = tiny_model(family)
    states = states_of_rows(model, RAGGED, HOOKS, stop_at_layer=stop)
    for i, row in enumerate(RAGGED):
        alone = forward(model, torch.tensor([row]), capture=HOOKS).states
        for hook in HOOKS:
            error = 1e-5 if family in SINGLE_PRECISION else 1e-9
            torch.testing.assert_close(states[hook][i], alone[hook][0], rtol=error, atol=error)


@torch.no_grad()
@cases
def test_any_shared_prefix(rows):
    model = tiny_model("llama")
    shared = run_shared_prefix(model, rows)
    assert len(shared.ids) < min(map(len, rows))
    assert all(row[: len(shared.ids)] == shared.ids for row in rows)
    states = states_of_rows(model, rows, HOOKS)
    for i, row in enumerate(rows):
        alone = forward(model, torch.tensor([row]), capture=HOOKS).states
        torch.testing.assert_close(states[HOOKS[0]][i], alone[HOOKS[0]][0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_blocks_from_stop_on_do_not_run():
    model, layers = tiny_model("gpt2"), []
    hooks = [(component_hook("resid_post", i), lambda _state, i=i, **_: layers.append(i)) for i in range(4)]
    with model.hooks(fwd_hooks=hooks):
        run = forward(model, torch.tensor([SHARED]), stop_at_layer=2)
    assert set(layers) == {0, 1}
    assert run.logits.shape[1] == 0
    assert len(run.key_values) == 2


def test_padding_stands_on_the_left():
    ids, mask = left_pad([[7, 8], [9, 8, 7]])
    assert ids.tolist() == [[0, 7, 8], [9, 8, 7]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
