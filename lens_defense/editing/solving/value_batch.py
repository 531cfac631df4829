"""Batches of contexts in which a vector is added, and the losses of what the model then says.

The same context of several requests is a batch, because all that stands before the subject is common to
them and runs once; its rows go on from the edited token behind that cache. Neighbours are then merged,
padded on the left, so that a step takes few passes. Blocks up to the layer are not run again: the vector
enters after it.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import KeyValues, forward, model_device, start_after_block
from lens_defense.models.prefix_batch import padding_counts, run_shared_prefix, stack_caches
from lens_defense.sites import component_hook


@dataclass(frozen=True, slots=True)
class FitRow:
    """One context of one request."""

    owner: int
    """The request's index."""
    ids: tuple[int, ...]
    position: int
    """Of the token where the vector is added."""
    turn: int = 0
    """Which of the contexts it is; 0 is the request as asked, which every second step sees."""
    target: tuple[int, ...] = ()
    """The answer to begin; none makes the row an essence prompt, whose next token shall not change."""


@dataclass(frozen=True, slots=True, eq=False)
class FitBatch:
    """Rows that run together, and what need not be computed twice."""

    owners: Int[Tensor, " row"]
    positions: Int[Tensor, " row"]
    """Of the tokens where the vectors are added, in `ids`."""
    ids: Int[Tensor, "row token"]
    attention_mask: Int[Tensor, "row past_and_token"]
    past_key_values: KeyValues
    targets: Int[Tensor, "row answer"]
    state: Float[Tensor, "row token d_model"]
    """The residual stream after the layer, which blocks below need not compute again."""
    norms: Float[Tensor, " row"]
    clean_log_probs: Float[Tensor, "row last vocab"]
    """Of the next token without the vector, for an essence prompt."""


def token_losses(
    model: TransformerBridge,
    batch: FitBatch,
    layer: int,
    vectors: Float[Tensor, "request d_model"],
    shares: Float[Tensor, " row"],
) -> Float[Tensor, "row token"]:
    """Nats of each target token; of essence prompts the KL of the next token's distribution, one per row."""

    def state() -> Tensor:
        rows = torch.arange(len(batch.state), device=batch.state.device)
        added = (shares[:, None] * vectors[batch.owners]).to(batch.state.dtype)
        return batch.state.index_put((rows, batch.positions), added, accumulate=True)

    with start_after_block(model, layer, state):
        forward_pass = forward(
            model, batch.ids, attention_mask=batch.attention_mask, past_key_values=batch.past_key_values,
            logits_to_keep=max(1, batch.targets.shape[1]),
        )  # fmt: skip
    logits = forward_pass.logits.float()
    if batch.targets.shape[1]:
        losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return losses.view(len(logits), -1)
    edited = logits.log_softmax(-1)
    return (edited.exp() * (edited - batch.clean_log_probs)).sum(-1)


def make_batches(
    model: TransformerBridge, rows: Sequence[FitRow], layer: int, batch_size: int
) -> list[FitBatch]:
    """Rows of one context and like length from the edited token on, behind a cache of what comes before.

    Requests in one context share all that stands before the subject. Every row ends at the last column, so
    that the targets line up and the head runs on them alone.
    """

    def kind(row: FitRow) -> tuple[int, int]:
        return len(row.target), row.turn

    by_kind = groupby(sorted(rows, key=lambda row: (kind(row), _tail_length(row))), key=kind)
    groups = [list(group) for _, group in by_kind]
    return [
        _batch(model, group[start : start + batch_size], layer)
        for group in groups
        for start in range(0, len(group), batch_size)
    ]


def merge_batches(model: TransformerBridge, batches: Sequence[FitBatch], batch_size: int) -> list[FitBatch]:
    """Neighbours with targets of one length as one batch, as long as they fit: fewer passes.

    Where padding counts, only batches of one length from the edited token on: caches are padded in front.
    """
    apart = any(padding_counts(model, batch.attention_mask.shape[1]) for batch in batches)
    groups: list[list[FitBatch]] = []
    for batch in batches:
        group = groups[-1] if groups else []
        fits = group and sum(len(member.ids) for member in (*group, batch)) <= batch_size
        alike = fits and _kind(group[0]) == _kind(batch)
        if alike and not (apart and group[0].ids.shape[1] != batch.ids.shape[1]):
            group.append(batch)
        else:
            groups.append([batch])
    return [_side_by_side(group) if len(group) > 1 else group[0] for group in groups]


def select_requests(batches: Sequence[FitBatch], owners: Set[int]) -> list[FitBatch]:
    """The rows of some requests alone; nothing is run again."""
    selected = []
    for batch in batches:
        rows = torch.tensor([owner in owners for owner in batch.owners.tolist()], device=batch.owners.device)
        if rows.any():
            tensors = {
                f.name: getattr(batch, f.name)[rows] for f in fields(FitBatch) if f.name != "past_key_values"
            }
            caches = tuple((keys[rows], values[rows]) for keys, values in batch.past_key_values)
            selected.append(FitBatch(**tensors, past_key_values=caches))
    return selected


def _batch(model: TransformerBridge, rows: Sequence[FitRow], layer: int) -> FitBatch:
    device = model_device(model)
    shared = run_shared_prefix(model, [row.ids[: row.position + 1] for row in rows])
    ids, mask = shared.pad_suffixes([[*row.ids, *row.target[:-1]] for row in rows], device)
    tail = max(map(_tail_length, rows))
    split = ids.shape[1] - tail
    caches = shared.past_key_values(len(rows))
    if split > 0:
        caches = forward(
            model, ids[:, :split], attention_mask=mask[:, :-tail], past_key_values=caches
        ).key_values
    hook = component_hook("resid_post", layer)
    stop = layer + 1 if rows[0].target else None  # the logits without a vector matter to the KL alone
    forward_pass = forward(
        model, ids[:, split:], capture=[hook], attention_mask=mask, past_key_values=caches,
        logits_to_keep=1, stop_at_layer=stop,
    )  # fmt: skip
    positions = torch.tensor([tail - _tail_length(row) for row in rows], device=device)
    owners = torch.tensor([row.owner for row in rows])
    edited_states = forward_pass.states[hook][torch.arange(len(rows), device=device), positions]
    return FitBatch(
        owners=owners.to(device),
        positions=positions,
        ids=ids[:, split:],
        attention_mask=mask,
        past_key_values=caches,
        targets=torch.tensor([row.target for row in rows], dtype=torch.long, device=device),
        state=forward_pass.states[hook],
        norms=edited_states.float().norm(dim=1),
        clean_log_probs=forward_pass.logits[:, -1:].float().log_softmax(-1),
    )


def _kind(batch: FitBatch) -> tuple[int, bool]:
    return batch.targets.shape[1], bool(batch.past_key_values)


def _side_by_side(batches: Sequence[FitBatch]) -> FitBatch:
    """Batches as one, padded on the left: what is cached, and what runs behind it."""
    tail = max(batch.ids.shape[1] for batch in batches)
    caches, cache_mask = stack_caches(
        [batch.past_key_values for batch in batches],
        [batch.attention_mask[:, : -batch.ids.shape[1]] for batch in batches],
    )

    def padded(tensor: Tensor, batch: FitBatch) -> Tensor:
        """With the missing tokens before the first, on axis 1."""
        return pad(tensor, (*((0, 0) * (tensor.dim() - 2)), tail - batch.ids.shape[1], 0))

    token_mask = [padded(batch.attention_mask[:, -batch.ids.shape[1] :], batch) for batch in batches]
    return FitBatch(
        owners=torch.cat([batch.owners for batch in batches]),
        positions=torch.cat([batch.positions + tail - batch.ids.shape[1] for batch in batches]),
        ids=torch.cat([padded(batch.ids, batch) for batch in batches]),
        attention_mask=torch.cat([cache_mask, torch.cat(token_mask)], 1),
        past_key_values=caches,
        targets=torch.cat([batch.targets for batch in batches]),
        state=torch.cat([padded(batch.state, batch) for batch in batches]),
        norms=torch.cat([batch.norms for batch in batches]),
        clean_log_probs=torch.cat([batch.clean_log_probs for batch in batches]),
    )


def _tail_length(row: FitRow) -> int:
    """Tokens from the edited one to the end of what the model reads."""
    return len(row.ids) + max(0, len(row.target) - 1) - row.position
