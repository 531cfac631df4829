"""The sweep equals one forward a cell, on every family, component and window."""

import pytest
import torch
from oracles import corrupted_run, one_forward_a_cell
from tiny import FAMILIES, tiny

from lens_defense.patches import run
from lens_defense.sites import EMBEDDING
from lens_defense.sweeps import Cell, base_hooks, cost, donor_hooks, sweep

KEEP, LAYERS, TOKENS = 3, 4, 9
COMPONENTS = ("residual", "mlp", "attention")


def measure(logits):
    return logits.log_softmax(-1)[:, :, 7].sum(-1)


def grid(component, width=1):
    """All layers by all positions, in windows of some layers."""
    cells = []
    for position in range(TOKENS - KEEP + 1):
        for layer in range(LAYERS):
            low = max(0, layer - width // 2)
            window = range(low, min(LAYERS, layer + (width + 1) // 2))
            cells.append(Cell(position, tuple((component, at) for at in window)))
    return cells


def setting(family, samples=2):
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (1, TOKENS), generator=generator)
    clean = run(model, ids, names=[EMBEDDING]).states[EMBEDDING]
    embeddings = clean.repeat(samples, 1, 1)
    noise = torch.randn(samples, 2, 32, generator=generator, dtype=torch.float64)
    embeddings[:, 2:4] += noise
    return model, ids, embeddings


def swept(model, ids, embeddings, cells, **settings):
    base = corrupted_run(model, ids, embeddings, base_hooks(cells), KEEP)
    donor = run(model, ids, names=donor_hooks(cells), keep=KEEP)
    settings = {"max_rows": 1000, **settings}
    return sweep(model, ids, base, donor, cells, measure, keep=KEEP, **settings)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_equals_one_forward_a_cell(family):
    model, ids, embeddings = setting(family)
    cells = grid("residual") + [c for name in COMPONENTS[1:] for w in (1, 3) for c in grid(name, w)]
    slow = one_forward_a_cell(model, ids, embeddings, cells, measure, KEEP)
    fast = swept(model, ids, embeddings, cells)
    assert slow.std() > 0.01
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_chunk_size_changes_nothing(max_rows):
    model, ids, embeddings = setting("llama")
    cells = grid("residual") + grid("mlp", 3)
    whole = swept(model, ids, embeddings, cells)
    torch.testing.assert_close(swept(model, ids, embeddings, cells, max_rows=max_rows), whole)


@torch.no_grad()
def test_order_of_cells_changes_nothing():
    model, ids, embeddings = setting("gpt2")
    cells = grid("attention", 3) + grid("residual")
    torch.testing.assert_close(
        swept(model, ids, embeddings, cells[::-1]).flip(0), swept(model, ids, embeddings, cells)
    )


@torch.no_grad()
def test_progress_counts_the_cost_announced():
    model, ids, embeddings = setting("llama")
    cells = grid("residual") + grid("mlp")
    done = []
    swept(model, ids, embeddings, cells, progress=done.append, max_rows=5)
    assert sum(done) == cost(cells, layers=LAYERS, tokens=TOKENS, samples=2)


def test_cost_is_blocks_above_times_tokens_from_there():
    assert cost([Cell(3, (("residual", 1),))], layers=4, tokens=9, samples=5) == 6 * 2 * 5
    assert cost([Cell(3, (("mlp", 1), ("mlp", 2)))], layers=4, tokens=9, samples=5) == 6 * 3 * 5
