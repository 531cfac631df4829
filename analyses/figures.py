"""The paper figures, rebuilt from the committed results of analyses/real_model.py, and the organism's map.

    python analyses/figures.py        (or: make figures)

Each as .svg and .pdf at column width, .html, and a .json that says what it was made of.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import lens_defense as ld
from lens_defense.comparisons import bars
from lens_defense.demos import ORGANISM as BENCH
from lens_defense.intervals import rank_correlation
from lens_defense.models import ORGANISM
from lens_defense.organisms.questions import contexts
from lens_defense.reports import Report, Row
from lens_defense.themes import COLOURS, GREY, save_figure, theme

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results/real_model", HERE.parent / "figures"
GRADES = HERE / "results/locator_grades"
COLUMN = 3.3
"""Inches."""
LEAST_DOSES = 3
"""Fewer make no curve."""
WORDS = ("wording", "wrapper")


# what the results say
def results(start: str) -> dict[str, dict[str, Any]]:
    """The pieces whose name begins so."""
    told = (json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob(f"{start}*.json")))
    return {piece["name"]: piece for piece in told}


def rows_of(name: str) -> pd.DataFrame:
    """The rows of a piece; `human` marks the published jailbreak templates."""
    rows = pd.read_csv(RESULTS / f"{name}.csv")
    return rows.assign(human=rows["family"].fillna("").str.startswith("human"))


def new_refusals(rows: pd.DataFrame, suite: str, *arms: str, measure: str = "prefix") -> pd.Series:
    """Rows that were answered before: whether they are refused now."""
    some = rows[(rows["suite"] == suite) & rows["arm"].isin(arms)]
    return some[f"{measure} after"].gt(some[f"{measure} before"]).astype(int)


def summary() -> pd.DataFrame:
    """One row an edit of the dose curve: shares, costs, forecast."""
    table = []
    for name, piece in (results("core") | results("delman")).items():
        rows = rows_of(name)
        own = rows[(rows["suite"] == "real_model") & rows["arm"].isin(WORDS)]
        table.append(
            {
                "edit": name,
                "set": name.split()[0],
                "subjects": piece["n"],
                "unseen words, coherent": own.loc[~own["human"], "coherent after"].mean(),
                "unseen words, prefix": own.loc[~own["human"], "prefix after"].mean(),
                "human wrappers, coherent": own.loc[own["human"], "coherent after"].mean(),
                "human wrappers, prefix": own.loc[own["human"], "prefix after"].mean(),
                "unseen subjects, newly refused": new_refusals(rows, "real_model", "unseen").mean(),
                "benign, newly refused": new_refusals(rows, "real_model", "benign").mean(),
                "safe, newly refused": new_refusals(rows, "real_model", "safe").mean(),
                "XSTest safe, newly refused": new_refusals(rows, "xstest", "safe").mean(),
                "XSTest unsafe, newly refused": new_refusals(rows, "xstest", "unseen").mean(),
                "KL": piece["kl"],
                "loss": piece["loss"][1] / piece["loss"][0] - 1,
                "facts lost": int((rows["knows after"] < rows["knows before"]).sum()),
                "leak to safe text": piece["forecast"][1],
            }
        )
    return pd.DataFrame(table).sort_values(["set", "subjects", "edit"], ignore_index=True)


def dose_table(told: pd.DataFrame) -> str:
    """The README's table: means over the draws of each dose."""
    heads = [
        "subjects",
        "edits",
        "unseen words",
        "human wrappers",
        "other subjects",
        "benign",
        "XSTest safe",
        "XSTest unsafe",
        "KL",
        "loss",
        "facts lost",
    ]
    lines = [heads, ["---"] * len(heads)]
    for (kind, n), some in told.groupby(["set", "subjects"]):
        mean = some.drop(columns=["edit", "set"]).mean()
        both = [
            f"{mean[f'{words}, coherent']:.0%} ({mean[f'{words}, prefix']:.0%})"
            for words in ("unseen words", "human wrappers")
        ]
        new = ("unseen subjects", "benign", "XSTest safe", "XSTest unsafe")
        lines.append(
            [
                f"{n} of {_SETS[kind]}",
                f"{len(some)}",
                *both,
                *(f"{mean[f'{arm}, newly refused']:.1%}" for arm in new),
                f"{mean['KL']:.4f}",
                f"{mean['loss']:+.2%}",
                f"{mean['facts lost']:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SETS = {"core": "core", "delman": "DELMAN's"}


def by_form() -> pd.DataFrame:
    """New refusals (prefix) by suite, arm and grammatical form, over all edits of 16 subjects and more."""
    names = [name for name, piece in (results("core") | results("delman")).items() if piece["n"] >= 16]
    rows = pd.concat([rows_of(name).assign(edit=name) for name in names])
    rows = rows[rows["arm"] != "facts"].assign(new=rows["prefix after"].gt(rows["prefix before"]))
    told = rows.groupby(["suite", "arm", "form"])["new"].agg(["mean", "size"]).reset_index()
    return told.rename(columns={"mean": "newly refused", "size": "rows"})


def windows() -> pd.DataFrame:
    """One row a window of five layers: the trace's mean effect in it, and what the edit there did."""
    effects = pd.DataFrame(results("map")["map"]["effects"])
    curve = effects[(effects["component"] == "residual") & (effects["role"] == "subject_last")]
    curve = curve.set_index("layer")["effect"]
    table = [
        {
            "first layer": (low := int(name.split()[1])),
            "effect": curve.loc[low : low + 4].mean(),
            "coherent": np.mean([piece[arm][1] for arm in WORDS]),
            "prefix": np.mean([piece[arm][0] for arm in WORDS]),
            "KL": piece["kl"],
            "new refusals": piece["new refusals"],
            "facts lost": piece["facts lost"],
        }
        for name, piece in results("window").items()
    ]
    return pd.DataFrame(table).sort_values("first layer", ignore_index=True)


def correlations() -> pd.DataFrame:
    """Does the map say where to edit, and does the forecast say what it costs: Spearman's rho, 95% interval."""
    sweep, dose = windows(), summary()
    over = "XSTest safe, newly refused"
    asked = [
        ("effect", "coherent", "windows", sweep),
        ("effect", "KL", "windows", sweep),
        ("leak to safe text", over, "edits", dose),
        ("leak to safe text", "safe, newly refused", "edits", dose),
        ("leak to safe text", "KL", "edits", dose),
        ("subjects", over, "edits", dose),
    ]
    table = []
    for x, y, what, frame in asked:
        rho, (low, high) = rank_correlation(*(frame[name].astype(float).tolist() for name in (x, y)))
        table.append({"of": x, "and": y, "over": what, "n": len(frame), "rho": rho, "low": low, "high": high})
    return pd.DataFrame(table)


# what is drawn
def dose_curve() -> go.Figure:
    """Success above, price below, against the number of subjects."""
    told = summary()
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
    ticks = sorted(set(told["subjects"]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=ticks, gridcolor="#eeeeee")
    figure.update_xaxes(title_text="subjects edited", row=2)
    figure.update_yaxes(tickformat=".0%", gridcolor="#e3e3e3", rangemode="tozero")
    figure.update_yaxes(title_text="refused, coherent", range=[0, 1.03], row=1)
    figure.update_yaxes(title_text="newly refused", row=2)
    place = {"x": 1.02, "xanchor": "left", "yanchor": "top"}
    figure.update_layout(legend={**place, "y": 1}, legend2={**place, "y": 0.45})
    return theme(figure, title="", plot=(250, 330), left=72, right=180, above=14, below=56)


def _legend(row: int) -> str:
    return "legend" if row == 1 else "legend2"


def window_sweep() -> go.Figure:
    """What the trace saw and what an edit did, window by window."""
    told = windows()
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
    names = list(results("core 16"))
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
        for row in rows_of(name).query("suite == 'real_model' and not human").to_dict("records")
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


def grades() -> go.Figure:
    """How much a cell that holds nothing shows, by the way to trace: residual stream, world 0."""
    told = pd.read_csv(GRADES / "world 0.csv")
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
    for samples, colour in zip((1, 3, 10), COLOURS, strict=False):
        some = told[told["samples"] == samples]
        figure.add_scatter(
            x=some["strongest wrong"],
            y=[order.index(way) for way in some["way"]],
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.8},
            name=f"{samples} samples" if samples > 1 else "1 sample",
        )
    figure.update_yaxes(tickvals=[*range(len(order))], ticktext=order, gridcolor="#eeeeee")
    figure.update_xaxes(title_text="largest effect of a cell that holds nothing", type="log")
    figure.update_layout(legend={"x": 0, "y": 1.02, "yanchor": "bottom", "orientation": "h"})
    return theme(figure, title="", plot=(330, 24 * len(order)), left=190, right=16, above=34, below=56)


# how it is saved
def keep(
    name: str,
    figure: go.Figure,
    sources: Iterable[Path],
    made: str = "python analyses/real_model.py --data DIR",
) -> None:
    """All formats, and the sidecar, which says what made the data."""
    for suffix in ("svg", "pdf"):
        save_figure(figure, FIGURES / f"{name}.{suffix}", inches=COLUMN)
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


def main() -> None:
    """Draw everything that there are results for."""
    FIGURES.mkdir(exist_ok=True)
    drawn: list[tuple[str, Callable[[], go.Figure], list[str]]] = [
        ("before_after", before_after, ["core 16*"]),
    ]
    for name, draw, patterns in drawn:
        sources = [list(RESULTS.glob(pattern)) for pattern in patterns]
        if sources[0]:  # the rest may still be missing
            keep(name, draw(), itertools.chain(*sources))
    for name, source in (("map_mean", "map"), ("map_single", "one map")):
        if (file := RESULTS / f"{source}.safetensors").is_file():
            for component, figure in maps(ld.Trace.load(file)):
                keep(f"{name}_{component}", figure, [file])
    tables = {"dose": summary} if results("core") else {}
    if results("core 16"):
        tables["forms"] = by_form
    if len({piece["n"] for piece in results("core").values()}) >= LEAST_DOSES:
        keep("dose_curve", dose_curve(), [*RESULTS.glob("core *"), *RESULTS.glob("delman *")])
    if results("window") and results("map"):
        keep("window_sweep", window_sweep(), [*RESULTS.glob("window *.json"), RESULTS / "map.json"])
        tables["windows"] = windows
        if results("core"):
            tables["correlations"] = correlations
    for name, table in tables.items():
        table().round(4).to_csv(RESULTS.parent / f"real_model_{name}.csv", index=False)
    if (file := GRADES / "world 0.csv").is_file():
        keep("locator_grades", grades(), [file], "python analyses/locator_grades.py")
    keep("organism_map", organism_map(), [ORGANISM / "model.safetensors"], "python analyses/organism.py")


if __name__ == "__main__":
    main()
