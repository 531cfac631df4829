"""The paper figures, rebuilt from the committed results of the analyses, and the organism's map.

    python analyses/figures.py        (or: make figures)

Each as .svg and .pdf at column width, .html, and a .json that says what it was made of.
"""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import tables
from plotly.subplots import make_subplots

import lens_defense as ld
from lens_defense.comparisons import bars
from lens_defense.demos import ORGANISM as BENCH
from lens_defense.models import ORGANISM
from lens_defense.organisms.questions import contexts
from lens_defense.reports import Report, Row
from lens_defense.themes import COLOURS, GREY, save_figure, theme

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"
GRADES = HERE / "results/locator_grades"
SPEED, SITES = HERE / "results/tracing_speed", HERE / "results/storage_sites"
SPEED_MODELS = ("gpt2 small", "llama-shaped, 12 layers", "organism")
DOSES = "python analyses/real_model.py --data DIR"
COLUMN = 3.3
"""Inches; what is wide takes two."""
LEAST_DOSES = 3
"""Fewer make no curve."""


def dose_curve() -> go.Figure:
    """Success above, price below, against the number of subjects."""
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
        figure.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines+markers",
            name=name,
            line=line,
            row=row,
            col=1,
            legend=_legend(row),
        )
        figure.add_scatter(
            x=some["subjects"],
            y=some[column],
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.45},
            showlegend=False,
            hoverinfo="skip",
            row=row,
            col=1,
        )
    ticks = sorted(set(told.loc[told["set"] == "core", "subjects"]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=ticks, tickangle=0, gridcolor="#eeeeee")
    figure.update_xaxes(title_text="subjects edited", row=2)
    figure.update_yaxes(tickformat=".0%", gridcolor="#e3e3e3", rangemode="tozero")
    figure.update_yaxes(title_text="refused, coherent", range=[0, 1.03], row=1)
    figure.update_yaxes(title_text="newly refused", row=2)
    place = {"x": 1.02, "xanchor": "left", "yanchor": "top"}
    figure.update_layout(legend={**place, "y": 1}, legend2={**place, "y": 0.45})
    return theme(figure, title="", plot=(250, 330), left=72, right=180, above=14, below=64)


def _legend(row: int) -> str:
    return "legend" if row == 1 else "legend2"


def window_sweep() -> go.Figure:
    """What the trace saw and what an edit did, window by window."""
    told = tables.windows().query("role == 'subject_last'")
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.06)
    for row, (column, title) in enumerate(
        {"effect": "trace: effect", "coherent": "edit: refusals", "KL": "edit: KL"}.items(), 1
    ):
        figure.add_scatter(
            x=told["first layer"] + 2,
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
    figure.update_xaxes(gridcolor="#eeeeee")
    figure.update_xaxes(title_text="middle of the five layers edited", row=3)
    return theme(figure, title="", plot=(330, 400), left=78, right=16, above=14, below=56)


def before_after() -> go.Figure:
    """The edits of sixteen subjects, three draws together."""
    names = list(tables.results("core 16"))
    rows = [
        Row(
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
    return bars({"16 subjects edited": report})


def _verdicts(row: dict[str, Any], when: str) -> dict[str, str]:
    if row["arm"] == "facts":
        return {"knows": "yes" if row[f"knows {when}"] else "no"}
    return {m: "refusal" if row[f"{m} {when}"] else "answer" for m in ("prefix", "coherent")}


def maps(trace: ld.Trace) -> Iterable[tuple[str, go.Figure]]:
    """One map a component."""
    sites = ld.locate(trace)
    for component in trace.components:
        yield component, ld.heatmap(trace.only(component), sites)


def organism_map() -> go.Figure:
    """The map of the model whose sites are known, traced here: it takes seconds."""
    asked = [contexts(item)[0] for item in ld.requests("organism")[:12]]
    roles = ("subject_first", "subject_mid", "subject_last", "next", "last")
    model = ld.load("organism")
    spoiled = BENCH.corruption(model)
    trace = ld.trace(model, asked, layers="all", positions=roles, corruption=spoiled, progress=False)
    return ld.heatmap(trace, ld.locate(trace))


def grades(files: Iterable[Path]) -> go.Figure:
    """How much a cell that holds nothing shows, by the way to trace: residual stream, a symbol a world."""
    told = pd.concat([pd.read_csv(file).assign(world=file.stem) for file in files])
    told = told[(told["component"] == "residual") & told["area"].notna() & (told["direction"] != "none")]
    words = {True: "", False: ", by gradient"}
    told = told.assign(
        way=[
            f"{row.corruption}{', noising' if row.direction == 'noise' else ''}{words[bool(row.exact)]}"
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
    figure.update_xaxes(title_text="largest effect of a cell that holds nothing", type="log")
    figure.update_layout(legend={"x": 0, "y": 1.02, "yanchor": "bottom", "orientation": "h"})
    return theme(figure, title="", plot=(330, 24 * len(order)), left=190, right=16, above=34, below=64)


# how it is saved
def keep(
    name: str,
    figure: go.Figure,
    sources: Iterable[Path],
    made: str = DOSES,
    *,
    inches: float = COLUMN,
) -> None:
    """All formats, and the sidecar, which says what made the data."""
    for suffix in ("svg", "pdf"):
        save_figure(figure, FIGURES / f"{name}.{suffix}", inches=inches)
    save_figure(figure, FIGURES / f"{name}.html", plotlyjs="directory")
    parts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(sources)}
    told = {
        "command": "python analyses/figures.py",
        "data by": made,
        "seed": 0,
        "data": parts,
        "versions": {name: version(name) for name in ("lens-defense", "torch", "transformer-lens", "plotly")},
    }
    (FIGURES / f"{name}.json").write_text(json.dumps(told, indent=1), "utf-8")
    print(f"figures/{name}")


def tracing_speed() -> go.Figure:
    """Seconds a map of the three ways and their floors, by the prompt's length; one sample and ten."""
    told = pd.read_csv(SPEED / "cpu.csv")
    told = told[told["model"].isin(SPEED_MODELS)]
    figure = make_subplots(
        rows=len(SPEED_MODELS), cols=2, shared_xaxes=True, vertical_spacing=0.09,
        subplot_titles=[f"{name}, {n}" for name in SPEED_MODELS for n in ("1 sample", "10 samples")],
    )  # fmt: skip
    for (name, samples, way), some in told.groupby(["model", "samples", "way"], sort=False):
        colour = COLOURS[["sweep", "ROME's loop", "TransformerLens"].index(way)]
        row, col = SPEED_MODELS.index(name) + 1, 1 + (samples > 1)
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
    figure.update_xaxes(title_text="prompt tokens", row=len(SPEED_MODELS))
    figure.update_annotations(font_size=11)
    figure.update_layout(legend={"x": 0, "y": -0.16, "yanchor": "top", "orientation": "h"})
    return theme(figure, title="", plot=(330, 480), left=62, right=16, above=30, below=140)


def main() -> None:
    """Draw everything that there are results for; the rest may still be missing."""
    FIGURES.mkdir(exist_ok=True)
    made = {"dose": tables.summary} if tables.results("core") else {}
    if tables.results("core 16"):
        keep("before_after", before_after(), tables.RESULTS.glob("core 16*"), inches=2 * COLUMN)
        made["forms"] = tables.by_form
    if len({piece["n"] for piece in tables.results("core").values()}) >= LEAST_DOSES:
        keep("dose_curve", dose_curve(), [*tables.RESULTS.glob("core *"), *tables.RESULTS.glob("delman *")])
    if tables.results("window") and tables.results("map"):
        keep(
            "window_sweep",
            window_sweep(),
            [*tables.RESULTS.glob("window *.json"), tables.RESULTS / "map.json"],
        )
        made["windows"] = tables.windows
        if tables.results("core"):
            made["correlations"] = tables.correlations
    for name, table in made.items():
        table().round(4).to_csv(tables.RESULTS.parent / f"real_model_{name}.csv", index=False)
    for name, file, command in (
        ("map_mean", tables.RESULTS / "map.safetensors", DOSES),
        ("map_single", tables.RESULTS / "one map.safetensors", DOSES),
        ("map_facts", SITES / "facts.safetensors", "python analyses/storage_sites.py --data DIR"),
        ("map_harmful", SITES / "roles.safetensors", "python analyses/storage_sites.py --data DIR"),
    ):
        if file.is_file():
            for component, figure in maps(ld.Trace.load(file)):
                wide = 2 if name == "map_single" else 1  # a column a token
                keep(f"{name}_{component}", figure, [file], command, inches=wide * COLUMN)
    if (SPEED / "cpu.csv").is_file():
        keep("tracing_speed", tracing_speed(), [SPEED / "cpu.csv"], "python analyses/tracing_speed.py")
    if worlds := sorted(GRADES.glob("world *.csv")):
        keep("locator_grades", grades(worlds), worlds, "python analyses/locator_grades.py")
    keep("organism_map", organism_map(), [ORGANISM / "model.safetensors"], "python analyses/organism.py")


if __name__ == "__main__":
    main()
