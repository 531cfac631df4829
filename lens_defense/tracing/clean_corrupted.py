"""Runs: what the cells of one prompt are measured from, clean and spoiled, and how many rows fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import explain_out_of_memory
from lens_defense.models.forward import ForwardPass, StateWrite, forward, model_device
from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, Request, UnfitRequest, prompt
from lens_defense.sites import EMBEDDING_HOOK
from lens_defense.tracing.activation_patching import Measure, PatchCell, base_hooks, donor_hooks, sweep
from lens_defense.tracing.attribution_patching import attribution_patching
from lens_defense.tracing.corruptions import Corruption
from lens_defense.tracing.metrics import Metric
from lens_defense.tracing.trace_result import Direction


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """What the cells of one prompt are measured from."""

    ids: Int[Tensor, "1 token"]
    clean: ForwardPass
    base: ForwardPass
    """The run that is patched, one row a sample."""
    donor: ForwardPass
    """The run whose states are put in."""
    embeddings: Float[Tensor, "sample token d_model"]
    """Of the run that is patched."""


class Embedded(NamedTuple):
    """A prompt with its answer, as the first block reads it."""

    clean: Float[Tensor, "1 token d_model"]
    spoiled: Float[Tensor, "sample token d_model"]


def answered(
    model: TransformerBridge,
    requests: Sequence[Request],
    answers: Sequence[str] | None,
    answer_tokens: int,
    chat: bool,
) -> list[Prompt]:
    """The prompts, each with the answer that the metric reads."""
    tokenizer = model.tokenizer
    prompts = [prompt(tokenizer, item, chat=chat) for item in requests]
    if answers is not None and len(answers) != len(requests):
        raise ValueError(f"there are {len(requests)} requests and {len(answers)} answers")
    given = answers or [item.target for item in requests]
    own = generate(
        model,
        [met.ids for met, text in zip(prompts, given, strict=True) if not text],
        tokens=answer_tokens,
    )
    told = iter(own)
    return [
        replace(met, answer=tokenize_answer(tokenizer, text, chat=met.chat) if text else next(told))
        for met, text in zip(prompts, given, strict=True)
    ]


@torch.no_grad()
def embedded(model: TransformerBridge, met: Prompt, corruption: Corruption) -> Embedded:
    """The embeddings of a prompt and its answer, clean and with the subject spoiled."""
    clean = forward(model, _ids(model, met), names=[EMBEDDING_HOOK], stop=1).states[EMBEDDING_HOOK]
    spoiled = corruption(clean[:, : len(met.ids)], met).to(clean)
    tail = clean[:, len(met.ids) :].expand(len(spoiled), -1, -1)
    return Embedded(clean, torch.cat([spoiled, tail], 1))


@torch.no_grad()
def ends(
    model: TransformerBridge,
    met: Prompt,
    given: Embedded,
    metrics: Mapping[str, Metric],
    most: int,
) -> tuple[Float[Tensor, " reading"], Float[Tensor, "sample reading"]]:
    """What the metrics read of the clean prompt and of the spoiled one."""
    clean, spoiled = [], []
    for part in given.spoiled.split(most):
        runs = _prepared(model, met, Embedded(given.clean, part), (), "denoising")
        read = reading(metrics, met, runs.clean.logits)
        clean.append(read(runs.clean.logits)[0].cpu().double())
        spoiled.append(read(runs.base.logits).cpu().double())
    return clean[0], torch.cat(spoiled)


def refuse_weak(
    prompts: Sequence[Prompt],
    clean: Sequence[Float[Tensor, " reading"]],
    corrupted: Sequence[Float[Tensor, "sample reading"]],
    floor: float,
) -> None:
    """Effects over a change that is nearly nothing, or not one way in every sample, would be noise.

    Raises:
        UnfitRequest: names the requests.
    """
    for k in range(len(clean[0])):
        least = [_least(one[k] - some[:, k]) for one, some in zip(clean, corrupted, strict=True)]
        weak = [i for i, value in enumerate(least) if not value >= floor]
        if weak:
            names = ", ".join(f"{prompts[i].request.id} ({least[i]:.3g})" for i in weak)
            raise UnfitRequest(
                f"spoiling the subject hardly changes the answer to: {names}; the least change is {floor}, "
                "one way in every sample. "
                "Leave these requests out, mark the words that matter, or lower floor"
            )


def _least(differences: Float[Tensor, " sample"]) -> float:
    """The least change of all samples; 0 where they do not all go one way."""
    one_way = bool((differences > 0).all() or (differences < 0).all())
    return float(differences.abs().min()) if one_way else 0.0


def measured(
    model: TransformerBridge,
    met: Prompt,
    given: Embedded,
    cells: Sequence[PatchCell],
    metrics: Mapping[str, Metric],
    direction: Direction,
    *,
    exact: bool,
    max_bytes: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Float[Tensor, "cell sample reading"]:
    """The cells of one prompt: each by a run of its own, or all by one gradient; some samples at once."""
    most, keep, told = rows_within(model, met, max_bytes, exact=exact), len(met.answer), []
    for part in given.spoiled.split(most):
        runs = _prepared(model, met, Embedded(given.clean, part), cells, direction)
        read = reading(metrics, met, runs.clean.logits)
        if exact:
            with torch.no_grad():
                told.append(
                    sweep(
                        model, runs.ids, runs.base, runs.donor, cells, read,
                        keep=keep, max_rows=most, progress=progress,
                    )
                )  # fmt: skip
        else:
            with explain_out_of_memory(f"{len(part)} rows of {runs.ids.shape[1]} tokens and their gradients"):
                told.append(
                    attribution_patching(model, runs.ids, runs.embeddings, runs.donor, cells, read, keep=keep)
                )
    return torch.cat(told, 1)


@torch.no_grad()
def _prepared(
    model: TransformerBridge, met: Prompt, given: Embedded, cells: Sequence[PatchCell], direction: Direction
) -> Runs:
    """The prompt with its answer, clean and spoiled; the run that is patched has one row a sample."""
    ids, keep, (clean_embeddings, spoiled) = _ids(model, met), len(met.answer), given
    every = ids.expand(len(spoiled), -1)
    writes: dict[str, StateWrite] = {EMBEDDING_HOOK: lambda _: spoiled}
    names = base_hooks(cells), donor_hooks(cells)
    with explain_out_of_memory(f"{len(spoiled)} rows of {ids.shape[1]} tokens"):
        if direction == "denoising":
            clean = forward(model, ids, names=names[1], keep=keep)
            base = forward(model, every, names=names[0], writes=writes, keep=keep)
            return Runs(ids, clean, base, clean, spoiled)
        clean = forward(model, every, names=names[0], keep=keep)
        donor = forward(model, every, names=names[1], writes=writes, keep=keep)
    return Runs(ids, clean, clean, donor, clean_embeddings.expand(len(spoiled), -1, -1))


def _ids(model: TransformerBridge, met: Prompt) -> Int[Tensor, "1 token"]:
    return torch.tensor([[*met.ids, *met.answer[:-1]]], device=model_device(model))


def reading(metrics: Mapping[str, Metric], met: Prompt, clean: Tensor) -> Measure:
    """All metrics as the columns of one measure; logits of half precision are read in single."""

    def precise(logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float64 else logits.float()

    return lambda logits: torch.stack(
        [read(precise(logits), met, precise(clean[:1])) for read in metrics.values()], 1
    )


def width_of(met: Prompt) -> int:
    """Tokens of a prompt and its answer, but the answer's last."""
    return len(met.ids) + len(met.answer) - 1


def rows_within(model: TransformerBridge, met: Prompt, max_bytes: int, *, exact: bool = True) -> int:
    """How many rows fit: their cache, attention scores, MLP states and logits, twice over.

    A gradient keeps the states of every layer, an exact pass those of one.
    """
    cfg, width = model.cfg, width_of(met)
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    wide = width * (4 * cfg.d_model + 3 * d_mlp) + cfg.n_heads * width * width
    cached = 2 * cfg.n_layers * width * cfg.n_heads * cfg.d_head
    row = 8 * (wide * (1 if exact else cfg.n_layers) + cached + len(met.answer) * cfg.d_vocab)
    return max(1, max_bytes // row)
