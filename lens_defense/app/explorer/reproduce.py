"""The Python that does again what a person did on the page."""

from collections.abc import Sequence
from dataclasses import fields

from lens_defense.editing.edit_plan import Edit
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


def reproducing_code(
    model: str,
    requests: Sequence[Request],
    bundled: str,
    trace: Trace | None,
    sites: Sequence[Site],
    standing: Sequence[Edit],
    plan: Edit | None,
    checked: bool,
) -> str:
    """Load, trace, locate, edit and check, with the same arguments.

    Args:
        model: its name.
        requests: that were looked at.
        bundled: the set whose first requests these may be.
        trace: the map that is shown, if any.
        sites: that are chosen.
        standing: the edits that stand.
        plan: what is planned beside them, if anything.
        checked: whether what stands was checked.
    """
    lines = ["import lens_defense as ld", "", f"model = ld.load({model!r})"]
    if tuple(requests) == tuple(bundled_requests(bundled)[: len(requests)]):
        lines += [f"requests = ld.requests({bundled!r})[:{len(requests)}]"]
    else:
        lines += ["requests = [", *(f"    {_request(item)}," for item in requests), "]"]
    if trace is not None:
        settings = trace.settings
        traced = _chosen([prompt.request for prompt in trace.prompts], requests)
        layers = "all" if len(trace.layers) == trace.model_layers else tuple(trace.layers)
        lines += [
            "trace = ld.trace(",
            f"    model, {traced}, components={tuple(trace.components)!r}, layers={layers!r},",
            f"    positions={tuple(settings.roles)!r}, direction={settings.direction!r},",
            f"    metric=ld.metrics.{trace.metric},",
            ")  # corruption: " + trace.corruption,
        ]
    for number, edit in enumerate(standing):
        lines += ["", "ledger = ld.Ledger(model)"] if number == 0 else []
        lines += [f"edit = {_edit(edit, requests)}", "ledger.apply(edit)"]
    if plan is not None:
        lines += ["", f"edit = {_edit(plan, requests)}"]
    elif sites and not standing:
        lines += ["", f"sites = {_sites(sites)}"]
    if checked:
        lines += ["", "print(ld.check(model, ledger))"]
    return "\n".join(lines)


def _request(item: Request) -> str:
    plain = Request("", ("",))
    names = [field.name for field in fields(Request) if field.name not in ("pieces", "subject", "spelled")]
    changed = {name: getattr(item, name) for name in names if getattr(item, name) != getattr(plain, name)}
    settings = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f"ld.request({item.text!r}, {item.subject!r}{settings})"


def _sites(sites: Sequence[Site]) -> str:
    return (
        "["
        + ", ".join(map(repr, (Site(s.component, s.layer, s.role) for s in sites))).replace(
            "Site(", "ld.Site("
        )
        + "]"
    )


def _edit(edit: Edit, requests: Sequence[Request]) -> str:
    chosen = _chosen(edit.requests, requests)
    sites = f"[ld.Site('resid_post', layer, {edit.role!r}) for layer in {tuple(edit.layers)}]"
    scaled = f".scaled({edit.strength:g})" if edit.strength != 1 else ""
    return f"ld.edit(model, {chosen}, {sites}, method={edit.method!r}){scaled}"


def _chosen(items: Sequence[Request], requests: Sequence[Request]) -> str:
    """Some of the requests, as Python says it; where others were taken, all of them."""
    known = list(requests)
    indices = [known.index(item) for item in items if item in known]
    if len(indices) < len(items) or indices == [*range(len(known))]:
        return "requests"
    if indices == [*range(len(indices))]:
        return f"requests[:{len(indices)}]"
    return f"[requests[i] for i in {tuple(indices)}]"
