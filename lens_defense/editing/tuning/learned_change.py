"""The gradients that a learned method reads, and the change that it makes of them.

The gradient of a matrix is a sum of outer products, value gradient times key, over tokens. So both are read
where the matrix stands, at its input and at its output, and the gradient itself is never made. No weight is
touched, nor is its gradient asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods.answer_losses import teacher_forced_losses
from lens_defense.editing.methods.learned_method import EditGradients, LearnedMethod, MatrixShape
from lens_defense.editing.methods.method import Factors
from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.editing.tuning.answer_rows import AnswerRow, answer_logits, first_losses
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import StateWrite, frozen_weights, model_device
from lens_defense.models.mlp_output import mlp_output_matrix, without_changes
from lens_defense.shown_text import shown
from lens_defense.sites import key_hook, value_hook

BATCH_SIZE = 8
"""Rows whose gradients are read together."""


def matrix_shape(model: TransformerBridge, layers: Sequence[int]) -> MatrixShape:
    """The shape of the layers' output matrices.

    Raises:
        ValueError: they differ, or a layer cannot be edited.
    """
    shapes = {layer: tuple(mlp_output_matrix(model, layer).shape) for layer in layers}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the output matrices of {model.cfg.model_name} have different shapes ({shapes}), and a learned "
            "method has one network for all; name layers of one shape"
        )
    ((d_out, d_in),) = set(shapes.values())
    return MatrixShape(d_out, d_in, int(model.embed.weight.shape[1]))


def edit_gradients(
    model: TransformerBridge, layers: Sequence[int], rows: Sequence[AnswerRow]
) -> list[EditGradients]:
    """The gradients of each row's own loss, in nats per token of its answer.

    Args:
        model: the model; no weight is touched.
        layers: whose output matrices are looked at.
        rows: a request's prompt with the refusal, each an edit.

    Returns:
        Of each row; without a graph, in the order of the rows. A token that has no gradient in a layer, as
        those of the prompt in the last one, is left out there.
    """
    edits = []
    with frozen_weights(model), torch.enable_grad():
        for start in range(0, len(rows), BATCH_SIZE):
            edits += _gradients_of_batch(model, layers, rows[start : start + BATCH_SIZE])
    return edits


def _gradients_of_batch(
    model: TransformerBridge, layers: Sequence[int], rows: Sequence[AnswerRow]
) -> list[EditGradients]:
    keys: dict[int, Tensor] = {}
    shifts: dict[int, Tensor] = {}
    patches: dict[str, StateWrite] = {}

    def watch(layer: int) -> None:
        def see(state: Tensor) -> Tensor:
            keys[layer] = state.detach()
            return state

        def shift(value: Tensor) -> Tensor:  # by 0, whose gradient is the value's
            shifts[layer] = torch.zeros_like(value).requires_grad_()
            return value + shifts[layer]

        patches.update({key_hook(layer): see, value_hook(layer): shift})

    for layer in layers:
        watch(layer)
    loss = teacher_forced_losses(answer_logits(model, rows, patches=patches)).sum()
    gradients = dict(zip(layers, torch.autograd.grad(loss, [shifts[layer] for layer in layers]), strict=True))
    edits = []
    for i, row in enumerate(rows):
        tokens = len(row.ids) + len(row.answer) - 1  # the others are padding, in front
        read = {layer: gradients[layer][i].any(-1) for layer in layers}
        for is_read in read.values():
            is_read[: len(is_read) - tokens] = False
        edits.append(
            EditGradients(
                row.owner,
                model.embed.weight[[*row.ids, *row.answer]].detach(),
                {layer: keys[layer][i, read[layer]] for layer in layers},
                {layer: gradients[layer][i, read[layer]] for layer in layers},
            )
        )
    return edits


def require_trained_on(method: LearnedMethod, model: TransformerBridge, layers: Sequence[int]) -> None:
    """One sentence where a learned method is not this model's, or not of these layers.

    Edits that stand in the model are set aside for the look: they may be there.

    Raises:
        ValueError: the method was not trained, or on another model or for other layers.
    """
    if method.origin is None:
        raise ValueError(
            f"this {method.name} was not trained; ld.train_editor trains one, and ld.load_editor reads it"
        )
    with without_changes(model):
        now = model_fingerprint(model)
    if differing := method.origin.fingerprint.differing(now, "weights", "config", "tokenizer"):
        raise ValueError(
            f"this {method.name} was trained on other {differing} of {shown(method.origin.model)} than "
            f"{model.cfg.model_name} has; train one on this model, as lens-defense train-editor does"
        )
    if tuple(layers) != method.layers:
        raise ValueError(
            f"this {method.name} was trained for the layers {', '.join(map(str, method.layers))}, and the "
            f"sites are in {', '.join(map(str, layers))}; give sites in its layers, or train one for these"
        )


def learned_change(
    model: TransformerBridge, method: LearnedMethod, refusals: Sequence[AnswerRow]
) -> tuple[dict[int, Factors], list[float]]:
    """The change of each layer that a learned method makes, in one step.

    Args:
        model: the model; no weight is touched.
        method: the method, trained on this model.
        refusals: contexts of each request, the request as asked first, with the refusal; the first of each is
            what the method reads.

    Returns:
        The factors by layer; and for each request, what is left of the first context's loss, in nats per
        token.
    """
    first = list({row.owner: row for row in reversed(refusals)}.values())
    first.sort(key=lambda row: row.owner)
    edits = edit_gradients(model, method.layers, first)
    with torch.no_grad():
        changes = method.to(model_device(model)).changes(edits)
    owners = method.owners(edits)
    losses = first_losses(model, changes, first, BATCH_SIZE)
    return {layer: _factors(change, owners[layer]) for layer, change in changes.items()}, losses


def _factors(change: LayerChange, owners: Sequence[int]) -> Factors:
    """A rank per token; the whole matrix where that is smaller, as of many requests."""
    assert change.right is not None
    delta_shape = change.left.shape[0], change.right.shape[1]
    if len(owners) > min(delta_shape):
        return LayerChange(change.left @ change.right).factors(frozenset(owners))
    factors = change.factors(frozenset(owners))
    return factors._replace(owners=tuple(frozenset([owner]) for owner in owners))
