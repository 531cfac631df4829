"""The exact engine: every cell of a storage-site map, measured by growing-batch passes.

A patch at (layer l, position t) changes only positions >= t above l. So run the corrupted prompt
once and keep its keys and values; then for each t ONE forward over the tokens from t on behind that
prefix, in which the batch GROWS: where a cell's first write lies, its rows (one a sample) are
appended, already carrying the base run's states below. Early layers run one row only, the last ones
all of them, and nothing is computed twice. The cost in passes of one token through one block is

    sum over patched positions t of (tokens from t on) x sum over the cells there of (blocks above)

which `cost` counts beforehand. Where that is little, a block's call costs more than what runs through it;
then neighbouring positions share a pass that begins at the first of them (`_passes`). A cell may write
several points: a window (ROME's seven or ten layers of MLP or attention outputs), or several tokens. What it
writes comes from the donor run; what it severs is held at the base run's state, so that an effect cannot pass
there (ROME's severed graphs).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import CallCost, call_cost, explain_out_of_memory, index_tensor
from lens_defense.models.forward import ForwardPass, KeyValues, StateWrite, forward
from lens_defense.sites import Component, block_input_hook, component_hook, head_index

Measure = Callable[[Float[Tensor, "row answer vocab"]], Float[Tensor, "row reading"]]


class PatchPoint(NamedTuple):
    """One state: what a component gives in a layer at a position."""

    component: Component
    layer: int
    position: int

    @property
    def hook(self) -> str:
        """Where it is read and written."""
        return component_hook(self.component, self.layer)


@dataclass(frozen=True, slots=True)
class PatchCell:
    """One intervention on the base run."""

    points: tuple[PatchPoint, ...]
    """Where the donor's states are put."""
    severed: tuple[PatchPoint, ...] = ()
    """Where the base run's states are held, in blocks above the first point."""

    @property
    def position(self) -> int:
        """The first position that changes."""
        return min(point.position for point in self.points)

    @property
    def birth(self) -> tuple[int, bool]:
        """The block where the cell's rows enter the batch, and whether at its end."""
        return min((point.layer, point.component == "resid_post") for point in self.points)

    @property
    def birth_hook(self) -> str:
        """The hook where the cell's rows enter the batch."""
        layer, at_end = self.birth
        return component_hook("resid_post", layer) if at_end else block_input_hook(layer)


def base_hooks(cells: Sequence[PatchCell]) -> tuple[str, ...]:
    """The states that the base run must keep for these cells."""
    severed = (point.hook for cell in cells for point in cell.severed)
    return tuple(dict.fromkeys((*(cell.birth_hook for cell in cells), *severed)))


def donor_hooks(cells: Sequence[PatchCell]) -> tuple[str, ...]:
    """The states that the donor run must keep for these cells."""
    return tuple(dict.fromkeys(point.hook for cell in cells for point in cell.points))


def block_passes(cells: Sequence[PatchCell], *, layers: int, tokens: int, samples: int) -> int:
    """Passes of one token through one block that a sweep takes, without the row that leads it."""
    return sum(
        (tokens - cell.position) * (layers - cell.birth[0] - cell.birth[1]) * samples for cell in cells
    )


def time_in_tokens(
    cells: Sequence[PatchCell], *, layers: int, tokens: int, samples: int, max_rows: int, call_cost: CallCost
) -> int:
    """Tokens through a block that take the time of a sweep: what shared passes run twice, and calls, too."""
    return sum(
        _pass_price(
            tokens - min(cells[i].position for i in some),
            sum(layers - cells[i].birth[0] - cells[i].birth[1] for i in some) * samples,
            layers,
            call_cost,
        )
        for some in _passes(cells, layers, tokens, samples, max_rows, call_cost)
    )


def _pass_price(tokens: int, blocks: int, layers: int, call_cost: CallCost) -> int:
    """Of a pass of some tokens, whose rows pass some blocks altogether, beside the one that leads them."""
    return tokens * (blocks + layers) + call_cost.call * layers


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
) -> Float[Tensor, "cell sample reading"]:
    """Measure every cell exactly.

    Args:
        model: the model.
        ids: the prompt and its answer but the answer's last token.
        base: the run that is patched, one row a sample, with `base_hooks` kept.
        donor: the run whose states are put in, with `donor_hooks` kept; one row, or one a sample.
        cells: the interventions, in any order.
        measure: reads the answer's logits, some numbers a row.
        keep: how many positions at the end predict the answer.
        max_rows: the most rows that one pass may carry; a pass that runs out of memory is halved once.
        progress: is told the passes through a block as they are done (on a GPU: as they are queued).

    Raises:
        MemoryError: half a pass does not fit either.
    """
    samples = len(base.key_values[0][0])
    told: dict[int, Tensor] = {}

    def measured(some: Sequence[int]) -> None:
        group = [cells[i] for i in some]
        with explain_out_of_memory(f"{len(group) * samples} rows of {ids.shape[1]} tokens"):
            read = measure(_grown(model, ids, base, donor, group, keep))
            read = read.clone()  # a view would keep all logits
        told.update(zip(some, read.view(len(group), samples, -1), strict=True))  # still on its device
        progress(block_passes(group, layers=model.cfg.n_layers, tokens=ids.shape[1], samples=samples))

    def fits(some: Sequence[int]) -> bool:
        try:
            measured(some)
        except MemoryError:
            if len(some) < 2:
                raise
            return False
        return True

    for some in _passes(cells, model.cfg.n_layers, ids.shape[1], samples, max_rows, call_cost(ids.device)):
        if not fits(some):  # by now the error is gone, and with it what the pass held
            measured(some[: len(some) // 2])
            measured(some[len(some) // 2 :])
    return torch.stack([told[i] for i in range(len(cells))]).cpu().double()


def _passes(
    cells: Sequence[PatchCell], layers: int, tokens: int, samples: int, max_rows: int, call_cost: CallCost
) -> Iterator[list[int]]:
    """Indices of the cells of each pass, in the order of birth.

    Neighbouring positions share a pass where running the tokens between them once more costs less than
    another call of every block: the cheapest cut of all positions into such runs. A position of too many rows
    is split.
    """
    most = max(1, max_rows // samples)
    here: dict[int, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        here[cell.position].append(i)
    positions = sorted(here)

    held = [0, *accumulate(len(here[position]) for position in positions)]
    above = (sum(layers - cells[i].birth[0] - cells[i].birth[1] for i in here[t]) for t in positions)
    blocks = [0, *accumulate(above)]

    def fits(start: int, end: int) -> bool:
        rows = held[end] - held[start]
        few = rows <= most and rows * samples * (tokens - positions[start]) <= call_cost.largest
        return few or end - start == 1

    def costs(start: int, end: int) -> int:
        return _pass_price(
            tokens - positions[start], samples * (blocks[end] - blocks[start]), layers, call_cost
        )

    best, cuts = [0], [0]
    for end in range(1, len(positions) + 1):
        starts = takewhile(partial(fits, end=end), range(end - 1, -1, -1))
        cheapest, start = min((best[start] + costs(start, end), start) for start in starts)
        best.append(cheapest)
        cuts.append(start)
    ends = [len(positions)]
    while ends[-1]:
        ends.append(cuts[ends[-1]])
    for start, end in pairwise(reversed(ends)):
        among = sorted(
            (i for position in positions[start:end] for i in here[position]), key=lambda i: cells[i].birth
        )
        for first in range(0, len(among), most):
            yield among[first : first + most]


def _grown(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    base: ForwardPass,
    donor: ForwardPass,
    cells: Sequence[PatchCell],
    keep: int,
) -> Float[Tensor, "row answer vocab"]:
    """One pass from the cells' first position on; row 0 only leads the way to the first birth."""
    position = min(cell.position for cell in cells)
    writes = _births(base, cells, position)
    for name, write in _interventions(base, donor, cells, position):
        grow = writes.get(name)
        writes[name] = write if grow is None else _both(grow, write)
    past = _expanded(base, cells, position) if position else ()
    return forward(
        model, ids[:, position:], patches=writes, past_key_values=past, logits_to_keep=keep
    ).logits[1:]


def _births(base: ForwardPass, cells: Sequence[PatchCell], position: int) -> dict[str, StateWrite]:
    """At each hook where rows are born, append the base run's state once a cell."""

    def append(rows: Tensor) -> StateWrite:
        return lambda state: torch.cat([state, rows.to(state.dtype)])

    hooks = [cell.birth_hook for cell in cells]
    return {
        name: append(base.states[name][:, position:].repeat(hooks.count(name), 1, 1))
        for name in dict.fromkeys(hooks)
    }


def _interventions(
    base: ForwardPass, donor: ForwardPass, cells: Sequence[PatchCell], position: int
) -> Iterator[tuple[str, StateWrite]]:
    """At each hook that some cells write, put the donor's or the base's states into their rows."""
    samples = len(base.key_values[0][0])
    places: dict[str, list[tuple[int, PatchPoint, ForwardPass]]] = defaultdict(list)
    for i, cell in enumerate(cells):
        for point in cell.points:
            places[point.hook].append((1 + i * samples, point, donor))
        for point in cell.severed:
            places[point.hook].append((1 + i * samples, point, base))

    def put(where: tuple[Tensor, ...], states: Tensor) -> StateWrite:
        return lambda state: state.index_put(where, states.to(state.dtype))

    for name, some in places.items():
        told, rows, at, heads = [], [], [], []
        for first, point, source in some:
            head = head_index(point.component)
            there = source.states[name][:, point.position]
            told.append((there if head is None else there[:, head]).expand(samples, -1))
            rows += range(first, first + samples)
            at += [point.position - position] * samples
            heads += [] if head is None else [head] * samples
        states = torch.cat(told)
        yield (
            name,
            put(tuple(index_tensor(part, states.device) for part in (rows, at, heads) if part), states),
        )


def _both(first: StateWrite, second: StateWrite) -> StateWrite:
    return lambda state: second(first(state))


def _expanded(base: ForwardPass, cells: Sequence[PatchCell], position: int) -> KeyValues:
    """The prefix of every block, once for each row that is present there."""
    samples, device = len(base.key_values[0][0]), base.key_values[0][0].device
    every = index_tensor([0, *list(range(samples)) * len(cells)], device)
    births = [cell.birth for cell in cells]  # in order
    expanded = []
    for layer, (keys, values) in enumerate(base.key_values):
        rows = every[: 1 + samples * bisect_left(births, (layer, True))]
        expanded.append((keys[rows, :, :position], values[rows, :, :position]))
    return tuple(expanded)
