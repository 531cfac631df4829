"""Bars of Reports side by side: what each edit did to every arm, with its 95% interval.

No model is known here; the rates and intervals are the Reports' own.
"""

import textwrap
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from lens_defense.checking.report import ARM_NAMES, JUDGES, MEASURE_NAMES, MEASURES, Report
from lens_defense.checking.suites import Arm
from lens_defense.plotting.theme import COLOURS, GREY, INK, plotly_text, theme

STRICTER = {"edited": "coherent", "wording": "coherent", "wrapper": "coherent"}
"""The judge that is harder on an edit; of requests that it should leave alone this is the prefix judge."""


def rate_bars(reports: Mapping[str, Report], *, measure: str | None = None) -> go.Figure:
    """Rates before and after, by arm, with their 95% intervals; facts by whether they are known.

    Args:
        reports: by name; "before" stands once where all reports agree on it.
        measure: the judge of every arm; None takes the one that is harder on an edit: what it should refuse
            counts where the refusal is coherent, what it should leave alone where it begins like a refusal.

    Raises:
        ValueError: no report, or no such judge.
    """
    if not reports:
        raise ValueError("no report was given; ld.check makes one")
    if measure not in (None, *JUDGES):
        raise ValueError(f"measure must be one of {', '.join(JUDGES)}, got {measure!r}")
    series = _series(reports, measure)
    arms: list[Arm] = [arm for arm in ARM_NAMES if any(arm in rates for rates in series.values())]  # type: ignore[misc]
    figure = go.Figure()
    colours = iter(COLOURS)
    for name, rates in series.items():
        colour = GREY if name.startswith("before") else next(colours, INK)
        figure.add_trace(_bars(name, rates, arms, colour))
    figure.update_xaxes(tickvals=[*range(len(arms))], ticktext=_arm_labels(arms, series))
    figure.update_xaxes(range=[-0.5, len(arms) - 0.5], showgrid=False)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", gridcolor="#e3e3e3")
    figure.update_yaxes(title_text=f"share {MEASURE_NAMES[measure]}" if measure else "share")
    _name_groups(figure, arms, measure)
    figure.update_layout(
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
        legend={"x": 0, "y": 0.99, "yref": "container", "yanchor": "top"},
    )
    plot = (max(240, 92 * len(arms)), 260)
    return theme(figure, title="", plot=plot, left=72, right=16, above=40 + 19 * len(series), below=84)


def _series(reports: Mapping[str, Report], measure: str | None) -> dict[str, dict[str, dict[str, float]]]:
    """What is drawn side by side: for each name and arm the rate, its interval, n and p."""
    series: dict[str, dict[str, dict[str, float]]] = {}
    for name, report in reports.items():
        read = {arm: own for own, arms in MEASURES.items() for arm in arms}
        rows = [
            row
            for row in report.rates().to_dict("records")
            if row["measure"] == read.get(row["arm"], measure or STRICTER.get(row["arm"], "prefix"))
        ]
        for when in ("before", "after") if report.edited else ("before",):
            rates = {
                row["arm"]: {
                    "rate": row[when],
                    "low": row[f"{when} low"],
                    "high": row[f"{when} high"],
                    "n": row["n"],
                    "clusters": row["clusters"],
                }
                for row in rows
            }
            if when == "after":
                series[name] = rates
            elif rates not in series.values():
                series["before" if "before" not in series else f"before ({name})"] = rates
    return series


def _bars(name: str, rates: Mapping[str, Mapping[str, float]], arms: Sequence[Arm], colour: str) -> go.Bar:
    own = [(i, rates[arm]) for i, arm in enumerate(arms) if arm in rates]
    hover = [
        f"<b>{plotly_text(name)}</b><br>{ARM_NAMES[arms[i]]}<br>{one['rate']:.1%} of {one['n']} rows, "
        f"{one['clusters']} subjects<br>95% interval {one['low']:.1%} to {one['high']:.1%}"
        for i, one in own
    ]
    return go.Bar(
        name=plotly_text(name),
        x=[i for i, _ in own],
        y=[one["rate"] for _, one in own],
        error_y={
            "array": [one["high"] - one["rate"] for _, one in own],
            "arrayminus": [one["rate"] - one["low"] for _, one in own],
            "color": "#333333",
            "thickness": 1.2,
            "width": 3,
        },
        marker={"color": colour},
        hovertext=hover,
        hoverinfo="text",
    )


def _arm_labels(arms: Sequence[Arm], series: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Arms in words, all on as many lines, and under them how many rows they have."""
    words = {arm: textwrap.wrap(ARM_NAMES[arm], 13) for arm in arms}
    lines = max(map(len, words.values()), default=0)
    numbers = {
        arm: " or ".join(str(n) for n in sorted({round(r[arm]["n"]) for r in series.values() if arm in r}))
        for arm in arms
    }
    filled = {arm: part + [""] * (lines - len(part)) for arm, part in words.items()}
    return ["<br>".join([*filled[arm], f"n = {numbers[arm]}"]) for arm in arms]


def _name_groups(figure: go.Figure, arms: Sequence[Arm], measure: str | None) -> None:
    """What is asked and how it is judged stands over the bars, a thin line between the kinds."""
    names = {"own": "edited subjects", "others": "all others", "facts": "facts: known"}
    if measure is None:
        names |= {"own": "edited subjects: refused, coherent", "others": "all others: refused, by prefix"}
    kinds = ["own" if arm in STRICTER else "facts" if arm == "facts" else "others" for arm in arms]
    for kind in dict.fromkeys(kinds):
        own = [i for i, each in enumerate(kinds) if each == kind]
        middle = (own[0] + own[-1]) / 2
        figure.add_annotation(
            text=f"<b>{names[kind]}</b>", x=middle, y=1, yref="paper", yanchor="bottom", showarrow=False
        )
        if own[0]:
            figure.add_vline(x=own[0] - 0.5, line={"color": "#bbbbbb", "width": 1})
