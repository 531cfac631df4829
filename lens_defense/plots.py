"""Figures from nouns: a map of a Trace with its Sites, bars of Reports. No model is known here.

Text that came from a model or a user is shown, never run: it is escaped for Plotly's markup, and
what has no shape of its own (spaces, newlines, control characters) gets one.
"""

import html
import itertools
import os
import re
import textwrap
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from lens_defense.intervals import LEAST_FOR_BOOTSTRAP
from lens_defense.prompts import READING_ORDER, Role
from lens_defense.reports import ARM_NAMES, JUDGES, MEASURE_NAMES, MEASURES, Report
from lens_defense.sites import Component, Site
from lens_defense.suites import HARMFUL_ARMS, Arm
from lens_defense.traces import Trace

ROLE_WORDS: Mapping[Role, str] = {
    "before": "before the subject",
    "subject_first": "first subject token",
    "subject_mid": "middle subject tokens",
    "subject_last": "last subject token",
    "next": "next token",
    "after": "later tokens",
    "template": "chat template",
    "last": "last prompt token",
}
COMPONENT_WORDS: Mapping[Component, str] = {
    "residual": "residual stream",
    "mlp": "MLP outputs",
    "attention": "attention outputs",
}
SCALE = ("#2166ac", "#67a9cf", "#d1e5f0", "#ffffff", "#fddbc7", "#ef8a62", "#b2182b")
"""Blue, white, red: ColorBrewer's RdBu turned round, told apart by all common forms of colour blindness."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's."""
INK, GREY, UNTRACED = "#1a1a1a", "#8c8c8c", "#e4e6ea"
FONT = 13
"""Pixels; a demo's map is 430 wide, so in a column of 3.3 inches this is more than 7 points."""
_BETWEEN = 24
"""Pixels from panel to panel."""
CONTROLS: Mapping[str, Any] = {
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}
"""What a figure in a browser offers beside hover and zoom: one button, which saves it as PNG."""
FORMATS = (".html", ".svg", ".pdf", ".png")


def heatmap(trace: Trace, sites: Sequence[Site] = ()) -> go.Figure:
    """A map of effects: layers x tokens for one request, layers x roles for many; a panel a component.

    Columns are the tokens that were traced and the subject; tokens left out between them show as a
    gap. The subject is bracketed. Sites are outlined where the map has their component and role; a
    site's layer that was not traced lies between its neighbours.
    """
    one = len(trace.prompts) == 1
    shown = _of_tokens(trace) if one else _of_roles(trace)
    panels, columns, rows = len(trace.components), len(shown.labels), len(trace.layers)
    flat = not one and panels * columns <= 14
    cell = 64 if flat else min(30 if one else 38, max(14, 1100 // (panels * columns)))
    width, height = max(170, columns * cell), max(190, rows * min(26, max(12, 420 // rows)))
    across = panels * width + _BETWEEN * (panels - 1)
    figure = make_subplots(cols=panels, shared_yaxes=True, horizontal_spacing=_BETWEEN / across)
    finite = np.abs(shown.effects[np.isfinite(shown.effects)])
    most = float(finite.max(initial=0.0)) or 1.0
    above = 54 if set(trace.components) == {"residual"} or trace.window < 2 else 70
    for c, component in enumerate(trace.components):
        figure.add_trace(_panel(shown, c, most, last=c == panels - 1), row=1, col=c + 1)
        _name_panel(figure, c, component, trace.window, above)
        _bracket_subjects(figure, c, shown, letters=width // 8)
        _frame_gaps(figure, c, shown.roles, rows)
        _outline(figure, c, shown.roles, trace.layers, [s for s in sites if s.component == component])
    angle = 0 if flat else -45 if cell > 20 else -90
    labels = [label.replace(" ", "<br>") if flat else label for label in shown.labels]
    figure.update_xaxes(tickvals=[*range(columns)], ticktext=labels, tickangle=angle)
    figure.update_xaxes(range=[-0.5, columns - 0.5], ticklabeloverflow="allow")
    every = -(-rows // 30)
    named = [str(layer) for layer in trace.layers[::every]]
    figure.update_yaxes(tickvals=[*range(0, rows, every)], ticktext=named, range=[-0.5, rows - 0.5])
    figure.update_yaxes(title_text="layer", col=1)
    aside, below = _room(shown.labels, angle)
    return _theme(
        figure,
        title=_heatmap_title(trace, shown, sites),
        plot=(across, height),
        left=max(62, aside - cell // 2),
        right=108,
        above=above,
        below=below,
    )


def bars(reports: Mapping[str, Report], *, measure: str = "coherent") -> go.Figure:
    """Rates before and after, by arm, with their 95% intervals; facts by whether they are known.

    Args:
        reports: by name; "before" stands once where all reports agree on it.
        measure: the judge that the harmful and harmless arms are read by.

    Raises:
        ValueError: no report, or no such judge.
    """
    if not reports:
        raise ValueError("no report was given; ld.check makes one")
    if measure not in JUDGES:
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
    figure.update_yaxes(title_text=f"share {MEASURE_NAMES[measure]}")
    _name_groups(figure, arms)
    figure.update_layout(
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
        legend={"x": 0, "y": 0.99, "yref": "container", "yanchor": "top"},
    )
    plot = (max(240, 92 * len(arms)), 260)
    return _theme(figure, title="", plot=plot, left=72, right=16, above=40 + 19 * len(series), below=84)


def save_figure(figure: go.Figure, path: str | os.PathLike[str], *, plotlyjs: bool | str = True) -> Path:
    """Write a figure as .html, .svg, .pdf or .png, whole or not at all.

    Args:
        figure: what heatmap or bars gave, or any other Plotly figure.
        path: the file; its suffix is its format.
        plotlyjs: for .html, Plotly's include_plotlyjs: True makes the file self-contained (4.8 MB),
            "directory" shares one plotly.min.js beside the figures.

    Raises:
        ValueError: another suffix; or for all but .html, kaleido or a Chromium is missing.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"a figure is saved as {', '.join(FORMATS)}, got {file.name!r}")
    unfinished = file.with_name(f".{file.name}.unfinished")
    if suffix == ".html":
        figure.write_html(unfinished, include_plotlyjs=plotlyjs, config=dict(CONTROLS))
    else:
        unfinished.write_bytes(_image(figure, suffix[1:]))
    unfinished.replace(file)
    return file


def visible(text: str) -> str:
    """Text with a shape for what has none: newlines, tabs, control and direction characters."""
    return "".join(_shape(character) for character in text)


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """What a heatmap shows: a column a token or a role."""

    labels: tuple[str, ...]
    roles: tuple[Role | None, ...]
    """None is a gap."""
    effects: NDArray[np.float64]
    """component layer column"""
    hover: NDArray[np.object_]
    subjects: tuple[tuple[int, int, str], ...]
    """First column, last column and text of each bracket."""


def _of_tokens(trace: Trace) -> _Map:
    met = trace.prompts[0]
    effects = trace.effects[0].numpy()
    traced = np.flatnonzero(np.isfinite(effects).any((0, 1))).tolist()
    columns: list[int | None] = []
    for position in sorted({*traced, *met.corrupted}):
        if columns and columns[-1] != position - 1:
            columns.append(None)
        columns.append(position)
    at = {position: i for i, position in enumerate(columns) if position is not None}
    values = np.full((*effects.shape[:2], len(columns)), np.nan)
    values[:, :, list(at.values())] = effects[:, :, list(at)]
    hover = np.full(values.shape, "", dtype=object)
    samples = trace.patched.shape[-1]
    for cell in trace.to_dataframe().to_dict("records"):
        c, j = trace.components.index(cell["component"]), trace.layers.index(cell["layer"])
        where = f"<b>{_label(cell['word'], cell['role'], 40)}</b><br>position {cell['position']}"
        hover[c, j, at[cell["position"]]] = f"{where}<br>{_about(cell, samples, 'noise draws')}"
    return _Map(
        labels=tuple("⋯" if t is None else _label(met.words[t], met.roles[t], 12) for t in columns),
        roles=tuple(None if t is None else met.roles[t] for t in columns),
        effects=values,
        hover=hover,
        subjects=tuple((at[a], at[b - 1], met.request.subject or "") for a, b in met.subjects),
    )


def _of_roles(trace: Trace) -> _Map:
    means = trace.by_role().to_dict("records")
    roles: list[Role] = [role for role in READING_ORDER if any(mean["role"] == role for mean in means)]
    values = np.full((len(trace.components), len(trace.layers), len(roles)), np.nan)
    hover = np.full(values.shape, "", dtype=object)
    for mean in means:
        cell = trace.components.index(mean["component"]), trace.layers.index(mean["layer"])
        values[*cell, roles.index(mean["role"])] = mean["effect"]
        hover[*cell, roles.index(mean["role"])] = _about(mean, mean["n"], "requests")
    subject = [i for i, role in enumerate(roles) if role.startswith("subject")]
    names = {met.request.subject or "" for met in trace.prompts}
    name = names.pop() if len(names) == 1 else "subject"
    return _Map(
        labels=tuple(ROLE_WORDS[role] for role in roles),
        roles=tuple(roles),
        effects=values,
        hover=hover,
        subjects=((subject[0], subject[-1], name),) if subject else (),
    )


def _about(cell: Mapping[Hashable, Any], n: int, things: str) -> str:
    """The lines of a hover that tokens and roles share."""
    interval = "95% interval" if n >= LEAST_FOR_BOOTSTRAP else "range"
    lines = [
        f"{ROLE_WORDS[cell['role']]}, layer {cell['layer']}, {COMPONENT_WORDS[cell['component']]}",
        f"effect <b>{cell['effect']:.3f}</b>",
        f"{interval} {cell['low']:.3f} to {cell['high']:.3f}, {n} {things}",
    ]
    return "<br>".join(lines if n > 1 else lines[:2])


def _panel(shown: _Map, c: int, most: float, *, last: bool) -> go.Heatmap:
    return go.Heatmap(
        x=[*range(len(shown.labels))],
        y=[*range(shown.effects.shape[1])],
        z=shown.effects[c],
        hovertext=shown.hover[c],
        hoverinfo="text",
        hoverongaps=False,
        colorscale=list(SCALE),
        zmid=0,
        zmin=-most,
        zmax=most,
        showscale=last,
        colorbar={
            "title": {
                "text": "effect<br>share of the answer restored",
                "side": "right",
                "font": {"size": FONT},
            },
            "thickness": 12,
            "outlinewidth": 0,
            "ypad": 0,
        },
    )


def _name_panel(figure: go.Figure, c: int, component: Component, window: int, above: int) -> None:
    wide = "" if component == "residual" or window < 2 else f"<br>windows of {window} layers"
    figure.add_annotation(
        text=f"<b>{COMPONENT_WORDS[component]}</b>{wide}",
        x=0,
        y=1,
        xref=f"{_axis('x', c)} domain",
        yref=f"{_axis('y', c)} domain",
        xanchor="left",
        yanchor="top",
        yshift=above,
        align="left",
        showarrow=False,
    )


def _bracket_subjects(figure: go.Figure, c: int, shown: _Map, *, letters: int) -> None:
    pixels = {"yref": f"{_axis('y', c)} domain", "ysizemode": "pixel", "yanchor": 1}
    for first, last, text in shown.subjects:
        left, right = first - 0.42, last + 0.42
        for a, b, low, high in ((left, right, 8.0, 8.0), (left, left, 3.0, 8.0), (right, right, 3.0, 8.0)):
            _draw(figure, c, "subject", (a, b, low, high), width=1.5, colour=INK, type="line", **pixels)
        figure.add_annotation(
            text=_plain(_cut(text, letters)),
            x=(first + last) / 2,
            y=1,
            xref=_axis("x", c),
            yref=pixels["yref"],
            yanchor="bottom",
            yshift=9,
            showarrow=False,
        )


def _frame_gaps(figure: go.Figure, c: int, roles: Sequence[Role | None], rows: int) -> None:
    for i in (i for i, role in enumerate(roles) if role is None):
        box = (i - 0.5, i + 0.5, -0.5, rows - 0.5)
        _draw(figure, c, "gap", box, width=1.0, colour="#bbbbbb", fillcolor="#ffffff")


def _outline(
    figure: go.Figure, c: int, roles: Sequence[Role | None], layers: Sequence[int], sites: Sequence[Site]
) -> None:
    """A white and a dark line around each block of cells, a little inside so that no edge is cut."""
    for role in dict.fromkeys(site.role for site in sites):
        columns = _merged((i - 0.5, i + 0.5) for i, each in enumerate(roles) if each == role)
        rows = _merged(_extent(site.layer, layers) for site in sites if site.role == role)
        for (x0, x1), (y0, y1) in itertools.product(columns, rows):
            box = (x0 + 0.05, x1 - 0.05, y0 + 0.05, y1 - 0.05)
            _draw(figure, c, "site", box, width=5.0, colour="#ffffff")
            _draw(figure, c, "site", box, width=2.5, colour="#111111")


def _draw(
    figure: go.Figure,
    c: int,
    name: str,
    box: tuple[float, float, float, float],
    *,
    width: float,
    colour: str,
    **more: Any,
) -> None:
    """A shape over panel c; its box is x0, x1, y0, y1."""
    edges = dict(zip(("x0", "x1", "y0", "y1"), box, strict=True))
    where = {"type": "rect", "xref": _axis("x", c), "yref": _axis("y", c), **edges}
    figure.add_shape(name=name, line={"color": colour, "width": width}, **(where | more))


def _extent(layer: int, layers: Sequence[int]) -> tuple[float, float]:
    """From where to where a layer lies on the axis: its own cell, or its share of the way between two."""
    if layer in layers:
        return layers.index(layer) - 0.5, layers.index(layer) + 0.5
    below, above = (layers[1] - layers[0], layers[-1] - layers[-2]) if len(layers) > 1 else (1, 1)
    known = [layers[0] - below / 2, *layers, layers[-1] + above / 2]
    places = [-0.5, *range(len(layers)), len(layers) - 0.5]
    low, high = np.interp([layer - 0.5, layer + 0.5], known, places).tolist()
    return low, high


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that touch or overlap, as one."""
    out: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if out and low <= out[-1][1] + 1e-9:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return out


def _heatmap_title(trace: Trace, shown: _Map, sites: Sequence[Site]) -> str:
    answer = f" “{trace.answers[0]}”" if len(trace.prompts) == 1 else ""
    many = "" if answer else f", mean over {len(trace.prompts)} requests"
    notes = ["outlined: the sites"] if sites else []
    blank = np.isnan(shown.effects).all((0, 1)) & np.array([role is not None for role in shown.roles])
    notes += ["grey: not traced"] if blank.any() else []
    what = f"what one restored state brings back of the answer{answer}{many}"
    return "\n".join((f"{trace.model}: {what}", "; ".join(notes))).strip()


def _room(labels: Sequence[str], angle: int) -> tuple[int, int]:
    """Pixels that tick labels need beside and below the plot."""
    longest = max(len(html.unescape(label)) for label in labels)
    if angle == 0:
        return 0, 74
    return (0, 20 + 8 * longest) if angle == -90 else (10 + round(5.4 * longest), 24 + round(5.4 * longest))


def _axis(letter: str, c: int) -> str:
    return letter if c == 0 else f"{letter}{c + 1}"


def _series(reports: Mapping[str, Report], measure: str) -> dict[str, dict[str, dict[str, float]]]:
    """What is drawn side by side: for each name and arm the rate, its interval, n and p."""
    series: dict[str, dict[str, dict[str, float]]] = {}
    for name, report in reports.items():
        read = {arm: own for own, arms in MEASURES.items() for arm in arms}
        rows = [
            row
            for row in report.rates().to_dict("records")
            if row["measure"] == read.get(row["arm"], measure)
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
        f"<b>{_plain(name)}</b><br>{ARM_NAMES[arms[i]]}<br>{one['rate']:.1%} of {one['n']} rows, "
        f"{one['clusters']} subjects<br>95% interval {one['low']:.1%} to {one['high']:.1%}"
        for i, one in own
    ]
    return go.Bar(
        name=_plain(name),
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


def _name_groups(figure: go.Figure, arms: Sequence[Arm]) -> None:
    """What is asked stands over the bars, a thin line between the kinds."""
    kinds = ["harmful" if arm in HARMFUL_ARMS else "facts" if arm == "facts" else "harmless" for arm in arms]
    for kind in dict.fromkeys(kinds):
        own = [i for i, each in enumerate(kinds) if each == kind]
        text = "facts: known" if kind == "facts" else f"{kind} requests"
        middle = (own[0] + own[-1]) / 2
        figure.add_annotation(
            text=f"<b>{text}</b>", x=middle, y=1, yref="paper", yanchor="bottom", showarrow=False
        )
        if own[0]:
            figure.add_vline(x=own[0] - 0.5, line={"color": "#bbbbbb", "width": 1})


def _theme(
    figure: go.Figure, *, title: str, plot: tuple[int, int], left: int, right: int, above: int, below: int
) -> go.Figure:
    """White ground, sans font, a size that leaves every label its room; no template is used.

    The title's lines are wrapped to the width and make the figure higher.
    """
    width = left + plot[0] + right
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, round((width - 56) / 7.4))]
    top = above + 19 * len(lines) + (8 if lines else 0)
    height = top + plot[1] + below
    figure.update_layout(
        template="none",
        width=width,
        height=height,
        margin={"l": left, "r": right, "t": top, "b": below},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        font={"family": "Helvetica, Arial, sans-serif", "size": FONT, "color": INK},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": GREY, "align": "left", "font": {"color": INK}},
    )
    if lines:
        figure.update_layout(
            title={
                "text": "<br>".join(map(_plain, lines)),
                "x": 12 / width,
                "xanchor": "left",
                "y": 1 - 16 / height,
                "yanchor": "top",
                "font": {"size": FONT},
            }
        )
    figure.update_xaxes(automargin=True, zeroline=False, ticks="", linecolor="#444444")
    figure.update_yaxes(
        automargin=True, zeroline=False, ticks="", title={"standoff": 8, "font": {"size": FONT}}
    )
    if any(isinstance(part, go.Heatmap) for part in figure.data):
        figure.update_layout(plot_bgcolor=UNTRACED)
        figure.update_xaxes(showgrid=False, showline=True, mirror=True, linecolor="#999999")
        figure.update_yaxes(showgrid=False, showline=True, mirror=True, linecolor="#999999")
    return figure


def _image(figure: go.Figure, suffix: str) -> bytes:
    needs = (
        f"a figure as .{suffix} needs kaleido (pip install 'lens-defense[figures]') and a Chromium "
        "(Debian: apt-get install chromium); .html needs neither"
    )
    if find_spec("kaleido") is None:
        raise ValueError(needs)
    from kaleido.errors import ChromeNotFoundError

    try:
        return figure.to_image(format=suffix, scale=3 if suffix == "png" else 1)
    except RuntimeError as error:
        if isinstance(error.__context__, ChromeNotFoundError):
            raise ValueError(needs) from error
        raise


def _label(word: str, role: str, letters: int) -> str:
    """A token as it is read on an axis: spaces visible, a template's own tokens in short."""
    own = re.fullmatch(r"<[|\uff5c](.+?)[|\uff5c]>", word)
    own = own or (re.fullmatch(r"<(\w+)>", word) if role in ("template", "last") else None)
    if own:
        return f"\u2039{_plain(_cut(own[1], 8))}\u203a"
    shown = "".join("·" if unicodedata.category(letter) == "Zs" else letter for letter in word)
    return _plain(_cut(visible(shown), letters)) or "∅"


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _plain(text: str) -> str:
    """Text that Plotly's markup and TeX leave as it is; Plotly knows no &quot;."""
    return html.escape(visible(text), quote=False).replace("$", "&#36;")


def _shape(character: str) -> str:
    if character in _SHAPES:
        return _SHAPES[character]
    unseen = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _UNSEEN
    return "\N{REPLACEMENT CHARACTER}" if unseen else character


_SHAPES = {"\n": "↵", "\t": "⇥"}
_UNSEEN = {0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
"""Characters that have no width, or turn the text after them round (Unicode's Bidi_Control)."""
