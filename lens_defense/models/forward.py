"""One forward pass of a model: capture states, patch states, continue behind a prefix's keys and values.

`forward` sets its hooks, runs the model once and removes them. Nothing of it stays in the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from lens_defense.models.mlp_output import settle
from lens_defense.models.restoring_block import RestoringBlock, finish
from lens_defense.sites import component_hook

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Attention keys and values of every layer, each [batch, head, token, d_head]."""
StateWrite = Callable[[Tensor], Tensor]
"""From a state [batch, token, width] to the state that a hook puts in its place."""

Hooks = Sequence[tuple[str, Callable[..., Any]]]
"""Hook names and what is called there, from a state to the one in its place, or to None."""
Result = TypeVar("Result")

_UNEMBED_INPUT = "unembed.hook_in"


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """What one forward pass computed."""

    logits: Float[Tensor, "batch position vocab"]
    """Of the last `logits_to_keep` positions."""
    states: Mapping[str, Tensor]
    """Captured states by hook name, each [batch, token, width]."""
    key_values: KeyValues


def forward(
    model: TransformerBridge,
    ids: Int[Tensor, "batch token"],
    *,
    capture: Sequence[str] = (),
    patches: Mapping[str, StateWrite] | None = None,
    attention_mask: Int[Tensor, "batch past_and_token"] | None = None,
    past_key_values: KeyValues = (),
    logits_to_keep: int = 1,
    stop_at_layer: int | None = None,
) -> ForwardPass:
    """Run the model once; hooks live as long as the call.

    Args:
        model: the model; it stays as it is.
        ids: token ids, without the tokens that `past_key_values` covers.
        capture: hook names of the states to return, as they are after the patches.
        patches: by hook name, what to put in the place of a state.
        attention_mask: 1 for tokens, 0 for padding, over past and new tokens; None where nothing is padded.
        past_key_values: keys and values of the tokens before, from an earlier ForwardPass.
        logits_to_keep: how many positions at the end get logits.
        stop_at_layer: the first block that is not run; then there are no logits. None runs the whole model.

    Raises:
        ValueError: the model keeps no keys and values.
    """
    settle(model)
    states: dict[str, Tensor] = {}

    def write_hook(write: StateWrite) -> Callable[..., Tensor]:
        return lambda state, **_: write(state)

    def capture_hook(name: str) -> Callable[..., None]:
        return lambda state, **_: states.__setitem__(name, state)

    hooks = _padding_hooks(model, attention_mask, ids.shape[1])
    hooks += [(name, write_hook(write)) for name, write in (patches or {}).items()]
    hooks += [(name, capture_hook(name)) for name in capture]
    hooks += [(_UNEMBED_INPUT, _copy_contiguous)]
    cache = _cache_of(past_key_values)
    stops_early = stop_at_layer is not None and stop_at_layer < model.cfg.n_layers
    run = partial(
        model,
        ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        logits_to_keep=logits_to_keep,
        return_type="logits",
        stop_at_layer=stop_at_layer if stops_early else None,
    )
    output = with_hooks(model, hooks, run)
    layers = _cache_layers(cache)
    if not layers or getattr(layers[-1], "keys", None) is None:
        raise ValueError(
            f"{model.cfg.model_name} keeps no keys and values of attention for the tokens to come; load a "
            "model whose layers are all attention"
        )
    return ForwardPass(
        logits=output[:, :0] if stops_early else output,
        states=states,
        key_values=tuple((layer.keys, layer.values) for layer in layers if layer.keys is not None),
    )


def with_hooks(model: TransformerBridge, hooks: Hooks, run: Callable[[], Result]) -> Result:
    """Call a function while hooks, by their names, are in the model; none of them stays there."""
    try:
        try:
            with model.hooks(fwd_hooks=list(hooks)):
                return run()
        except BaseException:
            finish(partial(_clear_run, model, hooks))
            raise
    except KeyboardInterrupt:  # a second one can come before the first line of the call above
        finish(partial(_clear_run, model, hooks))
        raise


def temporary_hooks(model: TransformerBridge, hooks: Hooks) -> RestoringBlock[TransformerBridge]:
    """A `with` block in which hooks, by their names, are in the model, before those of runs inside it."""

    def add_hooks() -> TransformerBridge:
        for name, function in hooks:
            model.add_hook(name, function)
        return model

    return RestoringBlock(add_hooks, partial(_remove_hooks, model, hooks))


def refuse_hooks(model: TransformerBridge) -> None:
    """Refuse a model with hooks that stay between runs, where what is computed is kept by its weights alone.

    Raises:
        ValueError: there is one.
    """
    for name, point in model.hook_dict.items():
        if any(not handle.is_permanent for handle in point.fwd_hooks):
            raise ValueError(
                f"there is a hook at {name}, as inside ld.steered; plan edits outside: what they keep on "
                "disk is known by the weights alone"
            )


def _clear_run(model: TransformerBridge, hooks: Hooks) -> None:
    """Take out what an interrupt can leave of a run: hooks, and the layer to stop at."""
    _remove_hooks(model, hooks)
    for block in model.blocks:
        block._stop_at_layer_idx = None


def _remove_hooks(model: TransformerBridge, hooks: Hooks) -> None:
    """Take hooks out, wherever in the model they are; none may be fine."""
    functions = [function for _, function in hooks]
    names = {repr(function) for function in functions}  # as the model calls its hooks
    for point in model.hook_dict.values():
        point.fwd_hooks[:] = [handle for handle in point.fwd_hooks if handle.user_hook not in functions]
        for key, hook in list(point._forward_hooks.items()):
            if getattr(hook, "__name__", "") in names:
                del point._forward_hooks[key]


def frozen_weights(model: TransformerBridge) -> RestoringBlock[None]:
    """No gradient reaches a weight inside; gradients of states are free."""
    parameters = [p for p in model.original_model.parameters() if p.requires_grad]

    def require_grad(required: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(required)

    return RestoringBlock(partial(require_grad, False), partial(require_grad, True))


def start_after_block(
    model: TransformerBridge, layer: int, block_output: Callable[[], Tensor]
) -> RestoringBlock[None]:
    """Inside, a forward pass starts after a block: blocks up to `layer` are skipped.

    Args:
        model: the model; its blocks are as before afterwards.
        layer: the last block that is skipped.
        block_output: called once per forward pass for that block's output [batch, token, d_model].
    """
    after_state = _block_returns_after_state(model)

    def as_block_returns(state: Tensor) -> Any:
        return state if after_state is None else (state, *(None,) * after_state)

    def pass_through(*args: Any, **settings: Any) -> Any:
        return as_block_returns(args[0] if args else settings["hidden_states"])

    def give_output(*_: Any, **__: Any) -> Any:
        return as_block_returns(block_output())

    blocks = [model.blocks[i] for i in range(layer + 1)]

    def replace_forward() -> None:
        for block in blocks:  # a bridge's own setattr would reach the module that it wraps
            object.__setattr__(block, "forward", give_output if block is blocks[-1] else pass_through)

    def restore_forward() -> None:
        for block in blocks:
            vars(block).pop("forward", None)

    return RestoringBlock(replace_forward, restore_forward)


_RETURNS: WeakKeyDictionary[TransformerBridge, int | None] = WeakKeyDictionary()


def _block_returns_after_state(model: TransformerBridge) -> int | None:
    """How many things a block returns after the residual stream; None where that alone. Looked at once."""
    if model not in _RETURNS:
        returned: list[Any] = []
        handle = model.blocks[0].register_forward_hook(lambda _module, _args, output: returned.append(output))
        try:
            with torch.no_grad():
                forward(
                    model, torch.zeros(1, 1, dtype=torch.long, device=model_device(model)), stop_at_layer=1
                )
        finally:
            handle.remove()
        _RETURNS[model] = len(returned[0]) - 1 if isinstance(returned[0], tuple) else None
    return _RETURNS[model]


def model_device(model: TransformerBridge) -> torch.device:
    """The device where the model wants its inputs."""
    return model.embed.weight.device


def _copy_contiguous(state: Tensor, **_: Any) -> Tensor:
    """Copy the last columns of a batch: on a strided view torch multiplies row by row, at half the speed."""
    return state.contiguous()


def _padding_hooks(model: TransformerBridge, attention_mask: Tensor | None, width: int) -> list[Any]:
    """Set the attention output of padding to 0.

    Padding attends to nothing. In float64 its softmax is NaN, and weights of 0 would spread the NaN.
    """
    if attention_mask is None or attention_mask.all() or model.embed.weight.dtype != torch.float64:
        return []
    is_token = attention_mask[:, -width:, None].bool()

    def clear_padding(state: Tensor, **_: Any) -> Tensor:
        return state.where(is_token, 0)

    return [(component_hook("attn_out", layer), clear_padding) for layer in range(model.cfg.n_layers)]


def _cache_of(past_key_values: KeyValues) -> DynamicCache:
    """A fresh cache without sliding windows, so that a prefix can be cut anywhere."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past_key_values):
        cache.update(keys[:, :, :0], values[:, :, :0], layer)
    for cache_layer, (keys, values) in zip(_cache_layers(cache), past_key_values, strict=True):
        cache_layer.keys, cache_layer.values = keys, values  # update would copy
    return cache


def _cache_layers(cache: DynamicCache) -> list[Any]:
    """The cache's layers, untyped: transformers' annotations do not tell their kinds apart."""
    return list(cache.layers)
