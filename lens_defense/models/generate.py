"""Answers of many prompts: batched, behind the prefix that they share, stopped early.

Prompts of like length are read together, so that little is padded; then all answer together, since a step of
many rows costs little more than one of few. Rows that have ended leave.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import KeyValues, forward, model_device
from lens_defense.models.prefix_batch import SharedPrefix, run_shared_prefix, stack_caches
from lens_defense.prompts.conversation import end_token_ids

Pick = Callable[[Float[Tensor, "row vocab"]], Int[Tensor, " row"]]


def greedy(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """The most probable token of each row."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 24,
    batch: int = 96,
    read: int = 32,
    pick: Pick = greedy,
    progress: Callable[[int], object] = lambda _: None,
) -> list[tuple[int, ...]]:
    """The model's answers, up to and with the token that ends it.

    Args:
        model: the model.
        prompts: token ids, of any lengths.
        tokens: the most tokens an answer may have.
        batch: rows that answer together.
        read: of them, rows whose prompts are read together.
        pick: chooses the next tokens; greedy, or a sampler of your own.
        progress: is told how many rows were finished.
    """
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    if not prompts:
        return answers
    shared = run_shared_prefix(model, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        told = _answers(model, [prompts[i] for i in rows], shared, tokens, read, pick, progress)
        for i, answer in zip(rows, told, strict=True):
            answers[i] = answer
    return answers


def _answers(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    shared: SharedPrefix,
    tokens: int,
    read: int,
    pick: Pick,
    progress: Callable[[int], object],
) -> list[tuple[int, ...]]:
    told: list[list[int]] = [[] for _ in prompts]
    alive, unfinished = list(range(len(prompts))), len(prompts)
    logits, past, mask = _read(model, prompts, shared, read)
    last = torch.tensor(end_token_ids(model.tokenizer), dtype=torch.long, device=logits.device)
    for step in range(tokens):
        following = pick(logits)
        for row, token in zip(alive, following.tolist(), strict=True):
            told[row].append(token)
        stays = ~torch.isin(following, last)
        ended = int((~stays).sum())
        progress(ended)
        unfinished -= ended
        if step == tokens - 1 or not stays.any():
            break
        if not stays.all():
            rows = stays.nonzero()[:, 0]
            past = tuple((k[rows], v[rows]) for k, v in past)
            alive = [row for row, stay in zip(alive, stays.tolist(), strict=True) if stay]
        mask = torch.cat([mask[stays], mask.new_ones(len(alive), 1)], 1)
        ran = forward(model, following[stays][:, None], mask=mask, past=past)
        logits, past = ran.logits[:, -1], ran.cache
    progress(unfinished)
    return [tuple(answer) for answer in told]


def _read(
    model: TransformerBridge, prompts: Sequence[Sequence[int]], shared: SharedPrefix, read: int
) -> tuple[Float[Tensor, "row vocab"], KeyValues, Int[Tensor, "row seen"]]:
    """What comes after each prompt, and the cache and mask behind which its answer goes on."""
    logits, pasts, masks = [], [], []
    for start in range(0, len(prompts), read):
        some = prompts[start : start + read]
        ids, mask = shared.batch(some, model_device(model))
        ran = forward(model, ids, mask=mask, past=shared.past(len(some)))
        logits.append(ran.logits[:, -1])
        pasts.append(ran.cache)
        masks.append(mask)
    return torch.cat(logits), *stack_caches(pasts, masks)
