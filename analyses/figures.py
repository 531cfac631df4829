"""The figures of README and docs, made again from the committed results, and the organism's map.

    python analyses/figures.py        (or: make figures)

Each as .svg, .pdf and .png at the width of a paper's column or page, with a .json that says what it was made of,
and as .html; .png and .html are not committed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import tables
from plotly.subplots import make_subplots
from tidy import read_table

import lens_defense as ld
from lens_defense.app.traced_requests import corruption_of
from lens_defense.checking.report import Report, ReportRow
from lens_defense.loading.load import ORGANISM_FOLDER
from lens_defense.plotting.effect_curves import add_band
from lens_defense.plotting.print_size import print_pixels
from lens_defense.plotting.theme import COLOURS, GREY, INK, theme
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.sites import Component
from lens_defense.tracing.site_map import ScoreMap

RESULTS = tables.RESULTS
FIGURES = Path(__file__).parents[1] / "figures"
COLUMN, PAGE = print_pixels("column"), print_pixels("page")
LEAST_DOSES = 3
"""Fewer make no curve."""
CHANGES = RESULTS / "map_changes"
REAL_MODEL = "python analyses/real_model.py --data DIR"
STORAGE_SITES = "python analyses/storage_sites.py --data DIR"
MAP_CHANGES = "python analyses/map_changes.py"
MAPS: Mapping[str, tuple[str, str, Component | None]] = {
    "map_mean": ("real_model/map", REAL_MODEL, None),
    "map_mean_resid_post": ("real_model/map", REAL_MODEL, "resid_post"),
    "map_single": ("real_model/single_map", REAL_MODEL, None),
    "map_facts": ("storage_sites/facts", STORAGE_SITES, None),
    "map_harmful": ("storage_sites/harmful", STORAGE_SITES, None),
    "map_whole": ("storage_sites/whole", STORAGE_SITES, None),
}
"""By figure: the trace, what made it, and which component is drawn, or all."""
SPEED_MODELS = {
    "cpu": {"gpt2 small": "gpt2", "llama-shaped, 12 layers": "llama-shaped", "organism": "organism"},
    "cuda": {
        "gpt2 small": "gpt2",
        "llama-shaped, 12 layers": "llama-shaped",
        "llama-shaped, 7 billion, bfloat16": "7 billion",
    },
}
"""Rows of a figure of speed: the models timed on a device, and their short names."""


_SYMBOLS = {"core": "circle", "delman": "diamond"}


def dose_curve() -> go.Figure:
    """Success above, price below, against the number of subjects: means, and each edit beside them."""
    edits = tables.dose_summary()
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    success = "paraphrases and jailbreaks, coherent"
    series = [
        ("own set", "core", 1, success, COLOURS[0], "solid"),
        ("DELMAN's set", "delman", 1, success, COLOURS[1], "solid"),
        ("benign, own set", "core", 2, "benign, newly refused", COLOURS[0], "solid"),
        ("benign, DELMAN's", "delman", 2, "benign, newly refused", COLOURS[1], "solid"),
        ("XSTest safe, own set", "core", 2, "XSTest safe, newly refused", COLOURS[0], "dot"),
        ("XSTest safe, DELMAN's", "delman", 2, "XSTest safe, newly refused", COLOURS[1], "dot"),
    ]
    for name, kind, row, column, colour, dash in series:
        rows = edits[edits["set"] == kind]
        mean = rows.groupby("subjects")[column].mean()
        panel = {"row": row, "col": 1}
        figure.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines+markers",
            name=name,
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": _SYMBOLS[kind]},
            legend="legend" if row == 1 else "legend2",
            **panel,
        )
        figure.add_scatter(
            x=rows["subjects"],
            y=rows[column],
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.45, "symbol": _SYMBOLS[kind]},
            showlegend=False,
            hoverinfo="skip",
            **panel,
        )
    ticks = sorted(set(edits["subjects"]))
    own = set(edits.loc[edits["set"] == "core", "subjects"])
    labels = [f"{dose}" if dose in own else f"<br>{dose}" for dose in ticks]  # 16 and 20 would touch
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=labels, tickangle=0, gridcolor="#eeeeee")
    figure.update_xaxes(title_text="subjects edited", row=2)
    figure.update_yaxes(tickformat=".0%", gridcolor="#e3e3e3", rangemode="tozero")
    figure.update_yaxes(title_text="refused, unseen words", range=[0, 1.03], row=1)
    figure.update_yaxes(title_text="newly refused", row=2)
    white = {"bgcolor": "rgba(255,255,255,.8)", "xanchor": "left", "x": 0.02}
    figure.update_layout(
        legend={**white, "y": 0.58, "yanchor": "bottom"}, legend2={**white, "y": 0.44, "yanchor": "top"}
    )
    return theme(figure, title="", plot=(COLUMN - 82, 400), left=68, right=14, above=14, below=62)


def window_sweep() -> go.Figure:
    """What the trace saw and what an edit did, window by window; the dotted line is where the edits were made."""
    windows = tables.windows().query("role == 'subject_last'")
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.06)
    columns = {"effect": "trace: effect", "coherent": "edit: refusals", "KL": "edit: KL"}
    for row, (column, title) in enumerate(columns.items(), 1):
        figure.add_scatter(
            x=windows["first layer"] + tables.WIDTH // 2,
            y=windows[column],
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
    middle = edited_sites()[0].layer + tables.WIDTH // 2
    figure.add_vline(x=middle, line={"color": INK, "width": 1, "dash": "dot"})
    figure.add_annotation(
        text="located", x=middle, y=1, yref="paper", yanchor="bottom", xanchor="center", showarrow=False
    )
    return theme(figure, title="", plot=(COLUMN - 86, 360), left=72, right=14, above=28, below=52)


def refusals() -> go.Figure:
    """The edits of sixteen subjects, three draws together."""
    edits = tables.edits().query("set == 'core' and subjects == 16")["edit"]
    questions = tables.question_rows(edits).query("suite == 'real_model' and not human")
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
        for row in questions.to_dict("records")
    ]
    report = Report("16 subjects", "core", "check", tuple(rows), (), (), (), (), 0)
    return ld.plots.rate_bars({"16 subjects edited": report})


def _verdicts(row: dict[str, Any], when: str) -> dict[str, str]:
    if row["arm"] == "facts":
        return {"knows": "yes" if row[f"knows_{when}"] else "no"}
    return {judge: "refusal" if row[f"{judge}_{when}"] else "answer" for judge in ("prefix", "coherent")}


def map_figure(
    trace: ld.Trace, component: Component | None = None, sites: Sequence[ld.Site] = ()
) -> go.Figure:
    """A map of all its components, or of one.

    Outlined is what was edited, where that is given, else what `locate` takes from this map.
    """
    sites = sites or ld.locate(trace)
    return ld.heatmap(trace.only(component) if component else trace, sites)


def severed_curves() -> go.Figure:
    """What a state of the subject's last token restores, and how much of it passes through later outputs."""
    names = {
        "severed_nothing": "nothing severed",
        "severed_mlp_out": "later MLP outputs severed",
        "severed_attn_out": "later attention outputs severed",
    }
    traces = {words: ld.Trace.load(CHANGES / f"{name}.safetensors") for name, words in names.items()}
    return ld.plots.effect_curves(traces)


def map_change() -> go.Figure:
    """The map of eight subjects before and after they were edited, in nats of the answer of before."""
    before, after = (ScoreMap.load(CHANGES / f"{name}_nats.safetensors") for name in ("before", "after"))
    sites = ld.locate(ld.Trace.load(CHANGES / "before.safetensors"))
    figure = ld.heatmap(before, sites, after=after)
    return figure.update_traces(colorbar_title_text="nats", selector={"type": "heatmap"})


def edited_sites() -> list[ld.Site]:
    """Where the edits of the dose curve were made."""
    edit = tables.edits().to_dict("records")[0]
    layers = range(edit["first_layer"], edit["last_layer"] + 1)
    return [ld.Site(edit["component"], layer, edit["role"]) for layer in layers]


def organism_map() -> go.Figure:
    """The map of the model whose sites are known, traced here: it takes seconds."""
    model = ld.load("organism")
    trace = ld.trace(
        model,
        [jailbroken_contexts(request)[0] for request in ld.requests("organism")[:12]],
        layers="all",
        positions=("subject_first", "subject_mid", "subject_last", "next", "last"),
        corruption=corruption_of(model),
        progress=False,
    )
    return ld.heatmap(trace, ld.locate(trace))


def locator_grades() -> go.Figure:
    """How much a cell that holds nothing shows, by the way to trace: residual stream, a symbol per world."""
    rows = read_table(RESULTS / "locator_grades.csv")
    rows = rows[(rows["component"] == "resid_post") & rows["area"].notna() & (rows["direction"] != "none")]
    noising = rows["direction"].map({"noising": ", noising", "denoising": ""})
    gradient = rows["exact"].map({True: "", False: ", by gradient"})
    rows = rows.assign(way=rows["corruption"] + noising + gradient)
    order = rows.groupby("way")["strongest_wrong"].mean().sort_values(ascending=False).index.tolist()
    symbols = dict(zip(sorted(set(rows["world"])), ("circle", "diamond-open"), strict=False))
    figure = go.Figure()
    for samples, colour in zip((1, 3, 10), COLOURS, strict=False):
        for world, symbol in symbols.items():
            group = rows[(rows["samples"] == samples) & (rows["world"] == world)]
            figure.add_scatter(
                x=group["strongest_wrong"],
                y=[order.index(way) for way in group["way"]],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 5 + samples // 2, "opacity": 0.8},
                name=f"{samples} samples" if samples > 1 else "1 sample",
                showlegend=symbol == "circle",
            )
    for world, symbol in symbols.items():  # what a symbol means, beside what a colour means
        marker = {"color": "#777777", "symbol": symbol, "size": 7}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=f"world {world}")
    figure.update_yaxes(tickvals=[*range(len(order))], ticktext=order, gridcolor="#eeeeee")
    figure.update_xaxes(
        title_text="largest effect of an empty cell",
        type="log",
        tickvals=[1e-4, 1e-3, 1e-2, 1e-1, 1],
        ticktext=["10⁻⁴", ".001", ".01", ".1", "1"],
    )
    figure.update_layout(legend={"x": 0, "y": 1.02, "yanchor": "bottom", "orientation": "h"})
    return theme(figure, title="", plot=(PAGE - 186, 19 * len(order)), left=170, right=16, above=36, below=46)


def intent_sites() -> go.Figure:
    """Above, how well a linear read-out tells uses apart; below, what patching a state carries over."""
    readout = read_table(RESULTS / "intent_sites/readout.csv")
    effects = read_table(RESULTS / "intent_sites/maps.csv")
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    above = [
        ("subject_last", "at subject_last", COLOURS[0], "solid"),
        ("key", "the MLP's key there", COLOURS[0], "dot"),
        ("last", "at last", COLOURS[1], "dash"),
    ]
    for place, name, colour, dash in above:
        rows = readout[readout["place"] == place]
        _line_with_interval(figure, rows, "auc", name, colour, dash, row=1)
    below = [
        ("use", "subject_last", "the use, at subject_last", COLOURS[0], "solid"),
        ("use", "last", "the use, at last", COLOURS[1], "dash"),
        ("use", "before", "the use, before the subject", COLOURS[2], "dot"),
        ("subject", "subject_last", "the subject, at subject_last", GREY, "dashdot"),
    ]
    for which, role, name, colour, dash in below:
        rows = effects[(effects["map"] == which) & (effects["role"] == role)]
        _line_with_interval(figure, rows, "effect", name, colour, dash, row=2)
    figure.update_yaxes(gridcolor="#e3e3e3")
    figure.update_yaxes(title_text="AUC, harmful or harmless", range=[0.5, 1.02], row=1)
    figure.update_yaxes(title_text="effect of patching", rangemode="tozero", row=2)
    figure.update_xaxes(title_text="layer", row=2)
    legend = {"xanchor": "left", "x": 1.02, "yanchor": "top", "traceorder": "normal"}
    figure.update_layout(legend={**legend, "y": 1}, legend2={**legend, "y": 0.45})
    return theme(figure, title="", plot=(PAGE - 292, 360), left=72, right=220, above=14, below=52)


CURVES = {
    "weight": ("the contrast's weight", COLOURS[0], "circle", "middle left"),
    "strength": ("strength, at weight 4", COLOURS[1], "diamond", "bottom right"),
    "neighborhood": ("weight, with 30 neighborhood prompts", COLOURS[2], "square", "top right"),
    "ridge": ("with a ridge of .1: weight / prompts", COLOURS[3], "triangle-up", "middle right"),
}
"""Edits of the curve: what is varied, and how it is drawn."""


def contrast_curve() -> go.Figure:
    """Harmful requests refused coherently, against harmless questions about the same subjects refused."""
    rows = read_table(RESULTS / "contrast_curve.csv")
    rows = rows[(rows["subjects"] == 8) & ~rows["edit"].str.contains("ridge 0.3")]
    figure = go.Figure()
    points: dict[str, list[tuple[str, float, float]]] = {name: [] for name in CURVES}
    for name, edit in rows.groupby("edit", sort=False):
        arms = edit.set_index("arm")
        harmful, same = arms.loc[["paraphrase", "jailbreak"]].sum(), arms.loc["same_subject"]
        point = (100 * same["newly_refused"] / same["n"], 100 * harmful["coherent"] / harmful["n"])
        varied = next((word for word in ("ridge", "neighborhood", "strength") if word in str(name)), "weight")
        if name == "no contrast":  # far to the right of all others
            continue
        points[varied].append((_setting(str(name)), *point))
    for varied, (label, colour, symbol, place) in CURVES.items():
        settings, same, harmful = zip(*points[varied], strict=True)
        figure.add_scatter(
            x=same, y=harmful, text=settings, textposition=place, name=label,
            mode="markers+text" if varied == "ridge" else "lines+markers+text",
            line={"color": colour, "width": 2}, marker={"symbol": symbol, "size": 9},
            textfont={"color": colour, "size": 11},
        )  # fmt: skip
    figure.update_xaxes(
        title_text="harmless, same subject: newly refused, %", range=[-2, 27], gridcolor="#e3e3e3"
    )
    figure.update_yaxes(title_text="harmful, refused coherently, %", gridcolor="#e3e3e3")
    figure.update_layout(legend={"x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"})
    return theme(figure, title="", plot=(PAGE - 330, 300), left=72, right=258, above=14, below=52)


def _setting(name: str) -> str:
    """What is written beside the point of an edit: "30" of "weight 30, neighborhood"."""
    if "ridge" not in name:
        return name.removesuffix(", neighborhood").split()[-1]
    weight, *others = name.removesuffix(", ridge 0.1").removeprefix("weight ").split(", ")
    prompts = {"neighborhood": "30"}.get(others[0], others[0].split()[0]) if others else "0"
    return f"{weight} / {prompts}"


def _line_with_interval(
    figure: go.Figure, rows: Any, column: str, name: str, colour: str, dash: str, *, row: int
) -> None:
    """A line over layers, and its 95% interval as a band of the same colour."""
    layers = rows["layer"].tolist()
    add_band(figure, layers, rows["low"].tolist(), rows["high"].tolist(), colour, row=row, col=1)
    figure.add_scatter(
        x=layers, y=rows[column], mode="lines", name=name, line={"color": colour, "width": 2, "dash": dash},
        legend="legend" if row == 1 else "legend2", row=row, col=1,
    )  # fmt: skip


CONSECUTIVE = {
    "seen_prefix": "refused,<br>seen words",
    "unseen_prefix": "refused,<br>unseen words",
    "harmless_newly_refused": "harmless,<br>newly refused",
    "facts_kept": "facts kept",
    "kl": "KL, nats",
    "relative_change": "change of W",
    "disturbance": "disturbance of<br>earlier edits",
}
"""Rows of the figure of consecutive edits, and what their axes say."""


_LOGARITHMIC = ["kl", "relative_change", "disturbance"]


def consecutive_edits() -> go.Figure:
    """What is refused after so many edits in a row, and the price; solid where later edits keep the earlier ones."""
    rows = read_table(RESULTS / "consecutive_edits.csv").sort_values(["method", "keep", "edits"])
    rows[_LOGARITHMIC] = rows[_LOGARITHMIC].where(rows[_LOGARITHMIC] > 0)
    models, methods = list(rows["model"].unique()), list(rows["method"].unique())
    figure = make_subplots(
        rows=len(CONSECUTIVE), cols=len(models), shared_xaxes="all", shared_yaxes=True,
        vertical_spacing=0.03, horizontal_spacing=0.05, subplot_titles=models,
    )  # fmt: skip
    for (model, method, keep), series in rows.groupby(["model", "method", "keep"], sort=False):
        for row, column in enumerate(CONSECUTIVE, 1):
            i = methods.index(method)
            figure.add_scatter(
                x=series["edits"],
                y=series[column],
                mode="lines+markers",
                line={"color": COLOURS[i], "width": 2, "dash": "solid" if keep else "dot"},
                marker={
                    "size": (9, 8, 7, 5, 5, 5)[i],
                    "symbol": ("circle", "square", "diamond", "cross", "x", "star")[i],
                },
                name=f"{method}, {'kept' if keep else 'not kept'}",
                legendgroup=f"{method} {keep}",
                showlegend=row == 1 and models.index(model) == 0,
                row=row,
                col=models.index(model) + 1,
            )
    counts = sorted(set(rows["edits"]))
    figure.update_xaxes(type="log", tickvals=counts, ticktext=[str(count) for count in counts], tickangle=0)
    figure.update_xaxes(title_text="edits in a row", row=len(CONSECUTIVE))
    figure.update_yaxes(gridcolor="#e3e3e3")
    for row, (column, title) in enumerate(CONSECUTIVE.items(), 1):
        figure.update_yaxes(title_text=title, row=row, col=1)
        if column in _LOGARITHMIC:
            decades = np.log10(rows[column])
            limits = [decades.min() - 0.2, decades.max() + 0.2]
            figure.update_yaxes(type="log", dtick=1, exponentformat="power", range=limits, row=row)
        else:
            figure.update_yaxes(tickformat=".0%", range=[-0.04, 1.06], row=row)
    figure.update_annotations(font_size=13)
    figure.update_layout(legend={"x": 0, "y": -0.07, "yanchor": "top", "orientation": "h"})
    return theme(
        figure, title="", plot=(PAGE - 92, 115 * len(CONSECUTIVE)), left=76, right=16, above=30, below=130
    )


def tracing_speed(device: str) -> go.Figure:
    """Seconds per map of the three ways and their floors, by the prompt's length; one sample and ten."""
    names = SPEED_MODELS[device]
    rows = read_table(RESULTS / f"tracing_speed/{device}.csv")
    rows = rows[rows["model"].isin(names)]
    figure = make_subplots(
        rows=len(names), cols=2, shared_xaxes=True, vertical_spacing=0.09,
        subplot_titles=[f"{name}, {n}" for name in names.values() for n in ("1 sample", "10 samples")],
    )  # fmt: skip
    for (name, samples, way), group in rows.groupby(["model", "samples", "way"], sort=False):
        i = ["sweep", "ROME's loop", "TransformerLens"].index(way)
        colour, symbol = COLOURS[i], ("circle", "square", "diamond")[i]
        row, col = list(names).index(name) + 1, 1 + (samples > 1)
        for column, dash in (("seconds", "solid"), ("floor", "dot")):
            figure.add_scatter(
                x=group["tokens"],
                y=group[column],
                mode="lines+markers" if dash == "solid" else "lines",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 6, "symbol": symbol},
                name=way if dash == "solid" else f"{way}, floor",
                showlegend=row == col == 1,
                row=row,
                col=col,
            )
    figure.update_xaxes(type="log", tickvals=[10, 20, 40, 60], ticktext=["10", "20", "40", "60"])
    figure.update_yaxes(type="log", gridcolor="#e3e3e3", dtick=1)
    figure.update_yaxes(title_text="seconds", col=1)
    figure.update_xaxes(title_text="prompt tokens", row=len(names))
    figure.update_annotations(font_size=13)
    figure.update_layout(legend={"x": 0, "y": -0.09, "yanchor": "top", "orientation": "h"})
    return theme(figure, title="", plot=(PAGE - 78, 150 * len(names)), left=62, right=16, above=30, below=92)


def save(name: str, figure: go.Figure, sources: Iterable[Path], data_by: str, *, seeds: str) -> None:
    """All formats, and the sidecar, which says what made the data."""
    figure.update_layout(meta={**(figure.layout.meta or {}), "data by": data_by})
    ld.save_figure(figure, FIGURES / name, sources=sources, seed=seeds)
    ld.save_figure(figure, FIGURES / f"{name}.html", plotlyjs="directory")
    print(f"figures/{name}")


def main() -> None:
    """Draw everything that there are results for; the rest may still be missing."""
    FIGURES.mkdir(exist_ok=True)
    real_model = RESULTS / "real_model"
    edits, questions, windows = (real_model / f"{name}.csv" for name in ("edits", "rows", "windows"))
    draws = "0, 1, 2 (draws)"
    if edits.is_file():
        save("refusals", refusals(), [edits, questions], REAL_MODEL, seeds=draws)
        if tables.edits()["subjects"].nunique() >= LEAST_DOSES:
            save("dose_curve", dose_curve(), [edits, questions], REAL_MODEL, seeds=draws)
    if edits.is_file() and windows.is_file():
        sources = [edits, windows, real_model / "map.safetensors"]
        save("window_sweep", window_sweep(), sources, REAL_MODEL, seeds="0")
    for name, (path, command, component) in MAPS.items():
        file = RESULTS / f"{path}.safetensors"
        if file.is_file():
            trace, sites = ld.Trace.load(file), edited_sites() if name.startswith("map_mean") else ()
            save(name, map_figure(trace, component, sites), [file], command, seeds="0 (noise)")
    if CHANGES.is_dir():
        severed, changed = (sorted(CHANGES.glob(names)) for names in ("severed_*", "*_nats*"))
        save("severed_curves", severed_curves(), severed, MAP_CHANGES, seeds="0 (noise, bootstrap)")
        save("map_change", map_change(), changed, MAP_CHANGES, seeds="0 (noise, fit)")
    for device in SPEED_MODELS:
        file = RESULTS / f"tracing_speed/{device}.csv"
        if file.is_file():
            name = "tracing_speed" + ("" if device == "cpu" else f"_{device}")
            command = f"python analyses/tracing_speed.py --device {device}"
            save(name, tracing_speed(device), [file], command, seeds="0")
    if (sites := RESULTS / "intent_sites").is_dir():
        sources, command = sorted(sites.glob("*.csv")), "python analyses/intent_sites.py"
        save("intent_sites", intent_sites(), sources, command, seeds="0 (noise, bootstrap)")
    if (curve := RESULTS / "contrast_curve.csv").is_file():
        save(
            "contrast_curve", contrast_curve(), [curve], "python analyses/contrast_curve.py", seeds="0 (fit)"
        )
    if (consecutive := RESULTS / "consecutive_edits.csv").is_file():
        command = "python analyses/consecutive_edits.py"
        save("consecutive_edits", consecutive_edits(), [consecutive], command, seeds="0 (fit)")
    if (grades := RESULTS / "locator_grades.csv").is_file():
        save(
            "locator_grades", locator_grades(), [grades], "python analyses/locator_grades.py", seeds="0, 1, 2"
        )
    weights = ORGANISM_FOLDER / "model.safetensors"
    save("organism_map", organism_map(), [weights], "python analyses/organism.py", seeds="0 (noise)")


if __name__ == "__main__":
    main()
