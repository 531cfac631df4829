"""The sweep equals one forward a cell: on every family, component, window, direction and severed graph."""

import itertools
import weakref

import pytest
import torch
from helpers.patch_cases import CELL_KINDS, KEEP, cells_of, grid, measure, run_sweep, sweep_inputs
from helpers.reference_tracing import corrupted_run, one_forward_per_cell
from helpers.tiny_models import FAMILIES, SINGLE_PRECISION
from torch.multiprocessing.reductions import StorageWeakRef

from lens_defense.models import devices
from lens_defense.models.forward import forward
from lens_defense.sites import EMBEDDING_HOOK
from lens_defense.tracing import activation_patching as sweeps
from lens_defense.tracing.activation_patching import (
    PatchCell,
    PatchPoint,
    block_passes,
    time_in_tokens,
)


@torch.no_grad()
@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("noising", [False, True], ids=["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES + SINGLE_PRECISION)
def test_sweep_equals_one_forward_a_cell(family, noising, kind):
    model, ids, embeddings = sweep_inputs(family)
    cells = cells_of(kind)
    slow = one_forward_per_cell(model, ids, embeddings, cells, measure, KEEP, noising=noising)
    fast = run_sweep(model, ids, embeddings, cells, noising=noising)[..., 0]
    assert slow.std() > 0.01
    close = 1e-5 if family in SINGLE_PRECISION else 1e-9
    torch.testing.assert_close(fast, slow, rtol=close, atol=close)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_everything_gives_the_clean_answer(family):
    model, ids, embeddings = sweep_inputs(family)
    clean = measure(forward(model, ids, logits_to_keep=KEEP).logits)[0, 0]
    spoiled = measure(corrupted_run(model, ids, embeddings, [], KEEP).logits)[:, 0]
    assert (spoiled - clean).abs().min() > 0.01
    all_tokens = [
        PatchCell(tuple(PatchPoint("resid_post", layer, t) for t in range(TOKENS))) for layer in range(LAYERS)
    ]
    told = run_sweep(model, ids, embeddings, all_tokens)
    torch.testing.assert_close(told, clean.expand(told.shape))
    without_noise = forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    told = run_sweep(model, ids, without_noise, grid("resid_post"))
    torch.testing.assert_close(told, clean.expand(told.shape))


@torch.no_grad()
def test_several_readings_of_one_sweep():
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("mlp_out")

    def both(logits):
        return torch.cat([measure(logits), logits[:, 0, :2]], 1)

    told = run_sweep(model, ids, embeddings, cells, read=both)
    assert told.shape == (len(cells), 2, 3)
    torch.testing.assert_close(told[..., :1], run_sweep(model, ids, embeddings, cells))


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_chunk_size_changes_nothing(max_rows):
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("resid_post") + grid("mlp_out", 3)
    whole = run_sweep(model, ids, embeddings, cells)
    torch.testing.assert_close(run_sweep(model, ids, embeddings, cells, max_rows=max_rows), whole)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_a_pass_changes_nothing(monkeypatch, family):
    model, ids, embeddings = sweep_inputs(family)
    cells = grid("resid_post") + grid("mlp_out", 3) + grid("z.1")
    passes, grown = [], sweeps._grown
    monkeypatch.setattr(sweeps, "_grown", lambda *given: passes.append(1) or grown(*given))
    told = []
    for call in (0, 1000):
        monkeypatch.setattr(devices, "CPU_CALL_COST", devices.CPU_CALL_COST._replace(call=call))
        told.append(run_sweep(model, ids, embeddings, cells))
    torch.testing.assert_close(*told)
    assert len(passes) == 3 + 1


@pytest.mark.parametrize("call", [0, 2, 20, 60, 1000])
@pytest.mark.parametrize(
    "samples, max_rows, most", [(1, 1000, 9999), (3, 1000, 9999), (3, 40, 9999), (3, 99, 90)]
)
def test_positions_share_passes_where_that_is_cheapest(call, samples, max_rows, most):
    """Against every way to cut the positions into neighbours."""
    places = itertools.product(range(LAYERS), range(TOKENS))
    cells = [PatchCell((PatchPoint("mlp_out", layer, t),)) for layer, t in places if (layer + t) % 4]

    def price(part):
        rows = samples * sum(LAYERS - cells[i].birth[0] for i in part) + LAYERS
        return (TOKENS - min(cells[i].position for i in part)) * rows + call * LAYERS

    def parts(cut):
        ends = [t + 1 for t, stops in enumerate(cut) if stops] + [TOKENS]
        starts = [0, *ends[:-1]]
        return [
            [i for i, cell in enumerate(cells) if start <= cell.position < end]
            for start, end in zip(starts, ends, strict=True)
        ]

    ways = [parts(cut) for cut in itertools.product((False, True), repeat=TOKENS - 1)]

    def fits(part):
        first = min(cells[i].position for i in part)
        alone = all(cells[i].position == first for i in part)
        rows = len(part) * samples
        return alone or (rows <= max_rows and rows * (TOKENS - first) <= most)

    allowed = [way for way in ways if all(map(fits, way))]
    told = list(sweeps._passes(cells, LAYERS, TOKENS, samples, max_rows, devices.CallCost(call, most)))
    assert sorted(i for part in told for i in part) == list(range(len(cells)))
    assert sum(map(price, told)) == min(sum(map(price, way)) for way in allowed)
    size = {"layers": LAYERS, "tokens": TOKENS, "samples": samples, "max_rows": max_rows}
    assert time_in_tokens(cells, **size, price=devices.CallCost(call, most)) == sum(map(price, told))
    assert all([cells[i].birth for i in part] == sorted(cells[i].birth for i in part) for part in told)


@torch.no_grad()
def test_order_of_cells_changes_nothing():
    model, ids, embeddings = sweep_inputs("gpt2")
    cells = grid("attn_out", 3) + grid("resid_post")
    torch.testing.assert_close(
        run_sweep(model, ids, embeddings, cells[::-1]).flip(0), run_sweep(model, ids, embeddings, cells)
    )


@torch.no_grad()
@pytest.mark.parametrize("limit, fits", [(8, True), (2, False)])
def test_a_pass_that_does_not_fit_is_halved_once(monkeypatch, limit, fits):
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("resid_post")
    whole = run_sweep(model, ids, embeddings, cells, max_rows=16)
    grown = sweeps._grown

    def small(model, ids, base, donor, group, keep):
        if 2 * len(group) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return grown(model, ids, base, donor, group, keep)

    monkeypatch.setattr(sweeps, "_grown", small)
    if fits:
        torch.testing.assert_close(run_sweep(model, ids, embeddings, cells, max_rows=16), whole)
    else:
        with pytest.raises(MemoryError, match="lower max_bytes"):
            run_sweep(model, ids, embeddings, cells, max_rows=16)


@torch.no_grad()
def test_the_failed_pass_is_gone_before_its_halves(monkeypatch):
    model, ids, embeddings = sweep_inputs("llama")
    grown, held, alive = sweeps._grown, [], []

    def greedy(*given):
        alive.append([one() is not None for one in held])
        big = torch.zeros(8)
        held.append(weakref.ref(big))
        if len(held) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return grown(*given)

    monkeypatch.setattr(sweeps, "_grown", greedy)
    run_sweep(model, ids, embeddings, grid("resid_post"), max_rows=16)
    assert len(alive) > 2 and not any(map(any, alive))


@torch.no_grad()
def test_the_logits_of_a_pass_are_gone_before_the_next():
    """Also where a measure returns a view of them."""
    model, ids, embeddings = sweep_inputs("llama")
    held, alive = [], []

    def view(logits):
        alive.append([not one.expired() for one in held])
        held.append(StorageWeakRef(logits.untyped_storage()))
        return logits[:, 0, :1]

    run_sweep(model, ids, embeddings, grid("resid_post"), max_rows=2, read=view)
    assert len(alive) > 2 and not any(map(any, alive))


@torch.no_grad()
def test_one_cell_that_does_not_fit_is_not_tried_again(monkeypatch):
    tried = []

    def full(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, ids, embeddings = sweep_inputs("llama")
    monkeypatch.setattr(sweeps, "_grown", full)
    with pytest.raises(MemoryError, match="2 rows of 9 tokens do not fit into memory; lower max_bytes"):
        run_sweep(model, ids, embeddings, grid("resid_post")[:1])
    assert len(tried) == 1


@torch.no_grad()
def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    model, ids, embeddings = sweep_inputs("llama")
    monkeypatch.setattr(sweeps, "_grown", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_sweep(model, ids, embeddings, grid("mlp_out"))


@torch.no_grad()
def test_progress_counts_the_cost_announced():
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("resid_post") + grid("mlp_out")
    done = []
    run_sweep(model, ids, embeddings, cells, progress=done.append, max_rows=5)
    assert sum(done) == block_passes(cells, layers=LAYERS, tokens=TOKENS, samples=2)


def test_cost_is_blocks_above_times_tokens_from_there():
    assert (
        block_passes([PatchCell((PatchPoint("resid_post", 1, 3),))], layers=4, tokens=9, samples=5)
        == 6 * 2 * 5
    )
    window = PatchCell((PatchPoint("mlp_out", 1, 3), PatchPoint("mlp_out", 2, 3)))
    assert block_passes([window], layers=4, tokens=9, samples=5) == 6 * 3 * 5
