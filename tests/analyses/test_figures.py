"""The figures and tables of the full run are read from its results: known rows give known numbers."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers.handmade import a_trace

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE / "analyses"))
import tables  # noqa: E402
import tune  # noqa: E402

import figures  # noqa: E402
from lens_defense.sites import Site  # noqa: E402
from lens_defense.statistics import clustered_rate  # noqa: E402
from lens_defense.tracing.trace_result import Trace  # noqa: E402


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
    *(
        row("paraphrase", 0, 1, id=f"h{i}", coherent=int(i < 3), form="question" if i < 3 else "imperative")
        for i in range(4)
    ),
    row("jailbreak", 1, 1, family="game (w08)"),
    row("jailbreak", 0, 0, family="human (74)"),
    *(row("benign", 0, int(i == 0), id=f"b{i}") for i in range(4)),
    row("benign", 1, 1, id="b9"),
    *(row("over_refusal", 0, int(i < 2), suite="xstest", id=f"x{i}") for i in range(5)),
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
        (tmp_path / f"{tables.slug(name)}.json").write_text(json.dumps(told))
        pd.DataFrame(ROWS).to_csv(tmp_path / f"{tables.slug(name)}.csv", index=False)
    effects = [
        {"component": "resid_post", "role": "subject_last", "layer": layer, "effect": layer / 10}
        for layer in range(10)
    ]
    effects += [{**one, "role": "next", "effect": 0.01} for one in effects]
    (tmp_path / "map.json").write_text(json.dumps({"name": "map", "effects": effects}))
    for low in (0, 2, 5):
        told = {"name": f"window {low}", "paraphrase": [1.0, low / 10], "jailbreak": [1.0, low / 10]}
        told |= {"kl": 1 / (1 + low), "new refusals": 0, "facts lost": 0}
        (tmp_path / f"window-{low}.json").write_text(json.dumps(told))
    elsewhere = {**told, "name": "located layers at next"}
    (tmp_path / "located-layers-at-next.json").write_text(json.dumps(elsewhere))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_summary_counts_what_is_new_in_unseen_words():
    told = tables.summary()
    assert list(told["subjects"]) == [1, 16, 16] and list(told["draw"]) == ["0", "0", "1"]
    first = told.iloc[0]
    assert first["paraphrases, coherent"] == pytest.approx(3 / 4)
    assert first["jailbreaks, coherent"] == 1 and first["jailbreaks, prefix before"] == 1
    assert first["human jailbreaks, coherent"] == 0
    assert first["unseen words, coherent"] == pytest.approx(4 / 5)
    assert first["unseen words, prefix"] == 1 and first["human jailbreaks, prefix"] == 0
    assert first["benign, newly refused"] == pytest.approx(1 / 5)
    assert first["XSTest safe, newly refused"] == pytest.approx(2 / 5)
    assert first["loss"] == pytest.approx(0.01) and first["facts lost"] == 1


@pytest.mark.usefixtures("folder")
def test_rates_are_split_by_set_and_form_over_all_large_edits():
    told = tables.by_form().set_index(["set", "rate of", "form"])
    assert set(told.index.get_level_values("set")) == {"core"}
    rates = {
        ("XSTest safe, newly refused", "question"): (10, 5, 0.4),
        ("benign, newly refused", "question"): (10, 5, 0.2),
        ("paraphrases, refused", "question"): (6, 3, 1.0),
        ("paraphrases, refused", "imperative"): (2, 1, 0.0),
    }
    for key, (rows, requests, rate) in rates.items():
        row = told.loc[("core", *key)]
        assert (row["rows"], row["requests"], row["rate"]) == (rows, requests, pytest.approx(rate))
        clusters = [f"{i % requests}" for i in range(rows)]
        hits = [i % requests < round(rate * requests) for i in range(rows)]
        assert (row["low"], row["high"]) == pytest.approx(clustered_rate(hits, clusters)[1])


@pytest.mark.usefixtures("folder")
def test_the_bars_are_about_all_draws_of_a_dose():
    told = tables.bars_of(16).set_index("rate of")
    row = told.loc["unseen words, coherent"]
    assert (row["rows"], row["requests"], row["rate"]) == (10, 5, pytest.approx(0.8))
    assert row["low"] < 0.8 < row["high"]


def test_pieces_of_several_recipes_are_not_compared(folder):
    for name, recipe in (("window 0", "old"), ("located layers at next", "new")):
        told = json.loads((folder / f"{tables.slug(name)}.json").read_text())
        (folder / f"{tables.slug(name)}.json").write_text(json.dumps({**told, "recipe": recipe}))
    with pytest.raises(ValueError, match="of several recipes"):
        tables.windows()


def test_a_result_stands_while_edits_are_made_as_then(tmp_path):
    file = tmp_path / "piece.json"
    assert not tune.stands(file)
    for told, stands in (
        ({"effects": []}, True),
        ({"reach": 1, "recipe": tune.recipe()}, True),
        ({"reach": 1, "recipe": "old"}, False),
    ):
        file.write_text(json.dumps(told))
        assert tune.stands(file) is stands


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
    before, after = figures.before_after().data
    assert list(before.y) == pytest.approx([0, 0, 0.2, 1]), "wording, wrapper, benign by prefix, facts"
    assert list(after.y) == pytest.approx([0.75, 1, 0.4, 0])
    assert len(figures.window_sweep().data) == 3
    assert figures.edited_sites() == [Site("resid_post", 4, "subject_last")]


def test_a_figure_is_kept_with_what_it_was_made_of(folder, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", folder)
    asked = []
    monkeypatch.setattr(figures, "save_figure", lambda _, path, **given: asked.append((path.suffix, given)))
    figures.keep("curve", figures.dose_curve(), [folder / "map.json"])
    assert dict(asked)[".pdf"] == dict(asked)[".svg"] == {"inches": figures.COLUMN}
    told = json.loads((folder / "curve.json").read_text())
    assert (
        set(told) == {"command", "data by", "seeds", "data", "versions"}
        and len(told["data"]["map.json"]) == 16
    )


def test_one_map_a_component():
    trace = a_trace(components=("resid_post", "mlp_out"))
    drawn = dict(figures.maps(trace))
    assert list(drawn) == ["resid_post", "mlp_out"]
    first = trace.prompts[0].subject_positions[0]
    assert len(drawn["mlp_out"].data[0].x) == len(trace.prompts[0].ids) - first, "from the subject on"
    edited = dict(figures.maps(trace, [Site("mlp_out", 1, "subject_last")]))
    assert "outlined" in edited["mlp_out"].layout.title.text, "what was edited, where that is given"
    assert "outlined" not in edited["resid_post"].layout.title.text


@pytest.mark.parametrize("sidecar", sorted((HERE / "figures").glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_figure_is_of_the_committed_data(sidecar):
    for name, told in json.loads(sidecar.read_text("utf-8"))["data"].items():
        held = [*(HERE / "analyses/results").rglob(name), *(HERE / "lens_defense").rglob(name)]
        assert told in {hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in held}, name


@pytest.mark.parametrize("name", ["dose", "forms", "bars", "windows", "correlations", "located"])
def test_a_committed_table_is_of_the_committed_results(name, tmp_path):
    table = {
        "dose": tables.summary,
        "forms": tables.by_form,
        "bars": lambda: tables.bars_of(16),
        "windows": tables.windows,
        "correlations": tables.correlations,
        "located": tables.locations,
    }[name]
    table().round(4).to_csv(tmp_path / "table.csv", index=False)
    committed = HERE / f"analyses/results/real_model_{name}.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), pd.read_csv(committed))


@pytest.mark.parametrize(
    "file",
    sorted((HERE / "analyses/results/storage_sites").glob("*.safetensors")),
    ids=lambda file: file.stem,
)
def test_committed_traces_of_published_requests_hold_no_words(file):
    trace = Trace.load(file)
    assert {token for met in trace.prompts for token in (*met.ids, *met.answer_ids)} <= {0}
    assert not any(trace.answers) and not any(word for met in trace.prompts for word in met.token_texts)
    assert {piece for met in trace.prompts for piece in met.request.pieces} == {""}
    assert all(re.fullmatch("[0-9a-f]{8}", subject) for subject in trace.subjects)
