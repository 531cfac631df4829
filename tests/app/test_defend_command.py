"""`lens-defense defend` writes a model that refuses, and what says so; a person picks, chats and leaves."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

import lens_defense as ld
from lens_defense.app.command_line import app
from lens_defense.app.defend_command import DefendSettings, defend
from lens_defense.models.fingerprint import model_fingerprint

SETTINGS = DefendSettings(trials=2, methods=("memit", "rome"), asks=False)


def run(out, settings, answers=()):
    """The command on the organism's first two requests; what it printed."""
    output, replies = io.StringIO(), iter(answers)
    defend(
        Console(file=output, width=110),
        name="organism",
        requests=ld.requests("organism")[:2],
        out=out,
        settings=settings,
        ask=lambda *_, **__: next(replies),
    )
    assert next(replies, None) is None
    return output.getvalue()


@pytest.fixture(scope="module")
def defended(tmp_path_factory):
    out = tmp_path_factory.mktemp("defended") / "out"
    return out, run(out, SETTINGS)


def test_the_folder_holds_all_and_the_model_refuses(defended):
    out, output = defended
    names = {path.name for path in out.iterdir()}
    assert names == {
        "search.json", "edit.safetensors", "trace.safetensors", "report.json", "report.html", "front.csv",
        "front.html", "model",
    }  # fmt: skip
    model, report = ld.load(out / "model"), ld.Report.load(out / "report.json")
    assert report.rate("jailbreak", after=False) < 0.5 < report.rate("jailbreak")
    measured = ld.check(model, None, ld.suite("organism").for_requests(ld.requests("organism")[:2]).small())
    assert measured.rate("jailbreak", after=False) == pytest.approx(report.rate("jailbreak"))
    assert "report.html" in output and "on the front" in output


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(defended, tmp_path):
    out, _ = defended
    again = tmp_path / "again"
    run(again, SETTINGS)
    for name in ("edit.safetensors", "model/model.safetensors", "model/README.md"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_a_finished_search_is_not_made_again_and_a_person_is_asked(defended, tmp_path, monkeypatch):
    out, _ = defended
    own = tmp_path / "own"
    own.mkdir()
    (own / "search.json").write_bytes((out / "search.json").read_bytes())
    monkeypatch.setattr("lens_defense.searching.search_edits._Bench.measure", None)
    asks = DefendSettings(trials=2, methods=("memit", "rome"))
    answers = ["1", "c", "what is soap", "", "a", "a", "q"]
    output = run(own, asks, answers)
    assert (own / "adapter" / "adapter_config.json").is_file()
    assert not (own / "model").exists()
    assert "exists" in output or "not empty" in output  # the second adapter into the same folder
    model = ld.load("organism")
    ledger = ld.Ledger(model)
    ledger.apply(ld.load_adapter(own / "adapter", model))
    assert model_fingerprint(model) != model_fingerprint(ld.load("organism"))


def test_a_row_that_the_front_lacks_is_refused(defended, tmp_path):
    out, _ = defended
    own = tmp_path / "own"
    own.mkdir()
    (own / "search.json").write_bytes((out / "search.json").read_bytes())
    settings = DefendSettings(trials=2, methods=("memit", "rome"), asks=False, pick=99)
    with pytest.raises(ValueError, match="no row 99"):
        run(own, settings)
    assert json.loads((own / "search.json").read_text())["content"]["outcomes"]
    assert [path.name for path in own.iterdir()] == ["search.json"]


def test_the_command_that_the_page_names_has_every_option(tmp_path, monkeypatch):
    passed_arguments = {}
    monkeypatch.setattr(
        "lens_defense.app.defend_command.defend", lambda *_, **settings: passed_arguments.update(settings)
    )
    options = ["--method", "rome", "--method", "memit", "--trials", "3", "--minutes", "5", "--pick", "2"]
    options += ["--adapter", "--yes", "--seed", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, ["defend", "organism", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    words = passed_arguments["reproduce"].split()
    assert words[:3] == ["lens-defense", "defend", "organism"]
    assert sorted(words[3:]) == sorted(["--out", str(tmp_path / "out"), *options])
    settings = passed_arguments["settings"]
    assert (settings.methods, settings.pick, settings.write, settings.asks) == (
        ("rome", "memit"),
        2,
        "adapter",
        False,
    )


def test_without_a_terminal_yes_is_wanted(tmp_path):
    result = CliRunner().invoke(app, ["defend", "organism", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "give --yes" in result.output
