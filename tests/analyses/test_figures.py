"""Figures of the results, as data; what is committed is of the committed results."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import map_changes
import numpy as np
import pytest
from helpers.handmade import a_trace, lamp_prompts

import figures
from lens_defense.plotting.heatmap import heatmap
from lens_defense.sites import Site

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("small_results")
def test_the_curve_goes_through_the_means():
    curve = next(line for line in figures.dose_curve().data if line.name == "XSTest safe, own set")
    assert list(curve.x) == [1, 16] and list(curve.y) == pytest.approx([0.4, 0.4])
    before, after = figures.refusals().data
    assert list(before.y) == pytest.approx([0, 0, 0.2, 1]), "paraphrase, jailbreak, benign by prefix, facts"
    assert list(after.y) == pytest.approx([0.75, 1, 0.4, 0])
    assert len(figures.window_sweep().data) == 3
    assert figures.edited_sites() == [Site("resid_post", layer, "subject_last") for layer in range(4, 9)]


def test_a_figure_is_saved_with_what_it_was_made_of(small_results, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", small_results)
    saved = {}

    def save_figure(figure, path, **settings):
        saved[path.name] = {**settings, **figure.layout.meta, "pixels": figure.layout.width}

    monkeypatch.setattr(figures.ld, "save_figure", save_figure, raising=False)
    edits = small_results / "real_model/edits.csv"
    figures.save("curve", figures.dose_curve(), [edits], "a script", seeds="0")
    assert set(saved) == {"curve", "curve.html"}
    expected = {"sources": [edits], "seed": "0", "data by": "a script", "pixels": figures.COLUMN}
    assert saved["curve"] == expected


def test_a_map_is_of_all_components_or_of_one():
    trace = a_trace(components=("resid_post", "mlp_out"))
    assert len(figures.map_figure(trace).data) == 2
    drawn = figures.map_figure(trace, "mlp_out")
    np.testing.assert_array_equal(drawn.data[0].z, trace.effects[0, 1].numpy())
    assert outlined(figures.map_figure(trace, "mlp_out", [Site("mlp_out", 1, "subject_last")]))
    assert not outlined(figures.map_figure(trace, "mlp_out", [Site("resid_post", 1, "subject_last")]))


def outlined(figure) -> bool:
    """Whether something is outlined."""
    return any(shape.name == "site" for shape in figure.layout.shapes)


def test_severed_curves_and_a_change_of_a_map_are_drawn_from_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "CHANGES", tmp_path)
    before = a_trace(lamp_prompts(3))
    half = replace(before, patched=(before.patched + 1) / 2 - 1)
    for name in ("severed_nothing", "severed_attn_out", "before"):
        before.save(tmp_path / f"{name}.safetensors")
    half.save(tmp_path / "severed_mlp_out.safetensors")
    for name, trace in {"before": before, "after": half}.items():
        map_changes.in_nats(trace).save(tmp_path / f"{name}_nats.safetensors")
    curves = {line.name: list(line.y) for line in figures.severed_curves().data if line.name}
    assert curves["later MLP outputs severed"] == pytest.approx([y / 2 for y in curves["nothing severed"]])
    assert curves["later attention outputs severed"] == curves["nothing severed"]
    figure = figures.map_change()
    first, _, change = figure.data
    np.testing.assert_allclose(
        first.z, heatmap(before).data[0].z, atol=1e-12
    )  # it is 1 nat from corrupted to clean
    np.testing.assert_allclose(change.z, -first.z / 2)
    assert outlined(figure) and change.colorbar.title.text == "nats"


@pytest.mark.parametrize("sidecar", sorted((ROOT / "figures").glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_figure_is_of_the_committed_data(sidecar):
    for name, digest in json.loads(sidecar.read_text("utf-8"))["sources"].items():
        files = [*(ROOT / "analyses/results").rglob(name), *(ROOT / "lens_defense").rglob(name)]
        assert digest in {hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}, name
    assert all(sidecar.with_suffix(suffix).is_file() for suffix in (".svg", ".pdf"))
