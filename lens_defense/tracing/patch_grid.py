"""Grids: which interventions make a storage-site map, and where each stands in it."""

from collections.abc import Sequence
from typing import Literal

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts.prompt import READING_ORDER, Prompt, Role
from lens_defense.sites import COMPONENTS, Component, head_index
from lens_defense.tracing.activation_patching import PatchCell, PatchPoint

PatchGrid = dict[tuple[int, int, int], PatchCell]
"""Cells by component, layer and position, each an index of the map's axis."""


def resolve_components(model: TransformerBridge, components: Sequence[Component]) -> tuple[Component, ...]:
    """The components of a map by name, "z" spelled out.

    Raises:
        ValueError: there are none, or one that no model has or that this model has not.
    """
    number = model.cfg.n_heads
    every = [
        name for one in components for name in ([f"z.{h}" for h in range(number)] if one == "z" else [one])
    ]
    heads = [head_index(name) for name in every]
    known = [
        name in COMPONENTS or (head is not None and head < number)
        for name, head in zip(every, heads, strict=True)
    ]
    if not every or not all(known):
        raise ValueError(
            f"components must be of {(*COMPONENTS, 'z')} or 'z.0' to 'z.{number - 1}', got {components!r}"
        )
    return tuple(dict.fromkeys(every))


def resolve_layers(layers: Sequence[int] | int | Literal["all"] | None, depth: int) -> tuple[int, ...]:
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


def resolve_roles(positions: Sequence[Role] | Literal["all"]) -> tuple[Role, ...]:
    """The roles of a map.

    Raises:
        ValueError: a role that does not exist.
    """
    roles = READING_ORDER if positions == "all" else tuple(positions)
    if (isinstance(positions, str) and positions != "all") or not set(roles) <= set(READING_ORDER):
        raise ValueError(f"positions must be 'all' or a list of {READING_ORDER}, got {positions!r}")
    return roles


def patch_grid(
    met: Prompt,
    components: Sequence[Component],
    layers: Sequence[int],
    roles: Sequence[Role],
    window: int,
    depth: int,
    *,
    severed: Component | None = None,
    parallel: bool = False,
    together: bool = False,
) -> PatchGrid:
    """The cells of one prompt, and where each goes in the map.

    Args:
        met: the prompt.
        components: of the map, by name.
        layers: of the map.
        roles: whose tokens are patched, one at a time.
        window: layers that are patched at once, for MLP and attention outputs.
        depth: the model's number of layers.
        severed: what is held wherever it is computed after the first state that is patched, at the same
            tokens, and is not patched itself.
        parallel: whether a block's MLP and attention read the same state, so that neither is the later.
        together: patch all of the tokens in one cell, which stands at the last of them.
    """

    def cell(component: Component, layer: int, positions: Sequence[int]) -> PatchCell:
        written = _window(component, layer, window, depth)
        held = range(_first_after(component, written[0], severed, parallel), depth) if severed else ()
        kept = [at for at in held if component != severed or at not in written]
        return PatchCell(
            tuple(PatchPoint(component, at, t) for at in written for t in positions),
            tuple(PatchPoint(severed or "", at, t) for at in kept for t in positions),
        )

    tokens = [t for t, role in enumerate(met.roles) if role in roles]
    places = {tokens[-1]: tokens} if together and tokens else {t: [t] for t in tokens}
    return {
        (c, j, t): cell(component, layer, positions)
        for c, component in enumerate(components)
        for j, layer in enumerate(layers)
        for t, positions in places.items()
    }


def _first_after(component: Component, layer: int, severed: Component, parallel: bool) -> int:
    """The first layer whose `severed` output is computed after a component's state in a layer."""
    same = component == "resid_pre" or (severed == "mlp_out" and component != "resid_post" and not parallel)
    return layer if same else layer + 1


def _window(component: Component, layer: int, window: int, depth: int) -> range:
    """One layer of the residual stream or of a head; a centred window of outputs (ROME: layer - w//2 on)."""
    if component not in ("mlp_out", "attn_out"):
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(depth, layer - (-window // 2)))
