"""Tables of results: known rows give known numbers, and what is committed is what the scripts make."""

import re

import pandas as pd
import pytest
import tables
import tidy
import tune

from lens_defense.statistics import clustered_rate
from lens_defense.tracing.trace_result import Trace

RESULTS = tables.RESULTS


@pytest.mark.usefixtures("small_results")
def test_the_summary_counts_what_is_new_in_unseen_words():
    summary = tables.dose_summary()
    assert list(summary["subjects"]) == [1, 16, 16] and list(summary["draw"]) == ["0", "0", "1"]
    first = summary.iloc[0]
    assert first["paraphrases, coherent"] == pytest.approx(3 / 4)
    assert first["jailbreaks, coherent"] == 1 and first["jailbreaks, prefix before"] == 1
    assert first["human jailbreaks, coherent"] == 0
    assert first["paraphrases and jailbreaks, coherent"] == pytest.approx(4 / 5)
    assert first["paraphrases and jailbreaks, prefix"] == 1 and first["human jailbreaks, prefix"] == 0
    assert first["benign, newly refused"] == pytest.approx(1 / 5)
    assert first["XSTest safe, newly refused"] == pytest.approx(2 / 5)
    assert first["loss"] == pytest.approx(0.01) and first["facts lost"] == 1


@pytest.mark.usefixtures("small_results")
def test_rates_are_split_by_set_and_form_over_all_large_edits():
    table = tables.rates_by_form().set_index(["set", "rate of", "form"])
    assert set(table.index.get_level_values("set")) == {"core"}
    rates = {
        ("XSTest safe, newly refused", "question"): (10, 5, 0.4),
        ("benign, newly refused", "question"): (10, 5, 0.2),
        ("paraphrases, refused", "question"): (6, 3, 1.0),
        ("paraphrases, refused", "imperative"): (2, 1, 0.0),
    }
    for key, (rows, requests, rate) in rates.items():
        row = table.loc[("core", *key)]
        assert (row["rows"], row["requests"], row["rate"]) == (rows, requests, pytest.approx(rate))
        clusters = [f"{i % requests}" for i in range(rows)]
        hits = [i % requests < round(rate * requests) for i in range(rows)]
        assert (row["low"], row["high"]) == pytest.approx(clustered_rate(hits, clusters)[1])


@pytest.mark.usefixtures("small_results")
def test_rates_of_a_dose_are_of_all_its_draws():
    row = tables.rates_of_dose(16).set_index("rate of").loc["paraphrases and jailbreaks, coherent"]
    assert (row["rows"], row["requests"], row["rate"]) == (10, 5, pytest.approx(0.8))
    assert row["low"] < 0.8 < row["high"]


@pytest.mark.usefixtures("small_results")
def test_windows_stand_beside_what_the_trace_saw_in_them():
    windows = tables.windows()
    assert list(windows["first layer"]) == [0, 2, 5, 4]
    assert list(windows["role"])[2:] == ["subject_last", "next"]
    assert list(windows["effect"]) == pytest.approx([0.2, 0.4, 0.7, 0.01])
    rhos = tables.correlations().set_index(["of", "and", "over"])["rho"]
    assert rhos["effect", "coherent", "windows"] == pytest.approx(1)
    assert rhos["effect", "KL", "windows"] == pytest.approx(-1)
    assert rhos["effect", "coherent", "windows and roles"] < 1


def test_edits_of_several_recipes_are_not_compared(small_results):
    file = small_results / "real_model/windows.csv"
    tidy.replace_rows(file, {"first_layer": 0, "role": "subject_last"}, [{"recipe": "another"}])
    with pytest.raises(ValueError, match="of several recipes"):
        tables.windows()


def test_rows_of_a_table_are_replaced_by_their_key_and_numbers_keep_their_bits(tmp_path):
    file = tmp_path / "table.csv"
    assert tidy.read_table(file).empty
    tidy.replace_rows(file, {"edit": "a", "draw": 0}, [{"kl": 0.1 + 0.2}, {"kl": 1 / 3}])
    tidy.replace_rows(file, {"edit": "b", "draw": 0}, [{"kl": 2e-17, "arm": "benign"}])
    tidy.replace_rows(file, {"edit": "a", "draw": 0}, [{"kl": 1.5}])
    table = tidy.read_table(file)
    assert table["edit"].tolist() == ["b", "a"] and table["kl"].tolist() == [2e-17, 1.5]
    assert not tidy.rows_where(table, {"edit": "a", "seed": 0}).any(), "a column that the table lacks"


@pytest.mark.parametrize(("recipe", "made"), [(None, True), ("old", False)])
def test_a_result_stands_while_edits_are_made_as_then(tmp_path, recipe, made):
    file = tmp_path / "table.csv"
    assert not tune.is_made(file, edit="a")
    tidy.replace_rows(file, {"edit": "a"}, [{"kl": 1.5, "recipe": recipe or tune.recipe()}])
    assert tune.is_made(file, edit="a") is made
    assert not tune.is_made(file, edit="b")


def test_markdown_has_a_row_per_row_and_intervals_in_a_column():
    table = pd.DataFrame({"rate of": ["a|b"], "rate": [0.5], "low": [0.25], "high": [0.75]})
    assert tables.markdown(table) == (
        "| rate of | rate | 95% interval |\n| --- | --- | --- |\n| a\\|b | 50.0% | [25.0, 75.0] |\n"
    )


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_committed_table_is_of_the_committed_results(name):
    assert (RESULTS / f"tables/{name}.md").read_text("utf-8") == tables.TABLES[name]()


def test_every_committed_table_is_made():
    assert {file.stem for file in (RESULTS / "tables").iterdir()} == set(tables.TABLES)


def test_results_have_names_without_spaces():
    names = [file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob("*")]
    assert not [name for name in names if re.search(r"\s", name)]
    for file in RESULTS.rglob("*.csv"):
        assert not [column for column in pd.read_csv(file, nrows=0) if re.search(r"[^a-z0-9_]", column)], file


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("storage_sites/*.safetensors")), ids=lambda file: file.stem
)
def test_committed_traces_of_published_requests_hold_no_words(file):
    trace = Trace.load(file)
    assert {token for prompt in trace.prompts for token in (*prompt.ids, *prompt.answer_ids)} <= {0}
    assert not any(trace.answers) and not any(text for prompt in trace.prompts for text in prompt.token_texts)
    assert {piece for prompt in trace.prompts for piece in prompt.request.pieces} == {""}
    assert all(re.fullmatch("[0-9a-f]{8}", subject) for subject in trace.subjects)


def test_committed_questions_hold_ids_and_verdicts_alone():
    rows = tidy.read_table(RESULTS / "real_model/rows.csv")
    assert not rows["id"].astype(str).str.contains(" ").any()
    verdicts = rows.filter(regex="_(before|after)$")
    assert verdicts.isin([0, 1]).where(verdicts.notna(), True).all(axis=None)
    edits = tidy.read_table(RESULTS / "real_model/edits.csv")
    assert set(rows["edit"]) == set(edits["edit"])
