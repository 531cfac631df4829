"""v*: what a site should write instead, so that the model begins the safe answer (Meng et al. 2022, eq. 4).

All requests run together (rows.py). Contexts take turns, so that many cost no more than a few; every second
step sees the request as asked. A step adds a random share of the vector, since in words not seen less of it
arrives. Fitted is first ONE vector shared by all, a context a step; then a vector each, started from it, the
rate decaying linearly. The shared start is what makes the planted refusals coherent.
Requests whose target is still hard after that get half of the second part again, by themselves.

    loss = mean over contexts and the target's tokens of -log p + weight * KL(edited || original)

with the KL of ROME and DELMAN on "{subject} is a", vector added at the subject's last token.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.value_batch import (
    FitBatch,
    FitRow,
    make_batches,
    merge_batches,
    select_requests,
    token_losses,
)
from lens_defense.models.forward import frozen_weights

ENOUGH = 0.12
"""Nats a token above which a request gets another round."""
FINAL_RATE = 0.05
"""The share of the rate that is left at the last step."""


@dataclass(frozen=True, slots=True)
class FitSettings:
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
    """How often half the steps may be taken again for requests whose target is still hard."""


def fit_target_values(
    model: TransformerBridge,
    rows: Sequence[FitRow],
    layer: int,
    schedule: FitSettings,
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
    rows = [row for row in rows if row.target or schedule.kl_weight]
    with frozen_weights(model), torch.enable_grad():
        contexts, kept = _batches(model, rows, layer, batch)
        single, together = _steps(contexts, kept, schedule, batch)
        limits = schedule.clamp * _mean_norms(single, n)
        start = torch.zeros(1, model.cfg.d_model, device=limits.device)
        shared, losses = _descend(
            model, single, layer, start, n, limits.mean(0, keepdim=True),
            schedule.shared_steps, schedule.shared_rate, schedule, progress,
        )  # fmt: skip
        vectors, last = _descend(
            model, together, layer, shared.expand(n, -1).clone(), n, limits,
            schedule.steps, schedule.rate, schedule, progress,
        )  # fmt: skip
        if not schedule.steps:
            return vectors, losses
        for _ in range(schedule.rounds):
            hard = set((last > ENOUGH).nonzero()[:, 0].tolist())
            if not hard:
                break
            some = [left for context in contexts if (left := select_requests(context, hard))]
            _, again = _steps(some, select_requests(kept, hard), schedule, batch)
            vectors, losses = _descend(
                model, again, layer, vectors, n, limits,
                -(-schedule.steps // 2), schedule.rate, schedule, progress,
            )  # fmt: skip
            last = torch.where(losses.isnan(), last, losses)
        return vectors, last


Step = Sequence[FitBatch]
"""What one step sees."""


@torch.no_grad()
def _batches(
    model: TransformerBridge, rows: Sequence[FitRow], layer: int, batch: int
) -> tuple[list[list[FitBatch]], list[FitBatch]]:
    """Each context's batches, and those of the essence prompts."""
    contexts = [
        make_batches(model, [row for row in rows if row.target and row.turn == turn], layer, batch)
        for turn in range(1 + max(row.turn for row in rows))
    ]
    return contexts, make_batches(model, [row for row in rows if not row.target], layer, batch)


def _steps(
    contexts: Sequence[Sequence[FitBatch]], kept: Sequence[FitBatch], schedule: FitSettings, batch: int
) -> tuple[Sequence[Step], Sequence[Step]]:
    """What the steps see by turns: of a vector that all share one context, of a vector each several."""
    turns = _turns(len(contexts), schedule.contexts_a_step)
    single = [[one, *kept] for turn in turns for context in turn for one in contexts[context]]
    together = [
        [*merge_batches([one for context in turn for one in contexts[context]], batch), *kept]
        for turn in turns
    ]
    return single, together


def _turns(contexts: int, at_once: int) -> list[list[int]]:
    """What each step sees of the contexts: others by turns, the request as asked in every second step."""
    others = list(range(1, contexts))
    turns: list[list[int]] = []
    while others or not turns:
        asked = [0] if not turns or (at_once > 1 and len(turns) % 2 == 0) else []
        free = at_once - len(asked)
        turns.append([*asked, *others[:free]])
        others = others[free:]
    return turns


def _descend(
    model: TransformerBridge,
    turns: Sequence[Step],
    layer: int,
    start: Float[Tensor, "vector d_model"],
    n: int,
    limits: Float[Tensor, " vector"],
    steps: int,
    rate: float,
    schedule: FitSettings,
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
        parts = turns[step % len(turns)]
        for part, share in zip(parts, _shares(parts, n), strict=True):
            shares = 1 - (1 - schedule.least_share) * torch.rand(len(part.ids), generator=generator)
            told = token_losses(model, part, layer, vectors.expand(n, -1), shares.to(start.device))
            if part.targets.shape[1]:
                losses.index_add_(0, part.owners, told.detach().mean(1) * share)
                seen.index_add_(0, part.owners, share)
                (told.mean(1) * share).sum().backward()
            else:
                (schedule.kl_weight * told.sum(1) * share).sum().backward()
        adam.step()
        with torch.no_grad():
            norms = vectors.norm(dim=1).clamp(min=1e-9)
            vectors.mul_((limits / norms).clamp(max=1.0)[:, None])
        lately.append(losses / seen)  # not a number for a request that sits out a turn
        progress(float(lately[-1].nanmean()))
    last = torch.stack(list(lately)).nanmean(0) if lately else torch.zeros(n, device=start.device)
    return vectors.detach(), last


def _shares(parts: Step, n: int) -> list[Float[Tensor, " row"]]:
    """One over the number of its owner's rows of the same sort, for each row of a step."""
    counts = torch.zeros(2, n, device=parts[0].owners.device)
    for part in parts:
        sort = counts[int(part.targets.shape[1] > 0)]
        sort.index_add_(0, part.owners, torch.ones_like(part.norms, dtype=sort.dtype))
    return [1 / counts[int(part.targets.shape[1] > 0)][part.owners] for part in parts]


def _mean_norms(steps: Sequence[Step], n: int) -> Float[Tensor, " request"]:
    """The residual's norm at the edited token, mean over the contexts of each request."""
    contexts = [part for step in steps for part in step if part.targets.shape[1]]
    sums = torch.zeros(2, n, device=contexts[0].norms.device)
    for part in contexts:
        sums.index_add_(1, part.owners, torch.stack([part.norms, torch.ones_like(part.norms)]))
    return sums[0] / sums[1]
