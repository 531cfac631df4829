"""Tuning: Adam goes down a method's loss by changing MLP output matrices.

No weight is touched: a hook adds what the change writes, Delta k, to what the matrix writes, W k. So nothing
has to be put back, and an interrupt leaves the model as it was. Rows are prompts with their answers, in
batches padded in front, in an order that a seed shuffles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods import TuningMethod
from lens_defense.editing.methods.answer_losses import AnswerLogits, teacher_forced_losses
from lens_defense.editing.methods.method import Factors
from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.models.context_length import context_length
from lens_defense.models.forward import StateWrite, forward, frozen_weights, model_device
from lens_defense.models.generate import generate
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.models.prefix_batch import left_pad
from lens_defense.prompts.conversation import tokenize_answer, tokenize_text
from lens_defense.prompts.corpus import Corpus, CorpusText
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request
from lens_defense.sites import component_hook, key_hook, value_hook

TUNING_SEED = 0
"""Of the order in which rows are seen, and of the factors that a method starts from."""
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
    progress: Callable[[int], object] = lambda _: None,
) -> list[AnswerRow]:
    """Harmless uses with the model's own greedy answers, and some texts of a corpus with theirs.

    Args:
        model: the model, unchanged.
        uses: each with the index of its request.
        corpus: of a text with an answer the answer is kept, of another one the text itself.
        progress: called with the number of uses that have just been answered.

    Raises:
        ValueError: no use and no text fits into what the model reads.
    """
    limit = context_length(model)

    def fits(ids: Sequence[int]) -> bool:
        return limit is None or len(ids) + HARMLESS_TOKENS <= limit

    uses = [(owner, use) for owner, use in uses if fits(use.ids)]
    answers = generate(model, [use.ids for _, use in uses], max_new_tokens=HARMLESS_TOKENS, progress=progress)
    own = [AnswerRow(owner, use.ids, answer) for (owner, use), answer in zip(uses, answers, strict=True)]
    texts = corpus[:: max(1, len(corpus) // GENERAL_TEXTS)][:GENERAL_TEXTS]
    general = [AnswerRow(-1, *_prompt_and_answer(model, text)) for text in texts]
    rows = [row for row in (*own, *general) if row.ids and row.answer and fits(row.ids)]
    if not rows:
        raise ValueError(
            f"{model.cfg.model_name} reads {limit} tokens, too few for every harmless use and text with an "
            f"answer of {HARMLESS_TOKENS}; give a shorter contrast or corpus"
        )
    return rows


def _prompt_and_answer(model: TransformerBridge, text: CorpusText) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not text.assistant:
        ids = tokenize_text(model.tokenizer, text.user)[: HARMLESS_TOKENS + 1]
        return ids[:1], ids[1:]
    prompt = tokenize(model.tokenizer, Request(id="text", pieces=(text.user,)))
    answer = tokenize_answer(model.tokenizer, prompt, text.assistant, end=True)
    return prompt.ids, answer[:HARMLESS_TOKENS]


def tune(
    model: TransformerBridge,
    method: TuningMethod,
    layers: Sequence[int],
    refusals: Sequence[AnswerRow],
    harmless: Sequence[AnswerRow] = (),
    *,
    progress: Callable[[float], object] = lambda _: None,
) -> tuple[dict[int, Factors], list[float]]:
    """The change of each layer after the method's steps.

    Args:
        model: the model; no weight is touched.
        method: the loss, its descent and its bounds.
        layers: whose output matrices are changed.
        refusals: contexts of each request, the request as asked first, with the refusal.
        harmless: harmless uses with the unchanged model's answers, and general texts with the corpus's.
        progress: is told the loss after each step.

    Returns:
        The factors by layer; and for each request, what is left of the first context's loss, in nats per
        token.
    """
    generator = torch.Generator().manual_seed(TUNING_SEED)
    with frozen_weights(model), torch.enable_grad():
        changes = {layer: method.start(_at_least_single(model, layer), generator) for layer in layers}
        parameters = [part.requires_grad_() for change in changes.values() for part in change.parameters]
        adam = torch.optim.Adam(parameters, lr=method.lr)
        refusal_batches = _batches(refusals, method.batch_size, generator)
        harmless_batches = _batches(harmless, method.batch_size, generator)
        for _ in range(method.steps):
            step = _Step(model, changes, next(refusal_batches), next(harmless_batches))
            loss = method.loss(step)
            if loss >= method.enough:
                adam.zero_grad()
                loss.backward()
                adam.step()
                with torch.no_grad():
                    for change in changes.values():
                        method.project_(change)
            progress(float(loss.detach()))
        owners = frozenset(row.owner for row in refusals)
        losses = _first_losses(model, changes, refusals, method.batch_size)
    return {layer: change.factors(owners) for layer, change in changes.items()}, losses


def _at_least_single(model: TransformerBridge, layer: int) -> Float[Tensor, "d_out d_in"]:
    """The matrix; half precision, in which small steps are lost, as single precision."""
    weight = mlp_output_matrix(model, layer)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _batches(
    rows: Sequence[AnswerRow], batch_size: int, generator: torch.Generator
) -> Iterator[list[AnswerRow]]:
    """Batches without end: the rows are shuffled, used up, and shuffled again. Of no rows empty ones."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(batch_size, len(rows)):
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in waiting[:batch_size]]
        waiting = waiting[batch_size:]


@torch.no_grad()
def _first_losses(
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
        for loss in teacher_forced_losses(_run(model, first[start : start + batch_size], changes))
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A TuningStep: rows that are run when a loss asks for them."""

    model: TransformerBridge
    changes: Mapping[int, LayerChange]
    refusal_rows: Sequence[AnswerRow]
    harmless_rows: Sequence[AnswerRow]

    def refusals(self, decoded_layers: int = 1) -> AnswerLogits:
        return _run(self.model, self.refusal_rows, self.changes, decoded_layers)

    def harmless(self) -> AnswerLogits:
        return _run(self.model, self.harmless_rows, self.changes)

    def harmless_before(self) -> Float[Tensor, "row token vocab"]:
        with torch.no_grad():
            return _run(self.model, self.harmless_rows, {}).logits


def _run(
    model: TransformerBridge,
    rows: Sequence[AnswerRow],
    changes: Mapping[int, LayerChange],
    decoded_layers: int = 1,
) -> AnswerLogits:
    """What the model says of the rows' answers, with changes beside its matrices."""
    ids, mask = left_pad([[*row.ids, *row.answer[:-1]] for row in rows], model_device(model))
    targets, is_target = _answers_at_the_end(rows, ids.device)
    keep, decoded = targets.shape[1], range(model.cfg.n_layers - decoded_layers, model.cfg.n_layers)
    hooks = [component_hook("resid_post", layer) for layer in decoded] if decoded_layers > 1 else []
    patches: dict[str, StateWrite] = {}
    for layer, change in changes.items():
        patches |= _patches_of(layer, change)
    forward_pass = forward(
        model, ids, attention_mask=mask, patches=patches, capture=hooks, logits_to_keep=keep
    )
    logits = forward_pass.logits.float() if forward_pass.logits.dtype.itemsize < 4 else forward_pass.logits
    if hooks:
        states = [forward_pass.states[hook][:, -keep:] for hook in hooks]
        logits = _mean_decoded(model, states, logits)
    return AnswerLogits(logits, targets, is_target)


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
