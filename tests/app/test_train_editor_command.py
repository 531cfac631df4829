"""`lens-defense train-editor` trains on the organism, goes on where it stopped, and its editor edits."""

import json

import pytest
from typer.testing import CliRunner

import lens_defense as ld
from lens_defense.app.command_line import app
from lens_defense.editing.tuning.train_editor import training_losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:this edit leaks", "ignore:less than 40%", "ignore:the refusal could not be fitted"
)


def run(*arguments):
    return CliRunner().invoke(app, ["train-editor", *map(str, arguments)])


@pytest.fixture
def own_requests(tmp_path):
    path = tmp_path / "requests.jsonl"
    rows = [{"text": row.text, "subject": row.subject} for row in ld.requests("organism")[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("method", ["mend", "ke"])
def test_the_command_end_to_end(method, own_requests, tmp_path):
    out = tmp_path / "editor"
    arguments = ("--method", method, "--model", "organism", "--out", out, "--requests", own_requests)
    first = run(*arguments, "--layers", "1-2", "--steps", 1)
    assert first.exit_code == 0, first.output
    assert f"{method} for the layers 1, 2, on 3 requests" in first.output and "1 steps" in first.output
    assert [loss.step for loss in training_losses(out)] == [1]
    assert run(*arguments, "--layers", "1-2", "--steps", 2).exit_code == 0
    assert [loss.step for loss in training_losses(out)] == [1, 2]
    model, editor = ld.load("organism"), ld.load_editor(out)
    assert editor.origin.steps == 2 and editor.origin.requests == 3 and editor.layers == (1, 2)
    sites = [ld.Site("mlp_out", layer, "subject_last") for layer in (1, 2)]
    plan = ld.edit(model, ld.requests("organism")[3:5], sites, method=editor, progress=False)
    assert plan.method == method and plan.rank > 2
    another = run(*arguments, "--layers", "1-2", "--steps", 2, "--seed", 1)
    assert another.exit_code == 2 and "holds another training" in another.stderr
    assert another.stderr.splitlines()[-1].startswith("lens-defense: ") and "Traceback" not in another.stderr


def test_the_layers_are_those_that_a_trace_finds(own_requests, tmp_path):
    result = run("--method", "mend", "--model", "organism", "--out", tmp_path / "editor",
                 "--requests", own_requests, "--steps", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    sites = ld.locate(ld.trace(ld.load("organism"), ld.requests("organism")[:3], progress=False))
    editor = ld.load_editor(tmp_path / "editor")
    assert len(editor.layers) == len(sites) and set(editor.layers) & {site.layer for site in sites}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "memit"), "'memit' is not one of 'mend'"),
        (("--method", "ke", "--layers", "all"), "--layers names layers here, as in 3-7 or 4,6; got 'all'"),
        (("--method", "ke", "--model", "organism", "--layers", "40"), "layer 40 is not in the model"),
        (("--method", "ke", "--steps", "0"), "Invalid value for '--steps'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(arguments, sentence, tmp_path):
    result = run(*arguments, "--out", tmp_path / "editor")
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "editor").exists()


def test_help_names_the_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = run("--help")
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--method", "--out", "--layers", "--steps", "--seed"))
