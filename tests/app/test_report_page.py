"""The page as data: what it says, that it stands alone, and that text in it stays text."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.handmade import HOSTILE, a_prompt, a_report, a_request, a_trace, an_edit, sites_at

import lens_defense as ld
from lens_defense.app.report_page import Conversation, save_report
from lens_defense.checking.check import rows_for_edits
from lens_defense.checking.report import ReportRow
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.shown_text import visible_text
from lens_defense.tracing.site_map import ScoreMap


class Page(HTMLParser):
    """Tags, what would be loaded, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def written(path: Path, text: str = "ricin", **changed: object) -> str:
    """The source of a page in which a text stands wherever a text can stand."""
    request = a_request(f"make {text} now", text)
    prompt = a_prompt(["make", f" {text}", " now", text], subject=(1, 2), request=request, template=())
    fields = {
        "title": text,
        "trace": a_trace([prompt, a_prompt()], model=text, answers=[text, text]),
        "sites": sites_at(),
        "edit": an_edit([request, a_request()]),
        "reports": {
            text: a_report(title=text),
            "control": a_report({"edited": (0, 1), "over_refusal": (0, 0)}),
        },
        "conversations": [Conversation(text, text, text, harmful) for harmful in (True, False)],
        "reproduce": f"lens-defense demo\n{text}",
        "seconds": {text: 1.25, "check": 2.5},
        "restored": True,
    }
    return save_report(path / "report.html", **(fields | changed)).read_text("utf-8")  # type: ignore[arg-type]


def parts_of(source: str) -> dict:
    """What the frozen parts of a page show."""
    start = source.index('id="parts">') + len('id="parts">')
    return json.loads(source[start : source.index("</script>", start)])


def test_the_page_stands_alone_and_is_small(tmp_path: Path):
    source = written(tmp_path)
    page = Page(source)
    assert page.loads == [] and page.open == []
    assert "default-src 'none'" in source and "plotly" not in source.lower()
    assert len(source) < 200_000, "before: 4.8 MB"
    assert [part for part in ("maps", "plan", "check") if f'data-part="{part}"' not in source] == []
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_adds_no_tag(tmp_path: Path, text: str):
    plain, page = Page(written(tmp_path)), Page(written(tmp_path, text))
    assert page.tags == plain.tags
    assert page.loads == page.handlers == []
    assert page.text.count(visible_text(text)) >= 6
    assert parts_of(written(tmp_path, text))["map"]["views"][1]["columns"][1]["text"].strip("·")
    assert not set(page.text) & set("\x00\x1b\x07\u202e")


def test_the_page_describes_the_run(tmp_path: Path):
    text = Page(written(tmp_path)).text
    for part in (
        "layers 1, 2 of the residual stream at the last subject token",
        "0.510",
        "0.400 to 0.600",
        "memit planned a change of rank 2",
        "mom2 update weight1000.0",
        "0.0900",
        "6% to 81%",
        "1 of 16",
        "0 of 6",
        "0.0150",
        "KL on benign answers, first token",
        "all3.8 s",
        "The weights are what they were: hash 0123456789abcdef",
        "lens-defense demo\n",
    ):
        assert part in text, part


def test_every_report_has_its_rates_with_intervals_and_the_answers_behind_them(tmp_path: Path):
    source = written(tmp_path)
    parts = parts_of(source)
    assert 'data-of="check0"' in source and 'data-of="check1"' in source
    rate = next(row for row in parts["check0"]["rates"] if row["arm"] == "edited")
    assert [rate[name] for name in ("before", "before low", "before high")] == [0.0, 0.0, 0.324]
    assert [rate[name] for name in ("after", "after low", "after high", "p")] == [1.0, 0.676, 1.0, 0.008]
    assert "paraphrase" not in {row["arm"] for row in parts["check1"]["rates"]}
    answers = parts["check0"]["answers"]
    failed = [row["failed"] for row in answers]
    assert failed == sorted(failed, reverse=True) and any(failed) and not all(failed)


def test_the_answers_stand_under_their_questions_where_the_suite_is_given(tmp_path: Path):
    asked = ld.suite("core").small(paraphrases=2, jailbreaks=1)
    edit = an_edit([a_request()])
    items = rows_for_edits(asked, [edit])[0].items
    verdicts = {"prefix": "answer"}, {"prefix": "refusal"}
    rows = [
        ReportRow(item.arm, str(i), item.cluster, item.family, "x", "y", *verdicts)
        for i, item in enumerate(items)
    ]
    report = replace(a_report(), rows=tuple(rows))
    parts = parts_of(written(tmp_path, reports={"one": report}, edit=edit, suite=asked))
    assert len({item.request.text for item in items if item.arm == "paraphrase"}) == 2
    for row in parts["check0"]["answers"]:
        item = items[int(row["id"])]
        assert row["question"] == ("" if item.arm == "jailbreak" else item.request.text)


def test_the_map_of_the_edited_model_stands_beside_the_first_on_its_scale(tmp_path: Path):
    before = a_trace()
    after = replace(
        before, patched=before.patched - 0.5, corrupted=before.corrupted - 0.5, clean=before.clean - 1.4
    )
    parts = parts_of(written(tmp_path, trace=before, after=after))
    view = parts["map"]["views"][1]
    assert parts["map"]["after"] and view["after"] == view["grids"], "the same patches bring the same nats"


def test_whether_the_weights_are_back_is_said_only_if_known(tmp_path: Path):
    assert "not what they were" in Page(written(tmp_path, restored=False)).text
    assert "what they were" not in Page(written(tmp_path, restored=None)).text


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({}, "was restored"),
        ({"direction": "noising"}, "put into the clean run"),
        ({"exact": False}, "estimated by a gradient"),
    ],
)
def test_the_page_says_how_its_maps_were_made(tmp_path: Path, settings, sentence):
    trace = replace(a_trace(), settings=TraceSettings(**settings))
    text = Page(written(tmp_path, trace=trace)).text
    assert sentence in text
    assert ("restoring this state brings the answer back" in text) == ("direction" not in settings)


def test_the_page_says_what_the_cells_of_a_score_map_are(tmp_path: Path):
    trace = a_trace()
    scores = ScoreMap(
        trace.prompts,
        trace.components,
        trace.layers,
        trace.model,
        trace.model_layers,
        trace.fingerprint,
        scores=trace.effects,
        quantity="distance of states",
    )
    text = Page(written(tmp_path, trace=scores)).text
    assert "Its maps show distance of states" in text and "Colours: distance of states" in text
    assert "restor" not in text


def test_without_an_edit_there_is_no_headline_and_a_report_is_wanted(tmp_path: Path):
    source = written(tmp_path, trace=a_trace(), reports={"as it is": a_report(edited=False)})
    assert "coherent refusals on the edited subjects" not in Page(source).text
    with pytest.raises(ValueError, match="one report"):
        written(tmp_path, reports={})


def test_several_edits_have_a_table_and_a_forecast_each(tmp_path: Path):
    edits = [an_edit([a_request()], layers=(1,)), an_edit([a_request("What is ricin?", "ricin")])]
    source = written(tmp_path, edit=edits)
    parts, text = parts_of(source), Page(source).text
    assert [parts[f"plan{i}"]["subjects"] for i in (0, 1)] == [["pipe bomb"], ["ricin"]]
    assert "2 edits were planned, each on the model with those before it" in text
    assert "1memit1last subject token100%1pipe bomb2memit1, 2last subject token100%1ricin" in text
    assert "fingerprint of the edited layers before edit 2" in text
    alone = written(tmp_path, edit=edits[:1])
    assert "The edits" not in alone and "edit 1" not in alone, "one edit needs no table"
    with pytest.raises(ValueError, match="at least one edit"):
        written(tmp_path, edit=[])


def test_a_trace_and_an_edit_of_models_that_differ_are_no_page(tmp_path: Path):
    other = replace(a_trace(), fingerprint=replace(a_trace().fingerprint, config="another"))
    with pytest.raises(ValueError, match="of models with other config; give those of one model"):
        written(tmp_path, trace=other)


def test_answers_to_harmful_requests_are_cut_to_a_dozen_words():
    long = " ".join(map(str, range(20)))
    cut = Conversation("?", long, long, harmful=True)
    assert cut.before == cut.after == " ".join(map(str, range(12))) + " ..."
    assert Conversation("?", long, long, harmful=False).before == long
