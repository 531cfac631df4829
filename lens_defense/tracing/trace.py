"""Tracing: which layer and which token hold what the subject of a request does to the answer."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import did_you_mean
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.devices import call_cost, memory_budget
from lens_defense.models.fingerprint import Fingerprint, model_fingerprint
from lens_defense.models.forward import model_device
from lens_defense.patching.activation_patching import WatchPasses
from lens_defense.patching.clean_corrupted import (
    CleanCorrupted,
    measure_cells,
    prompts_with_answers,
    refuse_weak,
    rows_that_fit,
    run_clean_and_corrupted,
    tokens_run,
    weak_prompts,
)
from lens_defense.patching.corruptions import Corruption, GaussianNoise
from lens_defense.patching.metrics import Metric, answer_logprob
from lens_defense.patching.pass_plan import block_passes, time_in_tokens
from lens_defense.patching.patch_grid import PatchGrid, patch_grid, resolve_components, resolve_layers
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.progress import ProgressBar, say
from lens_defense.prompts.chat_template import bound_arguments
from lens_defense.prompts.conversation import first_dozen_words
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request, UnfitRequest
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.shown_text import shown_names
from lens_defense.sites import Component
from lens_defense.tracing.measured_cell import WatchCells, report_cells
from lens_defense.tracing.site_map import SiteMap
from lens_defense.tracing.trace_result import Trace, effect_of_patch

_CALL = "ld.trace(model, requests)"
LONG_TRACE = 60.0
"""Seconds from which on a trace says beforehand how long it will take."""
LONGEST_ANSWER = 64
"""Tokens up to which the model's own answer is read where the first ones do not depend on the subject."""


def trace(
    model: Model,
    requests: Requests,
    settings: TraceSettings | None = None,
    *,
    corruption: Corruption | None = None,
    metric: Metric = answer_logprob,
    answers: Sequence[str] | SiteMap | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
    watch: WatchCells | None = None,
    **changes: Any,
) -> Trace:
    """Find which layer and which token hold what the subject of a request does to the answer.

    Exact causal tracing (Meng et al. 2022): every cell equals a forward pass of its own.

    Args:
        model: what `load` gave, or a name for it; it is not changed.
        requests: what is asked, each with a subject: requests, rows, or the name of a set.
        settings: what is patched, where, and how it is measured; None takes the defaults.
        corruption: how the subject is corrupted; None is GaussianNoise().
        metric: what is measured, see metrics.py; `trace_metrics` reads several in one sweep.
        answers: the answer that the metric reads, one per request; None takes the request's `target` or,
            without one, the model's own greedy answer to the clean prompt: its first `answer_tokens` tokens,
            and more, up to 64, where these do not depend on the subject. A Trace of the same requests gives
            its answers, so that a model can be compared before and after an edit.
        max_bytes: bounds the rows that run at once, by an estimate of their cache, states and logits; what
            does not fit is taken in parts, at least one row at a time. None is a GiB, on a CUDA device a
            quarter of what is free there.
        progress: shows a bar.
        watch: called while the trace runs, with the cells of each pass (`MeasuredCell`), each cell once; what
            it raises ends the trace. None costs nothing.
        changes: single fields of the settings, as in `trace(model, requests, layers="all")`.

    Raises:
        ValueError: a request without a subject, or of the split "check"; a role, layer or setting that does
            not exist.
        UnfitRequest: requests without a token of the roles, or whose answer does not depend on their subject.
        MemoryError: half of a pass does not fit either.
    """
    (result,) = trace_metrics(
        model,
        requests,
        {describe(metric): metric},
        settings,
        corruption=corruption,
        answers=answers,
        max_bytes=max_bytes,
        progress=progress,
        watch=watch,
        **changes,
    ).values()
    return result


def trace_metrics(
    model: Model,
    requests: Requests,
    metrics: Mapping[str, Metric],
    settings: TraceSettings | None = None,
    *,
    corruption: Corruption | None = None,
    answers: Sequence[str] | SiteMap | None = None,
    max_bytes: int | None = None,
    fingerprint: Fingerprint | None = None,
    progress: bool = True,
    watch: WatchCells | None = None,
    **changes: Any,
) -> dict[str, Trace]:
    """Traces by several metrics, read from one sweep; arguments as of `trace`.

    Args:
        model: see trace.
        requests: see trace.
        metrics: by a name each; min_difference holds for every metric, in the metric's unit.
        settings: see trace.
        corruption: see trace.
        answers: see trace.
        max_bytes: see trace.
        fingerprint: of the model, where it is known: to hash seven billion takes seconds.
        progress: see trace.
        watch: see trace; the effects are those by the first metric.
        changes: see trace.
    """
    model, requests = resolve_model(model, _CALL), requests_with_subjects(requests, _CALL)
    settings = changed_settings(settings, changes)
    corruption = corruption or GaussianNoise()
    components = resolve_components(model, settings.components)
    layers = resolve_layers(settings.layers, model.cfg.n_layers)
    budget = memory_budget(model_device(model)) if max_bytes is None else max_bytes
    prompts = _prompts(model, requests, answers, settings)
    grids = _grids(model, prompts, components, layers, settings)
    job = _Job(model, settings, corruption, tuple(metrics.values()), budget)

    start = time.perf_counter()
    kept_runs, clean, corrupted = job.run_all(prompts, grids)
    seconds = time.perf_counter() - start
    if answers is None:
        lengthened = job.lengthen_answers(prompts, grids, clean, corrupted)
        for r in lengthened:
            kept_runs.pop(r, None)
        _say_lengthened([prompts[r] for r in lengthened], settings.answer_tokens, progress)
    refuse_weak(prompts, weak_prompts(clean, corrupted, settings.min_difference), settings.min_difference)
    samples = len(corrupted[0])
    if settings.exact and progress:
        _announce(seconds * job.relative_length(prompts, grids, samples))

    shape = (len(components), len(layers), max(len(prompt.ids) for prompt in prompts), samples)
    with job.progress_bar(prompts, grids, samples, progress) as bar:
        reports = _reports(watch, grids, components, layers, clean, corrupted, settings)
        patched, estimates = job.measure_all(prompts, grids, kept_runs, clean, corrupted, shape, bar, reports)
    fingerprint = fingerprint or model_fingerprint(model)
    return {
        name: Trace(
            prompts=tuple(prompts),
            components=components,
            layers=layers,
            model=str(model.cfg.model_name),
            model_layers=model.cfg.n_layers,
            fingerprint=fingerprint,
            patched=patched[k].clone(),
            clean=torch.stack([values[k] for values in clean]),
            corrupted=torch.stack([values[:, k] for values in corrupted]),
            settings=settings,
            corruption=describe(corruption),
            metric=describe(metrics[name]),
            chat_arguments=bound_arguments(model.tokenizer),
            answers=tuple(
                first_dozen_words(model.tokenizer.decode(list(prompt.answer_ids))) for prompt in prompts
            ),
            estimates=None if estimates is None else estimates[k].clone(),
        )
        for k, name in enumerate(metrics)
    }


def changed_settings(settings: TraceSettings | None, changes: Mapping[str, Any]) -> TraceSettings:
    """The settings with single fields changed.

    Raises:
        ValueError: there is no such field, or a value is none that it may have.
    """
    names = [field.name for field in fields(TraceSettings)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        guess = did_you_mean(unknown[0], names)
        raise ValueError(f"trace has no setting {unknown[0]!r}; there are {', '.join(names)}{guess}")
    return replace(settings or TraceSettings(), **changes)


def _prompts(
    model: TransformerBridge,
    requests: Sequence[Request],
    answers: Sequence[str] | SiteMap | None,
    settings: TraceSettings,
) -> list[Prompt]:
    """The prompts with the answers that the metrics read; those of an earlier trace token by token."""
    if not isinstance(answers, SiteMap):
        return prompts_with_answers(
            model, requests, answers, answer_tokens=settings.answer_tokens, chat=settings.chat
        )
    prompts = [tokenize(model.tokenizer, request, chat=settings.chat) for request in requests]
    if [prompt.ids for prompt in prompts] != [prompt.ids for prompt in answers.prompts]:
        raise ValueError("the trace in answers= is of other requests; give the same ones in the same order")
    return [
        replace(prompt, answer_ids=traced.answer_ids)
        for prompt, traced in zip(prompts, answers.prompts, strict=True)
    ]


def _grids(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    components: Sequence[Component],
    layers: Sequence[int],
    settings: TraceSettings,
) -> list[PatchGrid]:
    n_layers, parallel = model.cfg.n_layers, bool(model.cfg.parallel_attn_mlp)
    grids = [
        patch_grid(prompt, components, layers, settings, n_layers=n_layers, parallel=parallel)
        for prompt in prompts
    ]
    empty = [prompt.request.id for prompt, grid in zip(prompts, grids, strict=True) if not grid]
    if empty:
        raise UnfitRequest(
            f"these requests have no token of the roles {settings.roles}: {shown_names(empty)}"
        )
    return grids


def _reports(
    watch: WatchCells | None,
    grids: Sequence[PatchGrid],
    components: Sequence[Component],
    layers: Sequence[int],
    clean: Sequence[Float[Tensor, " metric"]],
    corrupted: Sequence[Float[Tensor, "sample metric"]],
    settings: TraceSettings,
) -> list[WatchPasses | None]:
    """Of each prompt, what tells the watcher of its cells; None where nobody watches."""
    if watch is None:
        return [None] * len(grids)
    return [
        report_cells(
            watch,
            r,
            [(components[c], layers[j], position) for c, j, position in grid],
            clean[r],
            corrupted[r],
            settings.direction,
        )
        for r, grid in enumerate(grids)
    ]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for every prompt of a trace."""

    model: TransformerBridge
    settings: TraceSettings
    corruption: Corruption
    metrics: tuple[Metric, ...]
    max_bytes: int

    def rows(self, prompt: Prompt) -> int:
        """Rows of a prompt that run at once."""
        return rows_that_fit(self.model, prompt, self.max_bytes // 2, exact=self.settings.exact)

    def run(self, prompt: Prompt, cells: Sequence[Any]) -> CleanCorrupted:
        """A prompt clean and corrupted."""
        return run_clean_and_corrupted(
            self.model, prompt, self.corruption, cells, self.settings.direction, max_rows=self.rows(prompt)
        )

    def run_all(
        self, prompts: Sequence[Prompt], grids: Sequence[PatchGrid], *, keep: bool = True
    ) -> tuple[
        dict[int, CleanCorrupted], list[Float[Tensor, " metric"]], list[Float[Tensor, "sample metric"]]
    ]:
        """Every prompt clean and corrupted: the runs that fit into memory by index, and all metrics.

        A run that does not fit is made again when its turn comes.
        """
        kept_runs: dict[int, CleanCorrupted] = {}
        kept_bytes, clean, corrupted = 0, [], []
        for r, (prompt, grid) in enumerate(zip(prompts, grids, strict=True)):
            runs = self.run(prompt, list(grid.values()))
            of_clean, of_corrupted = runs.metrics(self.metrics)
            clean.append(of_clean)
            corrupted.append(of_corrupted)
            if keep and kept_bytes + runs.nbytes <= self.max_bytes // 2:
                kept_runs[r] = runs
                kept_bytes += runs.nbytes
        return kept_runs, clean, corrupted

    def lengthen_answers(
        self,
        prompts: list[Prompt],
        grids: Sequence[PatchGrid],
        clean: list[Float[Tensor, " metric"]],
        corrupted: list[Float[Tensor, "sample metric"]],
    ) -> set[int]:
        """Let the model say more where what it says first does not depend on the subject.

        Its own answers are doubled, up to LONGEST_ANSWER tokens, until the corruption changes them; prompts
        and metrics are changed in place. An answer that has ended, or that is known, stays.

        Returns:
            The indices of prompts that have another answer now.
        """
        lengthened: set[int] = set()
        length = self.settings.answer_tokens
        while (length := 2 * length) <= LONGEST_ANSWER:
            weak = weak_prompts(clean, corrupted, self.settings.min_difference)
            short = [
                r for r in weak if not prompts[r].request.target and len(prompts[r].answer_ids) == length // 2
            ]
            if not short:
                break
            longer = prompts_with_answers(
                self.model,
                [prompts[r].request for r in short],
                None,
                answer_tokens=length,
                chat=self.settings.chat,
            )
            _, of_clean, of_corrupted = self.run_all(longer, [grids[r] for r in short], keep=False)
            for r, prompt, one_clean, one_corrupted in zip(
                short, longer, of_clean, of_corrupted, strict=True
            ):
                prompts[r], clean[r], corrupted[r] = prompt, one_clean, one_corrupted
            lengthened |= set(short)
        return lengthened

    def measure_all(
        self,
        prompts: Sequence[Prompt],
        grids: Sequence[PatchGrid],
        kept_runs: dict[int, CleanCorrupted],
        clean: Sequence[Float[Tensor, " metric"]],
        corrupted: Sequence[Float[Tensor, "sample metric"]],
        shape: tuple[int, int, int, int],
        bar: ProgressBar,
        reports: Sequence[WatchPasses | None],
    ) -> tuple[
        Float[Tensor, "metric request component layer position sample"],
        Float[Tensor, "metric request component layer position"] | None,
    ]:
        """The patched metrics of every prompt, and the estimates of the cells that were verified.

        Args:
            prompts: with their answers.
            grids: of each prompt, its cells.
            kept_runs: by the prompt's index; each is let go once it was used.
            clean: of each prompt, the metrics of the clean run.
            corrupted: of each prompt, those of the corrupted one.
            shape: of one map: component, layer, position, sample.
            bar: shows what is done.
            reports: of each prompt, what is told of its cells while they are measured.
        """
        whole = (len(self.metrics), len(prompts), *shape)
        patched = torch.full(whole, float("nan"), dtype=torch.float64)
        estimates = torch.full_like(patched[..., 0], float("nan")) if self.settings.verify else None
        for r, (prompt, grid) in enumerate(zip(prompts, grids, strict=True)):
            runs = kept_runs.pop(r, None) or self.run(prompt, list(grid.values()))
            values, estimated = self.measure(runs, grid, clean[r], corrupted[r], bar, reports[r])
            for (c, layer, position), of_metrics in zip(grid, values, strict=True):
                patched[:, r, c, layer, position] = of_metrics.T
            for place, of_metrics in estimated.items():
                assert estimates is not None
                estimates[:, r, *place] = of_metrics
        return patched, estimates

    def measure(
        self,
        runs: CleanCorrupted,
        grid: PatchGrid,
        clean: Float[Tensor, " metric"],
        corrupted: Float[Tensor, "sample metric"],
        bar: ProgressBar,
        report: WatchPasses | None,
    ) -> tuple[Float[Tensor, "cell sample metric"], dict[tuple[int, int, int], Float[Tensor, " metric"]]]:
        """The patched metrics of one prompt; and of the cells that were verified the estimated effects."""
        exact, rows, cells = self.settings.exact, self.rows(runs.prompt), list(grid.values())
        update = bar.update if exact else lambda _: None
        watch = None if self.settings.verify else report
        values = measure_cells(
            self.model, runs, cells, self.metrics, exact=exact, max_rows=rows, progress=update, watch=watch
        )
        bar.update(0 if exact else 1)
        if not self.settings.verify:
            return values, {}
        effects = effect_of_patch(values, clean, corrupted, self.settings.direction).mean(1)
        strongest = effects[:, 0].abs().argsort(descending=True)[: self.settings.verify].tolist()
        values[strongest] = measure_cells(
            self.model, runs, [cells[i] for i in strongest], self.metrics, exact=True, max_rows=rows
        )
        if report is not None:  # not before, so that each cell is told once
            report(range(len(cells)), values)
        places = list(grid)
        return values, {places[i]: effects[i] for i in strongest}

    def progress_bar(
        self, prompts: Sequence[Prompt], grids: Sequence[PatchGrid], samples: int, progress: bool
    ) -> ProgressBar:
        """A bar over passes of one token through one block; of estimates over requests."""
        if not self.settings.exact:
            return ProgressBar("attribution", len(prompts), unit="request", shown=progress)
        total = sum(
            block_passes(
                list(grid.values()),
                layers=self.model.cfg.n_layers,
                tokens=tokens_run(prompt),
                samples=samples,
            )
            for prompt, grid in zip(prompts, grids, strict=True)
        )
        return ProgressBar("trace", total, unit="pass", unit_scale=True, shown=progress)

    def relative_length(self, prompts: Sequence[Prompt], grids: Sequence[PatchGrid], samples: int) -> float:
        """How many times longer the sweeps take than the clean and the corrupted runs took."""
        cost, n_layers = call_cost(model_device(self.model)), self.model.cfg.n_layers
        sweeps = runs = 0
        for prompt, grid in zip(prompts, grids, strict=True):
            tokens = tokens_run(prompt)
            sweeps += time_in_tokens(
                list(grid.values()),
                layers=n_layers,
                tokens=tokens,
                samples=samples,
                max_rows=self.rows(prompt),
                call_cost=cost,
            )
            runs += n_layers * (tokens * (samples + 1) + 2 * cost.call)
        return sweeps / runs


def describe(function: object) -> str:
    """A metric or a corruption in words: a function by its name, a dataclass by its words."""
    if is_dataclass(function):
        return str(function)
    return str(getattr(function, "__name__", type(function).__name__))


def _say_lengthened(prompts: Sequence[Prompt], tokens: int, progress: bool) -> None:
    if prompts and progress:
        named = ", ".join(f"{prompt.request.id} ({len(prompt.answer_ids)})" for prompt in prompts)
        say(
            f"The first {tokens} tokens of some answers do not depend on the subject; longer ones are read "
            f"(tokens): {named}"
        )


def _announce(seconds: float) -> None:
    if seconds > LONG_TRACE:
        minutes = round(seconds / 60)
        say(
            f"This trace takes about {minutes} minute{'s' * (minutes != 1)}. Fewer positions (roles), layers "
            "(a stride), samples or answer_tokens make it shorter."
        )
