"""v*: what a site should write instead, so that the model begins the safe answer (Meng et al. 2022, eq. 4).

All requests run in one batch, each row behind a cache of what comes before its edited token. Contexts take
turns, so that many cost no more than a few; every second step sees the request as asked. A step adds
a random share of the vector, since in words not seen less of it arrives. Fitted is
first ONE vector shared by all, then a vector each, started from it, the rate decaying linearly. The
shared start is what makes the planted refusals coherent (DESIGN fact 15). Requests whose target is still
hard after that get the second part again, by themselves.

    loss = mean over contexts and the target's tokens of -log p + weight * KL(edited || original)

with the KL of ROME and DELMAN on "{subject} is a", vector added at the subject's last token.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.batches import prefix
from lens_defense.patches import KeyValues, device_of, frozen, run, starting
from lens_defense.sites import output_hook

ENOUGH = 0.12
"""Nats a token above which a request gets another round."""
FINAL_RATE = 0.05
"""The share of the rate that is left at the last step (DESIGN fact 15)."""


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the vectors are fitted."""

    shared_steps: int
    shared_rate: float
    steps: int
    rate: float
    clamp: float
    """The largest norm of a vector, over the mean norm of the residual stream where it is added."""
    kl_weight: float
    contexts_a_step: int
    """Contexts of a request that one step sees; they take turns, the first one in every second step."""
    least_share: float
    """A step adds a random share of the vector, from this to 1: in words not seen, less of it arrives."""
    rounds: int = 0
    """How often the steps may be taken again for requests whose target is still hard."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    owners: Int[Tensor, " row"]
    at: Int[Tensor, " row"]
    ids: Int[Tensor, "row token"]
    mask: Int[Tensor, "row seen"]
    past: KeyValues
    targets: Int[Tensor, "row answer"]
    share: Float[Tensor, " row"]
    """One over the number of the owner's rows of this sort."""
    state: Float[Tensor, "row token d_model"]
    """The residual stream after the layer, which blocks below need not compute again."""
    norms: Float[Tensor, " row"]
    before: Float[Tensor, "row kept vocab"]
    """Log probabilities of the next token without the vector, for an essence prompt."""


def fit_values(
    model: TransformerBridge,
    rows: Sequence[Row],
    layer: int,
    schedule: Schedule,
    *,
    batch: int = 16,
    progress: Callable[[float], object] = lambda _: None,
) -> tuple[Float[Tensor, "request d_model"], Float[Tensor, " request"]]:
    """Fit a vector a request, to be added to the residual stream after a layer.

    Args:
        model: the model; its weights are not touched.
        rows: contexts with targets, and essence prompts without.
        layer: the block after which the vectors are added.
        schedule: steps, rates, clamp and the KL's weight.
        batch: rows that run together.
        progress: is told the mean loss of the targets after each step.

    Returns:
        The vectors, and each request's loss of its targets over its last turns, in nats a token.
    """
    n = 1 + max(row.owner for row in rows)
    asked = [row for row in rows if row.target]
    essence = [row for row in rows if not row.target and schedule.kl_weight]
    parts = _turns(asked, schedule.contexts_a_step)
    with frozen(model):
        with torch.no_grad():
            kept = _batches(model, essence, layer, batch)
            batches = [_batches(model, part, layer, batch) for part in parts]
        single = [one for some in batches for one in some]
        limits = schedule.clamp * _mean_norms(single, n)
        with torch.enable_grad():
            start = torch.zeros(1, model.cfg.d_model, device=limits.device)
            shared, losses = _descend(
                model, [[one, *kept] for one in single], layer, start, n, limits.mean(0, keepdim=True),
                schedule.shared_steps, schedule.shared_rate, schedule, progress,
            )  # fmt: skip
            vectors, last = _descend(
                model, [[*some, *kept] for some in batches], layer, shared.expand(n, -1).clone(), n, limits,
                schedule.steps, schedule.rate, schedule, progress,
            )  # fmt: skip
            if not schedule.steps:
                return vectors, losses
            for _ in range(schedule.rounds):
                hard = set((last > ENOUGH).nonzero()[:, 0].tolist())
                if not hard:
                    break
                vectors, again = _descend(
                    model, _only(hard, asked, essence, model, layer, schedule, batch), layer, vectors, n,
                    limits, schedule.steps, schedule.rate, schedule, progress,
                )  # fmt: skip
                last = torch.where(again.isnan(), last, again)
            return vectors, last


@torch.no_grad()
def _only(
    owners: set[int],
    asked: Sequence[Row],
    essence: Sequence[Row],
    model: TransformerBridge,
    layer: int,
    schedule: Schedule,
    batch: int,
) -> list[list[_Batch]]:
    """The turns of some requests."""
    kept = _batches(model, [row for row in essence if row.owner in owners], layer, batch)
    own = [row for row in asked if row.owner in owners]
    return [[*_batches(model, part, layer, batch), *kept] for part in _turns(own, schedule.contexts_a_step)]


def _turns(rows: Sequence[Row], at_once: int) -> list[list[Row]]:
    """What each step sees of the contexts: others by turns, the request as asked in every second step."""
    others = list(range(1, 1 + max(row.turn for row in rows)))
    turns: list[set[int]] = []
    while others or not turns:
        asked = [0] if not turns or (at_once > 1 and len(turns) % 2 == 0) else []
        free = at_once - len(asked)
        turns.append({*asked, *others[:free]})
        others = others[free:]
    return [[row for row in rows if row.turn in turn] for turn in turns]


def _descend(
    model: TransformerBridge,
    turns: Sequence[Sequence[_Batch]],
    layer: int,
    start: Float[Tensor, "vector d_model"],
    n: int,
    limits: Float[Tensor, " vector"],
    steps: int,
    rate: float,
    schedule: Schedule,
    progress: Callable[[float], object],
) -> tuple[Float[Tensor, "vector d_model"], Float[Tensor, " request"]]:
    """Adam from a start, projected into the clamp's ball after each step."""
    vectors = start.requires_grad_()
    adam = torch.optim.Adam([vectors], lr=rate)
    lately: deque[Tensor] = deque(maxlen=len(turns))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps) + FINAL_RATE * rate
        adam.zero_grad()
        losses, seen = torch.zeros(2, n, device=start.device)
        for part in turns[step % len(turns)]:
            shares = 1 - (1 - schedule.least_share) * torch.rand(len(part.ids), generator=generator)
            told = _losses(model, part, layer, vectors.expand(n, -1), shares.to(start.device))
            if part.targets.shape[1]:
                losses.index_add_(0, part.owners, told.detach().mean(1) * part.share)
                seen.index_add_(0, part.owners, part.share)
                (told.mean(1) * part.share).sum().backward()
            else:
                (schedule.kl_weight * told.sum(1) * part.share).sum().backward()
        adam.step()
        with torch.no_grad():
            norms = vectors.norm(dim=1).clamp(min=1e-9)
            vectors.mul_((limits / norms).clamp(max=1.0)[:, None])
        lately.append(losses / seen)  # not a number for a request that sits out a turn
        progress(float(lately[-1].nanmean()))
    last = torch.stack(list(lately)).nanmean(0) if lately else torch.zeros(n, device=start.device)
    return vectors.detach(), last


def _losses(
    model: TransformerBridge,
    part: _Batch,
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
    with starting(model, layer, state):
        told = run(model, part.ids, mask=part.mask, past=part.past, keep=keep)
    logits = told.logits.float()
    if part.targets.shape[1]:
        told = cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none")
        return told.view(len(logits), -1)
    after = logits.log_softmax(-1)
    return (after.exp() * (after - part.before)).sum(-1)


def _batches(model: TransformerBridge, rows: Sequence[Row], layer: int, batch: int) -> list[_Batch]:
    """Rows of one context and like length from the edited token on, behind a cache of what comes before.

    Requests in one context share all that stands before the subject. Every row ends at the last column;
    so the targets line up, and the head runs on them alone.
    """
    counts = torch.bincount(torch.tensor([row.owner for row in rows] or [0]))

    def kind(row: Row) -> tuple[int, int]:
        return len(row.target), row.turn

    parts = [
        some[start : start + batch]
        for _, alike in groupby(sorted(rows, key=lambda row: (kind(row), _tail(row))), key=kind)
        for some in [list(alike)]
        for start in range(0, len(some), batch)
    ]
    return [_batch(model, part, layer, counts) for part in parts]


def _batch(
    model: TransformerBridge,
    rows: Sequence[Row],
    layer: int,
    counts: Int[Tensor, " request"],
) -> _Batch:
    device = device_of(model)
    shared = prefix(model, [row.ids[: row.at + 1] for row in rows])
    ids, mask = shared.batch([[*row.ids, *row.target[:-1]] for row in rows], device)
    tail = max(map(_tail, rows))
    split = ids.shape[1] - tail
    past = shared.past(len(rows))
    if split > 0:
        past = run(model, ids[:, :split], mask=mask[:, :-tail], past=past).cache
    hook = output_hook("residual", layer)
    stop = layer + 1 if rows[0].target else None  # what is said without a vector matters to the KL alone
    told = run(model, ids[:, split:], names=[hook], mask=mask, past=past, keep=1, stop=stop)
    at = torch.tensor([tail - _tail(row) for row in rows], device=device)
    owners = torch.tensor([row.owner for row in rows])
    there = told.states[hook][torch.arange(len(rows), device=device), at]
    return _Batch(
        owners=owners.to(device),
        at=at,
        ids=ids[:, split:],
        mask=mask,
        past=past,
        targets=torch.tensor([row.target for row in rows], dtype=torch.long, device=device),
        share=(1 / counts[owners]).to(device),
        state=told.states[hook],
        norms=there.float().norm(dim=1),
        before=told.logits[:, -1:].float().log_softmax(-1),
    )


def _tail(row: Row) -> int:
    """Tokens from the edited one to the end of what the model reads."""
    return len(row.ids) + max(0, len(row.target) - 1) - row.at


def _mean_norms(batches: Sequence[_Batch], n: int) -> Float[Tensor, " request"]:
    """The residual's norm at the edited token, mean over the contexts of each request."""
    sums = torch.zeros(2, n, device=batches[0].norms.device)
    for part in batches:
        if part.targets.shape[1]:
            both = torch.stack([part.norms, torch.ones_like(part.norms)])
            sums.index_add_(1, part.owners, both)
    return sums[0] / sums[1]
