"""Grids: which interventions make a storage-site map, and where each stands in it."""

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts import Prompt, Role
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
