"""The screen: every cell of a map estimated by one gradient (attribution patching, Nanda 2023).

To first order, putting the donor's states x' in the place of the base's x moves a metric by

    sum over the cell's points of (x' - x) . d metric / d x

which costs one gradient of the base run, however many cells there are. In a window of outputs, what passes
from one layer to the next is counted twice. TransformerLens's own tool takes pairs of token prompts; noise
has no tokens, so the gradient is taken here.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import ForwardPass, StateWrite, forward, frozen_weights
from lens_defense.sites import EMBEDDING_HOOK, head_index
from lens_defense.tracing.activation_patching import Measure, PatchCell, PatchPoint, donor_hooks


def attribution_patching(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    embeddings: Float[Tensor, "sample token d_model"],
    donor: ForwardPass,
    cells: Sequence[PatchCell],
    measure: Measure,
    *,
    keep: int,
) -> Float[Tensor, "cell sample reading"]:
    """What `sweep` would measure, to first order.

    Args:
        model: the model.
        ids: the prompt and its answer but the answer's last token.
        embeddings: of the base run, one row a sample.
        donor: the run whose states are put in, with `donor_hooks` kept; one row, or one a sample.
        cells: the interventions.
        measure: reads the answer's logits, some numbers a row.
        keep: how many positions at the end predict the answer.

    Raises:
        ValueError: a cell holds severed states, which a gradient at the base run cannot see.
    """
    if any(cell.severed for cell in cells):
        raise ValueError("severed graphs are measured exactly; leave exact at True")
    names = donor_hooks(cells)
    with frozen_weights(model), torch.enable_grad():
        start = embeddings.detach().clone().requires_grad_()
        rows = ids.expand(len(embeddings), -1)
        states: dict[str, Tensor] = {}

        def kept(name: str) -> StateWrite:
            """A state that the model goes on with, which what a hook sees need not be."""
            return lambda state: states.setdefault(name, state.clone())

        writes = {EMBEDDING_HOOK: lambda _: start, **{name: kept(name) for name in names}}
        told = measure(forward(model, rows, patches=writes, logits_to_keep=keep).logits)
        slopes = [
            torch.autograd.grad(told[:, k].sum(), list(states.values()), retain_graph=k + 1 < told.shape[1])
            for k in range(told.shape[1])
        ]
    readings = [
        {
            name: ((donor.states[name] - state.detach()) * slope).double()
            for (name, state), slope in zip(states.items(), part, strict=True)
        }
        for part in slopes
    ]

    def moved(point: PatchPoint, products: dict[str, Tensor]) -> Float[Tensor, " sample"]:
        there, head = products[point.hook][:, point.position], head_index(point.component)
        return (there if head is None else there[:, head]).sum(-1)

    gains = [
        [torch.stack([moved(point, part) for point in cell.points]).sum(0) for part in readings]
        for cell in cells
    ]
    first = told.detach().double()
    return torch.stack([first + torch.stack(gain, 1) for gain in gains]).cpu()
