"""Tuning: Adam goes down a method's loss by changing MLP output matrices.

No weight is touched (answer_rows.py). So nothing has to be put back, and an interrupt leaves the model as it
was. Batches are drawn in an order that a seed shuffles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods import TuningMethod
from lens_defense.editing.methods.answer_losses import AnswerLogits
from lens_defense.editing.methods.method import Factors
from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.editing.tuning.answer_rows import AnswerRow, answer_logits, first_losses
from lens_defense.models.forward import frozen_weights
from lens_defense.models.mlp_output import mlp_output_matrix

TUNING_SEED = 0
"""Of the order in which rows are seen, and of the factors that a method starts from."""


def tune(
    model: TransformerBridge,
    method: TuningMethod,
    layers: Sequence[int],
    refusals: Sequence[AnswerRow],
    harmless: Sequence[AnswerRow] = (),
    *,
    progress: Callable[[float], object] = lambda _: None,
) -> tuple[dict[int, Factors], list[float]]:
    """The change of each layer after the method's steps.

    Args:
        model: the model; no weight is touched.
        method: the loss, its descent and its bounds.
        layers: whose output matrices are changed.
        refusals: contexts of each request, the request as asked first, with the refusal.
        harmless: harmless uses with the unchanged model's answers, and general texts with the corpus's.
        progress: is told the loss after each step.

    Returns:
        The factors by layer; and for each request, what is left of the first context's loss, in nats per
        token.
    """
    generator = torch.Generator().manual_seed(TUNING_SEED)
    with frozen_weights(model), torch.enable_grad():
        changes = {layer: method.start(_at_least_single(model, layer), generator) for layer in layers}
        parameters = [part.requires_grad_() for change in changes.values() for part in change.parameters]
        adam = torch.optim.Adam(parameters, lr=method.lr)
        refusal_batches = _batches(refusals, method.batch_size, generator)
        harmless_batches = _batches(harmless, method.batch_size, generator)
        for _ in range(method.steps):
            step = _Step(model, changes, next(refusal_batches), next(harmless_batches))
            loss = method.loss(step)
            if loss >= method.enough:
                adam.zero_grad()
                loss.backward()
                adam.step()
                with torch.no_grad():
                    for change in changes.values():
                        method.project_(change)
            progress(float(loss.detach()))
        owners = frozenset(row.owner for row in refusals)
        losses = first_losses(model, changes, refusals, method.batch_size)
    return {layer: change.factors(owners) for layer, change in changes.items()}, losses


def _at_least_single(model: TransformerBridge, layer: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix; half precision, in which small steps are lost, as single precision."""
    weight = mlp_output_matrix(model, layer)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _batches(
    rows: Sequence[AnswerRow], batch_size: int, generator: torch.Generator
) -> Iterator[list[AnswerRow]]:
    """Batches without end: the rows are shuffled, used up, and shuffled again. Of no rows empty ones."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(batch_size, len(rows)):
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in waiting[:batch_size]]
        waiting = waiting[batch_size:]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A TuningStep: rows that are run when a loss asks for them."""

    model: TransformerBridge
    changes: Mapping[int, LayerChange]
    refusal_rows: Sequence[AnswerRow]
    harmless_rows: Sequence[AnswerRow]

    def refusals(self, decoded_layers: int = 1) -> AnswerLogits:
        return answer_logits(self.model, self.refusal_rows, self.changes, decoded_layers=decoded_layers)

    def harmless(self) -> AnswerLogits:
        return answer_logits(self.model, self.harmless_rows, self.changes)

    def harmless_before(self) -> Float[Tensor, "row token vocab"]:
        with torch.no_grad():
            return answer_logits(self.model, self.harmless_rows).logits
