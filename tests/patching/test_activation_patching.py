"""The sweep equals one forward per cell: on every family, component, window, direction and severed graph."""

import weakref

import pytest
import torch
from helpers.patch_cases import (
    CELL_KINDS,
    KEEP,
    LAYERS,
    TOKENS,
    cells_of,
    grid,
    measure,
    run_sweep,
    sweep_inputs,
)
from helpers.reference_tracing import corrupted_run, one_forward_per_cell
from helpers.tiny_models import FAMILIES, SINGLE_PRECISION, plain_model, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from lens_defense.models import devices
from lens_defense.models.forward import forward
from lens_defense.models.growing_batch import batch_may_grow
from lens_defense.patching import activation_patching
from lens_defense.patching.pass_plan import block_passes
from lens_defense.patching.patch_cell import PatchCell, PatchPoint
from lens_defense.sites import EMBEDDING_HOOK


@torch.no_grad()
@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("noising", [False, True], ids=["denoising", "noising"])
@pytest.mark.parametrize("family", [*FAMILIES, *SINGLE_PRECISION, "opt", "mpt", "falcon", "falcon40"])
def test_sweep_equals_one_forward_per_cell(family, noising, kind):
    model, ids, embeddings = sweep_inputs(family)
    cells = cells_of(kind)
    expected = one_forward_per_cell(model, ids, embeddings, cells, measure, KEEP, noising=noising)
    metrics = run_sweep(model, ids, embeddings, cells, noising=noising)[..., 0]
    assert expected.std() > 0.01
    tolerance = 1e-4 if family in SINGLE_PRECISION else 1e-9
    torch.testing.assert_close(metrics, expected.double(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_everything_gives_the_clean_answer(family):
    model, ids, embeddings = sweep_inputs(family)
    clean = measure(forward(model, ids, logits_to_keep=KEEP).logits)[0, 0]
    corrupted = measure(corrupted_run(model, ids, embeddings, [], KEEP).logits)[:, 0]
    assert (corrupted - clean).abs().min() > 0.01
    all_tokens = [
        PatchCell(tuple(PatchPoint("resid_post", layer, t) for t in range(TOKENS))) for layer in range(LAYERS)
    ]
    metrics = run_sweep(model, ids, embeddings, all_tokens)
    torch.testing.assert_close(metrics, clean.expand(metrics.shape))
    without_noise = forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    metrics = run_sweep(model, ids, without_noise, grid("resid_post"))
    torch.testing.assert_close(metrics, clean.expand(metrics.shape))


@torch.no_grad()
def test_several_metrics_of_one_sweep():
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("mlp_out")

    def three_metrics(logits):
        return torch.cat([measure(logits), logits[:, 0, :2]], 1)

    metrics = run_sweep(model, ids, embeddings, cells, read=three_metrics)
    assert metrics.shape == (len(cells), 2, 3)
    torch.testing.assert_close(metrics[..., :1], run_sweep(model, ids, embeddings, cells))


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_the_size_of_passes_changes_nothing(max_rows):
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("resid_post") + grid("mlp_out", 3)
    whole = run_sweep(model, ids, embeddings, cells)
    torch.testing.assert_close(run_sweep(model, ids, embeddings, cells, max_rows=max_rows), whole)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_a_pass_changes_nothing(monkeypatch, family):
    model, ids, embeddings = sweep_inputs(family)
    cells = grid("resid_post") + grid("mlp_out", 3) + grid("z.1")
    passes, run_pass = [], activation_patching._patched_logits
    monkeypatch.setattr(
        activation_patching, "_patched_logits", lambda *arguments: passes.append(1) or run_pass(*arguments)
    )
    metrics = []
    for call in (0, 1000):
        monkeypatch.setattr(devices, "CPU_CALL_COST", devices.CPU_CALL_COST._replace(call=call))
        metrics.append(run_sweep(model, ids, embeddings, cells))
    torch.testing.assert_close(*metrics)
    assert len(passes) == 3 + 1


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
    run_pass = activation_patching._patched_logits

    def run_small_pass(model, ids, base, donor, cells_of_pass, keep):
        if 2 * len(cells_of_pass) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return run_pass(model, ids, base, donor, cells_of_pass, keep)

    monkeypatch.setattr(activation_patching, "_patched_logits", run_small_pass)
    if fits:
        torch.testing.assert_close(run_sweep(model, ids, embeddings, cells, max_rows=16), whole)
    else:
        with pytest.raises(MemoryError, match="lower max_bytes"):
            run_sweep(model, ids, embeddings, cells, max_rows=16)


@torch.no_grad()
def test_the_failed_pass_is_gone_before_its_halves(monkeypatch):
    model, ids, embeddings = sweep_inputs("llama")
    run_pass, references, alive = activation_patching._patched_logits, [], []

    def fail_once(*arguments):
        alive.append([reference() is not None for reference in references])
        tensor_of_pass = torch.zeros(8)
        references.append(weakref.ref(tensor_of_pass))
        if len(references) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return run_pass(*arguments)

    monkeypatch.setattr(activation_patching, "_patched_logits", fail_once)
    run_sweep(model, ids, embeddings, grid("resid_post"), max_rows=16)
    assert len(alive) > 2 and not any(map(any, alive))


@torch.no_grad()
def test_the_logits_of_a_pass_are_gone_before_the_next():
    """Also where a measure returns a view of them."""
    model, ids, embeddings = sweep_inputs("llama")
    references, alive = [], []

    def view(logits):
        alive.append([not reference.expired() for reference in references])
        references.append(StorageWeakRef(logits.untyped_storage()))
        return logits[:, 0, :1]

    run_sweep(model, ids, embeddings, grid("resid_post"), max_rows=2, read=view)
    assert len(alive) > 2 and not any(map(any, alive))


@torch.no_grad()
def test_one_cell_that_does_not_fit_is_not_tried_again(monkeypatch):
    calls = []

    def run_out_of_memory(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, ids, embeddings = sweep_inputs("llama")
    monkeypatch.setattr(activation_patching, "_patched_logits", run_out_of_memory)
    with pytest.raises(MemoryError, match="2 rows of 9 tokens do not fit into memory; lower max_bytes"):
        run_sweep(model, ids, embeddings, grid("resid_post")[:1])
    assert len(calls) == 1


@torch.no_grad()
def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    model, ids, embeddings = sweep_inputs("llama")
    monkeypatch.setattr(activation_patching, "_patched_logits", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_sweep(model, ids, embeddings, grid("mlp_out"))


@torch.no_grad()
def test_progress_counts_the_cost_announced():
    model, ids, embeddings = sweep_inputs("llama")
    cells = grid("resid_post") + grid("mlp_out")
    block_passes_done = []
    run_sweep(model, ids, embeddings, cells, progress=block_passes_done.append, max_rows=5)
    assert sum(block_passes_done) == block_passes(cells, layers=LAYERS, tokens=TOKENS, samples=2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "bloom", "bigcode", "falcon", "falcon40", "falcon-rw", "xglm"])
def test_a_patched_cell_equals_hooks_on_plain_transformers(family):
    model, ids, embeddings = sweep_inputs(family)
    position, layer = 3, 1
    cell = PatchCell((PatchPoint("resid_post", layer, position),))
    metrics = run_sweep(model, ids, embeddings, [cell])[0, :, 0]

    plain, states = plain_model(family), {}
    (blocks,) = (m for m in plain.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)

    def block_hook(write):
        def hook(_module, _arguments, output):
            state = write(output[0] if isinstance(output, tuple) else output)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return blocks[layer].register_forward_hook(hook)

    with block_hook(lambda state: states.setdefault("clean", state)):
        plain(ids)

    def restore(state):
        state = state.clone()
        state[:, position] = states["clean"][:, position]
        return state

    corrupt = plain.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
    with corrupt, block_hook(restore):
        logits = plain(ids.expand(len(embeddings), -1)).logits
    expected = measure(logits[:, -KEEP:])[:, 0].double()
    torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, grows", [("llama", True), ("mpt", True), ("opt", False), ("bloom", False), ("per layer", False)]
)
def test_where_a_batch_may_grow_is_measured(family, grows):
    assert batch_may_grow(tiny_model(family)) is grows


@torch.no_grad()
def test_blocks_that_read_the_embeddings_are_given_the_base_runs():
    model, ids, embeddings = sweep_inputs("per layer")
    cells = grid("resid_post")
    expected = one_forward_per_cell(model, ids, embeddings, cells, measure, KEEP)
    torch.testing.assert_close(run_sweep(model, ids, embeddings, cells)[..., 0], expected)
