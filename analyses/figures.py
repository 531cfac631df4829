"""The paper figures, rebuilt from the committed results of the analyses, and the organism's map.

    python analyses/figures.py        (or: make figures)

Each as .svg and .pdf at column width, .html to hover (not committed), and a .json that says what it was made of.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tables
import torch
from plotly.subplots import make_subplots

import lens_defense as ld
from lens_defense.app.demo import ORGANISM_SETUP
from lens_defense.checking.report import Report, ReportRow
from lens_defense.models.load import ORGANISM_FOLDER
from lens_defense.organism.request_set import contexts
from lens_defense.plotting.rate_bars import rate_bars
from lens_defense.plotting.theme import COLOURS, GREY, INK, save_figure, theme

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"
GRADES = HERE / "results/locator_grades"
SPEED, SITES = HERE / "results/tracing_speed", HERE / "results/storage_sites"
SPEED_MODELS = {
    "cpu": {"gpt2 small": "gpt2", "llama-shaped, 12 layers": "llama-shaped", "organism": "organism"},
    "cuda": {
        "gpt2 small": "gpt2",
        "llama-shaped, 12 layers": "llama-shaped",
        "llama-shaped, 7 billion, bfloat16": "7 billion",
    },
}
"""Rows of a figure of speed: the models timed on a device, and their short names."""
DOSES = "python analyses/real_model.py --data DIR"
COLUMN = 3.3
"""Inches; what is wide takes two."""
LEAST_DOSES = 3
"""Fewer make no curve."""


def dose_curve() -> go.Figure:
    """Success above, price below, against the number of subjects: means, and each edit beside them."""
    told = tables.summary()
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    series = [
        ("own set", "core", 1, "unseen words, coherent", COLOURS[0], "solid"),
        ("DELMAN's set", "delman", 1, "unseen words, coherent", COLOURS[1], "solid"),
        ("benign, own set", "core", 2, "benign, newly refused", COLOURS[0], "solid"),
        ("benign, DELMAN's", "delman", 2, "benign, newly refused", COLOURS[1], "solid"),
        ("XSTest safe, own set", "core", 2, "XSTest safe, newly refused", COLOURS[0], "dot"),
        ("XSTest safe, DELMAN's", "delman", 2, "XSTest safe, newly refused", COLOURS[1], "dot"),
    ]
    for name, kind, row, column, colour, dash in series:
        some = told[told["set"] == kind]
        mean = some.groupby("subjects")[column].mean()
        line = {"color": colour, "dash": dash, "width": 2}
        legend = "legend" if row == 1 else "legend2"
        where = {"row": row, "col": 1}
        figure.add_scatter(
            x=mean.index, y=mean, mode="lines+markers", name=name, line=line, legend=legend, **where
        )
        figure.add_scatter(
            x=some["subjects"],
            y=some[column],
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.45},
            showlegend=False,
            hoverinfo="skip",
            **where,
        )
    ticks = sorted(set(told["subjects"]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=ticks, tickangle=0, gridcolor="#eeeeee")
    figure.update_xaxes(title_text="subjects edited", row=2)
    figure.update_yaxes(tickformat=".0%", gridcolor="#e3e3e3", rangemode="tozero")
    figure.update_yaxes(title_text="refused, unseen words", range=[0, 1.03], row=1)
    figure.update_yaxes(title_text="newly refused", row=2)
    white = {"bgcolor": "rgba(255,255,255,.8)", "xanchor": "left", "x": 0.02}
    figure.update_layout(
        legend={**white, "y": 0.58, "yanchor": "bottom"}, legend2={**white, "y": 0.44, "yanchor": "top"}
    )
    return theme(figure, title="", plot=(340, 420), left=72, right=16, above=14, below=56)


def window_sweep() -> go.Figure:
    """What the trace saw and what an edit did, window by window."""
    told = tables.windows().query("role == 'subject_last'")
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.06)
    for row, (column, title) in enumerate(
        {"effect": "trace: effect", "coherent": "edit: refusals", "KL": "edit: KL"}.items(), 1
    ):
        figure.add_scatter(
            x=told["first layer"] + tables.WIDTH // 2,
            y=told[column],
            mode="lines+markers",
            line={"color": GREY if row == 1 else COLOURS[row - 2], "width": 2},
            name=title,
            showlegend=False,
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=title, row=row)
    figure.update_yaxes(gridcolor="#e3e3e3", rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05], row=2)
    figure.update_xaxes(gridcolor="#eeeeee", tickvals=[*range(2, 28, 5)])
    figure.update_xaxes(title_text="middle of the five layers edited", row=3)
    if tables.results("core"):
        middle = tables.located() + tables.WIDTH // 2
        figure.add_vline(x=middle, line={"color": INK, "width": 1, "dash": "dot"})
        figure.add_annotation(
            text="located", x=middle, y=1, yref="paper", yanchor="bottom", xanchor="center", showarrow=False
        )
    return theme(figure, title="", plot=(330, 400), left=78, right=16, above=28, below=56)


def before_after() -> go.Figure:
    """The edits of sixteen subjects, three draws together."""
    names = list(tables.results("core 16"))
    rows = [
        ReportRow(
            arm=row["arm"],
            id=row["id"],
            cluster=row["id"],
            family=str(row["family"]),
            before="",
            after="",
            verdicts_before=_verdicts(row, "before"),
            verdicts_after=_verdicts(row, "after"),
        )
        for name in names
        for row in tables.rows_of(name).query("suite == 'real_model' and not human").to_dict("records")
    ]
    report = Report("16 subjects", "core", "check", tuple(rows), (), (), (), (), 0)
    return rate_bars({"16 subjects edited": report})


def _verdicts(row: dict[str, Any], when: str) -> dict[str, str]:
    if row["arm"] == "facts":
        return {"knows": "yes" if row[f"knows {when}"] else "no"}
    return {m: "refusal" if row[f"{m} {when}"] else "answer" for m in ("prefix", "coherent")}


def maps(trace: ld.Trace, sites: Sequence[ld.Site] = ()) -> Iterable[tuple[str, go.Figure]]:
    """One map a component; of one request from its subject on, since nothing before it was spoiled.

    Outlined is what was edited, where that is given, else what `locate` takes from this map.
    """
    sites = sites or ld.locate(trace)
    if len(trace.prompts) == 1:
        patched = trace.patched.clone()
        patched[:, :, :, : min(trace.prompts[0].subject_positions)] = torch.nan
        trace = replace(trace, patched=patched)
    for component in trace.components:
        yield component, ld.heatmap(trace.only(component), sites)


def edited_sites() -> list[ld.Site]:
    """Where the edits of the dose curve were made."""
    names = [
        site.split(" (")[0].split() for piece in tables.results("core").values() for site in piece["sites"]
    ]
    return [
        ld.Site(component, int(layer), role) for component, layer, _, role in dict.fromkeys(map(tuple, names))
    ]


def organism_map() -> go.Figure:
    """The map of the model whose sites are known, traced here: it takes seconds."""
    asked = [contexts(item)[0] for item in ld.requests("organism")[:12]]
    roles = ("subject_first", "subject_mid", "subject_last", "next", "last")
    model = ld.load("organism")
    spoiled = ORGANISM_SETUP.corruption()
    trace = ld.trace(model, asked, layers="all", positions=roles, corruption=spoiled, progress=False)
    return ld.heatmap(trace, ld.locate(trace))


def grades(files: Iterable[Path]) -> go.Figure:
    """How much a cell that holds nothing shows, by the way to trace: residual stream, a symbol a world."""
    told = pd.concat([pd.read_csv(file).assign(world=file.stem) for file in files])
    told = told[(told["component"] == "resid_post") & told["area"].notna() & (told["direction"] != "none")]
    words = {True: "", False: ", by gradient"}
    told = told.assign(
        way=[
            f"{row.corruption}{', noising' if row.direction == 'noising' else ''}{words[bool(row.exact)]}"
            for row in told.itertuples()
        ]
    )
    order = told.groupby("way")["strongest wrong"].mean().sort_values(ascending=False).index.tolist()
    figure = go.Figure()
    symbols = dict(zip(told["world"].unique(), ("circle", "diamond-open"), strict=False))

    for samples, colour in zip((1, 3, 10), COLOURS, strict=False):
        for world, symbol in symbols.items():
            some = told[(told["samples"] == samples) & (told["world"] == world)]
            figure.add_scatter(
                x=some["strongest wrong"],
                y=[order.index(way) for way in some["way"]],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.8},
                name=f"{samples} samples" if samples > 1 else "1 sample",
                showlegend=symbol == "circle",
            )
    for world, symbol in symbols.items():  # what a symbol means, beside what a colour means
        grey = {"color": "#777777", "symbol": symbol, "size": 7}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=grey, name=world)
    figure.update_yaxes(tickvals=[*range(len(order))], ticktext=order, gridcolor="#eeeeee")
    powers = {
        "type": "log",
        "tickvals": [1e-4, 1e-3, 1e-2, 1e-1, 1],
        "ticktext": ["10⁻⁴", ".001", ".01", ".1", "1"],
    }
    figure.update_xaxes(title_text="largest effect of an empty cell", **powers)
    figure.update_layout(legend={"x": 0, "y": 1.02, "yanchor": "bottom", "orientation": "h"})
    return theme(figure, title="", plot=(225, 24 * len(order)), left=190, right=16, above=54, below=64)


# how it is saved
def keep(
    name: str,
    figure: go.Figure,
    sources: Iterable[Path],
    made: str = DOSES,
    *,
    inches: float = COLUMN,
    seeds: str = "0, 1, 2 (draws)",
) -> None:
    """All formats, and the sidecar, which says what made the data."""
    for suffix in ("svg", "pdf"):
        save_figure(figure, FIGURES / f"{name}.{suffix}", inches=inches)
    save_figure(figure, FIGURES / f"{name}.html", plotlyjs="directory")
    parts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(sources)}
    told = {
        "command": "python analyses/figures.py",
        "data by": made,
        "seeds": seeds,
        "data": parts,
        "versions": {name: version(name) for name in ("lens-defense", "torch", "transformer-lens", "plotly")},
    }
    (FIGURES / f"{name}.json").write_text(json.dumps(told, indent=1), "utf-8")
    print(f"figures/{name}")


def tracing_speed(device: str) -> go.Figure:
    """Seconds a map of the three ways and their floors, by the prompt's length; one sample and ten."""
    names = SPEED_MODELS[device]
    told = pd.read_csv(SPEED / f"{device}.csv")
    told = told[told["model"].isin(names)]
    figure = make_subplots(
        rows=len(names), cols=2, shared_xaxes=True, vertical_spacing=0.09,
        subplot_titles=[f"{name}, {n}" for name in names.values() for n in ("1 sample", "10 samples")],
    )  # fmt: skip
    for (name, samples, way), some in told.groupby(["model", "samples", "way"], sort=False):
        colour = COLOURS[["sweep", "ROME's loop", "TransformerLens"].index(way)]
        row, col = list(names).index(name) + 1, 1 + (samples > 1)
        for column, dash in (("seconds", "solid"), ("floor", "dot")):
            figure.add_scatter(
                x=some["tokens"],
                y=some[column],
                mode="lines+markers" if dash == "solid" else "lines",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 5},
                name=way if dash == "solid" else f"{way}, floor",
                showlegend=row == col == 1,
                row=row,
                col=col,
            )
    figure.update_xaxes(type="log", tickvals=[10, 20, 40, 60], ticktext=["10", "20", "40", "60"])
    figure.update_yaxes(type="log", gridcolor="#e3e3e3", dtick=1)
    figure.update_yaxes(title_text="seconds", col=1)
    figure.update_xaxes(title_text="prompt tokens", row=len(names))
    figure.update_annotations(font_size=11)
    figure.update_layout(legend={"x": 0, "y": -0.16, "yanchor": "top", "orientation": "h"})
    return theme(figure, title="", plot=(330, 480), left=62, right=16, above=30, below=140)


def main() -> None:
    """Draw everything that there are results for; the rest may still be missing."""
    FIGURES.mkdir(exist_ok=True)
    made = {"dose": tables.summary} if tables.results("core") else {}
    if tables.results("core 16"):
        keep("before_after", before_after(), tables.RESULTS.glob("core-16*"), inches=2 * COLUMN)
        made |= {"forms": tables.by_form, "bars": partial(tables.bars_of, 16)}
    if len({piece["n"] for piece in tables.results("core").values()}) >= LEAST_DOSES:
        keep("dose_curve", dose_curve(), [*tables.RESULTS.glob("core-*"), *tables.RESULTS.glob("delman-*")])
    if tables.results("window") and tables.results("map"):
        keep(
            "window_sweep",
            window_sweep(),
            [*tables.RESULTS.glob("window-*.json"), tables.RESULTS / "map.json"],
        )
        made |= {"windows": tables.windows, "located": tables.locations}
        if tables.results("core"):
            made["correlations"] = tables.correlations
    for name, table in made.items():
        table().round(4).to_csv(tables.RESULTS.parent / f"real_model_{name}.csv", index=False)
    for name, file, command in (
        ("map_mean", tables.RESULTS / "map.safetensors", DOSES),
        ("map_single", tables.RESULTS / "one-map.safetensors", DOSES),
        ("map_facts", SITES / "facts.safetensors", "python analyses/storage_sites.py --data DIR"),
        ("map_harmful", SITES / "roles.safetensors", "python analyses/storage_sites.py --data DIR"),
        ("map_whole", SITES / "whole.safetensors", "python analyses/storage_sites.py --data DIR"),
    ):
        if file.is_file():
            trace = ld.Trace.load(file)
            for component, figure in maps(trace, edited_sites() if name == "map_mean" else ()):
                wide = 2 if name in ("map_single", "map_whole") else 1  # many columns
                inches = wide * COLUMN
                keep(f"{name}_{component}", figure, [file], command, inches=inches, seeds=trace.corruption)
    for device in SPEED_MODELS:
        file = SPEED / f"{device}.csv"
        if file.is_file():
            name = "tracing_speed" + ("" if device == "cpu" else f"_{device}")
            command = f"python analyses/tracing_speed.py --device {device}"
            keep(name, tracing_speed(device), [file], command, seeds="0")
    if worlds := sorted(GRADES.glob("world-*.csv")):
        keep("locator_grades", grades(worlds), worlds, "python analyses/locator_grades.py", seeds="0, 1, 2")
    weights = [ORGANISM_FOLDER / "model.safetensors"]
    keep("organism_map", organism_map(), weights, "python analyses/organism.py", seeds="0 (noise)")


if __name__ == "__main__":
    main()
