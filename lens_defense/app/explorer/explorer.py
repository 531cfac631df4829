"""The explorer: see where a model keeps a subject, choose cells, plan an edit there, apply, ask, check, undo.

An Explorer is what a page shows and what the page's buttons do; it knows no page. Its state is named parts of
plain values (`parts`): a host sends each part to its page when it changes, and hands what a person does there
to `do`. The hosts are a widget in a notebook (widget.py) and a local page (server.py); in a report a page has
the parts alone (page.js). Short commands are done at once, long ones by one background thread (worker.py).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lens_defense.app.explorer import page_values, take_away
from lens_defense.app.explorer.choices import chosen_sites
from lens_defense.app.explorer.explorer_state import SMALL_SUITE, ExplorerState
from lens_defense.app.explorer.map_values import reddest_column_sentence
from lens_defense.app.explorer.model_values import template_texts
from lens_defense.app.explorer.notebook_form import NotebookForms
from lens_defense.app.explorer.session_report import Checked, session_report
from lens_defense.app.explorer.talk import Talk, answer_both, question_ids
from lens_defense.app.explorer.two_step_trace import estimate_and_measure, trace_edited
from lens_defense.app.explorer.worker import STOPPED
from lens_defense.checking.check import check
from lens_defense.checking.suites import suite
from lens_defense.editing.edit import edit as plan_edit
from lens_defense.editing.edit_plan import Edit, EditWarning
from lens_defense.models.language import language
from lens_defense.tracing.control_sites import control_sites
from lens_defense.tracing.locate import locate

_TAKEN = ("edit", "svg", "pdf", "report", "folder", "adapter")


class Explorer(ExplorerState):
    """What a page shows and does: set `sites`, `trace` or `edit` here, and the page moves."""

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

    def choose(self, cells: Any, how: Any = "set") -> None:
        """Choose cells.

        Args:
            cells: with the fields component, layer and role.
            how: "set" chooses these alone, "add" and "toggle" change what is chosen.
        """
        with self._lock:
            self._choose(chosen_sites(cells, how, self._sites, self.model.cfg.n_layers))

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
        self.trace_choices = self.trace_choices.changed(changes, self.model, len(self.requests))
        self.publish("settings")

    def set_plan(self, **changes: Any) -> None:
        """Choose method, strength (a factor of the fitted values) or requests of the plan."""
        choices = self.plan_choices.changed(changes, len(self.requests))
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
        """Make the planned change; where another strength was chosen since, it is solved for that first."""
        edit = self.edit
        if edit is None:
            raise ValueError("there is no plan for these cells yet; press Plan first")
        if self._solved_at in (None, self.plan_choices.strength):
            self._start("applying the edit", lambda: self._apply(edit))
        else:
            self._start("solving for the strength, and applying", self._plan_and_apply)

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
        ids = question_ids(question, template, template_texts(self.model), self.model.tokenizer)
        self._start("answering", lambda: self._answer(ids, Talk(question, template, self.ledger.edits)))

    def make_check(self) -> None:
        """Ask the suite with and without the edits that stand."""
        if not self.ledger.edits:
            raise ValueError("no edit stands; apply one first")
        self._start("checking", self._check)

    def take(self, what: Any, path: Any = "") -> None:
        """Hand something over, to the browser or to a path on this machine.

        Args:
            what: for the browser "edit" (the plan where there is one, else the last edit that stands), "svg",
                "pdf" or "report"; for a path "folder" (the edited model) or "adapter" (all edits that stand).
            path: of a new folder.
        """
        if not isinstance(what, str) or what not in _TAKEN or not isinstance(path, str):
            raise ValueError(f"there is {', '.join(_TAKEN)} to take away")
        self._start(f"making the {what}", lambda: self._take(what, path))

    # In a notebook

    @cached_property
    def _notebook(self) -> NotebookForms:
        return NotebookForms(self, self._picture)

    def _picture(self) -> bytes:
        known = self._trace or self._estimate
        return take_away.figure_file(known, self._sites, "png") if known else b""

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._notebook.bundle(**options)

    def _ipython_display_(self) -> None:
        self._notebook.show()

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
        estimate_and_measure(
            self.model,
            self.requests[: choices.number],
            choices,
            self.corruption,
            show=self._show_maps,
            watch=lambda cells: self._published.event(
                "cells", cells=page_values.visible(page_values.measured_cells(cells))
            ),
        )

    def _trace_after(self) -> None:
        standing = self.ledger.edits
        after = trace_edited(self.model, self._known_map(), self.corruption)
        with self._lock:
            self._after[standing] = after
            self.publish("map", "code")

    def _plan(self) -> None:
        choices, sites = self.plan_choices, self._sites
        chosen = [self.requests[i] for i in choices.requests]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)  # the page shows them beside the forecast
            edit = plan_edit(
                self.model, chosen, sites, method=choices.method, strength=choices.strength, **self.settings
            )
        with self._lock:
            now = (self.plan_choices.method, self.plan_choices.requests, self._sites)
            if now != (choices.method, choices.requests, sites):
                raise ValueError("other cells or requests were chosen meanwhile; press Plan again")
            self._edit, self._solved_at = edit, choices.strength
            self.publish("plan", "code")

    def _plan_and_apply(self) -> None:
        self._plan()
        assert self._edit is not None
        self._apply(self._edit)

    def _apply(self, edit: Edit) -> None:
        self.ledger.apply(edit)
        with self._lock:
            if self.edit is not None:
                self._edit = None  # it was for the weights as they were
            self.publish("plan", "code")

    def _answer(self, ids: Sequence[int], talk: Talk) -> None:
        answer_both(self.ledger, ids, talk, self.max_new_tokens, self._show_talk)

    def _show_talk(self, talk: Talk) -> None:
        self.talk = talk
        self.publish("talk")

    def _check(self) -> None:
        standing = self.ledger.edits
        asked = self.small_suite or suite(language(self.model)).small(**SMALL_SUITE)
        report = check(self.model, self.ledger, asked, max_new_tokens=self.max_new_tokens)
        with self._lock:
            self._checked = Checked(report, standing, asked)
            self.publish("check", "code")

    def _take(self, what: str, path: str) -> None:
        if what in ("folder", "adapter"):
            write = take_away.model_folder if what == "folder" else take_away.adapter_folder
            self._say(f"written: {write(self.ledger, path)}")
            return
        if what == "edit":
            name, data = take_away.edit_file(self.ledger.edits, self.edit)
        elif what == "report":
            name, data = "report.html", self._report_page()
        else:
            name, data = f"map.{what}", take_away.figure_file(self._known_map(), self._sites, what)
        self._published.event("file", file=name, data=page_values.base64_text(data))

    def _report_page(self) -> bytes:
        if self._checked is None or self._trace is None:
            raise ValueError("a report wants a map, an edit and its check; press Check these edits first")
        return session_report(
            f"{self.name}, edited in the explorer",
            self._checked,
            trace=self._trace,
            after=self._after.get(self._checked.edits),
            sites=self._sites,
            talk=self.talk,
            session=self._session(),
        )


_SUGGESTED = (
    "Suggested by the map: layers a third of the way up its plateau (which layer of a flat top is the "
    "highest is chance), at one role that carries over to other prompts."
)


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
