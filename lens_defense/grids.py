"""Grids: which interventions make a storage-site map, and where each stands in it."""

from collections.abc import Sequence
from typing import Literal

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts import READING_ORDER, Prompt, Role
from lens_defense.sites import COMPONENTS, Component, head_of
from lens_defense.sweeps import Cell, Point

Grid = dict[tuple[int, int, int], Cell]
"""Cells by component, layer and position, each an index of the map's axis."""


def cells_components(model: TransformerBridge, components: Sequence[Component]) -> tuple[Component, ...]:
    """The components of a map by name, "heads" spelled out.

    Raises:
        ValueError: there are none, or one that no model has or that this model has not.
    """
    number = model.cfg.n_heads
    every = [
        name
        for one in components
        for name in ([f"head {h}" for h in range(number)] if one == "heads" else [one])
    ]
    heads = [head_of(name) for name in every]
    known = [
        name in COMPONENTS or (head is not None and head < number)
        for name, head in zip(every, heads, strict=True)
    ]
    if not every or not all(known):
        raise ValueError(
            f"components must be of {(*COMPONENTS, 'heads')} or 'head 0' to 'head {number - 1}', got "
            f"{components!r}"
        )
    return tuple(dict.fromkeys(every))


def cells_layers(layers: Sequence[int] | int | Literal["all"] | None, depth: int) -> tuple[int, ...]:
    """The layers of a map; None takes at most twelve.

    Raises:
        ValueError: a layer that the model has not.
    """
    if layers is None:
        layers = -(-depth // 12)
    rows = range(depth) if layers == "all" else layers
    rows = range(0, depth, rows) if isinstance(rows, int) and rows > 0 else rows
    if isinstance(rows, int | str) or not rows or not set(rows) <= set(range(depth)):
        raise ValueError(f"layers must be 'all', a stride or layers 0 to {depth - 1}, got {layers!r}")
    return tuple(sorted(set(rows)))


def cells_roles(positions: Sequence[Role] | Literal["all"]) -> tuple[Role, ...]:
    """The roles of a map.

    Raises:
        ValueError: a role that does not exist.
    """
    roles = READING_ORDER if positions == "all" else tuple(positions)
    if (isinstance(positions, str) and positions != "all") or not set(roles) <= set(READING_ORDER):
        raise ValueError(f"positions must be 'all' or a list of {READING_ORDER}, got {positions!r}")
    return roles


def grid(
    met: Prompt,
    components: Sequence[Component],
    layers: Sequence[int],
    roles: Sequence[Role],
    window: int,
    depth: int,
    severed: Component | None = None,
) -> Grid:
    """The cells of one prompt, and where each goes in the map.

    Args:
        met: the prompt.
        components: of the map, by name.
        layers: of the map.
        roles: whose tokens are patched, one at a time.
        window: layers that are patched at once, for MLP and attention outputs.
        depth: the model's number of layers.
        severed: what is held in the layers above at the same token.
    """

    def cell(component: Component, layer: int, position: int) -> Cell:
        window_of = _window(component, layer, window, depth)
        above = range(window_of[-1] + 1, depth) if severed else ()
        return Cell(
            tuple(Point(component, at, position) for at in window_of),
            tuple(Point(severed or "", at, position) for at in above),
        )

    return {
        (c, j, t): cell(component, layer, t)
        for c, component in enumerate(components)
        for j, layer in enumerate(layers)
        for t, role in enumerate(met.roles)
        if role in roles
    }


def _window(component: Component, layer: int, window: int, depth: int) -> range:
    """One layer of the residual stream or of a head; a centred window of outputs (ROME: layer - w//2 on)."""
    if component not in ("mlp", "attention"):
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(depth, layer - (-window // 2)))
