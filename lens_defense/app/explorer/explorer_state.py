"""What an explorer holds and tells its pages of: maps, chosen cells, the plan, edits, answers.

The state is named parts of plain values (`parts`): a host sends each part to its page when it changes. It can
be set from the kernel too, and the page moves. What changes it by a button stands in explorer.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.explorer import page_values
from lens_defense.app.explorer.choices import FIRST_TRACED, PlanChoices, TraceChoices
from lens_defense.app.explorer.map_values import map_part, sites_part, with_effect
from lens_defense.app.explorer.model_values import model_values
from lens_defense.app.explorer.published_parts import PublishedParts
from lens_defense.app.explorer.reproduce import Session, reproducing_code
from lens_defense.app.explorer.session_report import Checked
from lens_defense.app.explorer.talk import Talk
from lens_defense.app.explorer.worker import Worker
from lens_defense.arguments import wrong_argument
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.language import language
from lens_defense.patching.corruptions import Corruption
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.shown_text import shown, truncate
from lens_defense.sites import Site, resolve_sites
from lens_defense.tracing.trace_result import Trace

FIRST_REQUESTS = 8
"""As many of a bundled set are looked at where no requests are named."""
SMALL_SUITE: Mapping[str, int] = {"jailbreaks": 2, "names": 1, "same_subject": 3, "harmless": 20}
"""What Check takes of the suite in the model's language."""
_CALL = "ld.Explorer(model, requests)"


class ExplorerState:
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
        chosen_requests = (
            bundled_requests(language(self.model))[:FIRST_REQUESTS] if requests is None else requests
        )
        self.requests = requests_with_subjects(chosen_requests, _CALL)
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
        self._solved_at: float | None = None  # the strength that the page planned it with
        self._checked: Checked | None = None
        self._published = PublishedParts({name: partial(make, self) for name, make in _PARTS.items()})
        self._lock = self._published.lock
        self.worker = Worker(lambda: self.publish("job"))
        self.ledger.watch(lambda: self.publish("stack", "plan", "map", "talk", "check", "code"))
        self.publish(*_PARTS)
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
        """The plan, to first order at the chosen strength; nothing is changed by it yet."""
        return self._edit and self._edit.scaled(self.plan_choices.strength / (self._solved_at or 1.0))

    @edit.setter
    def edit(self, edit: Edit | None) -> None:
        if not isinstance(edit, Edit | None):
            hint = "ld.edit(model, requests, sites) plans one"
            raise wrong_argument("explorer.edit = edit", "it must be an Edit", edit, hint)
        with self._lock:
            self._edit, self._solved_at = edit, None
            self.plan_choices = replace(self.plan_choices, strength=1.0)
            self.publish("plan", "code")

    @property
    def report(self) -> Report | None:
        """What the last check measured."""
        return self._checked.report if self._checked else None

    @property
    def answers(self) -> tuple[str, str]:
        """The last question's answers, without and with the edits that stood when it was asked."""
        return (self.talk.before, self.talk.now) if self.talk else ("", "")

    # What pages hear

    @property
    def parts(self) -> dict[str, Any]:
        """By name, what a page shows: plain values, safe to show."""
        return self._published.values

    def listen(self, listener: Callable[[str, Any], object]) -> Callable[[], None]:
        """Call a function with the name and the value of each part, now and when it changes.

        Names that begin with "event:" are no parts, but something that has just happened. An error of a
        listener is logged, and hurts nobody else.

        Returns:
            What ends that.
        """
        return self._published.listen(listener)

    def publish(self, *names: str) -> None:
        """Make these parts anew, and tell the hosts."""
        self._published.publish(*names)

    def done(self, ticket: str) -> None:
        """Tell the pages that a command of one of them was done; until then it shows as pending."""
        self._published.event("done", ticket=page_values.visible(ticket))

    def _say(self, sentence: str) -> None:
        self.message = sentence
        self.publish("message")

    # What the parts and the commands need

    def code_values(self) -> str:
        """The Python that does all this again."""
        standing = self.ledger.edits
        checked = self._checked is not None and self._checked.edits == standing
        return reproducing_code(
            self._session(), self._trace, self._sites, standing, self._plan_to_apply(), checked
        )

    def _plan_to_apply(self) -> Edit | None:
        """The plan as Apply makes it: one of the page is solved for the chosen strength."""
        if self._edit is None or self._solved_at is None:
            return self.edit
        return replace(self._edit, settings={**self._edit.settings, "strength": self.plan_choices.strength})

    def _session(self) -> Session:
        return Session(
            self.name,
            self.requests,
            language(self.model),
            self.settings,
            None if self.small_suite else SMALL_SUITE,
            self.max_new_tokens,
        )

    def _check_values(self) -> dict[str, Any]:
        if self._checked is None:
            return {}
        report, edits, asked = self._checked.report, self._checked.edits, self._checked.suite
        questions = page_values.questions(asked, edits)
        return page_values.check_values(report, questions, stale=edits != self.ledger.edits)

    def _known_map(self) -> Trace:
        known = self._trace or self._estimate
        if known is None:
            raise ValueError("there is no map yet; press Trace first")
        return known

    def _show_maps(self, measured: Trace | None, estimate: Trace | None) -> None:
        with self._lock:
            self._trace, self._estimate, self._after = measured, estimate, {}
            self.publish("map", "code")

    def _choose(self, sites: Sequence[Site], reason: str = "") -> None:
        known = self._trace or self._estimate
        chosen = tuple(dict.fromkeys(with_effect(site, known) for site in sites))
        with self._lock:
            if set(chosen) != set(self._sites):
                self._edit = None
            self._sites, self._reason = chosen, reason
            self.publish("sites", "plan", "code")

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


_PARTS: Mapping[str, Callable[[ExplorerState], Any]] = {
    "model": lambda explorer: model_values(explorer.model, explorer.name, explorer.requests),
    "settings": lambda explorer: {
        "trace": asdict(explorer.trace_choices),
        "plan": asdict(explorer.plan_choices),
    },
    "map": lambda explorer: map_part(explorer._trace, explorer._estimate, explorer.after),
    "sites": lambda explorer: sites_part(explorer._sites, explorer._reason),
    "plan": lambda explorer: page_values.plan_values(explorer.edit),
    "stack": lambda explorer: page_values.stack_values(explorer.ledger.edits, len(explorer.ledger.undone)),
    "talk": lambda explorer: page_values.talk_values(explorer.talk, explorer.ledger.edits),
    "check": ExplorerState._check_values,
    "code": ExplorerState.code_values,
    "job": lambda explorer: page_values.job_values(explorer.worker.job),
    "message": lambda explorer: explorer.message,
}
