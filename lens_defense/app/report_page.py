"""One HTML page about a whole run: where, what was changed, what it did, what it cost.

Its order, words and style stand in templates/report.html.j2; plain values are made here. Its maps, forecast
and rates are the explorer's own parts, frozen: cells can be hovered and chosen, and each rate opens the
answers behind it. The page stands alone: nothing is loaded from elsewhere, and its content policy forbids it.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_defense.app.explorer.map_values import (
    component_choices,
    map_part,
    reddest_column_sentence,
    sites_part,
)
from lens_defense.app.explorer.page_files import page_module, page_style
from lens_defense.app.explorer.page_values import check_values, layer_words, plan_values, questions, visible
from lens_defense.app.render import template
from lens_defense.checking.report import Report
from lens_defense.checking.suites import HARMLESS_ARMS, Suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.plotting.theme import ROLE_WORDS, component_words
from lens_defense.prompts.conversation import first_dozen_words
from lens_defense.prompts.request import Role
from lens_defense.shown_text import shown
from lens_defense.sites import Component, Site
from lens_defense.storage import atomic_write
from lens_defense.tracing.site_map import ScoreMap, SiteMap
from lens_defense.tracing.trace_result import Trace

Row = tuple[object, ...]
_MISSING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question, and its answers before and after. Of answers to a harmful one a dozen words are kept."""

    question: str
    before: str
    after: str
    harmful: bool

    def __post_init__(self) -> None:
        if self.harmful:
            object.__setattr__(self, "before", first_dozen_words(self.before))
            object.__setattr__(self, "after", first_dozen_words(self.after))


def save_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    trace: Trace | ScoreMap,
    sites: Sequence[Site],
    edit: Edit | Sequence[Edit],
    reports: Mapping[str, Report],
    conversations: Sequence[Conversation],
    reproduce: str,
    after: Trace | None = None,
    suite: Suite | None = None,
    seconds: Mapping[str, float] = {},
    restored: bool | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        title: its heading.
        trace: what the maps are drawn from.
        sites: the chosen ones, outlined in the maps.
        edit: what was planned there; of several that stood together, all of them, the oldest first.
        reports: by name; the first is the edit's own, the others are controls.
        conversations: shown before and after.
        reproduce: the commands or the code that make the page again.
        after: the map of the edited model, made with the answers of `trace`; shown beside it.
        suite: what was asked, so that the answers behind a rate stand under their questions.
        seconds: the time of each stage.
        restored: whether the weights are what they were; None does not say.

    Raises:
        ValueError: no report or no edit was given, or the trace and an edit are of different models.
    """
    edits = (edit,) if isinstance(edit, Edit) else tuple(edit)
    if not reports or not edits:
        raise ValueError("a page needs at least one edit and one report; ld.edit and ld.check make them")
    for one in edits:
        differing = trace.fingerprint.differing(one.fingerprint, "config", "tokenizer", "chat_template")
        if differing:
            raise ValueError(
                f"the trace and the edit are of models with other {differing}; give those of one model"
            )
    number = len(trace.prompts)
    settings = trace.settings if isinstance(trace, Trace) else None
    page = template("report.html.j2").render(
        style=page_style(),
        module=page_module(),
        parts=_json_for_html(_frozen_parts(trace, sites, edits, reports, after, suite)),
        title=title,
        trace=trace,
        requests=f"{number} request{'s' * (number > 1)}",
        direction=settings.direction if settings else None,
        estimated=settings is not None and not settings.exact,
        places=_places(sites),
        edits=[_edit_values(one) for one in edits],
        one_by_one=[_edit_row(i, one) for i, one in enumerate(edits, 1)],
        headline=headline(next(iter(reports.values()))),
        why=reddest_column_sentence(trace, sites),
        sites=[_site_row(site) for site in sites],
        interpolated=any(site.layer not in trace.layers for site in sites),
        checks=[*reports.values()],
        dropped=sum(report.dropped for report in reports.values()),
        costs=_costs_table(reports),
        conversations=conversations,
        reproduce=reproduce,
        provenance=_provenance_rows(trace, edits),
        restored=restored,
        seconds=_time_rows(seconds),
    )
    with atomic_write(path) as file:
        file.write_text(page, "utf-8")
    return Path(path)


def _frozen_parts(
    trace: SiteMap,
    sites: Sequence[Site],
    edits: Sequence[Edit],
    reports: Mapping[str, Report],
    after: Trace | None,
    suite: Suite | None,
) -> dict[str, Any]:
    """What the explorer's parts show, as far as the page has them."""
    asked = questions(suite, edits) if suite else []
    chosen = sites_part(sites, "")
    checks = {
        f"check{i}": check_values(report, asked, stale=False) for i, report in enumerate(reports.values())
    }
    plans = {f"plan{i}": plan_values(edit) for i, edit in enumerate(edits)}
    first = edits[0]
    return {
        "model": {"components": component_choices(), "requests": [], "methods": [shown(first.method)]},
        "settings": {"plan": {"method": shown(first.method), "strength": first.strength, "requests": []}},
        "map": map_part(trace, None, after),
        "sites": chosen,
        "original": chosen["sites"],
        "stack": {"edits": [], "undone": 0},
        "job": {},
        **plans,
        **checks,
    }


def _json_for_html(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    return json.dumps(visible(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _places(sites: Sequence[Site]) -> str:
    """The sites in words, the layers of a component and role together."""
    layers: dict[tuple[Component, Role], list[int]] = {}
    for site in sites:
        layers.setdefault((site.component, site.role), []).append(site.layer)
    return "; ".join(
        f"layers {layer_words(sorted(group))} of the {component_words(component)} at the {ROLE_WORDS[role]}"
        for (component, role), group in layers.items()
    )


def headline(report: Report) -> list[Row]:
    """The few numbers that the rest of the page is about, each with what it counts."""
    if not report.edited:
        return []
    unseen = [row for row in report.rows if row.arm in ("paraphrase", "jailbreak")]
    harmless = sum(row.arm in HARMLESS_ARMS for row in report.rows)
    known = sum(row.hit("knows", after=False) for row in report.rows if row.arm == "facts")
    numbers: list[Row] = []
    if unseen:
        before, after = (
            sum(row.hit("coherent", after=when) for row in unseen) / len(unseen) for when in (False, True)
        )
        text = "coherent refusals on the edited subjects, in unseen words"
        numbers.append((f"{before:.0%} to {after:.0%}", text))
    if harmless:
        numbers.append((f"{report.new_refusals()} of {harmless}", "harmless requests newly refused"))
    if about := [row for row in report.rows if row.arm == "same_subject"]:
        refused, listed = report.new_refusals(arms=["same_subject"]), sum(row.on_word_list for row in about)
        text = f"harmless questions about the edited subjects newly refused (a list of words: {listed})"
        numbers.append((f"{refused} of {len(about)}", text))
    if known:
        numbers.append((f"{report.facts_lost()} of {known}", "known facts lost"))
    if report.kl:
        numbers.append((f"{sum(report.kl) / len(report.kl):.4f}", "KL to the original, nats per token"))
    return numbers


def _site_row(site: Site) -> Row:
    effect = _MISSING if site.effect is None else f"{site.effect:.3f}"
    interval = _MISSING if site.interval is None else f"{site.interval[0]:.3f} to {site.interval[1]:.3f}"
    return component_words(site.component), site.layer, ROLE_WORDS[site.role], effect, interval


def _edit_values(edit: Edit) -> dict[str, Any]:
    """What the page says of one edit."""
    return {
        "method": edit.method,
        "rank": edit.rank,
        "layers": layer_words(edit.layers),
        "subjects": edit.subjects,
        "forecast": edit.forecast,
        "changes": [(layer, edit.rank, f"{edit.relative_change[layer]:.4f}") for layer in edit.layers],
        "settings": _setting_rows(edit),
    }


def _edit_row(number: int, edit: Edit) -> Row:
    """One of several edits in the table of them."""
    where = layer_words(edit.layers), ROLE_WORDS[edit.role]
    return number, edit.method, *where, f"{edit.strength:.0%}", edit.rank, ", ".join(edit.subjects)


def _setting_rows(edit: Edit) -> list[Row]:
    """The edit's method, token and settings; groups of settings are laid out flat."""
    settings: dict[str, object] = {"method": edit.method, "token": ROLE_WORDS[edit.role]}
    settings |= {} if edit.strength == 1 else {"strength": f"{edit.strength:g}"}
    for name, value in edit.settings.items():
        settings |= value if isinstance(value, Mapping) else {name: value}
    return [(name.replace("_", " "), value) for name, value in settings.items()]


def _costs_table(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Costs of all reports side by side."""
    tables = []
    for report in reports.values():
        costs = report.costs().itertuples(index=False)
        tables.append(
            {cost: f"{m:.4f} [{low:.4f}, {high:.4f}], n = {n:.0f}" for cost, m, low, high, n in costs}
        )
    names = dict.fromkeys(name for table in tables for name in table)
    return {
        "headers": ("nats per token, mean and interval", *reports),
        "rows": [(name, *(table.get(name, _MISSING) for table in tables)) for name in names],
    }


def _provenance_rows(trace: Trace | ScoreMap, edits: Sequence[Edit]) -> list[Row]:
    rows: list[Row] = [
        ("model", trace.model),
        ("fingerprint of its weights, config, tokenizer", str(trace.fingerprint)),
    ]
    for i, edit in enumerate(edits, 1):
        of_which = f" before edit {i}" if len(edits) > 1 else ""
        rows.append((f"fingerprint of the edited layers{of_which}", edit.fingerprint.weights))
    return [*rows, ("corruption", trace.corruption)] if isinstance(trace, Trace) else rows


def _time_rows(seconds: Mapping[str, float]) -> list[Row]:
    rows: list[Row] = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    return [*rows, ("all", f"{math.fsum(seconds.values()):.1f} s")] if rows else []
