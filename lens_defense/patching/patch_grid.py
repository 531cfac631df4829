"""The grid of a map: which patches make it, and where each one stands in it."""

from collections.abc import Sequence
from typing import Literal

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import did_you_mean
from lens_defense.patching.patch_cell import PatchCell, PatchPoint
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.prompts.prompt import Prompt
from lens_defense.sites import COMPONENTS, Component, component_hook

PatchGrid = dict[tuple[int, int, int], PatchCell]
"""Cells by component, layer and position, each an index of the map's axis."""


def resolve_components(
    model: TransformerBridge, components: Sequence[Component] | Component
) -> tuple[Component, ...]:
    """The components of a map by name, with "z" spelled out as every head.

    Raises:
        ValueError: there are none, or one that no model has or that this model has not.
    """
    components = [components] if isinstance(components, str) else components
    heads = [f"z.{head}" for head in range(model.cfg.n_heads)]
    names = [name for component in components for name in (heads if component == "z" else [component])]
    unknown = [name for name in names if name not in {*COMPONENTS, *heads}]
    if unknown or not names:
        raise ValueError(
            f"components must be of {(*COMPONENTS, 'z')} or 'z.0' to '{heads[-1]}', got {components!r}"
            f"{did_you_mean(unknown[0], COMPONENTS) if unknown else ''}"
        )
    missing = [name for name in names if model.get_hook_point(component_hook(name, 0)) is None]
    if missing:
        raise ValueError(
            f"{model.cfg.model_name} has no {missing[0]} that TransformerLens can patch; leave it out of "
            "components"
        )
    return tuple(dict.fromkeys(names))


def resolve_layers(layers: Sequence[int] | int | Literal["all"] | None, n_layers: int) -> tuple[int, ...]:
    """The layers of a map; None takes at most twelve.

    Raises:
        ValueError: a layer that the model has not.
    """
    stride = -(-n_layers // 12) if layers is None else 1 if layers == "all" else layers
    chosen = range(0, n_layers, stride) if isinstance(stride, int) and stride > 0 else stride
    if isinstance(chosen, int | str) or not chosen or not set(chosen) <= set(range(n_layers)):
        raise ValueError(f"layers must be 'all', a stride or layers 0 to {n_layers - 1}, got {layers!r}")
    return tuple(sorted(set(chosen)))


def patch_grid(
    prompt: Prompt,
    components: Sequence[Component],
    layers: Sequence[int],
    settings: TraceSettings,
    *,
    n_layers: int,
    parallel: bool = False,
) -> PatchGrid:
    """The cells of one prompt, and where each goes in the map.

    Args:
        prompt: the prompt.
        components: of the map, by name.
        layers: of the map.
        settings: which roles are patched, together or one token at a time; the window; what is severed.
        n_layers: of the model.
        parallel: whether a block's MLP and attention read the same state, so that neither is the later.
    """

    def cell(component: Component, layer: int, positions: Sequence[int]) -> PatchCell:
        patched = _window(component, layer, settings.window, n_layers)
        severed: list[PatchPoint] = []
        if settings.severed:
            first = _first_later_layer(component, patched[0], settings.severed, parallel)
            layers_above = [
                at for at in range(first, n_layers) if component != settings.severed or at not in patched
            ]
            severed = [
                PatchPoint(settings.severed, at, position) for at in layers_above for position in positions
            ]
        points = tuple(PatchPoint(component, at, position) for at in patched for position in positions)
        return PatchCell(points, tuple(severed))

    tokens = [position for position, role in enumerate(prompt.roles) if role in settings.roles]
    groups = {position: [position] for position in tokens}
    if settings.together and tokens:
        groups = {tokens[-1]: tokens}
    return {
        (c, j, position): cell(component, layer, positions)
        for c, component in enumerate(components)
        for j, layer in enumerate(layers)
        for position, positions in groups.items()
    }


def _first_later_layer(component: Component, layer: int, severed: Component, parallel: bool) -> int:
    """The first layer whose `severed` output is computed after a component's state in a layer."""
    later_in_block = severed == "mlp_out" and component != "resid_post" and not parallel
    return layer if component == "resid_pre" or later_in_block else layer + 1


def _window(component: Component, layer: int, window: int, n_layers: int) -> range:
    """One layer of the residual stream or a head; of outputs a centred window (ROME: from layer - w//2)."""
    if component not in ("mlp_out", "attn_out"):
        return range(layer, layer + 1)
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
