"""The exact engine: every cell of a storage-site map, measured by one growing-batch pass a position.

A patch at (layer l, position t) changes only positions >= t above l. So run the corrupted prompt
once and keep its keys and values; then for each t ONE forward over the tokens from t on behind that
prefix, in which the batch GROWS: where a cell's first write lies, its rows (one a sample) are
appended, already carrying the base run's states below. Early layers run one row only, the last ones
all of them, and nothing is computed twice. The cost in passes of one token through one block is

    sum over patched positions t of (tokens from t on) x sum over the cells there of (blocks above)

which `cost` counts beforehand. The cells of a window (ROME's seven or ten layers of MLP or attention
outputs) are one cell with several points.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.patches import KeyValues, Run, Write, run
from lens_defense.sites import Component, entry_hook, output_hook

Measure = Callable[[Float[Tensor, "row answer vocab"]], Float[Tensor, " row"]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One intervention: at one position, the donor's state in the place of each of these outputs."""

    position: int
    points: tuple[tuple[Component, int], ...]
    """(component, layer), one for a residual stream, several for a window of outputs."""

    @property
    def birth(self) -> tuple[int, bool]:
        """The block where the cell's rows enter the batch, and whether at its end."""
        component, layer = min(self.points, key=lambda point: point[1])
        return layer, component == "residual"

    @property
    def birth_hook(self) -> str:
        """The hook where the cell's rows enter the batch."""
        layer, at_end = self.birth
        return output_hook("residual", layer) if at_end else entry_hook(layer)


def base_hooks(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The states that the base run must keep for these cells."""
    return tuple(dict.fromkeys(cell.birth_hook for cell in cells))


def donor_hooks(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The states that the donor run must keep for these cells."""
    return tuple(dict.fromkeys(output_hook(*point) for cell in cells for point in cell.points))


def cost(cells: Sequence[Cell], *, layers: int, tokens: int, samples: int) -> int:
    """Passes of one token through one block that a sweep takes, without the row that leads it."""
    return sum(
        (tokens - cell.position) * (layers - cell.birth[0] - cell.birth[1]) * samples for cell in cells
    )


def sweep(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    base: Run,
    donor: Run,
    cells: Sequence[Cell],
    measure: Measure,
    *,
    keep: int,
    max_rows: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Float[Tensor, "cell sample"]:
    """Measure every cell exactly.

    Args:
        model: the model.
        ids: the prompt and its answer but the answer's last token.
        base: the run that is patched, one row a sample, with `base_hooks` kept.
        donor: the run whose states are put in, with `donor_hooks` kept; one row, or one a sample.
        cells: the interventions, in any order.
        measure: reads the answer's logits, one number a row.
        keep: how many positions at the end predict the answer.
        max_rows: the most rows that one pass may carry.
        progress: is told the passes through a block as they are done.
    """
    samples = len(base.cache[0][0])
    out = torch.empty(len(cells), samples, dtype=torch.float64)
    for indices in _passes(cells, max(1, max_rows // samples)):
        group = [cells[i] for i in indices]
        logits = _grown(model, ids, base, donor, group, keep)
        out[indices] = measure(logits).double().cpu().view(len(group), samples)
        progress(cost(group, layers=model.cfg.n_layers, tokens=ids.shape[1], samples=samples))
    return out


def _passes(cells: Sequence[Cell], most: int) -> Iterator[list[int]]:
    """Indices of the cells of each pass: one position, in the order of birth, at most so many."""
    for position in sorted({cell.position for cell in cells}):
        here = [i for i, cell in enumerate(cells) if cell.position == position]
        here.sort(key=lambda i: cells[i].birth)
        for start in range(0, len(here), most):
            yield here[start : start + most]


def _grown(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    base: Run,
    donor: Run,
    cells: Sequence[Cell],
    keep: int,
) -> Float[Tensor, "row answer vocab"]:
    """One pass from the cells' position on; row 0 only leads the way to the first birth."""
    position = cells[0].position
    writes = _births(base, cells, position)
    for name, write in _restorations(base, donor, cells, position):
        grow = writes.get(name)
        writes[name] = write if grow is None else _both(grow, write)
    past = _expanded(base, cells, position) if position else ()
    return run(model, ids[:, position:], writes=writes, past=past, keep=keep).logits[1:]


def _births(base: Run, cells: Sequence[Cell], position: int) -> dict[str, Write]:
    """At each hook where rows are born, append the base run's state once a cell."""

    def append(rows: Tensor) -> Write:
        return lambda state: torch.cat([state, rows.to(state.dtype)])

    hooks = [cell.birth_hook for cell in cells]
    return {
        name: append(base.states[name][:, position:].repeat(hooks.count(name), 1, 1))
        for name in dict.fromkeys(hooks)
    }


def _restorations(base: Run, donor: Run, cells: Sequence[Cell], position: int) -> Iterator[tuple[str, Write]]:
    """At each hook that some cells write, put the donor's state into their rows."""
    samples = len(base.cache[0][0])

    def restore(rows: Tensor, state_there: Tensor) -> Write:
        def write(state: Tensor) -> Tensor:
            state = state.clone()
            state[rows, 0] = state_there.to(state.dtype)
            return state

        return write

    for name in donor_hooks(cells):
        of = [i for i, cell in enumerate(cells) if name in donor_hooks([cell])]
        rows = torch.tensor([1 + i * samples + s for i in of for s in range(samples)])
        there = donor.states[name][:, position].expand(samples, -1).repeat(len(of), 1)
        yield name, restore(rows.to(there.device), there)


def _both(first: Write, second: Write) -> Write:
    return lambda state: second(first(state))


def _expanded(base: Run, cells: Sequence[Cell], position: int) -> KeyValues:
    """The prefix of every block, once for each row that is present there."""
    samples = len(base.cache[0][0])
    expanded = []
    for layer, (keys, values) in enumerate(base.cache):
        present = sum(cell.birth < (layer, True) for cell in cells)
        rows = torch.tensor([0, *list(range(samples)) * present], device=keys.device)
        expanded.append((keys[rows, :, :position], values[rows, :, :position]))
    return tuple(expanded)
