"""Clean and corrupted: the two runs of one prompt from which every patch is made, run once and handed on.

Denoising patches the corrupted run with clean states, noising the clean run with corrupted ones: the run that
is patched is the base, the run whose states are put in is the donor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.context_length import refuse_too_long
from lens_defense.models.devices import explain_out_of_memory
from lens_defense.models.forward import ForwardPass, forward, model_device
from lens_defense.models.generate import generate
from lens_defense.patching.activation_patching import WatchPasses, sweep
from lens_defense.patching.attribution_patching import attribution_patching
from lens_defense.patching.corruptions import Corruption
from lens_defense.patching.metrics import Measure, Metric
from lens_defense.patching.patch_cell import PatchCell, base_hooks, donor_hooks
from lens_defense.patching.trace_settings import Direction
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request, UnfitRequest
from lens_defense.shown_text import shown_names
from lens_defense.sites import EMBEDDING_HOOK


@dataclass(frozen=True, slots=True, eq=False)
class SampleRuns:
    """Some samples of a prompt's runs, as many as fit into memory."""

    base: ForwardPass
    """The run that is patched, one row per sample."""
    donor: ForwardPass
    """The run whose states are put in."""
    corrupted_logits: Float[Tensor, "sample answer vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class CleanCorrupted:
    """One prompt with its answer, run clean and with its subject corrupted."""

    prompt: Prompt
    ids: Int[Tensor, "1 token"]
    clean_logits: Float[Tensor, "1 answer vocab"]
    parts: tuple[SampleRuns, ...]

    def metrics(
        self, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, " metric"], Float[Tensor, "sample metric"]]:
        """What the metrics read of the clean and of the corrupted prompt."""
        measure = read_metrics(metrics, self.prompt, self.clean_logits)
        clean = measure(self.clean_logits)[0].cpu().double()
        corrupted = [measure(part.corrupted_logits).cpu().double() for part in self.parts]
        return clean, torch.cat(corrupted)

    @property
    def nbytes(self) -> int:
        """Memory of the states, keys and values that it holds; what is expanded counts once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for part in self.parts
            for run in (part.base, part.donor)
            for tensor in (run.logits, *run.states.values(), *(t for pair in run.key_values for t in pair))
        }
        return sum(storages.values())


def prompts_with_answers(
    model: TransformerBridge,
    requests: Sequence[Request],
    answers: Sequence[str] | None,
    *,
    answer_tokens: int,
    chat: bool,
) -> list[Prompt]:
    """The prompts, each with the answer that the metric reads: the known one, or the model's own."""
    prompts = [tokenize(model.tokenizer, request, chat=chat) for request in requests]
    if answers is not None and len(answers) != len(requests):
        raise ValueError(f"there are {len(requests)} requests and {len(answers)} answers")
    texts = answers or [request.target for request in requests]
    known = [
        tokenize_answer(model.tokenizer, prompt, text) if text else None
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    refuse_too_long(
        model,
        (
            (prompt.request.id, len(prompt.ids) + (answer_tokens if answer is None else len(answer)))
            for prompt, answer in zip(prompts, known, strict=True)
        ),
    )
    unanswered = [prompt.ids for prompt, answer in zip(prompts, known, strict=True) if answer is None]
    own_answers = iter(generate(model, unanswered, max_new_tokens=answer_tokens))
    return [
        replace(prompt, answer_ids=next(own_answers) if answer is None else answer)
        for prompt, answer in zip(prompts, known, strict=True)
    ]


@torch.no_grad()
def run_clean_and_corrupted(
    model: TransformerBridge,
    prompt: Prompt,
    corruption: Corruption,
    cells: Sequence[PatchCell],
    direction: Direction,
    *,
    max_rows: int,
) -> CleanCorrupted:
    """Run a prompt with its answer clean, once, and corrupted, one row per sample.

    Args:
        model: the model.
        prompt: with its answer.
        corruption: how the subject is corrupted.
        cells: the patches to come; their states are captured.
        direction: which of the two runs is patched.
        max_rows: samples that run at once.
    """
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]], device=model_device(model))
    answer_length = len(prompt.answer_ids)
    denoising = direction == "denoising"
    to_patch, to_read = base_hooks(cells), donor_hooks(cells)
    with explain_out_of_memory(f"{ids.shape[1]} tokens"):
        clean = forward(
            model,
            ids,
            capture=[EMBEDDING_HOOK, *(to_read if denoising else to_patch)],
            logits_to_keep=answer_length,
        )
    clean_embeddings = clean.states[EMBEDDING_HOOK]
    corrupted = corruption(model, clean_embeddings[:, : len(prompt.ids)], prompt).to(clean_embeddings)
    answer = clean_embeddings[:, len(prompt.ids) :].expand(len(corrupted), -1, -1)
    parts = []
    for embeddings in torch.cat([corrupted, answer], 1).split(max_rows):
        samples = len(embeddings)
        with explain_out_of_memory(f"{samples} rows of {ids.shape[1]} tokens"):
            run = forward(
                model,
                ids.expand(samples, -1),
                capture=to_patch if denoising else to_read,
                patches={EMBEDDING_HOOK: lambda _, embeddings=embeddings: embeddings},
                logits_to_keep=answer_length,
            )
        if denoising:
            parts.append(SampleRuns(run, clean, run.logits))
        else:
            parts.append(SampleRuns(_repeated(clean, samples), run, run.logits))
    return CleanCorrupted(prompt, ids, clean.logits, tuple(parts))


def measure_cells(
    model: TransformerBridge,
    runs: CleanCorrupted,
    cells: Sequence[PatchCell],
    metrics: Sequence[Metric],
    *,
    exact: bool,
    max_rows: int,
    progress: Callable[[int], object] = lambda _: None,
    watch: WatchPasses | None = None,
) -> Float[Tensor, "cell sample metric"]:
    """The metrics of every patched run: each cell by a run of its own, or all by one gradient.

    Args:
        model: the model.
        runs: the prompt clean and corrupted.
        cells: the patches.
        metrics: what is read.
        exact: False estimates the cells by one gradient.
        max_rows: the most rows of one pass.
        progress: see sweep.
        watch: see sweep; it is called with all samples of a cell, once the last part of them was run. Where
            exact is False, once with all cells.
    """
    measure = read_metrics(metrics, runs.prompt, runs.clean_logits)
    answer_length: int = len(runs.prompt.answer_ids)
    readings: list[Float[Tensor, "cell sample metric"]] = []

    def watch_last_part(indices: Sequence[int], values: Float[Tensor, "cell sample metric"]) -> None:
        if watch is not None and len(readings) == len(runs.parts) - 1:
            watch(indices, torch.cat([*(reading[list(indices)] for reading in readings), values], 1))

    for part in runs.parts:
        if exact:
            with torch.no_grad():
                readings.append(
                    sweep(
                        model, runs.ids, part.base, part.donor, cells, measure,
                        keep=answer_length, max_rows=max_rows, progress=progress,
                        watch=watch and watch_last_part,
                    )
                )  # fmt: skip
        else:
            embeddings = part.base.states[EMBEDDING_HOOK]
            rows = f"{len(embeddings)} rows of {runs.ids.shape[1]} tokens and their gradients"
            with explain_out_of_memory(rows):
                readings.append(
                    attribution_patching(
                        model, runs.ids, embeddings, part.donor, cells, measure, keep=answer_length
                    )
                )
    values = torch.cat(readings, 1)
    if watch is not None and not exact:
        watch(range(len(cells)), values)
    return values


def weak_prompts(
    clean: Sequence[Float[Tensor, " metric"]],
    corrupted: Sequence[Float[Tensor, "sample metric"]],
    min_difference: float,
) -> dict[int, float]:
    """Prompts whose corruption changes a metric by nearly nothing, or not one way in every sample.

    Returns:
        By the prompt's index, the change of the metric that changes least.
    """
    changes = [
        min(_least_change(c[metric] - d[:, metric]) for metric in range(len(c)))
        for c, d in zip(clean, corrupted, strict=True)
    ]
    return {i: change for i, change in enumerate(changes) if not change >= min_difference}


def refuse_weak(prompts: Sequence[Prompt], weak: Mapping[int, float], min_difference: float) -> None:
    """Refuse prompts whose corruption changes a metric too little.

    Raises:
        UnfitRequest: names the requests, and says what to do.
    """
    if weak:
        named = shown_names(
            f"{prompts[i].request.id} ({change:.3g} in {len(prompts[i].answer_ids)} tokens)"
            for i, change in weak.items()
        )
        raise UnfitRequest(
            f"corrupting the subject hardly changes the answer to: {named}; a change of {min_difference} is "
            "wanted, one way in every sample. Mark the words that matter (ld.mark_subjects proposes some), "
            "leave these requests out, or lower min_difference"
        )


def _least_change(changes: Float[Tensor, " sample"]) -> float:
    """The least change of all samples; 0 where they do not all go one way."""
    one_way = bool((changes > 0).all() or (changes < 0).all())
    return float(changes.abs().min()) if one_way else 0.0


def read_metrics(metrics: Sequence[Metric], prompt: Prompt, clean_logits: Tensor) -> Measure:
    """All metrics as the columns of one measure; logits of half precision are read in single."""

    def precise(logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float64 else logits.float()

    return lambda logits: torch.stack(
        [metric(precise(logits), prompt, precise(clean_logits)) for metric in metrics], 1
    )


def tokens_run(prompt: Prompt) -> int:
    """Tokens of a prompt and its answer, but the answer's last."""
    return len(prompt.ids) + len(prompt.answer_ids) - 1


def rows_that_fit(model: TransformerBridge, prompt: Prompt, max_bytes: int, *, exact: bool = True) -> int:
    """How many rows fit: their cache, attention scores, MLP states and logits, twice over.

    A gradient keeps the states of every layer, an exact pass those of one.
    """
    cfg, tokens = model.cfg, tokens_run(prompt)
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    states = tokens * (4 * cfg.d_model + 3 * d_mlp) + cfg.n_heads * tokens * tokens
    cache = 2 * cfg.n_layers * tokens * cfg.n_heads * cfg.d_head
    logits = len(prompt.answer_ids) * cfg.d_vocab
    row_bytes = 8 * (states * (1 if exact else cfg.n_layers) + cache + logits)
    return max(1, max_bytes // row_bytes)


def _repeated(run: ForwardPass, rows: int) -> ForwardPass:
    """A run of one row as one of many, without copying it."""

    def expand(tensor: Tensor) -> Tensor:
        return tensor.expand(rows, *tensor.shape[1:])

    return ForwardPass(
        logits=expand(run.logits),
        states={name: expand(state) for name, state in run.states.items()},
        key_values=tuple((expand(keys), expand(values)) for keys, values in run.key_values),
    )
