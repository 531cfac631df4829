"""The MLP output matrix of a layer, always as (d_out, d_in): read, write, restore to the bit, hash.

Only this file knows that GPT-2 stores the matrix the other way round. Undo by subtracting a change
is not exact (4e-7 in float32), so the original bits are kept.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Linear
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D


def mlp_output_matrix(model: TransformerBridge, layer: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix from MLP keys to what the MLP adds, as a view of the weight itself.

    Raises:
        ValueError: the layer has no such matrix that can be rewritten (mixture of experts, quantised
            weights, an unknown module), or the model has no such layer.
    """
    module = _output_module(model, layer)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def refuse_uneditable(model: TransformerBridge, layers: Iterable[int]) -> None:
    """One sentence where a change of these layers' output matrices could not be what it promises.

    Raises:
        ValueError: as output_matrix; or the block norms the MLP's output before it joins the residual.
    """
    for layer in layers:
        mlp_output_matrix(model, layer)
        if "ln2_post" in model.blocks[layer].submodules:
            raise ValueError(
                f"{model.cfg.model_name} norms the MLP's output before it joins the residual stream, "
                "so an edit could not be sized; trace it, but edit a pre-norm model"
            )


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """A change that stands in a model: the bits from before it, and the hash from after it."""

    bits: Mapping[int, Tensor]
    after: str


_STANDING: WeakKeyDictionary[TransformerBridge, list[WeightChange]] = WeakKeyDictionary()
"""The changes that stand in each model, oldest first; models that are gone are forgotten."""


def apply_change_(
    model: TransformerBridge,
    deltas: Mapping[int, Float[Tensor, "d_out d_in"]],
    *,
    expected: str | None = None,
) -> WeightChange:
    """Add deltas to the output matrices of their layers: all of them, or none at all.

    Sums are taken in float64 and rounded once. On any failure, an interrupt too, every weight is
    bit-identical to what it was.

    Raises:
        ValueError: the layers' fingerprint is not the expected one, or a sum is not finite.
    """
    refuse_uneditable(model, deltas)
    if expected is not None and weights_fingerprint(model, deltas) != expected:
        raise ValueError(
            "this edit was planned on other weights than the model has now; undo what stands in the "
            "way, load the model it was planned on, or plan it again with ld.edit"
        )
    bits = {layer: mlp_output_matrix(model, layer).clone() for layer in deltas}
    stack = _STANDING.setdefault(model, [])
    depth = len(stack)
    try:
        for layer, delta in deltas.items():
            _add_(model, layer, delta)
        change = WeightChange(bits=bits, after=weights_fingerprint(model, deltas))
        stack.append(change)
    except BaseException:
        _restore_(model, bits)
        del stack[depth:]
        raise
    return change


def undo_change_(model: TransformerBridge, change: WeightChange) -> None:
    """Take a change back, bit for bit; only the last one, and only if nothing touched its weights.

    An interrupt meanwhile is raised when the change is taken back.

    Raises:
        ValueError: another change lies on top of this one, or the weights are not as it left them.
    """
    stack = _STANDING.get(model, [])
    if not stack or stack[-1] is not change:
        raise ValueError("another edit lies on top of this one; undo that one first")
    if weights_fingerprint(model, change.bits) != change.after:
        raise ValueError("the weights were changed by something else since this edit; load the model again")
    try:
        _restore_(model, change.bits)
    except BaseException:
        _restore_(model, change.bits)
        raise
    finally:
        stack.pop()


def standing_changes(model: TransformerBridge) -> tuple[WeightChange, ...]:
    """The changes that stand in a model, oldest first."""
    return tuple(_STANDING.get(model, ()))


@torch.no_grad()
def _restore_(model: TransformerBridge, bits: Mapping[int, Tensor]) -> None:
    for layer, saved in bits.items():
        mlp_output_matrix(model, layer).copy_(saved)


@torch.no_grad()
def _add_(model: TransformerBridge, layer: int, delta: Float[Tensor, "d_out d_in"]) -> None:
    weight = mlp_output_matrix(model, layer)
    assert delta.shape == weight.shape, (layer, delta.shape, weight.shape)
    changed = (weight.double() + delta.to(weight.device).double()).to(weight.dtype)
    if not changed.isfinite().all():
        raise ValueError(f"the change of layer {layer} is not finite; nothing was written")
    weight.copy_(changed)


def weights_fingerprint(model: TransformerBridge, layers: Iterable[int] | None = None) -> str:
    """A hash of weights with their dtypes and shapes.

    Args:
        model: the model.
        layers: the layers whose output matrices are hashed; None takes every parameter and buffer.
    """
    digest = hashlib.sha256()
    if layers is None:
        whole = model.original_model
        tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    else:
        tensors = {str(layer): mlp_output_matrix(model, layer) for layer in sorted(set(layers))}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _output_module(model: TransformerBridge, layer: int) -> Linear | Conv1D:
    blocks = getattr(model, "blocks", ())
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} is not in the model, which has layers 0 to {len(blocks) - 1}")
    mlp = getattr(blocks[layer], "mlp", None)
    module = getattr(getattr(mlp, "out", None), "original_component", None)
    if (
        isinstance(module, Linear | Conv1D)
        and type(module) in (Linear, Conv1D)
        and module.weight.is_floating_point()
    ):
        return module
    what = "no single MLP output matrix" if module is None else type(module).__name__
    raise ValueError(
        f"layer {layer} of {model.cfg.model_name} cannot be edited: it has {what} (mixture of experts, or "
        "quantised weights); tracing works, editing needs a dense, unquantised model"
    )
