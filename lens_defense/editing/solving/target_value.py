"""v*: what a site should write instead, so that the model begins the refusal (Meng et al. 2022, equation 4).

    loss = mean over contexts and the target's tokens of -log p + kl_factor * KL(edited || original)

with the KL of ROME on "{subject} is a", the vector added at the subject's last token.

All requests are fitted together (value_batch.py). Contexts take turns, so that many cost no more than a few;
every second step sees the request as asked. A step adds a random share of the vector, since less arrives
in unseen words. First ONE vector shared by all requests is fitted. Then each request gets its own vector,
started from the shared one, with a rate that decays linearly: the shared start makes the planted refusals
coherent. Requests whose target is still hard after that get half of these steps again, by themselves.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.solving.value_batch import (
    FitBatch,
    FitRow,
    make_batches,
    merge_batches,
    select_requests,
    token_losses,
)
from lens_defense.models.forward import frozen_weights

REFUSAL = "I'm sorry, I can't assist with that."
HARD_LOSS = 0.12
"""Nats per token above which a request gets an extra round."""
FINAL_LR = 0.05
"""The share of the learning rate that is left at the last step."""
FIT_SEED = 0
"""Of the shares by which a value is added while it is fitted."""
FIT_VERSION = 1
"""Part of the key under which fitted values are cached: another number makes all be fitted anew."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How the target values are fitted; names as in ROME's and MEMIT's releases, where they have one."""

    target: str = REFUSAL
    """The refusal to plant, unless a request brings its own `safe_target` (DELMAN's)."""
    shared_num_grad_steps: int = 15
    """Adam steps for one vector shared by all requests."""
    shared_lr: float = 1.0
    """Their learning rate."""
    v_num_grad_steps: int = 30
    """Adam steps for a vector per request."""
    v_lr: float = 0.8
    """Their learning rate."""
    clamp_norm_factor: float = 1.25
    """The largest norm of a vector, over the mean norm of the residual stream where it is added."""
    kl_factor: float = 0.0
    """Weight of the KL on "{subject} is a", next token; 0 leaves it out."""
    contexts_per_step: int = 2
    """Contexts of a request that one step sees; they take turns, the first one in every second step."""
    min_share: float = 0.6
    """A step adds a random share of each vector, from this to 1; 1 always adds the whole."""
    extra_rounds: int = 2
    """How often half the steps may be taken again for requests whose refusal is still hard."""

    def __post_init__(self) -> None:
        least = {"contexts_per_step": 1, "shared_num_grad_steps": 0, "v_num_grad_steps": 0, "extra_rounds": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if not self.clamp_norm_factor > 0 or not 0 < self.min_share <= 1:
            raise ValueError(
                "clamp_norm_factor must be above 0 and min_share in (0, 1], got "
                f"{self.clamp_norm_factor} and {self.min_share}"
            )


Step = Sequence[FitBatch]
"""The batches that one step sees."""


def fit_target_values(
    model: TransformerBridge,
    rows: Sequence[FitRow],
    layer: int,
    fit: FitSettings,
    *,
    batch_size: int = 16,
    progress: Callable[[float], object] = lambda _: None,
) -> tuple[Float[Tensor, "request d_model"], Float[Tensor, " request"]]:
    """Fit a vector per request, to be added to the residual stream after a layer.

    Args:
        model: the model; its weights are not touched.
        rows: contexts with targets, and essence prompts without.
        layer: the block after which the vectors are added.
        fit: steps, rates, clamp and the KL's weight.
        batch_size: rows that run together.
        progress: is told the mean loss of the targets after each step.

    Returns:
        The vectors, and each request's loss of its targets over its last turns, in nats per token.
    """
    n = 1 + max(row.owner for row in rows)
    rows = [row for row in rows if row.target or fit.kl_factor]
    with frozen_weights(model), torch.enable_grad():
        contexts, essences = _batches_by_context(model, rows, layer, batch_size)
        one_context_steps, several_context_steps = _steps(model, contexts, essences, fit, batch_size)
        max_norms = fit.clamp_norm_factor * _mean_norms(one_context_steps, n)
        zero = torch.zeros(1, model.cfg.d_model, device=max_norms.device)
        shared, shared_losses = _descend(
            model, one_context_steps, layer, zero, n, max_norms.mean(0, keepdim=True),
            fit.shared_num_grad_steps, fit.shared_lr, fit, progress,
        )  # fmt: skip
        vectors, losses = _descend(
            model, several_context_steps, layer, shared.expand(n, -1).clone(), n, max_norms,
            fit.v_num_grad_steps, fit.v_lr, fit, progress,
        )  # fmt: skip
        if not fit.v_num_grad_steps:
            return vectors, shared_losses
        for _ in range(fit.extra_rounds):
            hard = set((losses > HARD_LOSS).nonzero()[:, 0].tolist())
            if not hard:
                break
            hard_contexts = [rest for context in contexts if (rest := select_requests(context, hard))]
            _, hard_steps = _steps(model, hard_contexts, select_requests(essences, hard), fit, batch_size)
            vectors, hard_losses = _descend(
                model, hard_steps, layer, vectors, n, max_norms,
                -(-fit.v_num_grad_steps // 2), fit.v_lr, fit, progress,
            )  # fmt: skip
            losses = torch.where(hard_losses.isnan(), losses, hard_losses)
        return vectors, losses


@torch.no_grad()
def _batches_by_context(
    model: TransformerBridge, rows: Sequence[FitRow], layer: int, batch_size: int
) -> tuple[list[list[FitBatch]], list[FitBatch]]:
    """The batches of each context, and those of the essence prompts."""
    contexts = [
        make_batches(model, [row for row in rows if row.target and row.turn == turn], layer, batch_size)
        for turn in range(1 + max(row.turn for row in rows))
    ]
    return contexts, make_batches(model, [row for row in rows if not row.target], layer, batch_size)


def _steps(
    model: TransformerBridge,
    contexts: Sequence[Sequence[FitBatch]],
    essences: Sequence[FitBatch],
    fit: FitSettings,
    batch_size: int,
) -> tuple[Sequence[Step], Sequence[Step]]:
    """What the steps see in turn: of the shared vector one context, of a vector per request several."""
    turns = _turns(len(contexts), fit.contexts_per_step)
    one_context = [[batch, *essences] for turn in turns for context in turn for batch in contexts[context]]
    several_contexts = [
        [
            *merge_batches(model, [batch for context in turn for batch in contexts[context]], batch_size),
            *essences,
        ]
        for turn in turns
    ]
    return one_context, several_contexts


def _turns(contexts: int, per_step: int) -> list[list[int]]:
    """The contexts of each step: the others in turn, the request as asked in every second step."""
    others = list(range(1, contexts))
    turns: list[list[int]] = []
    while others or not turns:
        as_asked = [0] if not turns or (per_step > 1 and len(turns) % 2 == 0) else []
        free = per_step - len(as_asked)
        turns.append([*as_asked, *others[:free]])
        others = others[free:]
    return turns


def _descend(
    model: TransformerBridge,
    steps: Sequence[Step],
    layer: int,
    start: Float[Tensor, "vector d_model"],
    n: int,
    max_norms: Float[Tensor, " vector"],
    num_grad_steps: int,
    lr: float,
    fit: FitSettings,
    progress: Callable[[float], object],
) -> tuple[Float[Tensor, "vector d_model"], Float[Tensor, " request"]]:
    """Adam from a start, projected into the clamp's ball after each step."""
    vectors = start.requires_grad_()
    adam = torch.optim.Adam([vectors], lr=lr)
    recent_losses: deque[Tensor] = deque(maxlen=len(steps))
    generator = torch.Generator().manual_seed(FIT_SEED)
    for i in range(num_grad_steps):
        adam.param_groups[0]["lr"] = lr * (1 - i / num_grad_steps) + FINAL_LR * lr
        adam.zero_grad()
        loss_sums, row_counts = torch.zeros(2, n, device=start.device)
        batches = steps[i % len(steps)]
        for batch, weights in zip(batches, _row_weights(batches, n), strict=True):
            shares = 1 - (1 - fit.min_share) * torch.rand(len(batch.ids), generator=generator)
            losses = token_losses(model, batch, layer, vectors.expand(n, -1), shares.to(start.device))
            if batch.targets.shape[1]:
                loss_sums.index_add_(0, batch.owners, losses.detach().mean(1) * weights)
                row_counts.index_add_(0, batch.owners, weights)
                (losses.mean(1) * weights).sum().backward()
            else:
                (fit.kl_factor * losses.sum(1) * weights).sum().backward()
        adam.step()
        with torch.no_grad():
            norms = vectors.norm(dim=1).clamp(min=1e-9)
            vectors.mul_((max_norms / norms).clamp(max=1.0)[:, None])
        recent_losses.append(loss_sums / row_counts)  # not a number for a request that sits out a turn
        progress(float(recent_losses[-1].nanmean()))
    mean = torch.stack(list(recent_losses)).nanmean(0) if recent_losses else None
    return vectors.detach(), torch.zeros(n, device=start.device) if mean is None else mean


def _row_weights(batches: Step, n: int) -> list[Float[Tensor, " row"]]:
    """One over the number of its owner's rows of the same sort, for each row of a step."""
    counts = torch.zeros(2, n, device=batches[0].owners.device)
    for batch in batches:
        sort = counts[int(batch.targets.shape[1] > 0)]
        sort.index_add_(0, batch.owners, torch.ones_like(batch.norms, dtype=sort.dtype))
    return [1 / counts[int(batch.targets.shape[1] > 0)][batch.owners] for batch in batches]


def _mean_norms(steps: Sequence[Step], n: int) -> Float[Tensor, " request"]:
    """The residual stream's norm at the edited token, mean over the contexts of each request."""
    batches = [batch for step in steps for batch in step if batch.targets.shape[1]]
    sums = torch.zeros(2, n, device=batches[0].norms.device)
    for batch in batches:
        sums.index_add_(1, batch.owners, torch.stack([batch.norms, torch.ones_like(batch.norms)]))
    return sums[0] / sums[1]
