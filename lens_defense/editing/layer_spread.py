"""MEMIT's spread: a value fitted at the top layer, written by several layers, lowest first."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods import EditingMethod
from lens_defense.models.mlp_output import apply_change_, undo_change_
from lens_defense.models.prefix_batch import state_reader
from lens_defense.prompts.prompt import Prompt, role_position
from lens_defense.prompts.request import Role
from lens_defense.sites import component_hook, key_hook

OwnedPrompts = Sequence[tuple[int, Prompt]]
"""Prompts, each with the index of the request that it is a context of."""
ReadStates = Callable[[Sequence[str]], dict[str, Float[Tensor, "context width"]]]


@torch.no_grad()
def spread_over_layers(
    model: TransformerBridge,
    prompts: OwnedPrompts,
    held_out_prompts: OwnedPrompts,
    role: Role,
    layers: Sequence[int],
    values: Float[Tensor, "request d_model"],
    covariances: Mapping[int, Float[Tensor, "d_in d_in"]],
    method: EditingMethod,
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[float]]:
    """MEMIT's algorithm 1: lowest layer first, each takes an equal share of what is still missing.

    Args:
        model: the model; it is as before afterwards.
        prompts: the contexts whose keys are written.
        held_out_prompts: the contexts in which the reach is measured; without any, `prompts` stand in.
        role: at which the keys stand.
        layers: that are changed, lowest first.
        values: what shall be added to the residual stream after the highest of the layers.
        covariances: C of each layer.
        method: makes the change of a layer.

    Returns:
        The factors by layer; and the reach: how much of each request's value arrives, as a share.
    """
    top = component_hook("resid_post", layers[-1])
    read_states = read_reach_states = _state_reader_at_role(model, prompts, role, layers)
    if held_out_prompts:
        read_reach_states = _state_reader_at_role(model, held_out_prompts, role, layers)
    clean_top, clean_reach_top = read_states([top])[top], read_reach_states([top])[top]
    changes = []
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for j, layer in enumerate(layers):
            states = read_states([key_hook(layer), top])
            residuals = values - _mean_by_request(states[top] - clean_top, prompts, len(values))
            keys = _mean_by_request(states[key_hook(layer)], prompts, len(values))
            covariance = covariances[layer].to(keys.device)
            left, right = method.solve(keys, residuals / (len(layers) - j), covariance)
            factors[layer] = (left.float().cpu().contiguous(), right.float().cpu().contiguous())
            delta = factors[layer][0].double() @ factors[layer][1].double()
            changes.append(apply_change_(model, {layer: delta}))
        shifts = read_reach_states([top])[top] - clean_reach_top
    finally:
        for change in reversed(changes):
            undo_change_(model, change)
    shift = _mean_by_request(shifts, held_out_prompts or prompts, len(values))
    reach = (shift * values).sum(1) / values.square().sum(1)
    return factors, reach.tolist()


def _state_reader_at_role(
    model: TransformerBridge, prompts: OwnedPrompts, role: Role, layers: Sequence[int], batch_size: int = 32
) -> ReadStates:
    """States at the role of every context, from the tokens up to it, as the layers are when they are read.

    The same context of all requests is a batch, so that what stands before the subject runs once.
    """
    rows = [prompt.ids[: role_position(prompt, role) + 1] for _, prompt in prompts]
    by_turn: dict[int, list[int]] = defaultdict(list)
    turns = Counter[int]()
    for i, (owner, _) in enumerate(prompts):
        by_turn[turns[owner]].append(i)
        turns[owner] += 1
    batches = [
        indices[start : start + batch_size]
        for indices in by_turn.values()
        for start in range(0, len(indices), batch_size)
    ]
    stop = layers[-1] + 1
    readers = [
        state_reader(model, [rows[i] for i in batch], first_changed=layers[0], stop_at_layer=stop)
        for batch in batches
    ]

    def read(hooks: Sequence[str]) -> dict[str, Tensor]:
        last_states: dict[str, dict[int, Tensor]] = {hook: {} for hook in hooks}
        for batch, reader in zip(batches, readers, strict=True):
            states = reader(hooks)
            for hook in hooks:
                last_states[hook] |= {i: row[-1].float() for i, row in zip(batch, states[hook], strict=True)}
        return {
            hook: torch.stack([states[i] for i in range(len(rows))]) for hook, states in last_states.items()
        }

    return read


def _mean_by_request(
    rows: Float[Tensor, "context width"], prompts: OwnedPrompts, n: int
) -> Float[Tensor, "request width"]:
    owners = torch.tensor([owner for owner, _ in prompts], device=rows.device)
    sums = torch.zeros(n, rows.shape[1], device=rows.device).index_add_(0, owners, rows)
    return sums / torch.bincount(owners, minlength=n)[:, None].clamp(min=1)
