"""Attribution patching (Nanda 2023): every cell of a map, estimated by one gradient of the base run.

To first order, putting the donor run's states x' in the place of the base run's x changes a metric by

    sum over the cell's points of (x' - x) . d metric / d x

In a window of outputs, what one layer passes on to the next counts twice. TransformerLens's own tool takes
pairs of token prompts; noise has no tokens, so the gradient is taken here.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import ForwardPass, StateWrite, forward, frozen_weights
from lens_defense.patching.metrics import Measure
from lens_defense.patching.patch_cell import PatchCell, donor_hooks
from lens_defense.sites import EMBEDDING_HOOK


def attribution_patching(
    model: TransformerBridge,
    ids: Int[Tensor, "1 token"],
    embeddings: Float[Tensor, "sample token d_model"],
    donor: ForwardPass,
    cells: Sequence[PatchCell],
    measure: Measure,
    *,
    keep: int,
) -> Float[Tensor, "cell sample metric"]:
    """What `sweep` would measure, to first order.

    Args:
        model: the model.
        ids: the prompt and its answer but the answer's last token.
        embeddings: of the base run, one row per sample.
        donor: the run whose states are put in, with those of `donor_hooks`; one row, or one per sample.
        cells: the interventions.
        measure: reads the answer's logits, one or more metrics per row.
        keep: how many positions at the end predict the answer.

    Raises:
        ValueError: a cell has severed states, which a gradient at the base run cannot see.
    """
    if any(cell.severed for cell in cells):
        raise ValueError("severed graphs are measured exactly; leave exact at True")
    hooks = donor_hooks(cells)
    with frozen_weights(model), torch.enable_grad():
        inputs = embeddings.detach().clone().requires_grad_()
        states: dict[str, Tensor] = {}

        def capture(hook: str) -> StateWrite:
            """Return the captured copy, so that the model goes on with it and a gradient reaches it."""
            return lambda state: states.setdefault(hook, state.clone())

        patches = {EMBEDDING_HOOK: lambda _: inputs, **{hook: capture(hook) for hook in hooks}}
        rows = ids.expand(len(embeddings), -1)
        metrics = measure(forward(model, rows, patches=patches, logits_to_keep=keep).logits)
        n_metrics = metrics.shape[1]
        gradients = [
            torch.autograd.grad(metrics[:, k].sum(), list(states.values()), retain_graph=k + 1 < n_metrics)
            for k in range(n_metrics)
        ]
    products = [
        {
            hook: ((donor.states[hook] - state.detach()) * gradient).double()
            for (hook, state), gradient in zip(states.items(), of_metric, strict=True)
        }
        for of_metric in gradients
    ]

    def change(cell: PatchCell, product: dict[str, Tensor]) -> Float[Tensor, " sample"]:
        return torch.stack([point.select(product[point.hook]).sum(-1) for point in cell.points]).sum(0)

    changes = [torch.stack([change(cell, product) for product in products], 1) for cell in cells]
    base_metrics = metrics.detach().double()
    return torch.stack([base_metrics + of_cell for of_cell in changes]).cpu()
