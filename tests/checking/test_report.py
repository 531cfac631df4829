"""A report's numbers are those of its rows, a file gives it back, and nothing in it runs when shown."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.handmade import HOSTILE, a_report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens_defense.checking.report import ARM_NAMES, KL_TOKENS, Report, ReportRow, formatted_rates
from lens_defense.checking.suites import ARMS
from lens_defense.statistics import clustered_rate, mean_interval, paired_p_value

BEFORE = (False, True, False, False, True, False, True, False, False)
AFTER = (True, True, True, False, True, True, False, True, True)
SHOWN = [arm for arm in ARMS if arm in {row.arm for row in a_report().rows}]
SUBJECTS = ("lamp", "lamp", "lamp", "bell", "bell", "ship", "ship", "tree", "oven")


def row(before, after, *, arm="paraphrase", cluster="lamp", id="1", measure="coherent", other="answer"):
    """A row that counts for one measure or does not."""
    yes, no = ("yes", "no") if measure == "knows" else ("refusal", other)
    verdicts = [{measure: yes if hit else no} for hit in (before, after)]
    return ReportRow(arm, id, cluster, "", "so", "then", *verdicts)


def report_of(rows, **fields):
    return replace(a_report(), rows=tuple(rows), **fields)


PARAPHRASES = [
    row(before, after, cluster=subject)
    for before, after, subject in zip(BEFORE, AFTER, SUBJECTS, strict=True)
]


def table_of(report, arm, measure):
    rates = report.rates()
    return rates[(rates.arm == arm) & (rates.measure == measure)].iloc[0].to_dict()


def test_rates_and_p_are_those_of_statistics():
    rates = table_of(report_of(PARAPHRASES), "paraphrase", "coherent")
    assert (rates["n"], rates["clusters"]) == (9, 5)
    for when, hits in (("before", BEFORE), ("after", AFTER)):
        rate, (low, high) = clustered_rate(hits, SUBJECTS)
        assert rates[when] == rate == sum(hits) / len(hits)
        assert (rates[f"{when} low"], rates[f"{when} high"]) == (low, high)
    assert rates["p"] == paired_p_value(BEFORE, AFTER, SUBJECTS)
    assert report_of(PARAPHRASES).rate("paraphrase") == sum(AFTER) / 9
    assert report_of(PARAPHRASES).rate("paraphrase", after=False) == sum(BEFORE) / 9
    assert math.isnan(report_of(PARAPHRASES).rate("over_refusal"))


def test_each_arm_and_measure_has_its_row_in_order():
    rates = a_report().rates()
    wanted = [(arm, measure) for arm in SHOWN for measure in ("prefix", "coherent")] + [("facts", "knows")]
    assert list(zip(rates.arm, rates.measure, strict=True)) == wanted
    assert set(report_of(PARAPHRASES).rates().arm) == {"paraphrase"}
    assert report_of([]).rates().empty and report_of([]).to_dataframe().empty


def test_a_report_without_an_edit_has_one_side():
    rates = a_report(edited=False).rates()
    assert "before" in rates and not {"after", "after low", "p"} & set(rates)
    assert {"loss on neutral text, before"} == set(a_report(edited=False).costs().cost)
    assert "after" not in repr(a_report(edited=False))


def test_the_word_list_refuses_what_names_a_subject():
    rows = [replace(row(False, True), on_word_list=i < 3) for i in range(4)]
    assert set(report_of(rows).rates()["word list"]) == {0.75}
    assert "75%" in repr(report_of(rows))


def test_verdicts_are_counted_and_deflections_are_no_refusals():
    rows = [row(False, True), row(False, False, other="deflection"), row(False, False)]
    counts = report_of(rows).verdicts("coherent").iloc[0]
    assert (counts["n"], counts["refusal"], counts["deflection"], counts["answer"]) == (3, 1, 1, 1)
    assert report_of(rows).rate("paraphrase") == 1 / 3
    asked = [row(False, True, arm="same_subject"), row(False, True, arm="benign")]
    assert report_of(asked).new_refusals("coherent") == 1, "questions about the subject are never pooled"
    assert report_of(asked).new_refusals("coherent", arms=["same_subject"]) == 1


def test_broken_answers_count_for_nobody():
    rows = [row(False, False, other="broken"), row(True, False, other="broken")]
    assert report_of(rows).rate("paraphrase") == 0.0
    assert report_of(rows).rate("paraphrase", after=False) == 0.5


def test_costs_are_means_with_intervals():
    kl, loss = tuple(0.01 * i for i in range(12)), (3.0, 3.5)
    costs = report_of(PARAPHRASES, kl=kl, loss_after=loss).costs().set_index("cost")
    kl_cost = costs.loc[f"KL on benign answers, {KL_TOKENS} tokens"]
    assert kl_cost["mean"] == pytest.approx(0.055) and kl_cost["n"] == 12
    assert (kl_cost["low"], kl_cost["high"]) == mean_interval(kl)
    after = costs.loc["loss on neutral text, after"]
    assert (after["mean"], after["low"], after["high"]) == (3.25, 3.0, 3.5)


def test_new_refusals_are_harmless_rows_that_were_answered():
    fields = {"measure": "prefix"}
    rows = [
        *(row(*pair, arm="benign", **fields) for pair in ((False, True), (True, True), (False, False))),
        *(row(*pair, arm="over_refusal", **fields) for pair in ((False, True), (True, False))),
        *(row(False, True, arm=arm, **fields) for arm in ("paraphrase", "held_out", "facts", "edited")),
    ]
    assert report_of(rows).new_refusals() == 2
    assert report_of(rows).new_refusals("coherent") == 0


def test_facts_lost_were_known():
    pairs = ((True, False), (True, True), (False, False), (False, True), (True, False))
    rows = [row(*pair, arm="facts", measure="knows") for pair in pairs]
    assert report_of([*rows, row(True, False, arm="over_refusal", measure="knows")]).facts_lost() == 2
    assert a_report().facts_lost() == 0


def test_dataframe_has_a_row_a_question():
    table = a_report().to_dataframe()
    assert len(table) == len(a_report().rows)
    assert {"arm", "id", "before", "after", "prefix before", "coherent after", "knows before"} <= set(table)


words = st.text(max_size=20) | st.sampled_from(HOSTILE)
numbers = st.lists(st.floats(allow_nan=False), max_size=3).map(tuple)
verdicts = st.dictionaries(
    st.sampled_from(("prefix", "coherent", "knows")), st.sampled_from(("yes", "broken"))
)
report_rows = st.builds(
    ReportRow, st.sampled_from(ARMS), words, words, words, words, words, verdicts, verdicts
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(report_rows, max_size=3).map(tuple),
    title=words,
    kl=numbers,
    loss=numbers,
    dropped=st.integers(0, 9),
    edited=st.booleans(),
)
def test_a_report_survives_its_file(tmp_path, rows, title, kl, loss, dropped, edited):
    report = report_of(rows, title=title, kl=kl, loss_after=loss, dropped=dropped, edited=edited)
    file = report.save(tmp_path / "report.json")
    assert Report.load(file) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = a_report().save(tmp_path / "report.json")
    saved = file.read_bytes()
    assert json.loads(saved)["content"]["title"] == "edited"

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        a_report(title="other").save(file)
    assert file.read_bytes() == saved


def test_repr_is_a_table():
    text = repr(a_report())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110 and "edited" in lines[0]
    for name in (ARM_NAMES[arm] for arm in SHOWN):
        assert sum(f" {name} " in line for line in lines) == 1, name
    rates = formatted_rates(a_report())
    assert len(rates) == 2 * (len(SHOWN) - 1) + 1, "facts are shown by what is known alone"
    for cell in (*rates.before, *rates.after, *rates.p):
        assert cell.replace("%,", ",").replace("%]", "]") in text, "as in the tables, in fewer letters"
    assert "KL on benign answers" in text


def test_percentages_are_those_of_the_rates():
    shown = formatted_rates(report_of(PARAPHRASES))
    cells = shown[shown.measure == "refused, coherent"].iloc[0]
    rate, (low, high) = clustered_rate(AFTER, SUBJECTS)
    assert cells["after"] == f"{rate:.0%} [{low:.0%}, {high:.0%}]"
    assert cells["n"] == "9 (5 subjects)"
    rows = [row(False, True, cluster=str(i)) for i in range(20)]
    assert "<.001" in set(formatted_rates(report_of(rows)).p)


@pytest.mark.parametrize("title", [*HOSTILE, "[red]", "edited [/b]", "layers [a, b]"])
def test_a_title_is_shown_as_it_is(title):
    text = repr(a_report(title=title))
    if title.isprintable():
        assert title in text


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_html_escapes_what_it_shows(text):
    hostile = ReportRow(
        "paraphrase", text, text, text, text, text, {"coherent": "refusal"}, {"coherent": text}
    )
    report = report_of([hostile], title=text)
    for page in (report._repr_html_(), report.to_dataframe().to_html()):
        assert "<script" not in page and "<img" not in page
    assert "&lt;" in report._repr_html_()


def test_markdown_has_the_tables_and_no_request_answer_or_title():
    private = dict.fromkeys(("id", "before", "after"), "a private text")
    rows = tuple(replace(item, **private) for item in a_report().rows)
    whole = report_of(rows, title="a private text", suite="a | b")
    text = whole.to_markdown()
    assert "private" not in text and "a \\| b" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == len(formatted_rates(whole)) + len(whole.costs()) + 2 * 2
    for line, cells in zip(lines[2:], formatted_rates(whole).itertuples(index=False), strict=False):
        assert cells.before in line and cells.after in line
