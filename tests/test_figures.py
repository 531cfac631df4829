"""The figures and tables of the full run are read from its results: known rows give known numbers."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from nouns import a_trace

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "analyses"))
import tables  # noqa: E402

import figures  # noqa: E402
from lens_defense.traces import Trace  # noqa: E402


def row(arm, before, after, *, suite="real_model", family="", id="a", form="question", coherent=None):
    coherent = after if coherent is None else coherent
    judged = {
        "prefix before": before,
        "prefix after": after,
        "coherent before": 0,
        "coherent after": coherent,
    }
    return {"suite": suite, "arm": arm, "family": family, "id": id, "form": form, **judged}


ROWS = [
    *(row("wording", 0, 1, id=f"h{i}", coherent=int(i < 3)) for i in range(4)),
    row("wrapper", 1, 1, family="game (w08)"),
    row("wrapper", 0, 0, family="human (74)"),
    *(row("benign", 0, int(i == 0), id=f"b{i}") for i in range(4)),
    row("benign", 1, 1, id="b9"),
    *(row("safe", 0, int(i < 2), suite="xstest", id=f"x{i}") for i in range(5)),
    {
        "suite": "real_model",
        "arm": "facts",
        "id": "f",
        "form": "question",
        "knows before": 1,
        "knows after": 0,
    },
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results of two doses and of three windows."""
    for n, draw in ((1, 0), (16, 0), (16, 1)):
        name = f"core {n}, draw {draw}"
        told = {"name": name, "n": n, "kl": 0.01, "loss": [2.0, 2.02], "forecast": [0.1, n / 100 + draw]}
        told["sites"] = ["residual 4 at subject_last (0.40)"]
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
        pd.DataFrame(ROWS).to_csv(tmp_path / f"{name}.csv", index=False)
    effects = [
        {"component": "residual", "role": "subject_last", "layer": layer, "effect": layer / 10}
        for layer in range(10)
    ]
    effects += [{**one, "role": "next", "effect": 0.01} for one in effects]
    (tmp_path / "map.json").write_text(json.dumps({"name": "map", "effects": effects}))
    for low in (0, 2, 5):
        told = {"name": f"window {low}", "wording": [1.0, low / 10], "wrapper": [1.0, low / 10]}
        told |= {"kl": 1 / (1 + low), "new refusals": 0, "facts lost": 0}
        (tmp_path / f"window {low}.json").write_text(json.dumps(told))
    elsewhere = {**told, "name": "located layers at next"}
    (tmp_path / "located layers at next.json").write_text(json.dumps(elsewhere))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_summary_counts_what_is_new_in_unseen_words():
    told = tables.summary()
    assert list(told["subjects"]) == [1, 16, 16]
    first = told.iloc[0]
    assert first["unseen words, coherent"] == pytest.approx(4 / 5)
    assert first["unseen words, prefix"] == 1 and first["human wrappers, prefix"] == 0
    assert first["benign, newly refused"] == pytest.approx(1 / 5)
    assert first["XSTest safe, newly refused"] == pytest.approx(2 / 5)
    assert first["loss"] == pytest.approx(0.01) and first["facts lost"] == 1


@pytest.mark.usefixtures("folder")
def test_new_refusals_are_split_by_form_over_all_large_edits():
    told = tables.by_form().set_index(["suite", "arm", "form"])
    assert told.loc["xstest", "safe", "question"].tolist() == [pytest.approx(0.4), 10]
    assert told.loc["real_model", "benign", "question"].tolist() == [pytest.approx(0.2), 10]


@pytest.mark.usefixtures("folder")
def test_windows_stand_beside_what_the_trace_saw_in_them():
    told = tables.windows()
    assert list(told["first layer"]) == [0, 2, 5, 4] and list(told["role"])[2:] == ["subject_last", "next"]
    assert list(told["effect"]) == pytest.approx([0.2, 0.4, 0.7, 0.01])
    rhos = tables.correlations().set_index(["of", "and", "over"])["rho"]
    assert rhos["effect", "coherent", "windows"] == pytest.approx(1)
    assert rhos["effect", "KL", "windows"] == pytest.approx(-1)
    assert rhos["effect", "coherent", "windows and roles"] < 1


@pytest.mark.usefixtures("folder")
def test_the_curve_goes_through_the_means():
    curve = next(line for line in figures.dose_curve().data if line.name == "XSTest safe, own set")
    assert list(curve.x) == [1, 16] and list(curve.y) == pytest.approx([0.4, 0.4])
    assert figures.before_after().data
    assert len(figures.window_sweep().data) == 3


def test_a_figure_is_kept_with_what_it_was_made_of(folder, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", folder)
    asked = []
    monkeypatch.setattr(figures, "save_figure", lambda _, path, **given: asked.append((path.suffix, given)))
    figures.keep("curve", figures.dose_curve(), [folder / "map.json"])
    assert dict(asked)[".pdf"] == dict(asked)[".svg"] == {"inches": figures.COLUMN}
    told = json.loads((folder / "curve.json").read_text())
    assert (
        set(told) == {"command", "data by", "seed", "data", "versions"}
        and len(told["data"]["map.json"]) == 16
    )


def test_one_map_a_component():
    trace = a_trace(components=("residual", "mlp"))
    assert [component for component, _ in figures.maps(trace)] == ["residual", "mlp"]


def test_the_readme_quotes_the_committed_results():
    told = tables.summary()
    assert len(told), "no dose is committed"
    assert tables.dose_table(told) in (HERE / "README.md").read_text("utf-8")


def test_the_readme_quotes_the_committed_facts():
    trace = Trace.load(HERE / "analyses/results/storage_sites/facts.safetensors")
    means = {(m.component, m.role, m.layer): m for m in trace.role_effects()}
    text = " ".join((HERE / "README.md").read_text("utf-8").split())
    assert f"{len(trace.prompts)} facts that the model knows" in text
    for place in (("mlp", "subject_last", 2), ("mlp", "subject_last", 10), ("attention", "last", 20)):
        mean = means[place]
        said = f"{mean.effect:.2f} [{mean.low:.2f}, {mean.high:.2f}]".replace("0.", ".")
        assert said in text, (place, said)
    for role in ("subject_last", "last"):
        for layer in (22, 23):
            mean = means["residual", role, layer]
            assert f"{mean.effect:.2f} [{mean.low:.2f}, {mean.high:.2f}]".replace("0.", ".") in text
