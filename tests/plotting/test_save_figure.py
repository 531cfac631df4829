"""Figures as files: their size in print, their letters, cells that are vectors, and the same bytes again."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers.handmade import a_trace, sites_at
from plotting.test_heatmap import NO_EXPORT

from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.print_size import fitting_width, print_inches, print_pixels, smallest_letters
from lens_defense.plotting.provenance import sidecar
from lens_defense.plotting.theme import save_figure
from lens_defense.plotting.vector_cells import cell_colours, with_vector_cells
from lens_defense.tracing.trace_result import Trace

needs_export = pytest.mark.skipif(bool(NO_EXPORT), reason=NO_EXPORT or "static export works")


def wide_trace() -> Trace:
    return a_trace(components=("resid_post", "mlp_out", "attn_out"))


def colours_of(figure: go.Figure) -> np.ndarray:
    """The colours of a figure's first map, cell by cell."""
    panel = figure.data[0]
    return cell_colours(panel.z, panel.zmax, [colour for _, colour in panel.colorscale])


@needs_export
def test_a_path_without_a_suffix_is_three_files_and_what_made_them(tmp_path: Path):
    source = tmp_path / "numbers.csv"
    source.write_text("1\n")
    figure = heatmap(wide_trace(), sites_at())
    assert save_figure(figure, tmp_path / "map", sources=[source], seed=3) == tmp_path / "map"
    names = {"map.svg", "map.pdf", "map.png", "map.json"}
    assert {file.name for file in tmp_path.iterdir()} == names | {"numbers.csv"}
    origin = json.loads((tmp_path / "map.json").read_text("utf-8"))
    assert origin["seed"] == 3 and origin["inches"] == 6.75 and "plotly" in origin["versions"]
    assert origin["sources"] == {"numbers.csv": "4355a46b19d348dc"}
    svg = ET.parse(tmp_path / "map.svg").getroot()
    assert float(svg.attrib["width"]) == pytest.approx(6.75 * 96)
    page = re.search(rb"/MediaBox \[0 0 ([\d.]+)", (tmp_path / "map.pdf").read_bytes())
    assert page is not None and float(page[1]) == pytest.approx(6.75 * 72, abs=1)
    width = int.from_bytes((tmp_path / "map.png").read_bytes()[16:20])
    assert width == pytest.approx(6.75 * 300, abs=2)


def two_legends() -> go.Figure:
    """A figure with two legends: each has an id of its own in an SVG."""
    lines = [go.Scatter(x=[0, 1], y=[0, 1], legend=name, showlegend=True) for name in ("legend", "legend2")]
    return go.Figure(lines, layout={"legend2": {"y": 0.5}})


@needs_export
@pytest.mark.parametrize(
    "draw", [lambda: heatmap(a_trace(), sites_at()), pytest.param(two_legends, marks=pytest.mark.slow)]
)
def test_a_second_run_writes_the_same_bytes(tmp_path: Path, draw: Callable[[], go.Figure]):
    for folder in ("first", "second"):
        save_figure(draw(), tmp_path / folder / "map")
    for ending in ("svg", "pdf", "json"):
        first, second = ((tmp_path / folder / f"map.{ending}").read_bytes() for folder in ("first", "second"))
        assert first == second, ending


@needs_export
def test_cells_are_vectors_and_fonts_are_embedded(tmp_path: Path):
    figure = heatmap(a_trace(), sites_at())
    for suffix in (".svg", ".pdf"):
        save_figure(figure, tmp_path / f"map{suffix}")
    svg = (tmp_path / "map.svg").read_text("utf-8")
    assert "<image" not in svg
    fills = set(
        cell_colours(figure.data[0].z, figure.data[0].zmax, [c for _, c in figure.data[0].colorscale]).flat
    )
    drawn = {tuple(map(int, rgb)) for rgb in re.findall(r"fill: rgb\((\d+), (\d+), (\d+)\)", svg)}
    assert {tuple(bytes.fromhex(fill[1:])) for fill in fills} <= drawn
    pdf = (tmp_path / "map.pdf").read_bytes()
    assert b"/Subtype /Image" not in pdf
    assert pdf.count(b"/FontFile2") == pdf.count(b"/Type /FontDescriptor") > 0


def test_a_cell_is_a_rectangle_of_its_colour_below_the_outlines():
    trace = replace(a_trace(), patched=a_trace(roles=["subject_last", "last"]).patched)
    figure = heatmap(trace, sites_at())
    vectors = with_vector_cells(figure)
    assert all(part.type == "heatmap" for part in figure.data), "on a screen a cell has its hover"
    assert not [part for part in vectors.data if part.type == "heatmap"]
    cells = [shape for shape in vectors.layout.shapes if shape.name == "cells"]
    assert [s.name for s in vectors.layout.shapes[len(cells) :]] == [s.name for s in figure.layout.shapes]
    rectangles = {
        corner: shape.fillcolor for shape in cells for corner in re.findall(r"M([-\d.]+,[-\d.]+)", shape.path)
    }
    z = figure.data[0].z
    colours = cell_colours(z, figure.data[0].zmax, [colour for _, colour in figure.data[0].colorscale])
    traced = {
        f"{i - 0.5:g},{j - 0.5:g}": colours[j, i] for j, i in zip(*np.isfinite(z).nonzero(), strict=True)
    }
    assert rectangles == traced
    assert vectors.data[0].marker.cmax == figure.data[0].zmax, "the colour bar stays"


def test_colours_lie_between_those_of_the_scale():
    effects = np.array([[-1.0, -0.5, 0.0, 0.25, 1.0, np.nan]])
    colours = cell_colours(effects, 1.0, ["#000000", "#808080", "#ffffff"])
    assert colours.tolist() == [["#000000", "#404040", "#808080", "#a0a0a0", "#ffffff", ""]]


def test_someone_elses_heatmap_stays_as_it_is():
    theirs = go.Figure(go.Heatmap(z=[[1, 2]], x=["a", "b"], zmin=0, zmax=2))
    assert with_vector_cells(theirs).data[0].type == "heatmap"


@pytest.mark.parametrize("width, inches", [("column", 3.25), ("page", 6.75), (5.0, 5.0)])
def test_widths_are_names_or_inches(width, inches):
    assert print_inches(width) == inches


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("width", ["poster", 0.0, -1.0, float("inf"), True])
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match="number of inches, got"):
        print_inches(width)


def test_letters_are_eight_points_and_a_warning_says_where_they_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_defense.plotting.theme._image", lambda *_: b"")
    page, column = heatmap(wide_trace()), heatmap(a_trace(layers=(0, 1)), width="column")
    assert (fitting_width(page), fitting_width(column)) == ("page", "column")
    assert print_pixels("column") == 380
    assert smallest_letters(column, 3.25) == pytest.approx(8, abs=0.05)
    assert smallest_letters(page, 6.75) == pytest.approx(8, abs=0.1)
    save_figure(page, tmp_path / "page.svg")
    with pytest.warns(UserWarning, match=r"at 3.25 inches the smallest .* are 3.9 points high, .*width"):
        save_figure(page, tmp_path / "column.svg", width="column")


def test_a_small_figure_gets_no_larger_letters(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(
        "lens_defense.plotting.theme._image", lambda figure, *_: printed.append(figure) or b""
    )
    save_figure(heatmap(a_trace(), width="column"), tmp_path / "map.svg", width="page")
    assert printed[0].layout.width == print_pixels("page")
    assert smallest_letters(printed[0], 6.75) == pytest.approx(8, abs=0.05)


def test_the_sidecar_says_model_corruption_and_seed(monkeypatch):
    trace = replace(a_trace(), corruption="noise of 3 standard deviations, 3 samples, seed 7")
    figure = heatmap(trace)
    monkeypatch.setattr("sys.argv", [str(Path.cwd() / "analyses/figures.py"), "--all"])
    origin = sidecar(figure, inches=3.25, sources=(), seed=None)
    assert origin["command"] == "python analyses/figures.py --all"
    assert origin["seed"] == 7
    assert origin["origin"]["model"] == "tiny" and "noise" in origin["origin"]["corruption"]
    changed = heatmap(replace(trace, patched=trace.patched + 0.01))
    assert sidecar(changed, inches=3.25, sources=(), seed=None)["data"] != origin["data"]
    monkeypatch.setattr("sys.argv", ["/somewhere/ipykernel_launcher.py", "-f", "/somewhere/kernel.json"])
    assert sidecar(figure, inches=3.25, sources=(), seed=None)["command"] == "interactive"
    with pytest.raises(ValueError, match="a source of the figure, cannot be read"):
        sidecar(figure, inches=3.25, sources=["nowhere.csv"], seed=None)
