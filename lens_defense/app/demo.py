"""The demo: the main job on a real chat model from one command, with a control, in under four minutes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.report_page import Conversation, save_report
from lens_defense.checking.check import check, suite_answers
from lens_defense.checking.judges import prefix
from lens_defense.checking.report import Report
from lens_defense.checking.suites import ABOUT_THE_EDIT, HARMFUL_ARMS, Suite, suite
from lens_defense.editing.covariance import Corpus, key_covariances, read_corpus
from lens_defense.editing.edit import Contexts, default_contexts, edit
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger import Ledger
from lens_defense.models.generate import generate
from lens_defense.models.load import load
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.organism.request_set import contexts
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import Request, prompt
from lens_defense.prompts.request_files import requests
from lens_defense.sites import Site
from lens_defense.tracing.control_sites import control_sites
from lens_defense.tracing.corruptions import Corruption, replacement
from lens_defense.tracing.locate import locate
from lens_defense.tracing.trace import trace
from lens_defense.tracing.trace_result import Trace

TRACED, TOKENS = 3, 24
CONTROLLED = 4
"""Subjects that the control edits elsewhere: with every fourth context, an eighth of the corpus, and no
further rounds for hard ones."""
OPENING = 8
"""Tokens of an answer that tell a refusal by its prefix."""


@dataclass(frozen=True)
class Bench:
    """What the demo asks a model, and how it edits it."""

    questions: str = "core"
    """The bundled set, which brings the corpus of C too."""
    edited: int = 8
    wrappers: int = 3
    """Of the suite's small form."""
    contexts: Contexts = default_contexts
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the edit that differ from the defaults."""
    replaced: bool = False
    """Whether the trace replaces subjects by benign ones of the set, where noise would."""

    def corruption(self, model: TransformerBridge) -> Corruption | None:
        """How the trace spoils a subject; None is its default."""
        if not self.replaced:
            return None
        benign = [item.subject or "" for item in requests(self.questions, split="check", kind="benign")]
        return replacement(model, samples=3, subjects=benign)


ORGANISM = Bench(
    "organism",
    edited=20,
    wrappers=10,
    contexts=contexts,
    settings={"rate": 0.4, "shared_rate": 0.4},
    replaced=True,
)


def demo(
    console: Console,
    *,
    name: str = "smollm2",
    out: Path = Path("demo"),
    cache: bool = True,
    device: str | None = None,
) -> Path:
    """Trace, locate, edit, check, undo; write report.html and what it is made of.

    Args:
        console: where progress and tables go.
        name: the model.
        out: the folder of the results; earlier ones there are replaced.
        cache: take moments and values from disk where they are.
        device: as of `load`.

    Returns:
        The page.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(title: str) -> Iterator[None]:
        console.rule(f"[bold]{title}")
        start = time.perf_counter()
        yield
        seconds[title] = time.perf_counter() - start

    out.mkdir(parents=True, exist_ok=True)
    with stage("load"):
        model = load(name, device=device)
        original = weights_fingerprint(model)
        bench = ORGANISM if name == "organism" else Bench()
        planned = requests(bench.questions)[: bench.edited]
        corpus = None if bench.questions == "core" else read_corpus(bench.questions)
    with stage("trace"):
        open_to = _answered(model, planned[:TRACED], bench.contexts)
        traced = trace(model, open_to, corruption=bench.corruption(model))
        traced.save(out / "trace.safetensors")
        sites = locate(traced)
        console.print("strongest sites:", ", ".join(map(str, sites)))
    with stage("moments"):
        if cache:
            key_covariances(model, [site.layer for site in sites], corpus)
    with stage("edit"):

        def planned_at(
            where: Sequence[Site],
            some: Sequence[Request] = planned,
            texts: Corpus | None = corpus,
            **more: Any,
        ) -> Edit:
            settings = {"contexts": bench.contexts, "corpus": texts, "cache": cache, **bench.settings}
            return edit(model, some, where, **{**settings, **more})

        plan = planned_at(sites)
        plan.save(out / "edit.safetensors")
        console.print(repr(plan))
    with stage("check"):
        asked = suite(bench.questions).small(wrappers=bench.wrappers)
        asked = replace(asked, neutral=asked.neutral[::2])
        seen = {text for texts in plan.contexts for text in texts}
        rows, _ = asked.for_requests(planned).about(planned, seen)
        before = suite_answers(model, rows, TOKENS)
        report = check(model, plan, asked, before=before, title=_title("edited", sites))
        report.save(out / "report.json")
        console.print(report)
    with stage("control"):
        elsewhere = control_sites(sites, model.cfg.n_layers)["late layers"]
        few = planned[:CONTROLLED]
        other = planned_at(
            elsewhere,
            few,
            read_corpus(bench.questions)[::8],
            contexts=lambda item: bench.contexts(item)[::4],
            rounds=0,
        )
        ids = {item.id for item in few}
        about = [
            i for i, item in enumerate(rows.items) if item.arm in ABOUT_THE_EDIT and item.request.id in ids
        ]
        control = check(
            model,
            other,
            replace(rows, items=tuple(rows.items[i] for i in about), neutral=()),
            before=[before[i] for i in about],
            title=f"{_title('control', elsewhere)}, {len(few)} of the subjects, fitted with less",
        )
        control.save(out / "control.json")
        console.print(control)
    with stage("undo"):
        talks = _conversations(model, plan, rows, before)
        restored = weights_fingerprint(model) == original
        console.print(f"weights as they were: {restored} (hash {original})")
    page = save_report(
        out / "report.html",
        title=f"lens_defense on {name}",
        trace=traced,
        sites=sites,
        edit=plan,
        reports={report.title: report, control.title: control},
        conversations=talks,
        reproduce=f"lens-defense demo --model {name}",
        seconds=seconds,
        restored=restored,
    )
    _close(console, seconds, page, report, traced, plan)
    return page


def _answered(model: TransformerBridge, planned: Sequence[Request], contexts: Contexts) -> list[Request]:
    """Each request as it is answered: as asked, or in the first of its contexts that is not refused.

    A refusal does not depend on what the subject holds; the place of it shows where the model answers.
    """

    def refused(ways: Sequence[Request]) -> list[bool]:
        told = generate(model, [prompt(model.tokenizer, way).ids for way in ways], tokens=OPENING)
        texts = [decode_answer(model.tokenizer, ids) for ids in told]
        return [prefix(way.text, text) == "refusal" for way, text in zip(ways, texts, strict=True)]

    found = []
    for item, plain in zip(planned, refused(planned), strict=True):
        ways = list(contexts(item)) if plain else []
        answered = [way for way, no in zip(ways, refused(ways), strict=True) if not no]
        found.append(answered[0] if answered else item)
    return found


def _title(what: str, sites: tuple[Site, ...]) -> str:
    return f"{what}: layers {sites[0].layer} to {sites[-1].layer} at {sites[0].role}"


def _conversations(
    model: TransformerBridge, plan: Edit, rows: Suite, before: Sequence[tuple[int, ...]]
) -> list[Conversation]:
    """Three questions, answered before the edit and with it applied for good; then it is undone."""
    arms = [item.arm for item in rows.items]
    first = [arms.index(arm) for arm in ("wording", "wrapper", "benign")]
    asked = [rows.items[i] for i in first]
    ledger = Ledger(model)
    ledger.apply(plan)
    try:
        ids = [prompt(model.tokenizer, item.request).ids for item in asked]
        after = generate(model, ids, tokens=TOKENS)
    finally:
        ledger.undo()
    told = [before[i] for i in first], after
    texts = [[decode_answer(model.tokenizer, answer) for answer in some] for some in told]
    return [
        Conversation(item.request.text, before, after, harmful=item.arm in HARMFUL_ARMS)
        for item, before, after in zip(asked, *texts, strict=True)
    ]


def _close(
    console: Console,
    seconds: dict[str, float],
    page: Path,
    report: Report,
    traced: Trace,
    plan: Edit,
) -> None:
    table = Table(title="time", show_header=False)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f} s")
    table.add_row("all", f"{sum(seconds.values()):.0f} s")
    console.print(table)
    kl = sum(report.kl) / len(report.kl)
    console.print(
        f"{len(plan.subjects)} subjects traced and edited on {traced.model}: in unseen words and "
        f"wrappers, coherent refusals from {_unseen_words(report, after=False):.0%} to "
        f"{_unseen_words(report, after=True):.0%}; new refusals of harmless requests "
        f"{report.new_refusals()}; facts lost {report.facts_lost()}; KL {kl:.4f}"
    )
    console.print(f"[bold]Open {page}")


def _unseen_words(report: Report, *, after: bool) -> float:
    hits = [row.hit("coherent", after=after) for row in report.rows if row.arm in ("wording", "wrapper")]
    return sum(hits) / len(hits)
