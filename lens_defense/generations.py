"""Answers of many prompts: batched, behind the prefix that they share, stopped early.

Rows that have ended leave the batch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.batches import Prefix, prefix
from lens_defense.patches import device_of, run

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
    batch: int = 64,
    pick: Pick = greedy,
    progress: Callable[[int], object] = lambda _: None,
) -> list[tuple[int, ...]]:
    """The model's answers, up to and with the end-of-turn token.

    Args:
        model: the model.
        prompts: token ids, of any lengths.
        tokens: the most tokens an answer may have.
        batch: rows that run together.
        pick: chooses the next tokens; greedy, or a sampler of your own.
        progress: is told how many rows were finished.
    """
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    if not prompts:
        return answers
    shared = prefix(model, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        told = _answers(model, [prompts[i] for i in rows], shared, tokens, pick)
        for i, answer in zip(rows, told, strict=True):
            answers[i] = answer
        progress(len(rows))
    return answers


def _answers(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    shared: Prefix,
    tokens: int,
    pick: Pick,
) -> list[tuple[int, ...]]:
    ids, mask = shared.batch(prompts, device_of(model))
    past = shared.past(len(prompts))
    told: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(tokens):
        step = run(model, ids, mask=mask, past=past)
        following = pick(step.logits[:, -1])
        for row, token in zip(alive, following.tolist(), strict=True):
            told[row].append(token)
        stays = following != model.tokenizer.eos_token_id
        if not stays.any():
            break
        past = step.cache
        if not stays.all():
            rows = stays.nonzero()[:, 0]
            past = tuple((k[rows], v[rows]) for k, v in past)
            alive = [row for row, stay in zip(alive, stays.tolist(), strict=True) if stay]
        ids = following[stays][:, None]
        mask = torch.cat([mask[stays], mask.new_ones(len(alive), 1)], 1)
    return [tuple(answer) for answer in told]
