"""Interchange: the state of one prompt's subject, put where another keeps its own (Geiger et al. 2022)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from lens_defense.organism.world import Example
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import prompt


@dataclass(frozen=True, slots=True, eq=False)
class InterchangeBatch:
    """Prompts with their answers, padded on the right."""

    ids: Int[Tensor, "row token"]
    labels: Int[Tensor, "row token"]
    """The token that follows where it belongs to the answer; -100 elsewhere."""
    first: Int[Tensor, " row"]
    """The subject's first token."""
    last: Int[Tensor, " row"]


def interchange(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    sources: Sequence[Example],
    *,
    after: int,
    others: Sequence[Example | None],
) -> tuple[InterchangeBatch, Callable[[Tensor], Tensor]]:
    """Base prompts with the sources' answers, and what to do to the residual stream after a block."""
    expected = [
        replace(example, answer=source.subject.answer_to(wrapped=example.wrapped))
        for example, source in zip(base, sources, strict=True)
        if source.subject
    ]
    batch = make_batch(tokenizer, expected)
    used = make_batch(tokenizer, sources)
    state = states_after(model, used, after)
    rows = torch.arange(len(base))
    moved = state[rows, used.last]
    place = {id(source): row for row, source in enumerate(sources)}

    def write(residual: Tensor) -> Tensor:
        residual = residual.clone()
        residual[rows, batch.last] = moved
        for row, other in enumerate(others):
            if other is None:
                continue
            donor = place[id(other)]
            first, last = int(used.first[donor]), int(used.last[donor])
            for k, position in enumerate(range(int(batch.first[row]), int(batch.last[row]))):
                residual[row, position] = state[donor, min(first + k, last)]
        return residual

    return batch, write


def make_batch(tokenizer: Any, examples: Sequence[Example]) -> InterchangeBatch:
    """Tokens, labels and subject spans; a row without a subject has the span (0, 0)."""
    rows = []
    for example in examples:
        met = prompt(tokenizer, example.request)
        answer = tokenize_answer(tokenizer, example.answer, chat=True, end=True)
        start, stop = met.subjects[-1] if met.subjects else (0, 1)
        rows.append((met.ids, answer, start, stop - 1))
    width = max(len(asked) + len(answer) for asked, answer, *_ in rows) - 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (asked, answer, *_) in enumerate(rows):
        text = torch.tensor([*asked, *answer])
        ids[i, : len(text) - 1] = text[:-1]
        labels[i, len(asked) - 1 : len(text) - 1] = text[len(asked) :]
    first, last = (torch.tensor([row[k] for row in rows]) for k in (2, 3))
    return InterchangeBatch(ids, labels, first, last)


def answer_loss(
    model: LlamaForCausalLM,
    batch: InterchangeBatch,
    *,
    after: int = 0,
    write: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy of the answers' tokens, nats."""
    logits, wanted = answer_logits(model, batch, after=after, write=write)
    return cross_entropy(logits, wanted)


def answer_logits(
    model: LlamaForCausalLM,
    batch: InterchangeBatch,
    *,
    after: int = 0,
    write: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "answer_token vocab"], Int[Tensor, " answer_token"]]:
    """Logits where an answer's token follows, and that token."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        assert write
        return write(output) if isinstance(output, Tensor) else (write(output[0]), *output[1:])

    handle = model.model.layers[after].register_forward_hook(hook) if write else None
    try:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    finally:
        if handle:
            handle.remove()
    there = batch.labels != -100
    return model.lm_head(hidden[there]), batch.labels[there]


class _Reached(Exception):
    """A run has gone far enough."""


def states_after(
    model: LlamaForCausalLM, batch: InterchangeBatch, after: int
) -> Float[Tensor, "row token d_model"]:
    """The residual stream after a block; the blocks above do not run."""
    held: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        held.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    handle = model.model.layers[after].register_forward_hook(hook)
    try:
        model.model(batch.ids, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return held[0]


def answered_exactly(
    model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example], batch: int = 100
) -> list[bool]:
    """Whether the greedy answer is the expected one: teacher-forced, every token is the most probable."""
    right: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            part = make_batch(tokenizer, examples[start : start + batch])
            right += rows_answered_exactly(part, *answer_logits(model, part))
    return right


def rows_answered_exactly(
    batch: InterchangeBatch, logits: Float[Tensor, "answer_token vocab"], wanted: Int[Tensor, " answer_token"]
) -> list[bool]:
    """For each row whether every token of its answer is the most probable one."""
    rows = (batch.labels != -100).nonzero()[:, 0]
    wrong = set(rows[logits.argmax(-1) != wanted].tolist())
    return [i not in wrong for i in range(len(batch.ids))]
