"""The Python that does again what a person did on the page.

It names objects that cannot be written down, and runs once they are put in.
"""

from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lens_defense.editing.edit_plan import Edit
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.shown_text import CODE_LETTERS, one_line
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


@dataclass(frozen=True, slots=True)
class Session:
    """What an explorer was opened with."""

    model: str
    """Its name, as `load` takes it."""
    requests: Sequence[Request]
    bundled: str
    """The set whose first requests these may be, and the suite that a check takes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of ld.edit."""
    small: Mapping[str, int] | None = None
    """What the check took of the suite; None stands for a suite of the user's own."""
    max_new_tokens: int = 100


def reproducing_code(
    session: Session,
    trace: Trace | None,
    sites: Sequence[Site],
    standing: Sequence[Edit],
    plan: Edit | None,
    checked: bool,
) -> str:
    """Load, trace, locate, edit and check, with the same arguments.

    Args:
        session: what the explorer was opened with.
        trace: the map that is shown, if any.
        sites: that are chosen.
        standing: the edits that stand.
        plan: what is planned beside them, if anything.
        checked: whether what stands was checked.
    """
    lines = ["import lens_defense as ld", "", f"model = ld.load({session.model!r})", *_requests(session)]
    if trace is not None:
        settings = trace.settings
        traced = _chosen([prompt.request for prompt in trace.prompts], session.requests)
        layers = "all" if len(trace.layers) == trace.model_layers else tuple(trace.layers)
        lines += [
            "trace = ld.trace(",
            f"    model, {traced}, components={tuple(trace.components)!r}, layers={layers!r},",
            f"    positions={tuple(settings.roles)!r}, direction={settings.direction!r},",
            f"    metric=ld.metrics.{trace.metric},",
            f")  # corruption: {one_line(trace.corruption)}",
        ]
    if session.settings and (standing or plan):
        lines += ["", _settings(session.settings)]
    for number, edit in enumerate(standing):
        lines += ["", "ledger = ld.Ledger(model)"] if number == 0 else []
        lines += [f"edit = {_edit(edit, session)}", "ledger.apply(edit)"]
    if plan is not None:
        lines += ["", f"edit = {_edit(plan, session)}"]
    elif sites and not standing:
        lines += ["", f"sites = {_sites(sites)}"]
    if checked:
        lines += ["", *_check(session)]
    return "\n".join(lines)


def _requests(session: Session) -> list[str]:
    """The requests, written out; where that is more than can be shown, a line to be filled in."""
    requests, bundled = session.requests, session.bundled
    if tuple(requests) == tuple(bundled_requests(bundled)[: len(requests)]):
        return [f"requests = ld.requests({bundled!r})[:{len(requests)}]"]
    lines = ["requests = [", *(f"    {_request(item)}," for item in requests), "]"]
    if sum(map(len, lines)) <= CODE_LETTERS // 2:
        return lines
    return [f'requests = ld.requests("requests.jsonl")  # name the file of your {len(requests)} requests']


def _request(item: Request) -> str:
    plain = Request("", ("",))
    names = [field.name for field in fields(Request) if field.name not in ("pieces", "subject", "spelled")]
    changed = {name: getattr(item, name) for name in names if getattr(item, name) != getattr(plain, name)}
    settings = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f"ld.request({item.text!r}, {item.subject!r}{settings})"


def _settings(settings: Mapping[str, Any]) -> str:
    try:
        if literal_eval(repr(dict(settings))) == dict(settings):
            return f"settings = {dict(settings)!r}"
    except (ValueError, SyntaxError):
        pass  # objects
    return f"settings = {{}}  # put in what ld.Explorer was given: {', '.join(map(str, settings))}"


def _check(session: Session) -> list[str]:
    if session.small is None:
        suite = f"suite = ld.suite({session.bundled!r})  # put in the small_suite that ld.Explorer was given"
    else:
        parts = ", ".join(f"{name}={number}" for name, number in session.small.items())
        suite = f"suite = ld.suite({session.bundled!r}).small({parts})"
    return [suite, f"print(ld.check(model, ledger, suite, max_new_tokens={session.max_new_tokens}))"]


def _sites(sites: Sequence[Site]) -> str:
    return f"[{', '.join(f'ld.Site({s.component!r}, {s.layer}, {s.role!r})' for s in sites)}]"


def _edit(edit: Edit, session: Session) -> str:
    chosen = _chosen(edit.requests, session.requests)
    sites = f"[ld.Site('resid_post', layer, {edit.role!r}) for layer in {tuple(edit.layers)}]"
    settings = ", **settings" if session.settings else ""
    solved_at, scaled_by = edit.settings.get("strength", 1.0), edit.forecast.strength
    strength = f", strength={solved_at:g}" if solved_at != 1 else ""
    scaled = f".scaled({scaled_by:g})" if scaled_by != 1 else ""
    return f"ld.edit(model, {chosen}, {sites}, method={edit.method!r}{strength}{settings}){scaled}"


def _chosen(items: Sequence[Request], requests: Sequence[Request]) -> str:
    """Some of the requests, as Python says it; others are written out."""
    places = {item: i for i, item in enumerate(requests)}
    if any(item not in places for item in items):
        return f"[{', '.join(map(_request, items))}]"
    indices = [places[item] for item in items]
    if indices == [*range(len(requests))]:
        return "requests"
    if indices == [*range(len(indices))]:
        return f"requests[:{len(indices)}]"
    return f"[requests[i] for i in {tuple(indices)}]"
