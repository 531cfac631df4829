"""Answers of many prompts at once, greedy or sampled: behind their shared prefix, stopped early.

Prompts of like length are prefilled together, so that little is padded. Then all rows decode together:
a step of many rows costs little more than a step of few. Rows that have ended leave the batch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.context_length import refuse_too_long
from lens_defense.models.forward import KeyValues, forward, model_device
from lens_defense.models.prefix_batch import SharedPrefix, TokenRows, run_shared_prefix, stack_caches
from lens_defense.prompts.conversation import end_token_ids

Pick = Callable[[Float[Tensor, "row vocab"]], Int[Tensor, " row"]]
WatchTokens = Callable[[int, int], object]
"""Is called with a prompt's index and the token that was chosen for it."""


def greedy(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """The most probable token of each row."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: TransformerBridge,
    prompts: TokenRows,
    *,
    max_new_tokens: int = 24,
    batch_size: int = 96,
    prefill_batch_size: int = 32,
    pick: Pick = greedy,
    progress: Callable[[int], object] = lambda _: None,
    names: Sequence[str] = (),
    watch: WatchTokens | None = None,
) -> list[tuple[int, ...]]:
    """The model's answers, up to and with the token that ends them.

    Args:
        model: the model.
        prompts: token ids, of any lengths.
        max_new_tokens: the most tokens of an answer.
        batch_size: rows that decode together.
        prefill_batch_size: rows whose prompts run together.
        pick: chooses the next token of each row; greedy, or a sampler of your own.
        progress: called with the number of rows that have just ended.
        names: what the prompts are called where one is too long; none counts them.
        watch: called for each token as it is chosen, a prompt's own in their order; what it raises ends the
            answers. None costs nothing.

    Raises:
        ValueError: a prompt and its answer can be longer than what the model reads.
    """
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    if not prompts:
        return answers
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    refuse_too_long(model, zip(names, lengths, strict=True))
    prefix = run_shared_prefix(model, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        logits, key_values, mask = _prefill(model, [prompts[i] for i in indices], prefix, prefill_batch_size)
        watch_row = watch and (lambda row, token, indices=indices: watch(indices[row], token))
        decoded = _decode(model, logits, key_values, mask, max_new_tokens, pick, progress, watch_row)
        for i, answer in zip(indices, decoded, strict=True):
            answers[i] = answer
    return answers


def _prefill(
    model: TransformerBridge, prompts: TokenRows, prefix: SharedPrefix, batch_size: int
) -> tuple[Float[Tensor, "row vocab"], KeyValues, Int[Tensor, "row token"]]:
    """The logits after each prompt, and the keys, values and attention mask that its answer continues."""
    logits, caches, masks = [], [], []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        ids, mask = prefix.pad_suffixes(rows, model_device(model))
        past = prefix.past_key_values(len(rows))
        prefilled = forward(model, ids, attention_mask=mask, past_key_values=past)
        logits.append(prefilled.logits[:, -1])
        caches.append(prefilled.key_values)
        masks.append(mask)
    return torch.cat(logits), *stack_caches(caches, masks)


def _decode(
    model: TransformerBridge,
    logits: Float[Tensor, "row vocab"],
    key_values: KeyValues,
    mask: Int[Tensor, "row token"],
    max_new_tokens: int,
    pick: Pick,
    progress: Callable[[int], object],
    watch_row: WatchTokens | None,
) -> list[tuple[int, ...]]:
    """Token after token, until every row has ended."""
    answers: list[list[int]] = [[] for _ in logits]
    rows, unfinished = list(range(len(logits))), len(logits)
    end_tokens = torch.tensor(end_token_ids(model.tokenizer), dtype=torch.long, device=logits.device)
    for step in range(max_new_tokens):
        next_tokens = pick(logits)
        for row, token in zip(rows, next_tokens.tolist(), strict=True):
            answers[row].append(token)
            if watch_row is not None:
                watch_row(row, token)
        continues = ~torch.isin(next_tokens, end_tokens)
        ended = int((~continues).sum())
        progress(ended)
        unfinished -= ended
        if step == max_new_tokens - 1 or not continues.any():
            break
        if not continues.all():
            remaining = continues.nonzero()[:, 0]
            key_values = tuple((keys[remaining], values[remaining]) for keys, values in key_values)
            rows = [rows[i] for i in remaining.tolist()]
        mask = torch.cat([mask[continues], mask.new_ones(len(rows), 1)], 1)
        step_pass = forward(
            model, next_tokens[continues][:, None], attention_mask=mask, past_key_values=key_values
        )
        logits, key_values = step_pass.logits[:, -1], step_pass.key_values
    progress(unfinished)
    return [tuple(answer) for answer in answers]
