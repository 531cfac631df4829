"""Activation patching, exactly: every cell of a map, measured in a few passes of growing batches.

1. A patch in layer l at position t changes nothing below l and nothing before t, so one pass per position is
   enough: it runs the tokens from t on, behind the base run's keys and values of the tokens before.
2. In that pass the batch grows: the rows of a cell (one per sample) enter at the layer of its first point,
   with the state that the base run had there.
3. So the lowest blocks run one row, the highest run all rows, and nothing below a patch is computed twice.

`pass_plan` decides which cells share a pass. The result equals one forward pass per cell. Where a family's
batch may not grow, all rows run from the first block on, and are made the base run's where they would enter.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import call_cost, explain_out_of_memory, index_tensor
from lens_defense.models.forward import ForwardPass, KeyValues, StateWrite, forward
from lens_defense.models.growing_batch import batch_may_grow
from lens_defense.patching.metrics import Measure
from lens_defense.patching.pass_plan import block_passes, plan_passes
from lens_defense.patching.patch_cell import PatchCell, PatchPoint
from lens_defense.sites import EMBEDDING_HOOK, head_index

WatchPasses = Callable[[Sequence[int], Float[Tensor, "cell sample metric"]], object]
"""Is called with the cells of a pass, as indices, and with their metrics on the CPU, in float64."""


def sweep(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    base: ForwardPass,
    donor: ForwardPass,
    cells: Sequence[PatchCell],
    measure: Measure,
    *,
    keep: int,
    max_rows: int,
    progress: Callable[[int], object] = lambda _: None,
    watch: WatchPasses | None = None,
) -> Float[Tensor, "cell sample metric"]:
    """Measure every cell exactly.

    Args:
        model: the model.
        ids: the prompt and its answer but the answer's last token.
        base: the run that is patched, one row per sample, with the states of `base_hooks`.
        donor: the run whose states are put in, with those of `donor_hooks`; one row, or one per sample.
        cells: the interventions, in any order.
        measure: reads the answer's logits, one or more metrics per row.
        keep: how many positions at the end predict the answer.
        max_rows: the most rows of one pass; a pass that runs out of memory is halved once.
        progress: called with the block passes of each pass when it is done (on a GPU: when it is queued).
        watch: called after each pass; it waits for a GPU. None costs nothing.

    Raises:
        MemoryError: half a pass does not fit either.
    """
    samples, layers, tokens = len(base.key_values[0][0]), model.cfg.n_layers, ids.shape[1]
    metrics: dict[int, Tensor] = {}

    def run(indices: Sequence[int]) -> None:
        cells_of_pass = [cells[i] for i in indices]
        with explain_out_of_memory(f"{len(indices) * samples} rows of {tokens} tokens"):
            values = measure(_patched_logits(model, ids, base, donor, cells_of_pass, keep))
            values = values.clone()  # a view would keep all logits
        values = values.view(len(indices), samples, -1)
        metrics.update(zip(indices, values, strict=True))  # on its device
        if watch is not None:
            watch(indices, values.cpu().double())
        progress(block_passes(cells_of_pass, layers=layers, tokens=tokens, samples=samples))

    def fits(indices: Sequence[int]) -> bool:
        try:
            run(indices)
        except MemoryError:
            if len(indices) < 2:
                raise
            return False
        return True

    cost = call_cost(ids.device)
    for indices in plan_passes(
        cells, layers=layers, tokens=tokens, samples=samples, max_rows=max_rows, call_cost=cost
    ):
        if not fits(indices):  # the error is gone by now, and with it the tensors of the failed pass
            run(indices[: len(indices) // 2])
            run(indices[len(indices) // 2 :])
    return torch.stack([metrics[i] for i in range(len(cells))]).cpu().double()


def _patched_logits(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    base: ForwardPass,
    donor: ForwardPass,
    cells: Sequence[PatchCell],
    keep: int,
) -> Float[Tensor, "row answer vocab"]:
    """One pass from the cells' first position on: the answer's logits, `samples` rows per cell.

    Row 0 runs every block, so that the pass reaches the layer where the first rows enter; it is no result.
    """
    start = min(cell.first_position for cell in cells)
    grows = batch_may_grow(model)
    rows = ids[:, start:]
    patches = _row_entries(base, cells, start, grows)
    if not grows:
        rows = rows.expand(1 + len(cells) * len(base.key_values[0][0]), -1)
        embeddings = base.states[EMBEDDING_HOOK][:, start:]
        embeddings = torch.cat([embeddings[:1], embeddings.repeat(len(cells), 1, 1)])
        patches = {EMBEDDING_HOOK: lambda _: embeddings, **patches}
    for hook, write in _point_writes(base, donor, cells, start):
        enter = patches.get(hook)
        patches[hook] = write if enter is None else _in_turn(enter, write)
    past = _prefix_key_values(base, cells, start, grows) if start else ()
    forward_pass = forward(model, rows, patches=patches, past_key_values=past, logits_to_keep=keep)
    return forward_pass.logits[1:]


def _row_entries(
    base: ForwardPass, cells: Sequence[PatchCell], start: int, grows: bool
) -> dict[str, StateWrite]:
    """By hook where rows enter: the base run's state once per cell, appended or put into rows that run."""
    samples = len(base.key_values[0][0])

    def enter(first_row: int, states: Tensor) -> StateWrite:
        if grows:
            return lambda state: torch.cat([state, states.to(state.dtype)])
        last_row = first_row + len(states)
        return lambda state: torch.cat([state[:first_row], states.to(state.dtype), state[last_row:]])

    hooks = [cell.entry_hook for cell in cells]  # ascending, as the plan orders them
    return {
        hook: enter(
            1 + samples * hooks.index(hook), base.states[hook][:, start:].repeat(hooks.count(hook), 1, 1)
        )
        for hook in dict.fromkeys(hooks)
    }


def _point_writes(
    base: ForwardPass, donor: ForwardPass, cells: Sequence[PatchCell], start: int
) -> Iterator[tuple[str, StateWrite]]:
    """By hook that cells write: put the donor run's states into their rows; the base run's where severed."""
    samples = len(base.key_values[0][0])
    by_hook: dict[str, list[tuple[int, PatchPoint, ForwardPass]]] = defaultdict(list)
    for i, cell in enumerate(cells):
        first_row = 1 + i * samples
        for point in cell.points:
            by_hook[point.hook].append((first_row, point, donor))
        for point in cell.severed:
            by_hook[point.hook].append((first_row, point, base))

    def put(indices: tuple[Tensor, ...], values: Tensor) -> StateWrite:
        return lambda state: state.index_put(indices, values.to(state.dtype))

    for hook, writes in by_hook.items():
        states, rows, positions, heads = [], [], [], []
        for first_row, point, source in writes:
            states.append(point.select(source.states[hook]).expand(samples, -1))
            rows += range(first_row, first_row + samples)
            positions += [point.position - start] * samples
            head = head_index(point.component)
            heads += [] if head is None else [head] * samples
        values = torch.cat(states)
        axes = [axis for axis in (rows, positions, heads) if axis]
        yield hook, put(tuple(index_tensor(axis, values.device) for axis in axes), values)


def _in_turn(first: StateWrite, second: StateWrite) -> StateWrite:
    return lambda state: second(first(state))


def _prefix_key_values(base: ForwardPass, cells: Sequence[PatchCell], start: int, grows: bool) -> KeyValues:
    """The base run's keys and values before `start`: in each layer once per row that runs there."""
    samples, device = len(base.key_values[0][0]), base.key_values[0][0].device
    all_rows = index_tensor([0, *list(range(samples)) * len(cells)], device)
    first_blocks = [cell.first_block for cell in cells]  # ascending, as the plan orders them
    expanded = []
    for layer, (keys, values) in enumerate(base.key_values):
        rows = all_rows[: 1 + samples * bisect_right(first_blocks, layer)] if grows else all_rows
        expanded.append((keys[rows, :, :start], values[rows, :, :start]))
    return tuple(expanded)
