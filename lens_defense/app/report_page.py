"""One HTML page that tells a whole run: where, what was changed, what it did, what it cost.

Its order, unchanging words and style stand in templates/page.html. The page stands alone: Plotly is
written into it once, nothing is loaded from elsewhere, and its content policy forbids that. All text
is escaped here; the figures escape their own.
"""

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lens_defense.app.html import escaped, escaped_lines, listed, table_of
from lens_defense.checking.report import Report, formatted_rates
from lens_defense.editing.edit_plan import Edit
from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.rate_bars import rate_bars
from lens_defense.plotting.theme import CONTROLS, ROLE_WORDS, component_words
from lens_defense.prompts.conversation import first_dozen_words
from lens_defense.prompts.prompt import Role
from lens_defense.sites import Component, Site
from lens_defense.storage import atomic_write
from lens_defense.tracing.trace_result import Trace


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question, and its answers before and after. Of a harmful one a dozen words are kept."""

    asked: str
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
    trace: Trace,
    sites: Sequence[Site],
    edit: Edit,
    reports: Mapping[str, Report],
    conversations: Sequence[Conversation],
    reproduce: str,
    seconds: Mapping[str, float] = {},
    restored: bool | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        title: its heading.
        trace: what the maps are drawn from.
        sites: the chosen ones, outlined in the maps.
        edit: what was planned there.
        reports: by name; the first is the edit's own, the others are controls.
        conversations: shown before and after.
        reproduce: the commands or the code that make the page again.
        seconds: the time of each stage.
        restored: whether the weights are what they were; None does not say.

    Raises:
        ValueError: no report was given.
    """
    if not reports:
        raise ValueError("a page needs at least one report; ld.check makes one")
    template = Template(files("lens_defense").joinpath("app/templates/page.html").read_text("utf-8"))
    page = template.substitute(
        plotly=get_plotlyjs(),
        title=escaped(title),
        told=_told(trace, sites, edit),
        headline=_headline(next(iter(reports.values()))),
        colours=_colours(trace),
        maps=_maps(trace, sites),
        sites=_sites(sites, trace.layers),
        leak="above" if edit.forecast.risky else "not above",
        threshold=edit.forecast.THRESHOLD,
        forecast=_forecast(edit),
        change=_change(edit),
        rates=_rates(reports) + _figure(rate_bars(reports), "bars"),
        costs=_costs(reports),
        talks=_talks(conversations),
        reproduce=_reproduce(trace, edit, reproduce),
        afterwards=_afterwards(trace, seconds, restored),
    )
    with atomic_write(path) as file:
        file.write_text(page, "utf-8")
    return Path(path)


def _told(trace: Trace, sites: Sequence[Site], edit: Edit) -> str:
    """What was done, in one paragraph."""
    texts = f"{len(trace.prompts)} request{'s' * (len(trace.prompts) > 1)}"
    measured = (
        f"In {texts} the subject was spoiled, and one state of the clean run at a time was restored, to see "
        "how much of the answer it brings back."
        if trace.direction == "denoising"
        else f"In {texts} one state of the run with a spoiled subject at a time was put into the clean run, "
        "to see how much of the answer it takes."
    )
    measured = measured if trace.exact else f"{measured} Effects were estimated by a gradient."
    measured = f"Its maps show {trace.measure}." if trace.measure else measured
    told = (
        f"The model is {trace.model}, with {trace.model_layers} layers. {measured} The chosen sites are "
        f"{_where(sites)}. There, {edit.method} planned a change of rank {edit.rank} to the MLP output "
        f"matrices of layers {listed(edit.layers)}, so that {len(edit.subjects)} subjects "
        f"({', '.join(edit.subjects)}) meet a refusal. The change was made, measured beside the model as it "
        "was, and taken back."
    )
    return f"<p class='lead'>{escaped(told)}</p>"


def _colours(trace: Trace) -> str:
    """What the colours of the maps mean."""
    if trace.measure:
        return escaped(f"Colours: {trace.measure}.")
    if trace.direction == "denoising":
        return (
            "Red: restoring this state brings the answer back (1 is all of it). White: it brings back "
            "nothing. Blue: it drives the answer away."
        )
    return (
        "Red: spoiling this state takes the answer (1 is all that the spoiled subject takes). White: it "
        "takes nothing. Blue: it makes the answer more probable."
    )


def _headline(report: Report) -> str:
    """The few numbers that the rest of the page is about."""
    if not report.edited:
        return ""
    unseen = [row for row in report.rows if row.arm in ("wording", "wrapper")]
    harmless = sum(row.arm in ("benign", "safe") for row in report.rows)
    known = sum(row.hit("knows", after=False) for row in report.rows if row.arm == "facts")
    numbers = []
    if unseen:
        before, after = (
            sum(row.hit("coherent", after=when) for row in unseen) / len(unseen) for when in (False, True)
        )
        numbers.append(
            (f"{before:.0%} to {after:.0%}", "coherent refusals on the edited subjects, in unseen words")
        )
    if harmless:
        numbers.append((f"{report.new_refusals()} of {harmless}", "harmless requests newly refused"))
    if known:
        numbers.append((f"{report.facts_lost()} of {known}", "known facts lost"))
    if report.kl:
        numbers.append((f"{sum(report.kl) / len(report.kl):.4f}", "KL to the original, nats a token"))
    cards = "".join(
        f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for value, name in numbers
    )
    return f"<div class='numbers'>{cards}</div>"


def _maps(trace: Trace, sites: Sequence[Site]) -> str:
    singles = [
        _figure(heatmap(trace[i], sites), f"map-{i}", caption=met.request.text)
        for i, met in enumerate(trace.prompts)
    ]
    if len(singles) == 1:
        return singles[0]
    mean = _figure(heatmap(trace, sites), "map")
    return f"{mean}<h3>Each request</h3><div class='row'>{''.join(singles)}</div>"


def _figure(figure: go.Figure, name: str, *, caption: str = "") -> str:
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=dict(CONTROLS))
    above = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f"<figure>{above}{drawn}</figure>"


def _sites(sites: Sequence[Site], traced: Sequence[int]) -> str:
    rows = [
        (
            component_words(site.component),
            site.layer,
            ROLE_WORDS[site.role],
            _NONE if site.effect is None else f"{site.effect:.3f}",
            _NONE if site.interval is None else f"{site.interval[0]:.3f} to {site.interval[1]:.3f}",
        )
        for site in sites
    ]
    between = any(site.layer not in traced for site in sites)
    note = "<p>The effect of a layer that was not traced lies on the line between its neighbours.</p>"
    return table_of(("component", "layer", "token", "effect", "interval"), rows) + note * between


def _forecast(edit: Edit) -> str:
    table = edit.forecast.to_dataframe().itertuples(index=False)
    rows = [(name, *(f"{value:.3f}" for value in values)) for name, *values in table]
    rows[-1] = ("all together", *rows[-1][1:])
    headers = ("subject", "reach", "leak to neutral text", "leak to safe-sounding text")
    return table_of(headers, rows)


def _change(edit: Edit) -> str:
    rows = [(layer, edit.rank, f"{edit.relative_change[layer]:.4f}") for layer in edit.layers]
    settings = [("method", edit.method), ("token", ROLE_WORDS[edit.role])]
    settings += [(name.replace("_", " "), value) for name, value in edit.settings.items()]
    changes = table_of(("layer", "rank of the change", "its norm over the matrix's"), rows)
    return f"<div class='row apart'>{changes}{table_of(('setting', 'value'), settings)}</div>"


def _rates(reports: Mapping[str, Report]) -> str:
    """Rates of all reports side by side: before once, then what each edit did."""
    tables = [formatted_rates(report).to_dict("records") for report in reports.values()]
    found = [{(row["arm"], row["measure"]): row for row in table} for table in tables]
    rows, last = [], ""
    for arm, measure in dict.fromkeys(key for table in found for key in table):
        each = [table.get((arm, measure), {}) for table in found]
        first = next(row for row in each if row)
        after = [_rate(row.get(name, _NONE)) for row in each for name in ("after", "p")]
        rows.append(("" if arm == last else arm, measure, first["n"], _rate(first["before"]), *after))
        last = arm
    headers = ("asked", "answer", "n", "before", *(("after", "p") * len(reports)))
    groups = [("", 4), *((name, 2) for name in reports)]
    note = (
        "Rates with 95% intervals, the rows of one subject taken as related; p is of the paired test. A "
        "refusal counts as coherent if the whole answer is one, and nothing follows it."
    )
    dropped = sum(report.dropped for report in reports.values())
    note += f" {dropped} rows were left out because an edit had seen their text." if dropped else ""
    return f"<p>{escaped(note)}</p>" + table_of(headers, rows, groups)


def _rate(shown: str) -> str:
    """A rate whose interval is not broken over lines."""
    return shown.replace(", ", ",\N{NO-BREAK SPACE}")


def _costs(reports: Mapping[str, Report]) -> str:
    found = [{row["cost"]: row for row in report.costs().to_dict("records")} for report in reports.values()]
    rows = [
        (name, *(_cost(table[name]) if name in table else _NONE for table in found))
        for name in dict.fromkeys(name for table in found for name in table)
    ]
    return table_of(("nats a token, mean and interval", *reports), rows)


def _cost(row: Mapping[Hashable, Any]) -> str:
    return f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}], n = {row['n']:.0f}"


def _talks(conversations: Sequence[Conversation]) -> str:
    note = "<p>Of answers to harmful requests at most a dozen words are kept.</p>"
    cards = [
        f"<article class='talk'><p class='asked'>{escaped_lines(talk.asked)}</p><div class='sides'>"
        f"<div><h4>before</h4><p>{escaped_lines(talk.before)}</p></div>"
        f"<div><h4>after</h4><p>{escaped_lines(talk.after)}</p></div></div></article>"
        for talk in conversations
    ]
    return (note if any(talk.harmful for talk in conversations) else "") + "".join(cards)


def _reproduce(trace: Trace, edit: Edit, reproduce: str) -> str:
    rows = [
        ("model", trace.model),
        ("fingerprint of its weights", trace.fingerprint),
        ("fingerprint of the edited layers", edit.fingerprint),
        ("corruption", trace.corruption or f"seed {trace.seed}"),
    ]
    return f"<pre><code>{escaped_lines(reproduce)}</code></pre>" + table_of(("what", "value"), rows)


def _afterwards(trace: Trace, seconds: Mapping[str, float], restored: bool | None) -> str:
    told = {
        None: "",
        True: f"<p class='good'>The weights are what they were: hash {escaped(trace.fingerprint)}.</p>",
        False: "<p class='bad'>The weights are not what they were: load the model again.</p>",
    }[restored]
    rows = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    rows.append(("all", f"{math.fsum(seconds.values()):.1f} s"))
    return told + (table_of(("stage", "time"), rows) if seconds else "")


def _where(sites: Sequence[Site]) -> str:
    places: dict[tuple[Component, Role], list[int]] = {}
    for site in sites:
        places.setdefault((site.component, site.role), []).append(site.layer)
    return "; ".join(
        f"layers {listed(sorted(layers))} of the {component_words(component)} at the {ROLE_WORDS[role]}"
        for (component, role), layers in places.items()
    )


_NONE = "\N{EN DASH}"
