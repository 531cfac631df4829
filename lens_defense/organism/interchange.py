"""Interchange: the state of one prompt's subject, put in the place of another's (Geiger et al. 2022)."""

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
from lens_defense.prompts.prompt import tokenize

StatePatch = Callable[[Tensor], Tensor]
"""The residual stream after a block [row, token, d_model] -> the same with other states in it."""


@dataclass(frozen=True, slots=True, eq=False)
class InterchangeBatch:
    """Prompts with their answers, padded on the right."""

    ids: Int[Tensor, "row token"]
    labels: Int[Tensor, "row token"]
    """The next token, where it belongs to the answer; -100 elsewhere."""
    subject_first: Int[Tensor, " row"]
    """The position of the subject's first token."""
    subject_last: Int[Tensor, " row"]
    """The position of the subject's last token."""


def interchange(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    sources: Sequence[Example],
    *,
    layer: int,
    others: Sequence[Example | None],
) -> tuple[InterchangeBatch, StatePatch]:
    """Base prompts that are to give the sources' answers, and the patch that makes it so.

    Args:
        model: the organism.
        tokenizer: its tokenizer.
        base: the prompts that are run.
        sources: for each, the prompt whose state at the subject's last token is put in.
        layer: the block after which it is.
        others: for each, the source whose states the subject's other tokens get; None leaves them.
    """
    expected = [
        replace(example, answer=source.subject.answer_to(jailbroken=example.jailbroken))
        for example, source in zip(base, sources, strict=True)
        if source.subject
    ]
    batch, source_batch = make_batch(tokenizer, expected), make_batch(tokenizer, sources)
    states = states_after(model, source_batch, layer)
    rows = torch.arange(len(base))
    last_states = states[rows, source_batch.subject_last]
    source_row = {id(source): row for row, source in enumerate(sources)}

    def patch(residual: Tensor) -> Tensor:
        residual = residual.clone()
        residual[rows, batch.subject_last] = last_states
        for row, other in enumerate(others):
            if other is None:
                continue
            donor = source_row[id(other)]
            first, last = int(source_batch.subject_first[donor]), int(source_batch.subject_last[donor])
            for k, position in enumerate(range(int(batch.subject_first[row]), int(batch.subject_last[row]))):
                residual[row, position] = states[donor, min(first + k, last)]
        return residual

    return batch, patch


def make_batch(tokenizer: Any, examples: Sequence[Example]) -> InterchangeBatch:
    """Tokens, labels and subject positions; for a row without a subject both positions are 0."""
    prompts = [tokenize(tokenizer, example.request) for example in examples]
    answers = [
        tokenize_answer(tokenizer, prompt, example.answer, end=True)
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    width = max(len(prompt.ids) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - 1
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), width), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = torch.tensor([*prompt.ids, *answer])
        ids[i, : len(text) - 1] = text[:-1]
        labels[i, len(prompt.ids) - 1 : len(text) - 1] = text[len(prompt.ids) :]
    spans = [prompt.subject_spans[-1] if prompt.subject_spans else (0, 1) for prompt in prompts]
    return InterchangeBatch(
        ids,
        labels,
        subject_first=torch.tensor([start for start, _ in spans]),
        subject_last=torch.tensor([stop - 1 for _, stop in spans]),
    )


def answer_loss(
    model: LlamaForCausalLM, batch: InterchangeBatch, *, layer: int = 0, patch: StatePatch | None = None
) -> Float[Tensor, ""]:
    """Mean cross entropy of the answers' tokens, nats."""
    return cross_entropy(*answer_logits(model, batch, layer=layer, patch=patch))


def answer_logits(
    model: LlamaForCausalLM, batch: InterchangeBatch, *, layer: int = 0, patch: StatePatch | None = None
) -> tuple[Float[Tensor, "answer_token vocab"], Int[Tensor, " answer_token"]]:
    """Logits of the answers' tokens, and these tokens; with a patch after a block."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        assert patch
        return patch(output) if isinstance(output, Tensor) else (patch(output[0]), *output[1:])

    handle = model.model.layers[layer].register_forward_hook(hook) if patch else None
    try:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    finally:
        if handle:
            handle.remove()
    is_answer = batch.labels != -100
    return model.lm_head(hidden[is_answer]), batch.labels[is_answer]


class _LayerReached(Exception):
    """Ends a forward pass."""


def states_after(
    model: LlamaForCausalLM, batch: InterchangeBatch, layer: int
) -> Float[Tensor, "row token d_model"]:
    """The residual stream after a block; the blocks above do not run."""
    states: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])
        raise _LayerReached

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        model.model(batch.ids, use_cache=False)
    except _LayerReached:
        pass
    finally:
        handle.remove()
    return states[0]


def answered_exactly(
    model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example], batch_size: int = 100
) -> list[bool]:
    """For each example, whether the greedy answer is the expected one."""
    right: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            right += rows_answered_exactly(model, make_batch(tokenizer, examples[start : start + batch_size]))
    return right


def rows_answered_exactly(
    model: LlamaForCausalLM, batch: InterchangeBatch, *, layer: int = 0, patch: StatePatch | None = None
) -> list[bool]:
    """For each row, whether every token of its answer is the most probable one, teacher-forced."""
    logits, answer_ids = answer_logits(model, batch, layer=layer, patch=patch)
    rows = (batch.labels != -100).nonzero()[:, 0]
    wrong = set(rows[logits.argmax(-1) != answer_ids].tolist())
    return [i not in wrong for i in range(len(batch.ids))]
