"""The explorer: see where a model keeps a subject, choose cells, plan an edit there, apply, ask, check, undo.

An Explorer is what a page shows and what the page's buttons do; it knows no page. Its state is named parts of
plain values (`parts`): a host sends each part to its page when it changes, and hands what a person does there
to `do`. The hosts are a widget in a notebook (widget.py) and a local page (server.py); in a report a page has
the parts alone (page.js). Short commands are done at once, long ones by one background thread (worker.py).
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.explorer import page_values, take_away
from lens_defense.app.explorer.map_values import (
    ROLES_OF_SITES,
    component_choices,
    editable,
    map_part,
    reddest_column_sentence,
    sites_part,
)
from lens_defense.app.explorer.notebook_form import StaticForm, page_form, wants_pictures
from lens_defense.app.explorer.page_state import EVENT
from lens_defense.app.explorer.reproduce import reproducing_code
from lens_defense.app.explorer.worker import STOPPED, Worker
from lens_defense.app.report_page import Conversation
from lens_defense.arguments import wrong_argument
from lens_defense.checking.check import check
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite, suite
from lens_defense.editing.edit import edit as plan_edit
from lens_defense.editing.edit_plan import Edit, EditWarning
from lens_defense.editing.ledger import Ledger
from lens_defense.editing.methods import METHODS
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.patching import metrics as all_metrics
from lens_defense.patching.corruptions import Corruption
from lens_defense.patching.metrics import Metric
from lens_defense.patching.patch_grid import resolve_components
from lens_defense.patching.trace_settings import Direction, TraceSettings
from lens_defense.prompts.conversation import decode_answer, decode_growing_answer
from lens_defense.prompts.harmless_uses import same_subject_requests
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request, Role, request
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.shown_text import shown, truncate
from lens_defense.sites import Component, Site, resolve_sites
from lens_defense.tracing.control_sites import control_sites
from lens_defense.tracing.locate import locate
from lens_defense.tracing.trace import trace as trace_requests
from lens_defense.tracing.trace import trace_metrics
from lens_defense.tracing.trace_result import Trace, join_traces

_log = logging.getLogger("lens_defense")
FIRST_REQUESTS = 8
"""As many of a bundled set are looked at where no requests are named."""
FIRST_TRACED = 3
"""As many of these are traced, unless told otherwise."""
METRICS: Mapping[str, Metric] = {
    "answer_logprob": all_metrics.answer_logprob,
    "answer_probability": all_metrics.answer_probability,
    "kl_to_clean": all_metrics.kl_to_clean,
}
SHARPENED: tuple[Role, ...] = ("subject_first", "subject_mid", "subject_last", "last")
"""Roles whose cells are measured after the estimate."""
STRONGEST = 2.0
"""The greatest factor of a plan's change that the page offers."""
_COMPONENTS = ("resid_post", "mlp_out", "attn_out")
_TAKEN = ("edit", "svg", "pdf", "report", "folder")
_CALL = "ld.Explorer(model, requests)"
_WAITING = "there is no map yet; press Trace first"


@dataclass(frozen=True, slots=True)
class TraceChoices:
    """How the page traces."""

    components: Sequence[Component] = ("resid_post", "mlp_out", "attn_out")
    direction: Direction = "denoising"
    metric: str = "answer_logprob"
    number: int = FIRST_TRACED
    """So many of the requests, the first ones: a map takes as many times as long."""


@dataclass(frozen=True, slots=True)
class PlanChoices:
    """What the page plans at the chosen cells."""

    method: str = "memit"
    strength: float = 1.0
    requests: tuple[int, ...] = ()
    """Indices of those that are edited."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One question, answered without and with the edits that stand."""

    question: str
    template: str
    """The id of the jailbreak template around it, or ""."""
    standing: tuple[Edit, ...]
    """The edits that stood when it was asked."""
    before: str = ""
    now: str = ""


class Explorer:
    """What a page shows, both ways: set `sites`, `trace` or `edit` here, and the page moves."""

    def __init__(
        self,
        model: Model,
        requests: Requests | None = None,
        trace: Trace | None = None,
        *,
        sites: Sequence[Site] = (),
        settings: Mapping[str, Any] | None = None,
        corruption: Corruption | None = None,
        small_suite: Suite | None = None,
        name: str = "",
        max_new_tokens: int = 60,
    ) -> None:
        """Open a model in which no edit stands; in a notebook, show the object to see the page.

        Args:
            model: what `load` gave, or a name for it. It is never copied.
            requests: what is looked at and edited, each with a subject; None takes the first of the model's
                own set.
            trace: a map to begin with; without one the page offers to make it.
            sites: the cells that are chosen at first.
            settings: more arguments for ld.edit.
            corruption: how a trace corrupts the subject; None takes its default.
            name: what `load` is to be told in the Python that the page shows; "" takes the model's name.
            small_suite: what Check asks; None takes a small one in the model's language.
            max_new_tokens: the most tokens of an answer.
        """
        self.model: TransformerBridge = resolve_model(model, _CALL)
        wanted = bundled_requests(language(self.model))[:FIRST_REQUESTS] if requests is None else requests
        self.requests = requests_with_subjects(wanted, _CALL)
        self.settings, self.corruption = dict(settings or {}), corruption
        self.small_suite, self.max_new_tokens = small_suite, max_new_tokens
        self.name = name or str(self.model.cfg.model_name)
        self.ledger = Ledger(self.model)
        self.trace_choices = TraceChoices(number=min(FIRST_TRACED, len(self.requests)))
        self.plan_choices = PlanChoices(requests=tuple(range(len(self.requests))))
        self.talk: Talk | None = None
        self.message = ""
        self._trace: Trace | None = None
        self._estimate: Trace | None = None
        self._after: dict[tuple[Edit, ...], Trace] = {}
        self._sites: tuple[Site, ...] = ()
        self._reason = ""
        self._edit: Edit | None = None
        self._report: Report | None = None
        self._questions: list[str] = []
        self._reported: tuple[Edit, ...] = ()
        self._asked: Suite | None = None
        self._widget: Any = None
        self._listeners: list[Callable[[str, Any], object]] = []
        self._lock = threading.RLock()
        self.worker = Worker(lambda: self.publish("job"))
        self.ledger.watch(lambda: self.publish("stack", "plan", "map", "talk", "check", "code"))
        self.parts: dict[str, Any] = {}
        self.publish(*_PARTS)
        self._static_form = StaticForm(self)
        if trace is not None:
            self.trace = trace
        if sites:
            self.sites = resolve_sites(sites, _CALL)

    # State, for the kernel and for a page

    @property
    def sites(self) -> tuple[Site, ...]:
        """The chosen cells: what the map marks, and where an edit is planned."""
        return self._sites

    @sites.setter
    def sites(self, sites: Sequence[Site] | Site) -> None:
        self._choose(resolve_sites(sites, "explorer.sites = sites"))

    @property
    def trace(self) -> Trace | None:
        """The map of the model without the edits."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        if not isinstance(trace, Trace):
            hint = "ld.trace(model, requests) makes one"
            raise wrong_argument("explorer.trace = trace", "it must be a Trace", trace, hint)
        self._show_maps(trace, None)

    @property
    def after(self) -> Trace | None:
        """The map of the model with the edits that stand now, where it was traced."""
        return self._after.get(self.ledger.edits)

    @property
    def edit(self) -> Edit | None:
        """The plan, at the chosen strength; nothing is changed by it yet."""
        return self._edit and self._edit.scaled(self.plan_choices.strength)

    @edit.setter
    def edit(self, edit: Edit | None) -> None:
        if not isinstance(edit, Edit | None):
            hint = "ld.edit(model, requests, sites) plans one"
            raise wrong_argument("explorer.edit = edit", "it must be an Edit", edit, hint)
        with self._lock:
            self._edit = edit
            self.plan_choices = replace(self.plan_choices, strength=1.0)
            self.publish("plan", "code")

    @property
    def report(self) -> Report | None:
        """What the last check measured."""
        return self._report

    @property
    def answers(self) -> tuple[str, str]:
        """The last question's answers, without and with the edits that stood when it was asked."""
        return (self.talk.before, self.talk.now) if self.talk else ("", "")

    def listen(self, listener: Callable[[str, Any], object]) -> Callable[[], None]:
        """Call a function with the name and the value of each part, now and when it changes.

        Names that begin with "event:" are no parts, but something that has just happened. An error of a
        listener is logged, and hurts nobody else.

        Returns:
            What ends that.
        """
        with self._lock:
            self._listeners.append(listener)
            for name, value in self.parts.items():
                _tell([listener], name, value)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def publish(self, *names: str) -> None:
        """Make these parts anew, and tell the hosts."""
        with self._lock:
            for name in names:
                self.parts[name] = value = page_values.visible(_PARTS[name](self))
                _tell(self._listeners, name, value)

    def _event(self, name: str, **value: Any) -> None:
        with self._lock:
            _tell(self._listeners, f"{EVENT}{name}", page_values.visible(value))

    def _say(self, sentence: str) -> None:
        self.message = sentence
        self.publish("message")

    # What a person does

    def do(self, command: str, **arguments: Any) -> None:
        """What a page asks for. What is wrong with it is a sentence on the page, never an exception."""
        action = _COMMANDS.get(command) if isinstance(command, str) else None
        self._say("")
        try:
            if action is None:
                raise ValueError("the page asked for something that does not exist; load it again")
            action(self, **arguments)
        except (ValueError, TypeError) as error:
            self._say(str(error))

    def done(self, ticket: str) -> None:
        """Tell the pages that a command of one of them was done; until then it shows as pending."""
        self._event("done", ticket=ticket)

    def choose(self, cells: Any, how: Any = "set") -> None:
        """Choose cells.

        Args:
            cells: with the fields component, layer and role.
            how: "set" chooses these alone, "add" and "toggle" change what is chosen.
        """
        if not isinstance(cells, list) or not all(isinstance(cell, Mapping) for cell in cells):
            raise ValueError("cells are wanted, each with a component, a layer and a role")
        if how not in ("set", "add", "toggle"):
            raise ValueError("cells are set, added or toggled")
        sites = [self._site(cell) for cell in cells]
        with self._lock:
            if how == "add":
                sites = [*self._sites, *sites]
            elif how == "toggle":
                sites = [site for site in self._sites if site not in sites] + [
                    site for site in sites if site not in self._sites
                ]
            self._choose(sites)

    def suggest(self) -> None:
        """Choose what `locate` finds, and say why."""
        known = self._known_map()
        sites = locate(known)
        self._choose(sites, " ".join(filter(None, (_SUGGESTED, reddest_column_sentence(known, sites)))))

    def control(self, which: Any) -> None:
        """Choose cells that the map did not choose, to compare an edit with."""
        controls = control_sites(self._sites or locate(self._known_map()), self.model.cfg.n_layers)
        if not isinstance(which, str) or which not in controls:
            raise ValueError(f"there are the control sites {', '.join(controls)}")
        self._choose(controls[which], f"Control sites, {which}: not what the map found, to compare with.")

    def set_trace(self, **changes: Any) -> None:
        """Choose how the next trace is made: components, direction, metric."""
        wanted = {**asdict(self.trace_choices), **_known(changes, TraceChoices)}
        if not isinstance(wanted["metric"], str) or wanted["metric"] not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}")
        components = wanted["components"]
        if not isinstance(components, tuple) or not all(isinstance(name, str) for name in components):
            raise ValueError("a list of components is wanted")
        number = wanted["number"]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError("a number of requests is wanted, at least 1")
        if wanted["direction"] not in get_args(Direction):
            raise ValueError(f"direction must be one of {', '.join(get_args(Direction))}")
        components = resolve_components(self.model, TraceSettings(components).components)
        number = min(number, len(self.requests))
        self.trace_choices = TraceChoices(components, wanted["direction"], wanted["metric"], number)
        self.publish("settings")

    def set_plan(self, **changes: Any) -> None:
        """Choose method, strength (a factor of the planned change) or requests of the plan."""
        wanted = {**asdict(self.plan_choices), **_known(changes, PlanChoices)}
        strength, method = wanted["strength"], wanted["method"]
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}")
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ValueError("strength must be a number")
        if not 0 <= strength <= STRONGEST:
            raise ValueError(f"strength must be from 0 to {STRONGEST:g}")
        chosen, known = wanted["requests"], range(len(self.requests))
        if not isinstance(chosen, tuple) or not all(type(i) is int and i in known for i in chosen):
            raise ValueError("a list of requests is wanted, by their indices")
        choices = PlanChoices(method, float(strength), chosen)
        with self._lock:
            if (choices.method, choices.requests) != (self.plan_choices.method, self.plan_choices.requests):
                self._edit = None
            self.plan_choices = choices
            self.publish("settings", "plan", "code")

    def stop(self) -> None:
        """Stop the work that runs, but not while it tells the pages something: they would keep half of it."""
        with self._lock:
            self.worker.stop()

    def make_trace(self) -> None:
        """Estimate the whole map, show it, and measure the cells at the subject and the last token."""
        if self.ledger.edits:
            raise ValueError("an edit stands: undo it to trace the model as it was, or press Trace again")
        self._start("tracing", self._trace_first)

    def make_trace_after(self) -> None:
        """Trace the model with the edits that stand, with the answers of before."""
        self._known_map()
        if not self.ledger.edits:
            raise ValueError("no edit stands; apply one first")
        self._start("tracing the edited model", self._trace_after)

    def make_plan(self) -> None:
        """Plan an edit of the chosen requests at the chosen cells; nothing is changed."""
        if not self._sites:
            raise ValueError("choose at least one cell first, or press Suggest")
        if not self.plan_choices.requests:
            raise ValueError("choose at least one request")
        self._start("planning the edit", self._plan)

    def apply(self) -> None:
        """Make the planned change."""
        edit = self.edit
        if edit is None:
            raise ValueError("there is no plan for these cells yet; press Plan first")
        self._start("applying the edit", lambda: self._apply(edit))

    def undo(self) -> None:
        """Take the last change back, bit for bit."""
        self._start("undoing", lambda: self.ledger.undo())

    def redo(self) -> None:
        """Make the change again that was taken back last."""
        self._start("redoing", lambda: self.ledger.redo())

    def remove(self, index: Any) -> None:
        """Take one of the edits that stand out, also from the middle."""
        edits = self.ledger.edits
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(edits):
            raise ValueError("there is no such edit any more")
        self._start("removing the edit", lambda: self.ledger.remove(edits[index]))

    def ask(self, question: Any, template: Any = "") -> None:
        """Answer a question with and without the edits that stand, token by token."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError("type a question first")
        if not isinstance(template, str) or (template and template not in self.templates()):
            raise ValueError("there is no such jailbreak template")
        asked = request(question)
        if template:
            asked = asked.inside(self.templates()[template][1])
        ids = tokenize(self.model.tokenizer, asked).ids
        self._start("answering", lambda: self._answer(ids, Talk(question, template, self.ledger.edits)))

    def make_check(self) -> None:
        """Ask the suite with and without the edits that stand."""
        if not self.ledger.edits:
            raise ValueError("no edit stands; apply one first")
        self._start("checking", self._check)

    def take(self, what: Any, path: Any = "") -> None:
        """Hand something over: "edit", "svg", "pdf", "report" to the browser; "folder" to a path here."""
        if not isinstance(what, str) or what not in _TAKEN or not isinstance(path, str):
            raise ValueError(f"there is {', '.join(_TAKEN)} to take away")
        self._start(f"making the {what}", lambda: self._take(what, path))

    # Work in the background

    def _start(self, name: str, action: Callable[[], object]) -> None:
        standing = self.ledger.edits

        def ended(sentence: str) -> None:
            if sentence == STOPPED and self.ledger.edits != standing:
                sentence = "stopped after the change was made"
            self.publish(*(_CHANGED_BY_WORK if sentence else ("plan", "code")))
            if sentence or self.message:
                self._say(sentence or self.message)

        self.worker.start(name, action, ended)

    def _trace_first(self) -> None:
        choices = self.trace_choices
        fingerprint = model_fingerprint(self.model)

        def traced(items: Sequence[Request], **settings: Any) -> Trace:
            (made,) = trace_metrics(
                self.model,
                items,
                {choices.metric: METRICS[choices.metric]},
                components=choices.components,
                direction=choices.direction,
                corruption=self.corruption,
                layers="all",
                fingerprint=fingerprint,
                **settings,
            ).values()
            return made

        estimates: list[Trace] = []
        for item in self.requests[: choices.number]:  # the first picture does not wait for the last request
            estimates.append(traced([item], positions="all", exact=False))
            self._show_maps(None, join_traces(estimates))
        estimate = join_traces(estimates)
        measured = traced(
            self.requests[: choices.number],
            positions=SHARPENED,
            answers=estimate,
            watch=lambda cells: self._event("cells", cells=page_values.measured_cells(cells)),
        )
        self._show_maps(measured, estimate)

    def _show_maps(self, measured: Trace | None, estimate: Trace | None) -> None:
        with self._lock:
            self._trace, self._estimate, self._after = measured, estimate, {}
            self.publish("map", "code")

    def _trace_after(self) -> None:
        before, standing = self._known_map(), self.ledger.edits
        after = trace_requests(
            self.model,
            [prompt.request for prompt in before.prompts],
            replace(before.settings, exact=True, verify=0, positions=SHARPENED, min_difference=0.0),
            metric=METRICS.get(before.metric, all_metrics.answer_logprob),
            corruption=self.corruption,
            answers=before,
        )
        with self._lock:
            self._after[standing] = after
            self.publish("map", "code")

    def _plan(self) -> None:
        choices, sites = self.plan_choices, self._sites
        chosen = [self.requests[i] for i in choices.requests]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)  # the page shows them beside the forecast
            edit = plan_edit(self.model, chosen, sites, method=choices.method, **self.settings)
        with self._lock:
            now = (self.plan_choices.method, self.plan_choices.requests, self._sites)
            if now != (choices.method, choices.requests, sites):
                raise ValueError("other cells or requests were chosen meanwhile; press Plan again")
            self._edit = edit
            self.publish("plan", "code")

    def _apply(self, edit: Edit) -> None:
        self.ledger.apply(edit)
        with self._lock:
            if self.edit is not None:
                self._edit = None  # it was for the weights as they were
            self.publish("plan", "code")

    def _answer(self, ids: Sequence[int], talk: Talk) -> None:
        self.talk = talk
        self.publish("talk")
        if talk.standing:
            self._stream(ids, "now")
            with self.ledger.set_aside():
                self._stream(ids, "before")
        else:
            self._stream(ids, "before")

    def _stream(self, ids: Sequence[int], side: str) -> None:
        """Answer, and show each token as it comes."""
        said: list[int] = []

        def show(text: str) -> None:
            assert self.talk is not None
            self.talk = replace(self.talk, **{side: text})
            self.publish("talk")

        def hear(_: int, token: int) -> None:
            said.append(token)
            show(decode_growing_answer(self.model.tokenizer, said))

        generate(self.model, [ids], max_new_tokens=self.max_new_tokens, watch=hear)
        show(decode_answer(self.model.tokenizer, said))

    def _check(self) -> None:
        standing = self.ledger.edits
        asked = self.small_suite or suite(language(self.model)).small(
            jailbreaks=2, names=1, same_subject=3, harmless=20
        )
        report = check(self.model, self.ledger, asked, max_new_tokens=self.max_new_tokens)
        with self._lock:
            self._report, self._reported, self._asked = report, standing, asked
            self._questions = page_values.questions(asked, standing)
            self.publish("check", "code")

    def _take(self, what: str, path: str) -> None:
        if what == "folder":
            written = take_away.model_folder(self.model, path)
            self._say(f"written: {written}")
            return
        name, data = self._file(what)
        self._event("file", file=name, data=page_values.base64_text(data))

    def _file(self, what: str) -> tuple[str, bytes]:
        """The name and the content of a file for the browser."""
        if what == "edit":
            edits = [*self.ledger.edits, *([self.edit] if self.edit else [])]
            if not edits:
                raise ValueError("nothing is planned and nothing stands; plan an edit first")
            return "edit.safetensors", take_away.edit_file(edits[-1])
        if what == "report":
            return "report.html", self._report_page()
        return f"map.{what}", take_away.figure_file(self._known_map(), self._sites, what)

    def _report_page(self) -> bytes:
        if self._report is None or not self._reported or self._trace is None:
            raise ValueError("a report wants a map, an edit and its check; press Check what stands first")
        return take_away.report_file(
            title=f"{self.name}, edited in the explorer",
            trace=self._trace,
            sites=self._sites,
            edit=self._reported[-1],
            reports={"what stands": self._report},
            conversations=self._conversations(),
            reproduce=self.code_values(),
            after=self._after.get(self._reported),
            suite=self._asked,
        )

    # What the parts and the commands need

    def templates(self) -> dict[str, tuple[str, str]]:
        """Jailbreak templates of the model's set: by id the family, and the template."""
        rows = bundled_rows(language(self.model), "jailbreaks")
        return {row["id"]: (row["family"], row["text"]) for row in rows}

    def model_values(self) -> dict[str, Any]:
        """What does not change: the model, what can be chosen."""
        return {
            "name": self.name,
            "layers": self.model.cfg.n_layers,
            "requests": page_values.request_values(self.requests),
            "methods": list(METHODS),
            "metrics": list(METRICS),
            "components": [choice for choice in component_choices() if choice[0] in _COMPONENTS],
            "strongest": STRONGEST,
            "templates": [(name, family) for name, (family, _) in self.templates().items()],
            "suggestions": self._suggested_questions(),
        }

    def settings_values(self) -> dict[str, Any]:
        """What is chosen for the next trace and the next plan."""
        return {"trace": asdict(self.trace_choices), "plan": asdict(self.plan_choices)}

    def talk_values(self) -> dict[str, Any]:
        """The last question and its answers."""
        talk = self.talk
        if talk is None:
            return {}
        return {
            "question": talk.question,
            "template": talk.template,
            "before": talk.before,
            "now": talk.now,
            "edits": len(talk.standing),
            "stale": talk.standing != self.ledger.edits,
        }

    def check_values(self) -> dict[str, Any]:
        """What the last check measured, with the answers behind each rate."""
        return page_values.check_values(
            self._report, self._questions, stale=self._reported != self.ledger.edits
        )

    def job_values(self) -> dict[str, Any]:
        """The work that runs."""
        job = self.worker.job if hasattr(self, "worker") else None
        if job is None:
            return {}
        return {
            "name": job.name,
            "step": job.step,
            "done": job.done,
            "total": job.total,
            "seconds": round(time.monotonic() - job.started, 1),
            "stopping": job.stopping,
            "note": job.note,
        }

    def code_values(self) -> str:
        """The Python that does all this again."""
        return reproducing_code(
            self.name,
            self.requests,
            language(self.model),
            self._trace,
            self._sites,
            self.ledger.edits,
            self.edit,
            checked=self._report is not None and self._reported == self.ledger.edits,
        )

    def _conversations(self) -> list[Conversation]:
        """The last question, if it was answered with the edits of the report."""
        talk = self.talk
        if talk is None or talk.standing != self._reported:
            return []
        return [Conversation(talk.question, talk.before, talk.now, harmful=True)]

    def _suggested_questions(self) -> list[dict[str, Any]]:
        """For each request, the request itself and harmless questions about the same subject."""
        name = language(self.model)
        return [
            {
                "id": shown(item.id),
                "harmful": truncate(item.text, 400),
                "harmless": [
                    truncate(question.text, 400)
                    for _, question in same_subject_requests(name, [item], "check")[:4]
                ],
            }
            for item in self.requests
        ]

    def _known_map(self) -> Trace:
        known = self._trace or self._estimate
        if known is None:
            raise ValueError(_WAITING)
        return known

    def _site(self, cell: Mapping[str, Any]) -> Site:
        component, layer, role = (cell.get(name) for name in ("component", "layer", "role"))
        if not (isinstance(component, str) and isinstance(role, str)):
            raise ValueError("a cell has a component, a layer and a role")
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError("a layer is a whole number")
        if not editable(component):
            raise ValueError("attention outputs cannot be edited; choose the residual stream or MLP outputs")
        if layer >= self.model.cfg.n_layers or role not in ROLES_OF_SITES:
            raise ValueError(f"the model has the layers 0 to {self.model.cfg.n_layers - 1}")
        address: Role = role  # type: ignore[assignment]
        return self._measured(Site(component, layer, address))

    def _measured(self, site: Site) -> Site:
        """The site with its mean effect, where the map has it."""
        known = self._trace or self._estimate
        if known is None or site.component not in known.components or site.effect is not None:
            return site
        for mean in known.only(site.component).role_means():
            if (mean.layer, mean.role) == (site.layer, site.role):
                return replace(site, effect=mean.effect, interval=(mean.low, mean.high))
        return site

    def _choose(self, sites: Sequence[Site], reason: str = "") -> None:
        chosen = tuple(dict.fromkeys(map(self._measured, sites)))
        with self._lock:
            if set(chosen) != set(self._sites):
                self._edit = None
            self._sites, self._reason = chosen, reason
            self.publish("sites", "plan", "code")

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        page = self._page_form(options)
        return {**page, **self._static_form.bundle()}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        page = self._page_form()
        self._static_form.show()
        if page:
            display(page, raw=True)

    def _page_form(self, options: Mapping[str, Any] = {}) -> dict[str, Any]:
        """What a notebook shows the page by; nothing where no page can be made."""
        form, drawn = self._static_form, self._trace or self._estimate
        form.picture = take_away.figure_file(drawn, self._sites, "png") if drawn and wants_pictures() else b""
        try:
            from lens_defense.app.explorer.widget import ExplorerWidget
        except ImportError as error:
            form.missing = str(error)
            return {}
        if self._widget is None or self._widget.closed:
            self._widget = ExplorerWidget(self, form.id)
        return page_form(self._widget, options)

    def __repr__(self) -> str:
        number, standing = len(self.requests), len(self.ledger.edits)
        cells = "; ".join(site["words"] for site in self.parts["sites"]["sites"])
        facts = (
            shown(self.name),
            f"{number} request{'s' * (number != 1)}",
            f"{standing} edit{'s' * (standing != 1)} in the model" if standing else "model as loaded",
            f"chosen: {truncate(cells, 200)}" if cells else "no cell chosen",
        )
        return f"Explorer({', '.join(facts)})"


_SUGGESTED = (
    "Suggested by the map: layers a third of the way up its plateau (which layer of a flat top is the "
    "highest is chance), at one role that carries over to other prompts."
)


def _tell(listeners: Sequence[Callable[[str, Any], object]], name: str, value: Any) -> None:
    for listener in [*listeners]:
        try:
            listener(name, value)
        except Exception:  # a page's own trouble: the work and the other pages go on
            _log.warning("a page could not be told of its %s", name, exc_info=True)


def _known(changes: Mapping[str, Any], choices: type) -> dict[str, Any]:
    """The changes of a page, if there are such choices; lists become tuples."""
    fields = choices.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = [name for name in changes if name not in fields]
    if unknown:
        raise ValueError(f"there is nothing like {unknown[0]!r} to choose")
    lists = {name: value for name, value in changes.items() if isinstance(value, list)}
    return {**changes, **{name: tuple(value) for name, value in lists.items()}}


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "choose": Explorer.choose,
    "suggest": Explorer.suggest,
    "control": Explorer.control,
    "set_trace": Explorer.set_trace,
    "set_plan": Explorer.set_plan,
    "stop": Explorer.stop,
    "trace": Explorer.make_trace,
    "trace_after": Explorer.make_trace_after,
    "plan": Explorer.make_plan,
    "apply": Explorer.apply,
    "undo": Explorer.undo,
    "redo": Explorer.redo,
    "remove": Explorer.remove,
    "ask": Explorer.ask,
    "check": Explorer.make_check,
    "take": Explorer.take,
}
_CHANGED_BY_WORK = ("map", "plan", "stack", "talk", "check", "code")
_PARTS: Mapping[str, Callable[[Explorer], Any]] = {
    "model": Explorer.model_values,
    "settings": Explorer.settings_values,
    "map": lambda explorer: map_part(explorer._trace, explorer._estimate, explorer.after),
    "sites": lambda explorer: sites_part(explorer._sites, explorer._reason),
    "plan": lambda explorer: page_values.plan_values(explorer.edit),
    "stack": lambda explorer: page_values.stack_values(explorer.ledger.edits, len(explorer.ledger.undone)),
    "talk": Explorer.talk_values,
    "check": Explorer.check_values,
    "code": Explorer.code_values,
    "job": Explorer.job_values,
    "message": lambda explorer: explorer.message,
}
