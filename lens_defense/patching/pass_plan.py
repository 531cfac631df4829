"""The plan of a sweep: which cells share a forward pass, and what the passes cost.

A pass begins at the first position that its cells change, and each of its rows runs only the blocks from its
cell's first block on. So the cost, in passes of one token through one block, is

    sum over passes of (tokens from the first position on) x sum over its rows of (blocks from the first on)

Every position could have a pass of its own. But where a pass is small, calling a block costs more than what
runs through it (`CallCost`); then neighbouring positions share a pass.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, takewhile

from lens_defense.models.devices import CallCost
from lens_defense.patching.patch_cell import PatchCell


def block_passes(cells: Sequence[PatchCell], *, layers: int, tokens: int, samples: int) -> int:
    """The cost of the cells if no positions share a pass; without row 0, which leads each pass."""
    return sum((tokens - cell.first_position) * (layers - cell.first_block) * samples for cell in cells)


def time_in_tokens(
    cells: Sequence[PatchCell], *, layers: int, tokens: int, samples: int, max_rows: int, call_cost: CallCost
) -> int:
    """Tokens through one block that take as long as the sweep, calls and shared passes included."""
    plan = plan_passes(
        cells, layers=layers, tokens=tokens, samples=samples, max_rows=max_rows, call_cost=call_cost
    )
    return sum(
        _price(
            tokens - min(cells[i].first_position for i in indices),
            sum(layers - cells[i].first_block for i in indices) * samples,
            layers,
            call_cost,
        )
        for indices in plan
    )


def plan_passes(
    cells: Sequence[PatchCell], *, layers: int, tokens: int, samples: int, max_rows: int, call_cost: CallCost
) -> list[list[int]]:
    """The cells of each pass, as indices, in the order in which their rows enter it.

    Of all ways to cut the positions into runs of neighbours, the cheapest one. A run has at most `max_rows`
    rows and `call_cost.largest` tokens; a position that has more rows by itself takes several passes.

    Args:
        cells: the interventions, in any order.
        layers: of the model.
        tokens: of the prompt and its answer, as they are run.
        samples: rows per cell.
        max_rows: the most rows of one pass.
        call_cost: of the device.
    """
    max_cells = max(1, max_rows // samples)
    by_position: dict[int, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        by_position[cell.first_position].append(i)
    positions = sorted(by_position)
    blocks = (sum(layers - cells[i].first_block for i in by_position[p]) for p in positions)
    blocks_before = [0, *accumulate(blocks)]
    cells_before = [0, *accumulate(len(by_position[p]) for p in positions)]

    def fits(start: int, end: int) -> bool:
        n_cells = cells_before[end] - cells_before[start]
        tokens_run = n_cells * samples * (tokens - positions[start])
        return end - start == 1 or (n_cells <= max_cells and tokens_run <= call_cost.largest)

    def price(start: int, end: int) -> int:
        blocks_run = samples * (blocks_before[end] - blocks_before[start])
        return _price(tokens - positions[start], blocks_run, layers, call_cost)

    passes = []
    for start, end in _cheapest_runs(len(positions), fits, price):
        indices = [i for position in positions[start:end] for i in by_position[position]]
        indices.sort(key=lambda i: cells[i].enters_at)
        passes += [indices[first : first + max_cells] for first in range(0, len(indices), max_cells)]
    return passes


def _price(tokens: int, blocks: int, layers: int, call_cost: CallCost) -> int:
    """The time of one pass, in tokens through one block.

    Its rows run so many blocks altogether; one more row runs all layers, and every layer is called once.
    """
    return tokens * (blocks + layers) + call_cost.call * layers


def _cheapest_runs(
    n: int, fits: Callable[[int, int], bool], price: Callable[[int, int], int]
) -> list[tuple[int, int]]:
    """Of all ways to cut 0 to n into runs (start, end) that fit, the one of the least price.

    Dynamic programming: the cheapest cut up to `end` is a cheapest cut up to some `start`, and one run more.
    """
    total_prices, last_starts = [0], [0]
    for end in range(1, n + 1):
        starts = takewhile(lambda start, end=end: fits(start, end), range(end - 1, -1, -1))
        total, last_start = min((total_prices[start] + price(start, end), start) for start in starts)
        total_prices.append(total)
        last_starts.append(last_start)
    ends = [n]
    while ends[-1]:
        ends.append(last_starts[ends[-1]])
    return list(pairwise(reversed(ends)))
