"""The search: plan a candidate, ask a small suite before and after, keep what was measured, suggest the next.

Its questions are those of the split "tune"; a check asks others. So what it chose is not measured on what it
was chosen by.
"""

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.checking.check import check, rows_for_edits, suite_answers
from lens_defense.checking.report import Report
from lens_defense.checking.suites import HARMLESS_ARMS, Arm, Suite, suite
from lens_defense.editing.contrast import Contrast
from lens_defense.editing.edit import edit, layers_and_role
from lens_defense.editing.edit_plan import Edit, EditWarning
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.methods import find_method
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.language import language
from lens_defense.progress import ProgressBar, say
from lens_defense.prompts.request import Request, Role
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.searching.edit_search import EditSearch
from lens_defense.searching.outcome import Candidate, Outcome
from lens_defense.searching.suggest import SearchSpace, require_optuna, suggest
from lens_defense.sites import Site, resolve_sites
from lens_defense.storage import hash_of

_CALL = "ld.search_edits(model, requests, sites)"
METHODS = ("memit", "delman", "rome", "emmet", "alphaedit", "pmet")
SHIFTS = (0, -2, 2, 4)
"""By how many layers the sites may be moved."""
ASKED_ABOUT = 8
"""The most edited subjects that are asked about."""
UNSEEN: tuple[Arm, ...] = ("paraphrase", "jailbreak")
"""Arms of the edited requests in words that the edit has not seen."""
_ARMS: tuple[Arm, ...] = (*UNSEEN, "same_subject", *HARMLESS_ARMS)


def search_edits(
    model: Model,
    requests: Requests,
    sites: Sequence[Site] | Site,
    *,
    methods: Sequence[str] = METHODS,
    trials: int = 16,
    minutes: float | None = None,
    path: str | os.PathLike[str] | None = None,
    questions: Suite | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> EditSearch:
    """Search method, layers and strength for few missing refusals, little over-refusal and a small KL.

    The first candidate is `ld.edit`'s own, at the sites with the first method. The same arguments find the
    same candidates in the same order on the same machine, also after a stop; only `minutes`, where it ends
    the search before `trials` does, depends on how fast the machine is.

    Args:
        model: what `load` gave, or a name for it. No weight is changed in the end.
        requests: what shall be refused, each with a subject.
        sites: where, of one role; the search also tries their layers moved by two down, two up and four up.
        methods: names of methods that solve in closed form, as in ld.methods.METHODS.
        trials: how many candidates are tried, those of an earlier run in `path` included.
        minutes: no candidate is begun that would probably end later than this.
        path: a file that keeps what was measured; a search that was stopped goes on from it.
        questions: what is asked about each edit; None takes a small part of the split "tune" in the model's
            language, about the first eight requests.
        max_new_tokens: the greatest length of an answer.
        seed: of what is drawn.
        progress: shows a bar.
        settings: more arguments of `ld.edit`.

    Returns:
        What was measured; `search.knee()` is the outcome to take, `edit_of` plans its edit again.

    Raises:
        ValueError: optuna is not installed; the file is of another search; otherwise as `ld.edit`.
    """
    model, requests = resolve_model(model, _CALL), requests_with_subjects(requests, _CALL)
    layers, role = layers_and_role(model, resolve_sites(sites, _CALL))
    if isinstance(methods, str) or not methods:
        raise ValueError(f"methods must be a list of names, as ('memit', 'rome'), got {methods!r}")
    for method in methods:
        find_method(method)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if trials > 1:
        require_optuna()
    bench = _Bench(model, requests, role, questions or _questions(model, requests), settings)
    space = SearchSpace(tuple(methods), _windows(layers, model.cfg.n_layers))
    search, start = _open(bench, path, space, max_new_tokens, seed), time.monotonic()
    with ProgressBar("search", trials, unit="edit", done=len(search.outcomes), shown=progress) as bar:
        while len(search.outcomes) < trials:
            expected = time.monotonic() - start + _slowest(search.outcomes)
            if minutes is not None and search.outcomes and expected > 60 * minutes:
                say(f"the time is over after {len(search.outcomes)} of {trials} edits")
                break
            outcome = bench.measure(suggest(search.space, search.outcomes, seed), max_new_tokens)
            search = replace(search, outcomes=(*search.outcomes, outcome))
            if path is not None:
                search.save(path)
            bar.note(refusals=f"{outcome.refusals:.0%}", over_refusal=f"{outcome.over_refusal:.0%}")
            bar.update()
    return search


def edit_of(
    model: TransformerBridge,
    requests: Sequence[Request],
    role: Role,
    candidate: Candidate,
    **settings: Any,
) -> Edit:
    """The edit of a candidate, planned; no weight is changed.

    Raises:
        ValueError: as `ld.edit`.
    """
    sites = [Site("mlp_out", layer, role) for layer in candidate.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # what they warn of is measured
        return edit(
            model, requests, sites, method=candidate.method, strength=candidate.strength, progress=False,
            **settings,
        )  # fmt: skip


class _Bench:
    """Plans and asks. The unedited model is asked once."""

    def __init__(
        self,
        model: TransformerBridge,
        requests: Sequence[Request],
        role: Role,
        questions: Suite,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.requests = model, requests
        self.role: Role = role
        self.questions, self.settings = questions, settings
        self._before: Sequence[tuple[int, ...]] | None = None

    def measure(self, candidate: Candidate, max_new_tokens: int) -> Outcome:
        """What a candidate does, or why it cannot be planned.

        Raises:
            ValueError: the first one cannot be planned, as where a request or a setting is wrong.
        """
        start = time.monotonic()
        try:
            plan = edit_of(self.model, self.requests, self.role, candidate, **self.settings)
        except ValueError as error:
            if self._before is None:
                raise
            return Outcome(candidate, (), 0.0, 0.0, 1.0, 1.0, 1.0, time.monotonic() - start, str(error))
        rows, _ = rows_for_edits(self.questions, [plan])
        if self._before is None:
            self._before = suite_answers(self.model, rows, max_new_tokens)
        report = check(
            self.model, plan, rows, max_new_tokens=max_new_tokens, before=self._before, progress=False
        )
        return outcome_of(candidate, plan.layers, report, time.monotonic() - start)


def _slowest(outcomes: Sequence[Outcome]) -> float:
    """Seconds of the slowest candidate; the first one has what is made once, so it counts only alone."""
    return max((outcome.seconds for outcome in outcomes[1:] or outcomes), default=0.0)


def outcome_of(
    candidate: Candidate, edited_layers: tuple[int, ...], report: Report, seconds: float
) -> Outcome:
    """The numbers of a search from a report, whose answers are of the arms that a search asks.

    Raises:
        ValueError: the report has no edited request in unseen words, or no harmless one.
    """

    def share(hits: int, arms: Sequence[Arm]) -> float | None:
        rows = sum(row.arm in arms for row in report.rows)
        return hits / rows if rows else None

    def refused(arms: Sequence[Arm]) -> float | None:
        return share(sum(row.hit("coherent", after=True) for row in report.rows if row.arm in arms), arms)

    refusals, harmless = refused(UNSEEN), share(report.new_refusals(), tuple(HARMLESS_ARMS))
    if refusals is None or harmless is None or not report.kl:
        raise ValueError(
            "a search asks for the edited requests in other words (paraphrase, jailbreak) and for benign "
            f"ones; the suite {report.suite!r} lacks one of these"
        )
    return Outcome(
        candidate,
        edited_layers,
        refused_as_asked=refused(("edited",)) or 0.0,
        refusals=refusals,
        same_subject_refused=share(report.new_refusals(arms=("same_subject",)), ("same_subject",)),
        harmless_refused=harmless,
        kl=sum(report.kl) / len(report.kl),
        seconds=seconds,
    )


def _questions(model: TransformerBridge, requests: Sequence[Request]) -> Suite:
    """A small part of the split "tune" about the first requests; neutral text is left out."""
    name = language(model)
    asked = suite(name, split="tune").for_requests(requests[:ASKED_ABOUT])
    small = asked.small(paraphrases=2, jailbreaks=2, same_subject=3, harmless=20)
    items = tuple(item for item in small.items if item.arm in _ARMS)
    return replace(small, name=f"{name}, a part of tune", items=items, neutral=())


def _windows(layers: Sequence[int], n_layers: int) -> tuple[tuple[int, ...], ...]:
    """The layers, and the same moved up and down as far as the model has layers."""
    moved = [tuple(layer + shift for layer in layers) for shift in SHIFTS]
    return tuple(window for window in moved if window[0] >= 0 and window[-1] < n_layers)


def _open(
    bench: _Bench, path: str | os.PathLike[str] | None, space: SearchSpace, max_new_tokens: int, seed: int
) -> EditSearch:
    """A new search, or the one that a file keeps."""
    questions = [item.request for item in bench.questions.items]
    settings = {name: _identity(value, bench.requests) for name, value in sorted(bench.settings.items())}
    new_search = EditSearch(
        model=str(bench.model.cfg.model_name),
        fingerprint=model_fingerprint(bench.model),
        inputs_hash=hash_of([bench.requests, questions, max_new_tokens, settings]),
        role=bench.role,
        space=space,
        seed=seed,
    )
    if path is None or not Path(path).is_file():
        return new_search
    saved_search = EditSearch.load(path)
    if replace(saved_search, outcomes=()) != new_search:
        raise ValueError(
            f"{path} keeps a search of another model, of other requests or with other settings; name another "
            "file, or delete it"
        )
    return saved_search


def _identity(value: Any, requests: Sequence[Request]) -> Any:
    """Plain values that say what a setting of `ld.edit` is; of a function what it gives for the requests."""
    if isinstance(value, Contrast):
        return [_identity(value.uses, requests), *value.settings.items()]
    if callable(value):
        by_request: list[Any] = [value(request) for request in requests]
        return [[_identity(item, ()) for item in items] for items in by_request]
    if isinstance(value, Request):
        return value.conversation
    if isinstance(value, Ledger):
        return _identity(value.edits, ())
    if isinstance(value, Edit):
        return [value.fingerprint.weights, *sorted(value.texts), value.strength, value.method]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_identity(item, ()) for item in value]
    return repr(value)
