"""Prompts with answers to them, and one forward pass that says how likely a model finds the answers.

What methods that tune and learned methods are made of. No weight is touched: a hook adds what a change
writes, Delta k, to what the matrix writes, W k. Rows are padded in front, so that answers end at the last
column.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods.answer_losses import AnswerLogits, teacher_forced_losses
from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.models.context_length import context_length
from lens_defense.models.forward import StateWrite, forward, model_device
from lens_defense.models.generate import generate
from lens_defense.models.prefix_batch import left_pad
from lens_defense.prompts.conversation import tokenize_answer, tokenize_text
from lens_defense.prompts.corpus import Corpus, CorpusText
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request
from lens_defense.sites import component_hook, key_hook, value_hook

HARMLESS_TOKENS = 24
"""Tokens of a harmless answer that a loss sees."""
GENERAL_TEXTS = 64
"""Texts of the corpus that stand beside the harmless uses."""


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A prompt and an answer to it."""

    owner: int
    """The request's index; of a general text -1."""
    ids: tuple[int, ...]
    answer: tuple[int, ...]


def harmless_rows(
    model: TransformerBridge,
    uses: Sequence[tuple[int, Prompt]],
    corpus: Corpus,
    *,
    texts: int = GENERAL_TEXTS,
    progress: Callable[[int], object] = lambda _: None,
) -> list[AnswerRow]:
    """Harmless uses with the model's own greedy answers, and some texts of a corpus with theirs.

    Args:
        model: the model, unchanged.
        uses: each with the index of its request.
        corpus: of a text with an answer the answer is kept, of another one the text itself.
        texts: how many of them are taken, evenly from first to last.
        progress: called with the number of uses that have just been answered.

    Raises:
        ValueError: no use and no text fits into what the model reads.
    """
    general = [
        AnswerRow(-1, *_prompt_and_answer(model, text))
        for text in corpus[:: max(1, len(corpus) // texts)][:texts]
    ]
    general = [row for row in general if row.ids and row.answer and _leaves_room(model, row.ids)]
    rows = [*answered_rows(model, uses, progress=progress), *general]
    if not rows:
        raise ValueError(
            f"{model.cfg.model_name} reads {context_length(model)} tokens, too few for every harmless use "
            f"and text with an answer of {HARMLESS_TOKENS}; give a shorter contrast or corpus"
        )
    return rows


def answered_rows(
    model: TransformerBridge,
    prompts: Sequence[tuple[int, Prompt]],
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> list[AnswerRow]:
    """Prompts with the model's own greedy answers; what is too long to be answered is left out.

    Args:
        model: the model.
        prompts: each with the index of its request.
        progress: called with the number of prompts that have just been answered.
    """
    prompts = [(owner, prompt) for owner, prompt in prompts if _leaves_room(model, prompt.ids)]
    ids = [prompt.ids for _, prompt in prompts]
    answers = generate(model, ids, max_new_tokens=HARMLESS_TOKENS, progress=progress)
    rows = [
        AnswerRow(owner, own, answer) for (owner, _), own, answer in zip(prompts, ids, answers, strict=True)
    ]
    return [row for row in rows if row.ids and row.answer]


def _leaves_room(model: TransformerBridge, ids: Sequence[int]) -> bool:
    """Whether an answer fits behind a prompt."""
    limit = context_length(model)
    return limit is None or len(ids) + HARMLESS_TOKENS <= limit


def _prompt_and_answer(model: TransformerBridge, text: CorpusText) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not text.assistant:
        ids = tokenize_text(model.tokenizer, text.user)[: HARMLESS_TOKENS + 1]
        return ids[:1], ids[1:]
    prompt = tokenize(model.tokenizer, Request(id="text", pieces=(text.user,)))
    answer = tokenize_answer(model.tokenizer, prompt, text.assistant, end=True)
    return prompt.ids, answer[:HARMLESS_TOKENS]


def answer_logits(
    model: TransformerBridge,
    rows: Sequence[AnswerRow],
    changes: Mapping[int, LayerChange] | None = None,
    *,
    decoded_layers: int = 1,
    patches: Mapping[str, StateWrite] | None = None,
) -> AnswerLogits:
    """What a model says of the rows' answers.

    Args:
        model: the model; no weight is touched.
        rows: run together.
        changes: by layer, what stands beside its matrix; gradients reach it.
        decoded_layers: see TuningStep.refusals.
        patches: by hook name, what else is written into the pass.

    Raises:
        ValueError: several layers are to be decoded, and the model makes something else of its last state.
    """
    ids, mask = padded_rows(model, rows)
    targets, is_target = _answers_at_the_end(rows, ids.device)
    keep, decoded = targets.shape[1], range(model.cfg.n_layers - decoded_layers, model.cfg.n_layers)
    hooks = [component_hook("resid_post", layer) for layer in decoded] if decoded_layers > 1 else []
    writes = dict(patches or {})
    for layer, change in (changes or {}).items():
        writes |= _patches_of(layer, change)
    forward_pass = forward(
        model, ids, attention_mask=mask, patches=writes, capture=hooks, logits_to_keep=keep
    )
    logits = forward_pass.logits.float() if forward_pass.logits.dtype.itemsize < 4 else forward_pass.logits
    if hooks:
        states = [forward_pass.states[hook][:, -keep:] for hook in hooks]
        logits = _mean_decoded(model, states, logits)
    return AnswerLogits(logits, targets, is_target)


def padded_rows(
    model: TransformerBridge, rows: Sequence[AnswerRow]
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """The tokens that `answer_logits` runs, each answer without its last, and their attention mask."""
    return left_pad([[*row.ids, *row.answer[:-1]] for row in rows], model_device(model))


def _answers_at_the_end(
    rows: Sequence[AnswerRow], device: torch.device
) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    targets, mask = left_pad([row.answer for row in rows], device)
    return targets, mask.bool()


def _patches_of(layer: int, change: LayerChange) -> dict[str, StateWrite]:
    """What adds a change's product with the keys to what the matrix writes."""
    seen: list[Tensor] = []

    def see(keys: Tensor) -> Tensor:
        seen[:] = [keys]
        return keys

    def add(value: Tensor) -> Tensor:
        return value + change.written(seen.pop().to(change.left.dtype)).to(value.dtype)

    return {key_hook(layer): see, value_hook(layer): add}


def _mean_decoded(
    model: TransformerBridge,
    states: Sequence[Float[Tensor, "row token d_model"]],
    last_logits: Float[Tensor, "row token vocab"],
) -> Float[Tensor, "row token vocab"]:
    """The mean over layers of what the final norm and the unembedding make of their states.

    Raises:
        ValueError: the model makes something else of its last state.
    """
    decoded = [model.unembed(model.ln_final(state)).to(last_logits.dtype) for state in states]
    difference = (decoded[-1] - last_logits).detach().abs().max()
    if difference > _DECODING_ERROR * last_logits.detach().abs().max():
        raise ValueError(
            f"{model.cfg.model_name} makes its logits otherwise than by a norm and an unembedding, so the "
            "states of its layers cannot be decoded; take another method"
        )
    return torch.stack(decoded).mean(0)


_DECODING_ERROR = 0.02
"""Of the largest logit: what half precision may differ by."""


@torch.no_grad()
def first_losses(
    model: TransformerBridge,
    changes: Mapping[int, LayerChange],
    refusals: Sequence[AnswerRow],
    batch_size: int,
) -> list[float]:
    """For each request, nats per token of its first row's answer."""
    first = list({row.owner: row for row in reversed(refusals)}.values())
    first.sort(key=lambda row: row.owner)
    return [
        float(loss)
        for start in range(0, len(first), batch_size)
        for loss in teacher_forced_losses(answer_logits(model, first[start : start + batch_size], changes))
    ]
