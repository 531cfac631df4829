"""The demo: the main job on a real chat model from one command, with a control, in some minutes."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.output_folder import staged_folder
from lens_defense.app.report_page import Conversation, headline, save_report
from lens_defense.app.traced_requests import corruption_of, trace_answered
from lens_defense.checking.check import check, suite_answers
from lens_defense.checking.report import Report
from lens_defense.checking.suites import HARMFUL_ARMS, Suite, suite
from lens_defense.editing.defaults import edit_defaults
from lens_defense.editing.edit import edit
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.solving.covariance import key_covariances
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.loading.load import load
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.corpus import read_corpus
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import requests as read_requests
from lens_defense.shown_text import shown
from lens_defense.sites import Site
from lens_defense.tracing.control_sites import control_sites
from lens_defense.tracing.locate import locate
from lens_defense.tracing.trace import trace

PAGE = "report.html"
_CONTROL_REQUESTS = 4
"""Requests that the control edits elsewhere: with every fourth context, a sixth of the corpus, and no extra
rounds for hard ones."""
_CONTROL_ARMS = ("edited", "paraphrase", "jailbreak")
_SHOWN_SUBJECTS = 3
"""Subjects whose harmful request and harmless question are shown as conversations."""
_ANSWER_TOKENS = 24
"""Fewer than check's 100, for time: enough to see how an answer begins."""


@dataclass(frozen=True)
class DemoSetup:
    """What the demo asks a model, and how it edits it."""

    request_set: str = "core"
    """The bundled set of the suite and the corpus, and of the requests unless others are given."""
    edited: int = 8
    """The most requests that are edited."""
    jailbreaks: int = 3
    """Jailbreaks of each request in the small suite."""
    harmless: int = 40
    """Benign and over_refusal requests each."""
    fit: FitSettings | None = None
    """None takes the defaults of the model's language, as for all else that an edit is not told."""


ORGANISM_SETUP = DemoSetup("organism", edited=20, jailbreaks=10)


def demo(
    console: Console,
    *,
    name: str = "smollm2",
    requests: Sequence[Request] | None = None,
    out: Path = Path("demo"),
    cache: bool = True,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    reproduce: str = "lens-defense demo",
) -> Path:
    """Trace, locate, edit, check, undo; write report.html and what it is made of.

    Args:
        console: where progress and tables go.
        name: the model.
        requests: what is edited, the first ones of it; None takes a bundled set.
        out: the folder of the results, all of them or none; earlier ones move to a folder inside.
        cache: take covariances and values from disk where they are.
        device: as of `load`.
        dtype: as of `load`.
        reproduce: the command that the page names.

    Returns:
        The page.
    """
    with staged_folder(out, console.print) as folder:
        seconds, report, plan = _run(console, name, requests, folder, cache, device, dtype, reproduce)
    page = out / PAGE
    _print_summary(console, seconds, page, report, plan)
    return page


def _run(
    console: Console,
    name: str,
    requests: Sequence[Request] | None,
    out: Path,
    cache: bool,
    device: str | None,
    dtype: torch.dtype,
    reproduce: str,
) -> tuple[dict[str, float], Report, Edit]:
    """The stages: the seconds of each, what was measured, and the edit."""
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(title: str) -> Iterator[None]:
        console.rule(f"[bold]{title}")
        start = time.perf_counter()
        yield
        seconds[title] = time.perf_counter() - start

    with stage("load"):
        model = load(name, device=device, dtype=dtype)
        original = model_fingerprint(model)
        setup = ORGANISM_SETUP if language(model) == "organism" else DemoSetup()
        own = None if requests is None else requests[: DemoSetup.edited]
        edited = own or read_requests(setup.request_set)[: setup.edited]
        corpus = read_corpus(setup.request_set)
    with stage("trace"):
        result = trace_answered(model, edited)
        result.save(out / "trace.safetensors")
        sites = locate(result)
        console.print("strongest sites:", ", ".join(map(str, sites)))
    with stage("covariance"):
        if cache:
            key_covariances(model, [site.layer for site in sites], corpus, fingerprint=original)
    with stage("edit"):
        plan = edit(model, edited, sites, fit=setup.fit, corpus=corpus, cache=cache)
        plan.save(out / "edit.safetensors")
        console.print(repr(plan), markup=False)
    with stage("check"):
        questions = _questions(setup, plan)
        before = suite_answers(model, questions, _ANSWER_TOKENS)
        title = _title("edited", sites)
        report = check(model, plan, questions, max_new_tokens=_ANSWER_TOKENS, before=before, title=title)
        report.save(out / "report.json")
        console.print(report)
    with stage("trace again"), plan.applied(model):
        traced = [prompt.request for prompt in result.prompts]
        settings = replace(result.settings, min_difference=0.0)
        after = trace(model, traced, settings, corruption=corruption_of(model), answers=result)
        after.save(out / "trace_after.safetensors")
    with stage("control"):
        control = _control(model, setup, edited, sites, questions, before, cache)
        control.save(out / "control.json")
        console.print(control)
    with stage("undo"):
        conversations = _conversations(model, plan, questions, before)
        restored = model_fingerprint(model) == original
        console.print(f"weights as they were: {restored} (hash {original.weights})")
    save_report(
        out / PAGE,
        title=f"lens_defense on {name}",
        trace=result,
        sites=sites,
        edit=plan,
        reports={report.title: report, control.title: control},
        conversations=conversations,
        reproduce=reproduce,
        after=after,
        suite=questions,
        seconds=seconds,
        restored=restored,
    )
    return seconds, report, plan


def _questions(setup: DemoSetup, plan: Edit) -> Suite:
    """The small suite about the edit, with half of its neutral texts."""
    small = suite(setup.request_set).small(
        jailbreaks=setup.jailbreaks, names=1, same_subject=3, harmless=setup.harmless
    )
    small = replace(small, neutral=small.neutral[::2])
    questions, _ = small.for_requests(plan.requests).for_edit(plan.requests, plan.texts, plan.names)
    return questions


def _control(
    model: TransformerBridge,
    setup: DemoSetup,
    requests: Sequence[Request],
    sites: Sequence[Site],
    questions: Suite,
    before: Sequence[tuple[int, ...]],
    cache: bool,
) -> Report:
    """What an edit in late layers, of a few of the subjects and fitted with less, does to their questions."""
    late_sites = control_sites(sites, model.cfg.n_layers)["late layers"]
    edited, defaults = requests[:_CONTROL_REQUESTS], edit_defaults(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what a control is for: it hardly works
        plan = edit(
            model,
            edited,
            late_sites,
            contexts=lambda request: defaults.contexts(request)[::4],
            contrast=None,
            fit=replace(setup.fit or defaults.fit, extra_rounds=0),
            corpus=read_corpus(setup.request_set)[::6],
            cache=cache,
        )
    ids, items = {request.id for request in edited}, questions.items
    chosen = [i for i, item in enumerate(items) if item.arm in _CONTROL_ARMS and item.request.id in ids]
    return check(
        model,
        plan,
        replace(questions, items=tuple(items[i] for i in chosen), neutral=()),
        max_new_tokens=_ANSWER_TOKENS,
        before=[before[i] for i in chosen],
        title=f"{_title('control', late_sites)}, {len(edited)} of the subjects, fitted with less",
    )


def _title(name: str, sites: Sequence[Site]) -> str:
    return f"{name}: layers {sites[0].layer} to {sites[-1].layer} at {sites[0].role}"


def _conversations(
    model: TransformerBridge, plan: Edit, questions: Suite, before: Sequence[tuple[int, ...]]
) -> list[Conversation]:
    """Some questions, answered before the edit and with it applied for good; then it is undone.

    A request and a harmless question about each of three subjects; then a paraphrase, a jailbreak, and an
    everyday question.
    """
    items = questions.items
    arms = [item.arm for item in items]

    def of(arm: str, subject: str | None) -> list[int]:
        matching = [i for i, item in enumerate(items) if item.arm == arm and subject in (None, item.subject)]
        return matching[:1]

    subjects = plan.subjects[:_SHOWN_SUBJECTS] if "same_subject" in arms else ()
    chosen = [i for subject in subjects for arm in ("edited", "same_subject") for i in of(arm, subject)]
    chosen += [i for arm in ("paraphrase", "jailbreak", "benign") for i in of(arm, None)]
    prompts = [tokenize(model.tokenizer, questions.items[i].request).ids for i in chosen]
    ledger = Ledger(model)
    ledger.apply(plan)
    try:
        after = generate(model, prompts, max_new_tokens=_ANSWER_TOKENS)
    finally:
        ledger.undo()
    return [
        Conversation(
            questions.items[i].request.text,
            decode_answer(model.tokenizer, before[i]),
            decode_answer(model.tokenizer, answer),
            harmful=arms[i] in HARMFUL_ARMS,
        )
        for i, answer in zip(chosen, after, strict=True)
    ]


def _print_summary(
    console: Console, seconds: dict[str, float], page: Path, report: Report, plan: Edit
) -> None:
    table = Table(title="time", show_header=False)
    for name, value in (*seconds.items(), ("all", sum(seconds.values()))):
        table.add_row(name, f"{value:.0f} s")
    console.print(table)
    numbers = "; ".join(f"{name}: {value}" for value, name in headline(report))
    console.print(f"{len(plan.subjects)} subjects edited on {shown(plan.model)}; {numbers}", markup=False)
    console.print(f"[bold]Open {escape(shown(page, 2000))}")
