"""Patch cells: which states of a base run are replaced, and by which run's.

A cell may write several points: a window (ROME's ten layers of MLP or attention outputs), or several tokens.
What it severs stays as in the base run, so that an effect cannot pass there (ROME's severed graphs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lens_defense.sites import EMBEDDING_HOOK, Component, block_input_hook, component_hook, head_index


class PatchPoint(NamedTuple):
    """One state: what a component gives in a layer at a position."""

    component: Component
    layer: int
    position: int

    @property
    def hook(self) -> str:
        """The hook that reads and writes it."""
        return component_hook(self.component, self.layer)

    def select(self, states: Float[Tensor, "row token ..."]) -> Float[Tensor, "row width"]:
        """Its state in every row of what the hook gives."""
        state = states[:, self.position]
        head = head_index(self.component)
        return state if head is None else state[:, head]


@dataclass(frozen=True, slots=True)
class PatchCell:
    """One intervention on the base run."""

    points: tuple[PatchPoint, ...]
    """States that are taken from the donor run."""
    severed: tuple[PatchPoint, ...] = ()
    """States that stay as in the base run, in blocks above the first point."""

    @property
    def first_position(self) -> int:
        """The first position that changes."""
        return min(point.position for point in self.points)

    @property
    def enters_at(self) -> tuple[int, bool]:
        """The layer of its first point, and whether that point is the layer's output.

        There its rows enter the batch of a pass.
        """
        return min((point.layer, point.component == "resid_post") for point in self.points)

    @property
    def entry_hook(self) -> str:
        """The hook where its rows enter the batch of a pass."""
        layer, at_output = self.enters_at
        return component_hook("resid_post", layer) if at_output else block_input_hook(layer)

    @property
    def first_block(self) -> int:
        """The first block that its rows run; the number of layers where they run none."""
        layer, at_output = self.enters_at
        return layer + at_output


def base_hooks(cells: Sequence[PatchCell]) -> tuple[str, ...]:
    """The states that the base run must capture for these cells; its embeddings first."""
    severed = (point.hook for cell in cells for point in cell.severed)
    return tuple(dict.fromkeys((EMBEDDING_HOOK, *(cell.entry_hook for cell in cells), *severed)))


def donor_hooks(cells: Sequence[PatchCell]) -> tuple[str, ...]:
    """The states that the donor run must capture for these cells."""
    return tuple(dict.fromkeys(point.hook for cell in cells for point in cell.points))
