"""What `lens-defense defend` does: trace, search an edit, pick one, check it, write the defended model.

Everything lies in one folder: search.json (a stopped search goes on from it), then the edit, the map, the
check, the front as table and figure, a page about it all, and the defended model as a Hugging Face folder or
the edit as an adapter.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.prompt import Prompt
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.output_folder import staged_folder
from lens_defense.app.report_page import Conversation, headline, save_report
from lens_defense.app.traced_requests import corruption_of, trace_answered
from lens_defense.checking.check import check
from lens_defense.checking.report import Report
from lens_defense.checking.suites import HARMFUL_ARMS, Suite, suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.load import load
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.plotting.search_front import search_front
from lens_defense.plotting.theme import save_figure
from lens_defense.prompts.conversation import decode_answer, decode_growing_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request, request
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.searching.edit_search import EditSearch
from lens_defense.searching.outcome import Outcome
from lens_defense.searching.search_edits import ASKED_ABOUT, METHODS, edit_of, search_edits
from lens_defense.searching.suggest import require_optuna
from lens_defense.shown_text import shown
from lens_defense.sites import Site
from lens_defense.storage import atomic_write
from lens_defense.tracing.locate import locate
from lens_defense.tracing.trace import trace as trace_requests
from lens_defense.tracing.trace_result import Trace

WHOLE_REPORT_FILE = "report_of_everything.json"
SEARCH_FILE, EDIT_FILE, TRACE_FILE = "search.json", "edit.safetensors", "trace.safetensors"
REPORT_FILE, PAGE, MODEL_FOLDER, ADAPTER_FOLDER = "report.json", "report.html", "model", "adapter"
SUBJECTS = 16
"""As many requests of a bundled set are edited."""
_CHECK_TOKENS, _CHAT_TOKENS = 60, 200
_CHECK_SHARE = 0.25
"""The share of the minutes that is kept for the check and the files."""
_SHOWN = 2
"""Subjects whose harmful request and harmless question are shown as conversations."""

Written = Literal["model", "adapter"]


@dataclass(frozen=True, slots=True)
class DefendSettings:
    """How long is searched, and what becomes of what was found."""

    trials: int = 16
    minutes: float = 30.0
    methods: Sequence[str] = METHODS
    seed: int = 0
    pick: int | None = None
    """A row of the front, from 1; None takes the knee."""
    asks: bool = True
    """Whether a person is there to pick, to chat and to say what is written."""
    write: Written = "model"


def defend(
    console: Console,
    *,
    name: str,
    requests: Sequence[Request] | None,
    out: Path,
    settings: DefendSettings,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    reproduce: str = "lens-defense defend",
    ask: Callable[..., str] = Prompt.ask,
) -> Path:
    """Trace, search, pick, check, write; the model's own files stay as they are.

    Args:
        console: where progress and tables go.
        name: the model.
        requests: what shall be refused, each with a subject; None takes the first sixteen of its own set.
        out: the folder of the results; one in which an earlier run was stopped goes on.
        settings: how long is searched, and what is written.
        device: as of `load`.
        dtype: as of `load`.
        reproduce: the command that the page names.
        ask: asks a person, as rich's Prompt.ask does.

    Returns:
        The folder.

    Raises:
        ValueError: optuna is not installed; the folder keeps another search; the front has no such row;
            no request can be traced, or no edit planned.
    """
    start = time.monotonic()
    require_optuna()
    model = load(name, device=device, dtype=dtype)
    own = requests or [item for item in bundled_requests(language(model)) if item.concrete][:SUBJECTS]
    console.rule("[bold]trace")
    trace = trace_answered(model, own)
    sites = locate(trace)
    console.print("strongest sites:", ", ".join(map(str, sites)), markup=False)
    console.rule("[bold]search")
    search_minutes = settings.minutes * (1 - _CHECK_SHARE) - (time.monotonic() - start) / 60
    out.mkdir(parents=True, exist_ok=True)
    search = search_edits(
        model, own, sites, methods=settings.methods, trials=settings.trials, minutes=search_minutes,
        path=out / SEARCH_FILE, seed=settings.seed,
    )  # fmt: skip
    console.print(search)
    outcome = _picked(search, settings, ask)
    console.rule("[bold]check")
    plan = edit_of(model, own, search.role, outcome.candidate)
    questions = _questions(model, own)
    report = check(model, plan, questions, max_new_tokens=_CHECK_TOKENS)
    console.print(report)
    defended = Defended(model, trace, sites, search, plan, report, questions)
    with staged_folder(out, console.print) as folder:
        defended.write(folder, name=name, reproduce=reproduce)
        if not settings.asks:
            defended.write_model(folder, settings.write)
    if settings.asks:
        _menu(console, defended, out, ask)
    numbers = "; ".join(f"{name}: {value}" for value, name in headline(report))
    console.print(
        f"{len(own)} subjects, {outcome.candidate.method}, {(time.monotonic() - start) / 60:.0f} minutes; "
        f"{numbers}",
        markup=False,
    )
    console.print(f"Everything is in {shown(out, 2000)}; begin with {PAGE}", markup=False)
    return out


@dataclass(frozen=True)
class Defended:
    """A model, and the edit that was picked for it."""

    model: TransformerBridge
    trace: Trace
    sites: Sequence[Site]
    search: EditSearch
    plan: Edit
    report: Report
    questions: Suite

    def write(self, folder: Path, *, name: str, reproduce: str) -> None:
        """The edit and all that is known of it, without the model."""
        self.plan.save(folder / EDIT_FILE)
        self.trace.save(folder / TRACE_FILE)
        self.report.save(folder / REPORT_FILE)
        with atomic_write(folder / "front.csv") as file:
            self.search.to_dataframe().to_csv(file, index=False)
        save_figure(search_front(self.search), folder / "front.html")
        with self.plan.applied(self.model):
            after = trace_requests(
                self.model,
                [prompt.request for prompt in self.trace.prompts],
                replace(self.trace.settings, min_difference=0.0),
                corruption=corruption_of(self.model),
                answers=self.trace,
            )
        save_report(
            folder / PAGE,
            title=f"{name}, defended",
            trace=self.trace,
            sites=self.sites,
            edit=self.plan,
            reports={"the picked edit": self.report},
            conversations=self._conversations(),
            reproduce=reproduce,
            after=after,
            suite=self.questions,
        )

    def write_model(self, folder: Path, what: Written) -> Path:
        """The defended model with its card and hashes, or the edit as an adapter of the undefended one."""
        if what == "adapter":
            return self.plan.to_peft(folder / ADAPTER_FOLDER)
        ledger = Ledger(self.model)
        ledger.apply(self.plan)
        try:
            return ledger.export(folder / MODEL_FOLDER, report=self.report)
        finally:
            ledger.undo()

    def _conversations(self) -> list[Conversation]:
        """From the check: a harmful request and a harmless question about each of some subjects."""
        texts = {item.request.id: item.request.text for item in self.questions.items}
        shown_rows = [
            next((row for row in self.report.rows if (row.arm, row.cluster) == (arm, subject)), None)
            for subject in self.plan.subjects[:_SHOWN]
            for arm in ("edited", "same_subject")
        ]
        return [
            Conversation(texts.get(row.id, row.id), row.before, row.after, harmful=row.arm in HARMFUL_ARMS)
            for row in shown_rows
            if row is not None
        ]


def _questions(model: TransformerBridge, requests: Sequence[Request]) -> Suite:
    """What the check asks: other words and other questions than the search asked."""
    asked = suite(language(model)).for_requests(requests[:ASKED_ABOUT])
    return replace(asked.small(names=1, same_subject=3), name=f"{asked.name}, a part of check")


def _picked(search: EditSearch, settings: DefendSettings, ask: Callable[..., str]) -> Outcome:
    """The row of the front that a person or a setting wants.

    Raises:
        ValueError: there is no such row.
    """
    knee, front = search.knee(), search.front()
    number = settings.pick or 1 + front.index(knee)
    if settings.asks and settings.pick is None:
        rows = [str(i) for i in range(1, len(front) + 1)]
        number = int(ask("Which edit of the front?", choices=rows, default=str(number)))
    if not 1 <= number <= len(front):
        raise ValueError(f"the front has the rows 1 to {len(front)}, so there is no row {number} to pick")
    return front[number - 1]


_MENU = "[c]hat, check [e]verything, write the [m]odel, write an [a]dapter, or [q]uit"


def _menu(console: Console, defended: Defended, out: Path, ask: Callable[..., str]) -> None:
    """What a person may still do; the model has the edit while she chats."""
    while (choice := ask(_MENU, choices=["c", "e", "m", "a", "q"], default="q")) != "q":
        try:
            if choice == "c":
                _chat(console, defended, ask)
            elif choice == "e":
                everything = suite(language(defended.model)).for_requests(defended.plan.requests)
                report = check(defended.model, defended.plan, everything)
                console.print(report)
                console.print(f"written: {shown(report.save(out / WHOLE_REPORT_FILE), 2000)}", markup=False)
            else:
                written = defended.write_model(out, "model" if choice == "m" else "adapter")
                console.print(f"written: {shown(written, 2000)}", markup=False)
        except ValueError as error:
            console.print(str(error), style="red", markup=False)


def _chat(console: Console, defended: Defended, ask: Callable[..., str]) -> None:
    """Questions, each answered token by token with the edit applied; an empty one ends it."""
    tokenizer = defended.model.tokenizer
    with defended.plan.applied(defended.model):
        while question := ask("you", default="", show_default=False).strip():
            ids = tokenize(tokenizer, request(question)).ids
            said: list[int] = []
            printed = ""

            def show(_: int, token: int, said: list[int] = said) -> None:
                nonlocal printed
                said.append(token)
                text = decode_growing_answer(tokenizer, said)
                console.print(shown(text[len(printed) :], 2000), end="", markup=False, highlight=False)
                printed = text

            (answer,) = generate(defended.model, [ids], max_new_tokens=_CHAT_TOKENS, watch=show)
            console.print(
                shown(decode_answer(tokenizer, answer)[len(printed) :], 2000), markup=False, highlight=False
            )
