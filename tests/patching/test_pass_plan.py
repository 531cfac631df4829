"""The plan of a sweep: what it costs, and that no other cut of the positions is cheaper."""

import itertools

import pytest
from helpers.patch_cases import LAYERS, TOKENS

from lens_defense.models.devices import CallCost
from lens_defense.patching.pass_plan import block_passes, plan_passes, time_in_tokens
from lens_defense.patching.patch_cell import PatchCell, PatchPoint


def cells_at_most_points():
    """A cell at every layer and token but each fourth."""
    points = itertools.product(range(LAYERS), range(TOKENS))
    return [PatchCell((PatchPoint("mlp_out", layer, t),)) for layer, t in points if (layer + t) % 4]


@pytest.mark.parametrize("call", [0, 2, 20, 60, 1000])
@pytest.mark.parametrize(
    "samples, max_rows, largest", [(1, 1000, 9999), (3, 1000, 9999), (3, 40, 9999), (3, 99, 90)]
)
def test_positions_share_passes_as_is_cheapest(call, samples, max_rows, largest):
    """Against every way to cut the positions into runs of neighbours."""
    cells = cells_at_most_points()

    def price(indices):
        blocks = samples * sum(LAYERS - cells[i].enters_at[0] for i in indices) + LAYERS
        return (TOKENS - min(cells[i].first_position for i in indices)) * blocks + call * LAYERS

    def fits(indices):
        first = min(cells[i].first_position for i in indices)
        single_position = all(cells[i].first_position == first for i in indices)
        rows = len(indices) * samples
        return single_position or (rows <= max_rows and rows * (TOKENS - first) <= largest)

    def passes_of(cuts):
        """The passes of cells, cut after the tokens whose flag is True."""
        ends = [t + 1 for t, cut in enumerate(cuts) if cut] + [TOKENS]
        return [
            [i for i, cell in enumerate(cells) if start <= cell.first_position < end]
            for start, end in itertools.pairwise([0, *ends])
        ]

    all_plans = map(passes_of, itertools.product((False, True), repeat=TOKENS - 1))
    least = min(sum(map(price, plan)) for plan in all_plans if all(map(fits, plan)))
    size = {"layers": LAYERS, "tokens": TOKENS, "samples": samples, "max_rows": max_rows}
    size["call_cost"] = CallCost(call, largest)
    plan = plan_passes(cells, **size)
    assert sorted(i for indices in plan for i in indices) == list(range(len(cells)))
    assert sum(map(price, plan)) == least
    assert time_in_tokens(cells, **size) == least
    for indices in plan:
        entries = [cells[i].enters_at for i in indices]
        assert entries == sorted(entries)


def test_cost_is_blocks_above_times_tokens_from_the_patch_on():
    cell = PatchCell((PatchPoint("resid_post", 1, 3),))
    assert block_passes([cell], layers=4, tokens=9, samples=5) == 6 * 2 * 5
    window = PatchCell((PatchPoint("mlp_out", 1, 3), PatchPoint("mlp_out", 2, 3)))
    assert block_passes([window], layers=4, tokens=9, samples=5) == 6 * 3 * 5
