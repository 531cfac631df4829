"""The MLP output matrix of a layer, always as (d_out, d_in): read, change, restore to the bit, hash.

Only this file knows that GPT-2 stores the matrix transposed. A change is undone by copying the saved
weights back: subtracting it again would be off by rounding (4e-7 in float32). Every change goes through the
model's journal (weight_journal.py), so that it stands whole or not at all, and the journal says which.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Linear
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from lens_defense.models.restoring_block import RestoringBlock, finish
from lens_defense.models.weight_journal import (
    JournalState,
    Maker,
    UndoneEdit,
    WeightChange,
    WeightJournal,
    journal_of,
)


def mlp_output_matrix(model: TransformerBridge, layer: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix from MLP keys to what the MLP adds, as a view of the weight itself.

    Raises:
        ValueError: the model has no such layer, or the layer has no such matrix that can be rewritten
            (mixture of experts, quantised weights, an unknown module).
    """
    refuse_missing_layer(model, layer)
    blocks = model.blocks
    mlp = getattr(blocks[layer], "mlp", None)
    module: Any = getattr(getattr(mlp, "out", None), "original_component", None)
    if isinstance(module, Linear | Conv1D) and module.weight.is_meta:
        raise ValueError(_NO_VALUES)
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


def refuse_missing_layer(model: TransformerBridge, layer: int) -> None:
    """Refuse a layer that a model does not have.

    Raises:
        ValueError: so it is.
    """
    blocks = getattr(model, "blocks", ())
    if not isinstance(layer, Integral) or not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer!r} is not in the model, which has layers 0 to {len(blocks) - 1}")


@dataclass(frozen=True, slots=True)
class OutputModule:
    """The module of an MLP output matrix, as plain transformers has it."""

    name: str
    """As in "model.layers.5.mlp.down_proj"."""
    transposed: bool
    """Whether its weight is stored as (d_in, d_out), as GPT-2's is."""


def output_modules(model: TransformerBridge, layers: Iterable[int]) -> dict[int, OutputModule]:
    """By layer, the module of the output matrix.

    Raises:
        ValueError: as `mlp_output_matrix`.
    """
    modules: dict[int, OutputModule] = {}
    names = {id(module): name for name, module in model.original_model.named_modules()}
    for layer in layers:
        mlp_output_matrix(model, layer)
        module = model.blocks[layer].mlp.out.original_component
        name = names[id(module)].replace("._original_component", "")  # the bridge's own wrappers
        modules[layer] = OutputModule(name, isinstance(module, Conv1D))
    return modules


_NO_VALUES = "the model's weights are on the meta device and have no values; load it on device='cpu' or a GPU"


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


def apply_change_(
    model: TransformerBridge,
    deltas: Mapping[int, Float[Tensor, "d_out d_in"]],
    *,
    refuse: Callable[[], None] = lambda: None,
    maker: Maker | None = None,
    edit: Any = None,
    undone: tuple[UndoneEdit, ...] | None = None,
) -> WeightChange:
    """Add deltas to the output matrices of their layers: all of them, or none.

    Sums are taken in float64 and rounded once. On any failure, an interrupt too, every weight is
    bit-identical to what it was, or the change stands and the journal says so.

    Args:
        model: the model whose weights change.
        deltas: by layer, what to add.
        refuse: raises where the model is not the one that is meant; called before anything is written.
        maker: who makes the change, and may take it back.
        edit: what a ledger applies.
        undone: the edits that can be made again afterwards; None leaves those of now.

    Raises:
        ValueError: a delta is of another shape or kind, a sum is not finite, or another thread is inside a
            `with` block that changes this model.
    """
    refuse_uneditable(model, deltas)
    return _rewrite_(
        model, deltas, lambda layer: _add_(model, layer, deltas[layer]), maker, edit, undone, refuse
    )


def without_changes(model: TransformerBridge) -> RestoringBlock[TransformerBridge]:
    """The model without the changes that stand, for a `with` block; afterwards they stand as before."""
    maker = Maker(threading.get_ident())

    def write_original_weights() -> TransformerBridge:
        _set_aside_(model, maker)
        return model

    return RestoringBlock(write_original_weights, partial(take_back_, model, maker), maker)


def _set_aside_(model: TransformerBridge, maker: Maker) -> None:
    """Write the weights that were there before all that stands: a change like others, to be undone first."""
    with journal_of(model).lock:
        original_weights = _saved_originals(standing_changes(model))
        if original_weights:
            _rewrite_(
                model,
                original_weights,
                lambda layer: _restore_(model, {layer: original_weights[layer]}),
                maker,
            )


def undo_change_(model: TransformerBridge, change: WeightChange) -> None:
    """Undo a change bit for bit: only the last one, and only if nothing else touched its weights.

    An interrupt meanwhile is raised once the change is undone, or before anything was.

    Raises:
        ValueError: another change lies on top of this one, or the weights are not as it left them.
    """
    with journal_of(model).lock:
        if standing_changes(model)[-1:] != (change,):
            raise ValueError(_LIES_BELOW)
        remove_change_(model, change, lambda _: {})  # nothing has to be made again


def remove_change_(
    model: TransformerBridge,
    change: WeightChange,
    deltas_of: Callable[[Any], Mapping[int, Float[Tensor, "d_out d_in"]]],
) -> None:
    """Take a change out from under later ones: as if these had been made without it, bit for bit.

    The weights that were saved before it are the start, and the later edits are added to them again in their
    order, beside the model. Then one assignment to the journal says what is to stand, and the weights are
    written. An interrupt before it changes nothing, one after it is raised once all is done.

    Args:
        model: the model.
        change: a change that stands.
        deltas_of: what a later edit adds, by layer.

    Raises:
        ValueError: the change does not stand, somebody else's lies on top, something else touched the weights
            since, or a sum would not be finite.
    """
    journal = journal_of(model)
    with journal.lock:
        settle(model)
        state = journal.state
        place = next((i for i, standing in enumerate(state.standing) if standing is change), None)
        if place is None:
            raise ValueError("this change does not stand in the model")
        before, later = state.standing[:place], state.standing[place + 1 :]
        if any(other.maker is not change.maker for other in later):
            raise ValueError(_LIES_BELOW)
        _refuse_touched(model, state.standing, range(place, len(state.standing)))
        originals = _saved_originals(state.standing)
        weights, remade = dict(change.saved_weights), []
        for other in later:
            if other.saved_weights.keys().isdisjoint(weights):
                remade.append(other)
                continue
            saved = {layer: weights.get(layer, weight) for layer, weight in other.saved_weights.items()}
            deltas = deltas_of(other.edit)
            sums = {layer: _sum(layer, weight, deltas[layer]) for layer, weight in saved.items()}
            remade.append(replace(other, saved_weights=saved, fingerprint=_hash_of_layers(sums)))
            weights |= sums
        undone = state.undone
        if change.edit is not None:
            hashes = {layer: _hash_of_layers({layer: originals[layer]}) for layer in change.saved_weights}
            undone = (*undone, UndoneEdit(change.maker, change.edit, hashes))
        try:
            journal.state = JournalState((*before, *remade), undone, weights)
            settle(model)
        finally:
            settle(model)


def refuse_other_originals(model: TransformerBridge, undone: UndoneEdit) -> None:
    """Refuse weights on which an edit that was taken back may not be made again.

    Raises:
        ValueError: something else than the edits that stand has changed the layers since.
    """
    standing, layers = standing_changes(model), undone.original_hashes.keys()
    _refuse_touched(
        model,
        standing,
        [i for i, change in enumerate(standing) if not layers.isdisjoint(change.saved_weights)],
    )
    originals = _matrices(model, layers) | _saved_originals(standing)
    for layer, original_hash in undone.original_hashes.items():
        if _hash_of_layers({layer: originals[layer]}) != original_hash:
            raise ValueError(_TOUCHED)


_LIES_BELOW = "another edit lies on top of this one; undo that one first"
_TOUCHED = "the weights were changed by something else since this edit; load the model again"


def take_back_(model: TransformerBridge, maker: Maker) -> None:
    """Undo every change that a maker has in the model; none may be fine.

    Raises:
        ValueError: as `undo_change_`.
    """
    for change in reversed(standing_changes(model)):
        if change.maker is maker:
            undo_change_(model, change)


def temporary_changes(model: TransformerBridge) -> RestoringBlock[Maker]:
    """A `with` block for changes, of the maker that it gives; it takes them back however it is left."""
    maker = Maker(threading.get_ident())
    return RestoringBlock(lambda: maker, partial(take_back_, model, maker), maker)


def standing_changes(model: TransformerBridge) -> tuple[WeightChange, ...]:
    """The changes that stand in a model, oldest first."""
    settle(model)
    return journal_of(model).state.standing


def settle(model: TransformerBridge) -> None:
    """Put right what interrupts left: half-written weights, the change of a `with` block that is over.

    Whatever reads or changes the weights calls this first. It waits for another thread's change of now.
    """
    journal = journal_of(model)
    state = journal.state
    if state.unfinished is not None or (state.standing and state.standing[-1].maker.left):
        with journal.lock:
            finish(partial(_put_right_, model, journal))


def weights_fingerprint(model: TransformerBridge, layers: Iterable[int] | None = None) -> str:
    """A hash of weights with their dtypes and shapes.

    Args:
        model: the model.
        layers: the layers whose output matrices are hashed; None takes every parameter and buffer.
    """
    settle(model)
    if layers is not None:
        return _hash_of_layers(_matrices(model, layers))
    original = model.original_model
    return _hash_of({**dict(original.named_parameters()), **dict(original.named_buffers())})


def original_weights_fingerprint(model: TransformerBridge, layers: Iterable[int]) -> str:
    """The hash that `weights_fingerprint` gives of layers without the changes that stand."""
    originals = _saved_originals(standing_changes(model))
    matrices = _matrices(model, layers)
    return _hash_of_layers({layer: originals.get(layer, matrix) for layer, matrix in matrices.items()})


def _matrices(model: TransformerBridge, layers: Iterable[int]) -> dict[int, Tensor]:
    return {layer: mlp_output_matrix(model, layer) for layer in layers}


def _hash_of_layers(weights: Mapping[int, Tensor]) -> str:
    return _hash_of({str(layer): weights[layer] for layer in sorted(weights)})


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(_NO_VALUES)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _rewrite_(
    model: TransformerBridge,
    layers: Iterable[int],
    write: Callable[[int], None],
    maker: Maker | None = None,
    edit: Any = None,
    undone: tuple[UndoneEdit, ...] | None = None,
    refuse: Callable[[], None] = lambda: None,
) -> WeightChange:
    """Write layers: the journal first, with what has to be put back if this does not come to its end."""
    maker, journal = maker or Maker(), journal_of(model)
    with journal.lock:
        settle(model)
        state = journal.state
        if any(change.maker.thread not in (None, threading.get_ident()) for change in state.standing):
            raise ValueError(
                "another thread is inside a `with` block that changes this model; wait until it is left, "
                "or give each thread a model of its own"
            )
        refuse()
        saved_weights = {layer: mlp_output_matrix(model, layer).clone() for layer in layers}
        try:
            journal.state = replace(state, unfinished=saved_weights)
            for layer in saved_weights:
                write(layer)
            fingerprint = _hash_of_layers(_matrices(model, saved_weights))
            change = WeightChange(saved_weights, fingerprint, maker, edit)
            undone = state.undone if undone is None else undone
            journal.state = JournalState((*state.standing, change), undone)
        finally:
            try:
                settle(model)
            finally:  # an interrupt can come before the first line of the call above
                settle(model)
    return change


def _put_right_(model: TransformerBridge, journal: WeightJournal) -> None:
    while True:
        state = journal.state
        if state.unfinished is not None:
            _restore_(model, state.unfinished)
            journal.state = replace(state, unfinished=None)
        elif state.standing and state.standing[-1].maker.left and _is_untouched(model, state.standing[-1]):
            journal.state = JournalState(state.standing[:-1], state.undone, state.standing[-1].saved_weights)
        else:
            return


def _is_untouched(model: TransformerBridge, change: WeightChange, later: Sequence[WeightChange] = ()) -> bool:
    """Whether the weights are as the change left them, later changes aside."""
    saved_later = _saved_originals(later)
    weights = {
        layer: saved_later.get(layer, matrix)
        for layer, matrix in _matrices(model, change.saved_weights).items()
    }
    return _hash_of_layers(weights) == change.fingerprint


def _refuse_touched(
    model: TransformerBridge, standing: Sequence[WeightChange], places: Iterable[int]
) -> None:
    if not all(_is_untouched(model, standing[i], standing[i + 1 :]) for i in places):
        raise ValueError(_TOUCHED)


def _saved_originals(changes: Sequence[WeightChange]) -> dict[int, Tensor]:
    """By layer, what was saved before the first of the changes."""
    originals: dict[int, Tensor] = {}
    for change in changes:
        originals = {**change.saved_weights, **originals}
    return originals


def _restore_(model: TransformerBridge, saved_weights: Mapping[int, Tensor]) -> None:
    for layer, weight in saved_weights.items():
        mlp_output_matrix(model, layer).copy_(weight)


def _add_(model: TransformerBridge, layer: int, delta: Float[Tensor, "d_out d_in"]) -> None:
    weight = mlp_output_matrix(model, layer)
    weight.copy_(_sum(layer, weight, delta))


def _sum(
    layer: int, weight: Float[Tensor, "d_out d_in"], delta: Float[Tensor, "rows columns"]
) -> Float[Tensor, "d_out d_in"]:
    """A weight with its change added in float64, rounded once."""
    if delta.shape != weight.shape or not delta.is_floating_point():
        raise ValueError(
            f"the change of layer {layer} is {list(delta.shape)} of {delta.dtype}, but the matrix there is "
            f"{list(weight.shape)} of real numbers; apply it to the model that it was planned on"
        )
    changed = (weight.double() + delta.to(weight.device).double()).to(weight.dtype)
    if not changed.isfinite().all():
        raise ValueError(f"the change of layer {layer} is not finite; nothing was written")
    return changed
