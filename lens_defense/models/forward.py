"""What is done to a running model: capture states, write states, start behind a prefix cache.

One function, `run`, is one forward with hooks that are gone when it returns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from lens_defense.sites import component_hook

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of every layer, each [batch, head, token, d_head]."""
StateWrite = Callable[[Tensor], Tensor]
"""What a hook puts in the place of a state [batch, token, width]."""


UNEMBED_INPUT = "unembed.hook_in"


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """One forward, kept."""

    logits: Float[Tensor, "batch kept vocab"]
    states: Mapping[str, Tensor]
    """Captured states by hook name, each [batch, token, width]."""
    cache: KeyValues


def forward(
    model: TransformerBridge,
    ids: Int[Tensor, "batch token"],
    *,
    names: Sequence[str] = (),
    writes: Mapping[str, StateWrite] | None = None,
    mask: Int[Tensor, "batch seen"] | None = None,
    past: KeyValues = (),
    keep: int = 1,
    stop: int | None = None,
) -> ForwardPass:
    """One forward pass; hooks live as long as the call.

    Args:
        model: the model, unchanged by this.
        ids: tokens, without those that `past` already holds.
        names: hooks whose states are kept, after the writes.
        writes: what to put in the place of a state, by hook name.
        mask: 1 for tokens, 0 for padding, over past and new tokens; None where nothing is padded.
        past: keys and values of the tokens before, for example from an earlier Run.
        keep: how many positions at the end give logits.
        stop: the first block that is not run; then there are no logits. None runs the whole model.
    """
    states: dict[str, Tensor] = {}

    def writing(write: StateWrite) -> Callable[..., Tensor]:
        return lambda state, **_: write(state)

    def capturing(name: str) -> Callable[..., None]:
        return lambda state, **_: states.__setitem__(name, state)

    hooks = [(name, writing(write)) for name, write in (writes or {}).items()]
    hooks += [(name, capturing(name)) for name in names]
    hooks = _padding_hooks(model, mask, ids.shape[1]) + hooks + [(UNEMBED_INPUT, _in_one_piece)]
    cache = _cache(past)
    whole = stop is None or stop >= model.cfg.n_layers
    with model.hooks(fwd_hooks=hooks):
        told = model(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_to_keep=keep,
            return_type="logits",
            stop_at_layer=None if whole else stop,
        )
    logits = told if whole else told[:, :0]
    layers = _layers(cache)
    assert layers and layers[-1].keys is not None, (
        "the model ignored the cache it was given (transformers and transformer-lens disagree); "
        "install the versions of constraints.txt"
    )
    kept = tuple((layer.keys, layer.values) for layer in layers if layer.keys is not None)
    return ForwardPass(logits=logits, states=states, cache=kept)


def _in_one_piece(state: Tensor, **_: Any) -> Tensor:
    """The last columns, cut out of a batch, copied: else torch multiplies row by row, at half the speed."""
    return state.contiguous()


def _padding_hooks(model: TransformerBridge, mask: Tensor | None, width: int) -> list[Any]:
    """Padding sees nothing: in float64 its softmax is NaN, which 0 weights would spread. Keep it at 0."""
    if mask is None or mask.all() or model.embed.weight.dtype != torch.float64:
        return []
    there = mask[:, -width:, None].bool()

    def clear(state: Tensor, **_: Any) -> Tensor:
        return state.where(there, 0)

    return [(component_hook("attn_out", layer), clear) for layer in range(model.cfg.n_layers)]


@contextmanager
def frozen_weights(model: TransformerBridge) -> Iterator[None]:
    """No gradient reaches a weight inside; gradients of states are free."""
    held = [p for p in model.original_model.parameters() if p.requires_grad]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def start_after_block(model: TransformerBridge, layer: int, state: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, a forward starts after a block: no block up to it is computed, and `state` gives its output."""

    def hand_on(*args: Any, **settings: Any) -> Tensor:
        return args[0] if args else settings["hidden_states"]

    def give(*_: Any, **__: Any) -> Tensor:
        return state()

    blocks = [model.blocks[i] for i in range(layer + 1)]
    try:
        for block in blocks:  # a bridge hands setattr on to what it wraps
            object.__setattr__(block, "forward", give if block is blocks[-1] else hand_on)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def model_device(model: TransformerBridge) -> torch.device:
    """Where the model's inputs belong."""
    return model.embed.weight.device


def _cache(past: KeyValues) -> DynamicCache:
    """A fresh cache without windows, so that a prefix can be cut anywhere."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys[:, :, :0], values[:, :, :0], layer)
    for held, (keys, values) in zip(_layers(cache), past, strict=True):
        held.keys, held.values = keys, values  # update would copy
    return cache


def _layers(cache: DynamicCache) -> list[Any]:
    """The cache's layers, whose kinds transformers' annotations do not tell apart."""
    return list(cache.layers)
