"""One HTML page that tells a whole run: where, what was changed, what it did, what it cost.

The page stands alone: Plotly is written into it once, nothing is loaded from elsewhere, and its
content policy forbids that. All text is escaped here; the figures escape their own.
"""

import html
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lens_defense.edits import Edit
from lens_defense.plots import COMPONENT_WORDS, CONTROLS, ROLE_WORDS, bars, heatmap, visible
from lens_defense.prompts import Role, dozen
from lens_defense.reports import Report, shown_rates
from lens_defense.sites import Component, Site
from lens_defense.traces import Trace


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question, and its answers before and after. Of a harmful one a dozen words are kept."""

    asked: str
    before: str
    after: str
    harmful: bool

    def __post_init__(self) -> None:
        if self.harmful:
            object.__setattr__(self, "before", dozen(self.before))
            object.__setattr__(self, "after", dozen(self.after))


def save_page(
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
    parts = [
        f"<header><h1>{_text(title)}</h1>{_told(trace, sites, edit)}</header>",
        _headline(next(iter(reports.values()))),
        _section("Where: maps of the trace", _maps(trace, sites)),
        _section("The chosen sites", _sites(sites, trace.layers)),
        _section("Forecast, before anything was changed", _forecast(edit)),
        _section("What was changed", _change(edit)),
        _section("What it did", _rates(reports) + _figure(bars(reports), "bars")),
        _section("What it cost", _costs(reports)),
        _section("Before and after", _talks(conversations)),
        _section("How to reproduce", _reproduce(trace, edit, reproduce)),
        _section("Afterwards", _afterwards(trace, seconds, restored)),
    ]
    file = Path(path)
    unfinished = file.with_name(f".{file.name}.unfinished")
    page = _PAGE.format(
        policy=_POLICY, title=_text(title), style=_STYLE, plotly=get_plotlyjs(), body="\n".join(parts)
    )
    unfinished.write_text(page, "utf-8")
    unfinished.replace(file)
    return file


def _told(trace: Trace, sites: Sequence[Site], edit: Edit) -> str:
    """What was done, in one paragraph."""
    texts = f"{len(trace.prompts)} request{'s' * (len(trace.prompts) > 1)}"
    told = (
        f"The model is {trace.model}, with {trace.model_layers} layers. In {texts} the subject was spoiled, "
        f"and one state of the clean run at a time was restored, to see how much of the answer it brings "
        f"back. The chosen sites are {_where(sites)}. There, {edit.method} planned a change of rank "
        f"{edit.rank} to the MLP output matrices of layers {_listed(edit.layers)}, so that "
        f"{len(edit.subjects)} subjects ({', '.join(edit.subjects)}) meet a refusal. The change was made, "
        "measured beside the model as it was, and taken back."
    )
    return f"<p class='lead'>{_text(told)}</p>"


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
    cards = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in numbers)
    return f"<div class='numbers'>{cards}</div>"


def _maps(trace: Trace, sites: Sequence[Site]) -> str:
    read = (
        "Red: restoring this state brings the answer back (1 is all of it). White: it brings back nothing. "
        "Blue: it drives the answer away. Outlined: the chosen sites. Bracketed: the subject. Below eight "
        "requests or noise draws an interval is their range, from eight on a 95% bootstrap."
    )
    singles = [
        _figure(heatmap(trace[i], sites), f"map-{i}", caption=met.request.text)
        for i, met in enumerate(trace.prompts)
    ]
    if len(singles) == 1:
        return f"<p>{read}</p>{singles[0]}"
    mean = _figure(heatmap(trace, sites), "map")
    return f"<p>{read}</p>{mean}<h3>Each request</h3><div class='row'>{''.join(singles)}</div>"


def _figure(figure: go.Figure, name: str, *, caption: str = "") -> str:
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=dict(CONTROLS))
    above = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{above}{drawn}</figure>"


def _sites(sites: Sequence[Site], traced: Sequence[int]) -> str:
    rows = [
        (
            COMPONENT_WORDS[site.component],
            site.layer,
            ROLE_WORDS[site.role],
            _NONE if site.effect is None else f"{site.effect:.3f}",
            _NONE if site.interval is None else f"{site.interval[0]:.3f} to {site.interval[1]:.3f}",
        )
        for site in sites
    ]
    between = any(site.layer not in traced for site in sites)
    note = "<p>The effect of a layer that was not traced lies on the line between its neighbours.</p>"
    return _table(("component", "layer", "token", "effect", "interval"), rows) + note * between


def _forecast(edit: Edit) -> str:
    forecast = edit.forecast
    table = forecast.to_dataframe().itertuples(index=False)
    rows = [(name, *(f"{value:.3f}" for value in values)) for name, *values in table]
    rows[-1] = ("all together", *rows[-1][1:])
    note = (
        "Reach: the share of a subject's vector that arrives, in contexts kept aside. Leak: the change that "
        "other text meets, over the mean norm of a value. "
    )
    note += (
        f"The leak to safe-sounding text is {'above' if forecast.risky else 'not above'} "
        f"{forecast.THRESHOLD}, from which on harmless requests can be expected to be refused."
    )
    headers = ("subject", "reach", "leak to neutral text", "leak to safe-sounding text")
    return f"<p>{_text(note)}</p>" + _table(headers, rows)


def _change(edit: Edit) -> str:
    rows = [(layer, edit.rank, f"{edit.relative_change[layer]:.4f}") for layer in edit.layers]
    settings = [("method", edit.method), ("token", ROLE_WORDS[edit.role])]
    settings += [(name.replace("_", " "), value) for name, value in edit.settings.items()]
    changes = _table(("layer", "rank of the change", "its norm over the matrix's"), rows)
    return f"<div class='row apart'>{changes}{_table(('setting', 'value'), settings)}</div>"


def _rates(reports: Mapping[str, Report]) -> str:
    """Rates of all reports side by side: before once, then what each edit did."""
    tables = [shown_rates(report).to_dict("records") for report in reports.values()]
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
    return f"<p>{_text(note)}</p>" + _table(headers, rows, groups)


def _rate(shown: str) -> str:
    """A rate whose interval is not broken over lines."""
    return shown.replace(", ", ",\N{NO-BREAK SPACE}")


def _costs(reports: Mapping[str, Report]) -> str:
    found = [{row["cost"]: row for row in report.costs().to_dict("records")} for report in reports.values()]
    rows = [
        (name, *(_cost(table[name]) if name in table else _NONE for table in found))
        for name in dict.fromkeys(name for table in found for name in table)
    ]
    return _table(("nats a token, mean and interval", *reports), rows)


def _cost(row: Mapping[Hashable, Any]) -> str:
    return f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}], n = {row['n']:.0f}"


def _talks(conversations: Sequence[Conversation]) -> str:
    note = "<p>Of answers to harmful requests at most a dozen words are kept.</p>"
    cards = [
        f"<article class='talk'><p class='asked'>{_block(talk.asked)}</p><div class='sides'>"
        f"<div><h4>before</h4><p>{_block(talk.before)}</p></div>"
        f"<div><h4>after</h4><p>{_block(talk.after)}</p></div></div></article>"
        for talk in conversations
    ]
    return (note if any(talk.harmful for talk in conversations) else "") + "".join(cards)


def _reproduce(trace: Trace, edit: Edit, reproduce: str) -> str:
    rows = [
        ("model", trace.model),
        ("fingerprint of its weights", trace.fingerprint),
        ("fingerprint of the edited layers", edit.fingerprint),
        ("seed of the trace", trace.seed),
    ]
    return f"<pre><code>{_block(reproduce)}</code></pre>" + _table(("what", "value"), rows)


def _afterwards(trace: Trace, seconds: Mapping[str, float], restored: bool | None) -> str:
    told = {
        None: "",
        True: f"<p class='good'>The weights are what they were: hash {_text(trace.fingerprint)}.</p>",
        False: "<p class='bad'>The weights are not what they were: load the model again.</p>",
    }[restored]
    rows = [(name, f"{value:.1f} s") for name, value in seconds.items()]
    rows.append(("all", f"{math.fsum(seconds.values()):.1f} s"))
    return told + (_table(("stage", "time"), rows) if seconds else "")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _table(
    headers: Sequence[object], rows: Sequence[Sequence[object]], groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table; groups name columns that belong together, each with its number of columns."""
    over = "".join(f"<th colspan='{span}'>{_text(name)}</th>" for name, span in groups)
    head = "".join(f"<th>{_text(name)}</th>" for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<tr class='groups'>{over}</tr>" if groups else ""
    return f"<div class='wide'><table><thead>{top}<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: object) -> str:
    return html.escape(visible(str(value)))


def _block(text: str) -> str:
    """Text whose line breaks stay."""
    return "\n".join(_text(line) for line in text.split("\n"))


def _where(sites: Sequence[Site]) -> str:
    places: dict[tuple[Component, Role], list[int]] = {}
    for site in sites:
        places.setdefault((site.component, site.role), []).append(site.layer)
    return "; ".join(
        f"layers {_listed(sorted(layers))} of the {COMPONENT_WORDS[component]} at the {ROLE_WORDS[role]}"
        for (component, role), layers in places.items()
    )


def _listed(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


_NONE = "\N{EN DASH}"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1a1a1a; line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 21px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid #e3e3e3; }
h3 { font-size: 16px; margin: 24px 0 4px; }
h4 { font-size: 12px; margin: 0 0 2px; color: #666; font-weight: 600; }
p { margin: 0 0 12px; max-width: 76ch; overflow-wrap: anywhere; }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
.numbers div { flex: 1 1 160px; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px; }
.numbers b { display: block; font-size: 24px; line-height: 1.25; color: #0b4f8a; white-space: nowrap; }
.numbers span { font-size: 14px; color: #444; }
figure { margin: 8px 0; overflow-x: auto; overflow-y: hidden; max-width: 100%; }
figcaption { font-size: 14px; color: #444; padding: 0 12px; max-width: 420px;
  font-weight: 600; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px 10px; align-items: flex-start; }
.apart { gap: 8px 48px; }
.wide { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 16px 6px 0; border-bottom: 1px solid #ececec; vertical-align: top; }
td { overflow-wrap: break-word; max-width: 360px; }
thead tr:last-child th { border-bottom: 1px solid #999; }
th { font-weight: 600; }
.groups th { border-bottom: 0; padding-bottom: 0; }
pre { background: #f6f7f9; border: 1px solid #e3e6ea; border-radius: 6px; padding: 12px 14px;
  overflow-x: auto; font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.talk { border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px; margin: 0 0 14px; }
.talk p { white-space: pre-wrap; margin: 0; }
.asked { font-weight: 600; padding-bottom: 10px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.good { border-left: 4px solid #009e73; padding-left: 12px; }
.bad { border-left: 4px solid #d55e00; padding-left: 12px; font-weight: 600; }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr; } main { padding: 24px 14px 48px; } }
@media print {
  @page { margin: 12mm; }
  main { max-width: none; padding: 0; }
  body { font-size: 12px; }
  figure, .talk, tr, .numbers { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  figure, .wide { overflow: visible; }
}
"""
