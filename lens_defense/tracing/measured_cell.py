"""A cell of a map as soon as it is measured: what a trace tells whoever watches it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lens_defense.patching.activation_patching import WatchPasses
from lens_defense.patching.trace_settings import Direction
from lens_defense.sites import Component
from lens_defense.tracing.trace_result import effect_of_patch


@dataclass(frozen=True, slots=True)
class MeasuredCell:
    """One cell of a trace that is still running."""

    request: int
    """The request's index."""
    component: Component
    layer: int
    position: int
    """The token's index; of tokens that are patched together, that of the last."""
    effect: float
    """As it will stand in the trace: mean over samples, by the first metric."""


WatchCells = Callable[[Sequence[MeasuredCell]], object]
"""Is called with the cells of each pass, each cell once."""


def report_cells(
    watch: WatchCells,
    request: int,
    places: Sequence[tuple[Component, int, int]],
    clean: Float[Tensor, " metric"],
    corrupted: Float[Tensor, "sample metric"],
    direction: Direction,
) -> WatchPasses:
    """What turns the metrics of a pass into cells.

    Args:
        watch: is called with them.
        request: whose cells they are.
        places: component, layer and position of each of its cells.
        clean: what the metrics read of the clean run.
        corrupted: what they read of the corrupted run.
        direction: which of the two was patched.
    """

    def report(indices: Sequence[int], metrics: Float[Tensor, "cell sample metric"]) -> None:
        patched = metrics[..., 0].contiguous()
        effects = effect_of_patch(patched, clean[0], corrupted[:, 0], direction).mean(-1)
        cells = zip(indices, effects.tolist(), strict=True)
        watch([MeasuredCell(request, *places[i], effect) for i, effect in cells])

    return report
