"""Rows: contexts of requests as batches in which a vector is added, and what the model then says.

The same context of several requests is a batch, because all that stands before the subject is common to
them and runs once; its rows go on from the edited token behind that cache. Neighbours are then joined,
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
from lens_defense.models.prefix_batch import run_shared_prefix, stack_caches
from lens_defense.sites import component_hook


@dataclass(frozen=True, slots=True)
class FitRow:
    """One context of one request."""

    owner: int
    """The request's index."""
    ids: tuple[int, ...]
    at: int
    """The position of the token where the vector is added."""
    turn: int = 0
    """Which of the contexts it is; 0 is the request as asked, which every second step sees."""
    target: tuple[int, ...] = ()
    """The answer to begin; none makes the row an essence prompt, whose next token shall not change."""


@dataclass(frozen=True, slots=True, eq=False)
class FitBatch:
    """Rows that run together, and what need not be computed twice."""

    owners: Int[Tensor, " row"]
    at: Int[Tensor, " row"]
    ids: Int[Tensor, "row token"]
    mask: Int[Tensor, "row seen"]
    past: KeyValues
    targets: Int[Tensor, "row answer"]
    state: Float[Tensor, "row token d_model"]
    """The residual stream after the layer, which blocks below need not compute again."""
    norms: Float[Tensor, " row"]
    before: Float[Tensor, "row kept vocab"]
    """Log probabilities of the next token without the vector, for an essence prompt."""


def token_losses(
    model: TransformerBridge,
    part: FitBatch,
    layer: int,
    vectors: Float[Tensor, "request d_model"],
    shares: Float[Tensor, " row"],
) -> Float[Tensor, "row token"]:
    """Nats of each target token; or the KL of the next token's distribution, one a row."""

    def state() -> Tensor:
        there = torch.arange(len(part.state), device=part.state.device)
        added = (shares[:, None] * vectors[part.owners]).to(part.state.dtype)
        return part.state.index_put((there, part.at), added, accumulate=True)

    keep = max(1, part.targets.shape[1])
    with start_after_block(model, layer, state):
        told = forward(model, part.ids, mask=part.mask, past=part.past, keep=keep)
    logits = told.logits.float()
    if part.targets.shape[1]:
        told = cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none")
        return told.view(len(logits), -1)
    after = logits.log_softmax(-1)
    return (after.exp() * (after - part.before)).sum(-1)


def make_batches(model: TransformerBridge, rows: Sequence[FitRow], layer: int, batch: int) -> list[FitBatch]:
    """Rows of one context and like length from the edited token on, behind a cache of what comes before.

    Requests in one context share all that stands before the subject. Every row ends at the last column;
    so the targets line up, and the head runs on them alone.
    """

    def kind(row: FitRow) -> tuple[int, int]:
        return len(row.target), row.turn

    parts = [
        some[start : start + batch]
        for _, alike in groupby(sorted(rows, key=lambda row: (kind(row), _tail(row))), key=kind)
        for some in [list(alike)]
        for start in range(0, len(some), batch)
    ]
    return [_batch(model, part, layer) for part in parts]


def _batch(model: TransformerBridge, rows: Sequence[FitRow], layer: int) -> FitBatch:
    device = model_device(model)
    shared = run_shared_prefix(model, [row.ids[: row.at + 1] for row in rows])
    ids, mask = shared.batch([[*row.ids, *row.target[:-1]] for row in rows], device)
    tail = max(map(_tail, rows))
    split = ids.shape[1] - tail
    past = shared.past(len(rows))
    if split > 0:
        past = forward(model, ids[:, :split], mask=mask[:, :-tail], past=past).cache
    hook = component_hook("resid_post", layer)
    stop = layer + 1 if rows[0].target else None  # what is said without a vector matters to the KL alone
    told = forward(model, ids[:, split:], names=[hook], mask=mask, past=past, keep=1, stop=stop)
    at = torch.tensor([tail - _tail(row) for row in rows], device=device)
    owners = torch.tensor([row.owner for row in rows])
    there = told.states[hook][torch.arange(len(rows), device=device), at]
    return FitBatch(
        owners=owners.to(device),
        at=at,
        ids=ids[:, split:],
        mask=mask,
        past=past,
        targets=torch.tensor([row.target for row in rows], dtype=torch.long, device=device),
        state=told.states[hook],
        norms=there.float().norm(dim=1),
        before=told.logits[:, -1:].float().log_softmax(-1),
    )


def merge_batches(parts: Sequence[FitBatch], batch: int) -> list[FitBatch]:
    """Neighbours with targets of one length as one batch, as long as they fit: fewer passes."""
    out: list[list[FitBatch]] = []
    for part in parts:
        last = out[-1] if out else []
        fits = last and sum(len(one.ids) for one in (*last, part)) <= batch
        alike = last and _kind(last[0]) == _kind(part)
        last.append(part) if fits and alike else out.append([part])
    return [_side_by_side(some) if len(some) > 1 else some[0] for some in out]


def select_requests(parts: Sequence[FitBatch], owners: Set[int]) -> list[FitBatch]:
    """The rows of some requests alone; nothing is run again."""
    kept = []
    for part in parts:
        rows = torch.tensor([owner in owners for owner in part.owners.tolist()], device=part.owners.device)
        if rows.any():
            held = {f.name: getattr(part, f.name)[rows] for f in fields(FitBatch) if f.name != "past"}
            kept.append(FitBatch(**held, past=tuple((k[rows], v[rows]) for k, v in part.past)))
    return kept


def _kind(part: FitBatch) -> tuple[int, bool]:
    return part.targets.shape[1], bool(part.past)


def _side_by_side(parts: Sequence[FitBatch]) -> FitBatch:
    """Batches as one, padded on the left: what is cached, and what runs behind it."""
    tail = max(part.ids.shape[1] for part in parts)
    past, held = stack_caches(
        [part.past for part in parts], [part.mask[:, : -part.ids.shape[1]] for part in parts]
    )
    own = [pad(part.mask[:, -part.ids.shape[1] :], (tail - part.ids.shape[1], 0)) for part in parts]
    return FitBatch(
        owners=torch.cat([part.owners for part in parts]),
        at=torch.cat([part.at + tail - part.ids.shape[1] for part in parts]),
        ids=torch.cat([pad(part.ids, (tail - part.ids.shape[1], 0)) for part in parts]),
        mask=torch.cat([held, torch.cat(own)], 1),
        past=past,
        targets=torch.cat([part.targets for part in parts]),
        state=torch.cat([pad(part.state, (0, 0, tail - part.state.shape[1], 0)) for part in parts]),
        norms=torch.cat([part.norms for part in parts]),
        before=torch.cat([part.before for part in parts]),
    )


def _tail(row: FitRow) -> int:
    """Tokens from the edited one to the end of what the model reads."""
    return len(row.ids) + max(0, len(row.target) - 1) - row.at
