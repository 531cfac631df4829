"""Text of others is shown and never obeyed, wherever it reaches a terminal; and what is too long is cut."""

import io
import json
import unicodedata
from dataclasses import replace

import pytest
from helpers.handmade import HOSTILE, a_prompt, a_report, a_request, a_trace, an_edit, sites_at
from helpers.tiny_models import byte_tokenizer, tiny_model
from rich.console import Console
from typer.testing import CliRunner

from lens_defense.app.command_line import app
from lens_defense.app.report_page import Conversation, save_report
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.rate_bars import rate_bars
from lens_defense.prompts.chat_template import bind_arguments
from lens_defense.prompts.conversation import tokenize_answer, tokenize_text
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.prompts.request_files import requests
from lens_defense.shown_text import NAME_LETTERS, shown, shown_names

COMMANDS = (
    *HOSTILE,
    "\x1b]0;title\x07",
    "\x1b[31mred\x9b2J",
    "\u2066\u202ea\u2069",
    "[/]",
    "[bold]\\",
    "x" * 10**6,
)
HALF = "half \ud83d"


def is_safe(text):
    return not any(
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in "\u202e\u2066\u2069"
        for letter in text.replace("\n", "")
    )


def everything_of(text):
    """Values in which a text stands wherever it can stand."""
    item = a_request(f"make {text} now", text, id=text)
    report = a_report(title=text)
    verdicts = [
        replace(
            row,
            verdicts_before={**row.verdicts_before, text: "answer"},
            verdicts_after={**row.verdicts_after, text: "answer"},
        )
        for row in report.rows
    ]
    edit = replace(an_edit([item, item]), model=text, method=text)
    return {
        "request": item,
        "prompt": a_prompt(("a", text, "b"), subject=(1, 2), request=item, template=()),
        "suite item": SuiteItem("edited", item),
        "suite": Suite(text, "check", (SuiteItem("edited", item),), (text,)),
        "trace": replace(a_trace(model=text), components=(text,)),
        "edit": edit,
        "forecast": str(edit.forecast),
        "report": replace(report, rows=tuple(verdicts)),
    }


@pytest.mark.parametrize("text", COMMANDS, ids=range(len(COMMANDS)))
def test_what_is_printed_holds_no_command_and_ends(text):
    for name, value in everything_of(text).items():
        printed = value if isinstance(value, str) else repr(value)
        assert is_safe(printed), name
        assert len(printed) < 12_000, name


@pytest.mark.parametrize("text", COMMANDS, ids=range(len(COMMANDS)))
def test_rich_shows_a_report_as_it_is(text):
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    report = everything_of(text)["report"]
    console.print(report)
    printed = console.file.getvalue()
    assert is_safe(printed) and len(printed) < 30_000
    if text in ("[/]", "[bold]\\"):
        assert text in printed, "markup is shown and not read"


def test_a_ledger_shows_names(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model.cfg, "model_name", "\x1b[31m")
    assert is_safe(repr(Ledger(model)))


def test_shown():
    assert shown("a\x1b]0;b\x07\nc\td\u202e") == "a\ufffd]0;b\ufffd↵c⇥d\ufffd"
    assert len(shown("x" * 10**6)) == NAME_LETTERS and shown("x" * 10**6).endswith("…")
    joined = "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c"
    assert shown(joined) == joined, "letters of many scripts are joined by characters without a width"
    assert shown_names("abc", most=2) == "a, b ..."


def test_an_error_on_the_command_line_obeys_nothing(tmp_path):
    name = str(tmp_path / "\x1b[31m\x07")
    result = CliRunner().invoke(app, ["demo", "--model", name, "--out", str(tmp_path / "demo")])
    assert result.exit_code == 2 and "lens-defense: " in result.stderr
    assert is_safe(result.stderr)


def test_a_megabyte_makes_a_page_of_usual_size(tmp_path):
    text = "y" * 10**6
    values = everything_of(text)
    trace = a_trace([values["prompt"], values["prompt"]], answers=[text, text], model=text)
    page = save_report(
        tmp_path / "page.html",
        title=text,
        trace=trace,
        sites=sites_at(),
        edit=values["edit"],
        reports={text: values["report"]},
        conversations=[Conversation(text, text, text, harmful=False)],
        reproduce=text,
        seconds={text: 1.0},
    )
    assert page.stat().st_size < 500_000
    assert len(heatmap(trace[0], sites_at()).to_json()) < 100_000
    assert len(rate_bars({text: values["report"]}).to_json()) < 100_000


@pytest.mark.parametrize(
    "use",
    [
        lambda text: request(text),
        lambda text: request("make a lamp", "lamp", id=text),
        lambda text: request("make a lamp", "lamp", prefill=text),
        lambda text: request("make a lamp", "lamp").inside(text + "{}"),
        lambda text: tokenize_text(byte_tokenizer(), text),
        lambda text: tokenize_answer(byte_tokenizer(), tokenize(byte_tokenizer(), request("hello")), text),
        lambda text: bind_arguments(byte_tokenizer(chat=True), {}, text),
    ],
)
def test_half_a_character_is_a_sentence(use):
    with pytest.raises(ValueError, match=r"holds '\\ud83d', half of a character") as caught:
        use(HALF)
    assert is_safe(str(caught.value))
    use("whole \U0001f600")


def test_half_a_character_in_a_file_leaves_its_row_out(tmp_path):
    file = tmp_path / "requests.jsonl"
    rows = [{"text": "make a lamp", "subject": "lamp"}, {"text": HALF}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="1 of 2 rows were left out: .*half of a character"):
        assert [item.text for item in requests(str(file))] == ["make a lamp"]


def test_half_a_character_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"r\.json cannot be written: .* holds '\\ud83d'"):
        a_report(title=HALF).save(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())
