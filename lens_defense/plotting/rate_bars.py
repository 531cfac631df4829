"""Bars of Reports side by side: the rates of every arm before and after each edit, with 95% intervals.

Of what an edit should refuse (TO_BE_REFUSED) a bar is the share of coherent refusals, of other
requests the share that begins like a refusal, of facts the share that is known. Rates and intervals are those
of `Report.rates`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from lens_defense.checking.report import ARM_NAMES, JUDGES, MEASURE_NAMES, Report
from lens_defense.checking.suites import TO_BE_REFUSED, Arm
from lens_defense.plotting.print_size import Width, print_pixels
from lens_defense.plotting.theme import COLOURS, INK, plotly_text, theme

_BEFORE = "#bdbdbd"
_PATTERNS = ("", "/", "x", ".", "\\", "+")
"""In grey, bars are told apart by these."""
_LEFT, _RIGHT, _LINE = 58, 12, 17
_LETTER = 6.6
"""Pixels of a letter."""
_FLAT = 76
"""Pixels of an arm from which on its longest word fits below it."""


class _Rate(NamedTuple):
    """The height of a bar, and its interval."""

    rate: float
    low: float
    high: float
    n: int
    clusters: int


def rate_bars(
    reports: Mapping[str, Report], *, measure: str | None = None, width: Width | float | None = None
) -> go.Figure:
    """Rates before and after, by arm, with their 95% intervals; facts by whether they are known.

    Args:
        reports: by name. "before" stands once where all reports agree on it.
        measure: the judge of every arm but facts. None takes the judge that is harder on an edit: `coherent`
            for what the edit should refuse, and `prefix` for all others, which should not.
        width: what it is drawn for: a paper's "column", its "page", or inches. None takes a column where the
            names of the arms fit into it, else a page.

    Raises:
        ValueError: there are no reports, or there is no such judge or width.
    """
    if not reports:
        raise ValueError("no report was given; ld.check makes one")
    if measure not in (None, *JUDGES):
        raise ValueError(f"measure must be one of {', '.join(JUDGES)}, got {measure!r}")
    series = _series(reports, measure)
    arms: list[Arm] = [arm for arm in ARM_NAMES if any(arm in rates for rates in series.values())]
    if width is None:
        width = "column" if len(arms) * _FLAT <= print_pixels("column") - _LEFT - _RIGHT else "page"
    across = print_pixels(width) - _LEFT - _RIGHT
    figure = go.Figure()
    looks = iter(zip(COLOURS, _PATTERNS, strict=True))
    for name, rates in series.items():
        colour, pattern = (_BEFORE, "") if name.startswith("before") else next(looks, (INK, ""))
        figure.add_trace(_bars(name, rates, arms, colour, pattern))
    labels, below = _arm_labels(arms, series, across / max(1, len(arms)))
    flat = any("<br>" in label for label in labels)
    figure.update_xaxes(tickvals=[*range(len(arms))], ticktext=labels, tickangle=0 if flat else -90)
    figure.update_xaxes(range=[-0.5, len(arms) - 0.5], showgrid=False)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", gridcolor="#e3e3e3")
    figure.update_yaxes(title_text=f"share {MEASURE_NAMES[measure]}" if measure else "share")
    lines = _name_groups(figure, arms, measure, across)
    figure.update_layout(
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
        legend={"x": 0, "y": 0.99, "yref": "container", "yanchor": "top"},
    )
    above = 24 + _LINE * lines + 19 * len(series)
    return theme(figure, title="", plot=(across, 220), left=_LEFT, right=_RIGHT, above=above, below=below)


def _series(reports: Mapping[str, Report], measure: str | None) -> dict[str, dict[Arm, _Rate]]:
    """Rates by name of the series and arm: "before" and one series per edit."""
    series: dict[str, dict[Arm, _Rate]] = {}
    for name, report in reports.items():
        rows = [
            row for row in report.rates().to_dict("records") if row["measure"] == _drawn(row["arm"], measure)
        ]
        for when in ("before", "after") if report.edited else ("before",):
            rates: dict[Arm, _Rate] = {
                row["arm"]: _Rate(
                    row[when], row[f"{when} low"], row[f"{when} high"], row["n"], row["clusters"]
                )
                for row in rows
            }
            if when == "after":
                series[name] = rates
            elif rates not in series.values():
                series["before" if "before" not in series else f"before ({name})"] = rates
    return series


def _drawn(arm: Arm, measure: str | None) -> str:
    """The measure that an arm's bars show."""
    if arm == "facts":
        return "knows"
    return measure or ("coherent" if arm in TO_BE_REFUSED else "prefix")


def _bars(name: str, rates: Mapping[Arm, _Rate], arms: Sequence[Arm], colour: str, pattern: str) -> go.Bar:
    columns = [i for i, arm in enumerate(arms) if arm in rates]
    bars = [rates[arms[i]] for i in columns]
    hover = [
        f"<b>{plotly_text(name)}</b><br>{ARM_NAMES[arms[i]]}<br>{bar.rate:.1%} of {bar.n} rows, "
        f"{bar.clusters} subjects<br>95% interval {bar.low:.1%} to {bar.high:.1%}"
        for i, bar in zip(columns, bars, strict=True)
    ]
    return go.Bar(
        name=plotly_text(name),
        x=columns,
        y=[bar.rate for bar in bars],
        error_y={
            "array": [bar.high - bar.rate for bar in bars],
            "arrayminus": [bar.rate - bar.low for bar in bars],
            "color": "#333333",
            "thickness": 1.2,
            "width": 3,
        },
        marker={"color": colour, "pattern": {"shape": pattern, "size": 5, "solidity": 0.25}},
        hovertext=hover,
        hoverinfo="text",
    )


def _arm_labels(
    arms: Sequence[Arm], series: Mapping[str, Mapping[Arm, _Rate]], cell: float
) -> tuple[list[str], int]:
    """Arms in words, with how many rows they have, and the pixels below; upright where they are many.

    Flat labels have as many lines each, so that the numbers of rows stand in a row.
    """
    flat = cell >= _FLAT
    letters = int(cell / _LETTER) if flat else 99
    wrapped = {arm: textwrap.wrap(ARM_NAMES[arm], letters, break_long_words=False) for arm in arms}
    lines = max(map(len, wrapped.values()), default=0)
    labels = []
    for arm in arms:
        n = " or ".join(map(str, sorted({rates[arm].n for rates in series.values() if arm in rates})))
        padding = [""] * (lines - len(wrapped[arm]))
        labels.append(
            "<br>".join([*wrapped[arm], *padding, f"n = {n}"]) if flat else f"{ARM_NAMES[arm]}, n = {n}"
        )
    longest = max(map(len, labels), default=0)
    return labels, 14 + _LINE * (lines + 1) if flat else 14 + round(_LETTER * longest)


def _name_groups(figure: go.Figure, arms: Sequence[Arm], measure: str | None, across: int) -> int:
    """Name the groups of arms and their measure over the bars, with a thin line between groups.

    Returns:
        Lines of the longest name, as it is wrapped to its group's width.
    """
    names = {"edited": "to be refused", "others": "all others", "facts": "facts: known"}
    if measure is None:
        names |= {"edited": "to be refused: refused, coherent", "others": "all others: refused, by prefix"}
    groups = ["edited" if arm in TO_BE_REFUSED else "facts" if arm == "facts" else "others" for arm in arms]
    most = 1
    for group in dict.fromkeys(groups):
        first, last = groups.index(group), len(groups) - 1 - groups[::-1].index(group)
        pixels = across * (last - first + 1) / len(groups)
        lines = textwrap.wrap(names[group], max(6, int(pixels / 7.4)), break_long_words=False)
        most = max(most, len(lines))
        figure.add_annotation(
            text="<br>".join(f"<b>{line}</b>" for line in lines),
            x=(first + last) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
        )
        if first:
            figure.add_vline(x=first - 0.5, line={"color": "#bbbbbb", "width": 1})
    return most
