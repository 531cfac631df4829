"""A batch behind a shared prefix tells each row what a plain run of that row alone tells."""

import pytest
import torch
from tiny import FAMILIES, tiny

from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.models.prefix_batch import left_pad, run_shared_prefix, state_reader, states_of_rows
from lens_defense.sites import component_hook, key_hook

SHARED = (5, 9, 120, 33)
RAGGED = [SHARED + tail for tail in [(7, 8, 41), (99,), (41, 7, 250, 3, 17, 60, 61), (7, 8), (200, 14)]]
NAMES = [key_hook(1), component_hook("resid_post", 1)]
cases = pytest.mark.parametrize(
    "rows",
    [RAGGED, [(7, 8), (9, 8, 7)], [SHARED] * 3, [SHARED, SHARED[:2]], [(7,), (7, 9)]],
    ids=["ragged", "nothing shared", "the same", "one inside the other", "one token"],
)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop", [2, None])
def test_states_are_those_of_plain_runs(family, stop):
    model = tiny(family)
    told = states_of_rows(model, RAGGED, NAMES, stop=stop)
    for i, row in enumerate(RAGGED):
        alone = forward(model, torch.tensor([row]), names=NAMES).states
        for name in NAMES:
            torch.testing.assert_close(told[name][i], alone[name][0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@cases
def test_any_shared_prefix(rows):
    model = tiny("llama")
    shared = run_shared_prefix(model, rows)
    assert len(shared.ids) < min(map(len, rows))
    assert all(row[: len(shared.ids)] == shared.ids for row in rows)
    told = states_of_rows(model, rows, NAMES)
    for i, row in enumerate(rows):
        alone = forward(model, torch.tensor([row]), names=NAMES).states
        torch.testing.assert_close(told[NAMES[0]][i], alone[NAMES[0]][0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_blocks_from_stop_on_do_not_run():
    model, ran = tiny("gpt2"), []
    hooks = [(component_hook("resid_post", i), lambda _state, i=i, **_: ran.append(i)) for i in range(4)]
    with model.hooks(fwd_hooks=hooks):
        told = forward(model, torch.tensor([SHARED]), stop=2)
    assert set(ran) == {0, 1}
    assert told.logits.shape[1] == 0
    assert len(told.cache) == 2


def test_padding_stands_on_the_left():
    ids, mask = left_pad([[7, 8], [9, 8, 7]])
    assert ids.tolist() == [[0, 7, 8], [9, 8, 7]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("low", [0, 1, 2])
@cases
def test_a_reader_sees_blocks_that_changed(family, low, rows):
    model = tiny(family)
    names = [key_hook(2), component_hook("resid_post", 3)]
    read = state_reader(model, rows, low=low, stop=4)
    for scale in (1.0, 3.0):
        mlp_output_matrix(model, low).mul_(scale)
        told = read(names)
        for i, row in enumerate(rows):
            alone = forward(model, torch.tensor([row]), names=names).states
            for name in names:
                torch.testing.assert_close(told[name][i], alone[name][0], rtol=1e-9, atol=1e-9)
