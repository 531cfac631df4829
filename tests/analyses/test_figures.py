"""Figures of the results, as data; what is committed is of the committed results."""

import hashlib
import json
from pathlib import Path

import pytest
from helpers.handmade import a_trace

import figures
from lens_defense.sites import Site

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("small_results")
def test_the_curve_goes_through_the_means():
    curve = next(line for line in figures.dose_curve().data if line.name == "XSTest safe, own set")
    assert list(curve.x) == [1, 16] and list(curve.y) == pytest.approx([0.4, 0.4])
    before, after = figures.before_after().data
    assert list(before.y) == pytest.approx([0, 0, 0.2, 1]), "paraphrase, jailbreak, benign by prefix, facts"
    assert list(after.y) == pytest.approx([0.75, 1, 0.4, 0])
    assert len(figures.window_sweep().data) == 3
    assert figures.edited_sites() == [Site("resid_post", layer, "subject_last") for layer in range(4, 9)]


def test_a_figure_is_saved_with_what_it_was_made_of(small_results, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", small_results)
    saved = {}
    monkeypatch.setattr(
        figures.ld,
        "save_figure",
        lambda _, path, **settings: saved.update({path.name: settings}),
        raising=False,
    )
    edits = small_results / "real_model/edits.csv"
    figures.save("curve", figures.dose_curve(), [edits], "a script", seeds="0")
    assert set(saved) == {"curve.svg", "curve.pdf", "curve.html"}
    assert saved["curve.pdf"] == saved["curve.svg"] and figures.COLUMN in saved["curve.svg"].values()
    sidecar = json.loads((small_results / "curve.json").read_text("utf-8"))
    assert set(sidecar) == {"command", "data by", "seeds", "data", "versions"}
    assert sidecar["data"]["edits.csv"] == hashlib.sha256(edits.read_bytes()).hexdigest()[:16]


def test_one_map_per_component():
    trace = a_trace(components=("resid_post", "mlp_out"))
    drawn = dict(figures.maps(trace, ["mlp_out"]))
    assert list(drawn) == ["mlp_out"]
    first = trace.prompts[0].subject_positions[0]
    assert len(drawn["mlp_out"].data[0].x) == len(trace.prompts[0].ids) - first, "from the subject on"
    edited = dict(figures.maps(trace, trace.components, [Site("mlp_out", 1, "subject_last")]))
    assert "outlined" in edited["mlp_out"].layout.title.text, "what was edited, where that is given"
    assert "outlined" not in edited["resid_post"].layout.title.text


@pytest.mark.parametrize("sidecar", sorted((ROOT / "figures").glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_figure_is_of_the_committed_data(sidecar):
    for name, digest in json.loads(sidecar.read_text("utf-8"))["data"].items():
        files = [*(ROOT / "analyses/results").rglob(name), *(ROOT / "lens_defense").rglob(name)]
        assert digest in {hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}, name
    assert all(sidecar.with_suffix(suffix).is_file() for suffix in (".svg", ".pdf"))
