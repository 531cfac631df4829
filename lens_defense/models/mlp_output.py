"""The MLP output matrix of a layer, always as (d_out, d_in): read, change, restore to the bit, hash.

Only this file knows that GPT-2 stores the matrix transposed. A change is undone by copying the saved
weights back: subtracting it again would be off by rounding (4e-7 in float32).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Linear
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from lens_defense.models.forward import forward, model_device
from lens_defense.sites import component_hook, key_hook


def mlp_output_matrix(model: TransformerBridge, layer: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix from MLP keys to what the MLP adds, as a view of the weight itself.

    Raises:
        ValueError: the model has no such layer, or the layer has no such matrix that can be rewritten
            (mixture of experts, quantised weights, an unknown module).
    """
    blocks = getattr(model, "blocks", ())
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} is not in the model, which has layers 0 to {len(blocks) - 1}")
    mlp = getattr(blocks[layer], "mlp", None)
    module: Any = getattr(getattr(mlp, "out", None), "original_component", None)
    if isinstance(module, Linear | Conv1D) and module.weight.is_floating_point():
        weight = module.weight.detach()
        return weight.T if isinstance(module, Conv1D) else weight
    names = [name for name, _ in blocks[layer].named_modules()]
    if module is not None:
        obstacle = f"an MLP output of the kind {type(module).__name__} with weights of {module.weight.dtype}"
    elif any("expert" in name for name in names):
        obstacle = "a mixture of experts and no single MLP output matrix"
    else:
        obstacle = "an MLP whose output matrix TransformerLens does not name"
    raise ValueError(
        f"layer {layer} of {model.cfg.model_name} cannot be edited: it has {obstacle}; tracing works, "
        "editing needs a dense, unquantised MLP"
    )


def refuse_uneditable(model: TransformerBridge, layers: Iterable[int]) -> None:
    """Refuse layers whose output matrices cannot be edited.

    Raises:
        ValueError: as `mlp_output_matrix`; or the block norms the MLP's output before it joins the residual.
    """
    for layer in layers:
        mlp_output_matrix(model, layer)
        config: Any = model.original_model.config
        post_norm = getattr(config, "do_layer_norm_before", True) is False  # OPT-350m
        if post_norm or "ln2_post" in model.blocks[layer].submodules:
            raise ValueError(
                f"{model.cfg.model_name} norms the MLP's output before or after it joins the residual "
                "stream, so an edit could not be sized; trace it, but edit a pre-norm model"
            )


@torch.no_grad()
def residual_scale(model: TransformerBridge, layer: int) -> float:
    """What a block multiplies its MLP's output by before it joins the residual stream (Granite); mostly 1.

    Measured: the block runs twice, with its keys as they are and doubled.
    """
    key, resid_post = key_hook(layer), component_hook("resid_post", layer)
    ids = torch.ones(1, 1, dtype=torch.long, device=model_device(model))
    stop = layer + 1
    clean = forward(model, ids, capture=[key, resid_post], stop_at_layer=stop).states
    patches = {key: lambda state: 2 * state}
    doubled = forward(model, ids, capture=[resid_post], patches=patches, stop_at_layer=stop).states
    written = clean[key].double() @ mlp_output_matrix(model, layer).T.double()
    added = (doubled[resid_post] - clean[resid_post]).double()
    scale = float((added * written).sum() / written.square().sum().clamp(min=1e-30))
    return 1.0 if abs(scale - 1) < _ROUNDING_OF_SCALE else scale


_ROUNDING_OF_SCALE = 0.02
"""Half precision measures a scale of 1 that well."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """A change that stands in a model."""

    saved_weights: Mapping[int, Tensor]
    """By layer, the output matrix before the change."""
    fingerprint: str
    """Of the same layers, after the change."""


_STANDING: WeakKeyDictionary[TransformerBridge, list[WeightChange]] = WeakKeyDictionary()
"""The changes that stand in each model, oldest first; deleted models are forgotten."""


def apply_change_(
    model: TransformerBridge,
    deltas: Mapping[int, Float[Tensor, "d_out d_in"]],
    *,
    expected: str | None = None,
) -> WeightChange:
    """Add deltas to the output matrices of their layers: all of them, or none.

    Sums are taken in float64 and rounded once. On any failure, an interrupt too, every weight is
    bit-identical to what it was.

    Args:
        model: the model whose weights change.
        deltas: by layer, what to add.
        expected: the fingerprint that the layers must have now; None skips the check.

    Raises:
        ValueError: the layers' fingerprint is not the expected one, or a sum is not finite.
    """
    refuse_uneditable(model, deltas)
    if expected is not None and weights_fingerprint(model, deltas) != expected:
        raise ValueError(
            "this edit was planned on other weights than the model has now; undo what stands in the "
            "way, load the model it was planned on, or plan it again with ld.edit"
        )
    saved_weights = {layer: mlp_output_matrix(model, layer).clone() for layer in deltas}
    stack = _STANDING.setdefault(model, [])
    depth = len(stack)
    try:
        for layer, delta in deltas.items():
            _add_(model, layer, delta)
        change = WeightChange(saved_weights, weights_fingerprint(model, deltas))
        stack.append(change)
    except BaseException:
        _restore_(model, saved_weights)
        del stack[depth:]
        raise
    return change


def undo_change_(model: TransformerBridge, change: WeightChange) -> None:
    """Undo a change bit for bit: only the last one, and only if nothing else touched its weights.

    An interrupt meanwhile is raised once the change is undone.

    Raises:
        ValueError: another change lies on top of this one, or the weights are not as it left them.
    """
    stack = _STANDING.get(model, [])
    if not stack or stack[-1] is not change:
        raise ValueError("another edit lies on top of this one; undo that one first")
    if weights_fingerprint(model, change.saved_weights) != change.fingerprint:
        raise ValueError("the weights were changed by something else since this edit; load the model again")
    try:
        _restore_(model, change.saved_weights)
    except BaseException:
        _restore_(model, change.saved_weights)
        raise
    finally:
        stack.pop()


def standing_changes(model: TransformerBridge) -> tuple[WeightChange, ...]:
    """The changes that stand in a model, oldest first."""
    return tuple(_STANDING.get(model, ()))


def weights_fingerprint(model: TransformerBridge, layers: Iterable[int] | None = None) -> str:
    """A hash of weights with their dtypes and shapes.

    Args:
        model: the model.
        layers: the layers whose output matrices are hashed; None takes every parameter and buffer.
    """
    if layers is None:
        original = model.original_model
        tensors = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    else:
        tensors = {str(layer): mlp_output_matrix(model, layer) for layer in sorted(set(layers))}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def _restore_(model: TransformerBridge, saved_weights: Mapping[int, Tensor]) -> None:
    for layer, weight in saved_weights.items():
        mlp_output_matrix(model, layer).copy_(weight)


@torch.no_grad()
def _add_(model: TransformerBridge, layer: int, delta: Float[Tensor, "d_out d_in"]) -> None:
    weight = mlp_output_matrix(model, layer)
    assert delta.shape == weight.shape, (layer, delta.shape, weight.shape)
    changed = (weight.double() + delta.to(weight.device).double()).to(weight.dtype)
    if not changed.isfinite().all():
        raise ValueError(f"the change of layer {layer} is not finite; nothing was written")
    weight.copy_(changed)
