"""The command line says what it can do, and what went wrong in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lens_defense.app.demo as demos
from lens_defense.app.command_line import app
from lens_defense.models.devices import explain_out_of_memory
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.prompts.request_files import requests


def run_command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_help_names_the_command():
    result = run_command("--help")
    assert result.exit_code == 0
    assert "demo" in result.output and "take it out" in result.output


def test_help_of_the_demo_names_its_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = run_command("demo", "--help")
    assert result.exit_code == 0
    assert all(
        option in result.output for option in ("--model", "--out", "--no-cache", "--device", "smollm2")
    )


def test_help_loads_no_model_library():
    code = (
        "import sys; import lens_defense.app.command_line as cli; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(cli.app, ['demo', '--help']).exit_code == 0;"
        "assert not {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("name", ["nope", "./nope", "nope.gguf", " "])
def test_a_model_that_is_not_there_is_one_sentence(tmp_path, name):
    result = run_command("demo", "--model", name, "--out", str(tmp_path / "demo"))
    assert result.exit_code == 2
    assert result.stderr.startswith("lens-defense: ") and name in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)


def test_a_file_in_the_folders_place_is_one_sentence(tmp_path):
    file = tmp_path / "demo"
    file.write_text("mine", "utf-8")
    result = run_command("demo", "--model", "nope", "--out", str(file))
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert file.read_text("utf-8") == "mine"


def test_options_reach_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr(demos, "demo", lambda _, **options: calls.append(options))
    assert run_command("demo").exit_code == 0
    options = ("--model", "mine", "--out", "there", "--no-cache", "--device", "cuda:1")
    assert run_command("demo", *options).exit_code == 0
    assert calls == [
        {"name": "smollm2", "out": Path("demo"), "cache": True, "device": None},
        {"name": "mine", "out": Path("there"), "cache": False, "device": "cuda:1"},
    ]


def test_an_interrupt_is_one_sentence(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demos, "demo", interrupted)
    result = run_command("demo")
    assert result.exit_code == 130 and "stopped" in result.stderr


def test_an_unknown_command_or_option_is_refused():
    assert run_command("trace").exit_code == 2
    assert run_command("demo", "--nope").exit_code == 2


def test_trace_writes_one_file_per_request_and_the_map(tmp_path):
    forms = [jailbroken_contexts(request)[0] for request in three_requests()]
    rows = [{"id": form.id, "subject": form.subject, "text": form.text} for form in forms]
    second = jailbroken_contexts(three_requests()[0])[1]
    rows.append({"id": "second", "subject": second.subject, "text": second.text})  # two of one subject
    rows.append({"id": "benign", "subject": second.subject, "text": second.text, "kind": "benign"})
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    arguments = ["trace", "--model", "organism", "--requests", str(file), "--out", str(tmp_path / "out")]
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out/traces").iterdir())) == 4
    assert "not traced: 1 benign and safe requests" in result.output
    assert "strongest sites: resid_post 0 at subject_last" in " ".join(result.output.split())
    assert (tmp_path / "out/map.html").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/traces").iterdir()}
    assert run_command(*arguments).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/traces").iterdir()}


def test_a_device_that_is_not_there_is_one_sentence(tmp_path):
    result = run_command("trace", "--requests", "organism", "--out", str(tmp_path), "--device", "cuda:99")
    assert result.exit_code == 2 and "the device 'cuda:99' cannot be used here" in result.stderr
    assert result.stderr.count("\n") <= 3, "wrapped, not a traceback"


def test_what_does_not_fit_into_memory_is_one_sentence(monkeypatch):
    def full(*_, **__):
        with explain_out_of_memory("9 rows of 9 tokens"):
            raise MemoryError

    monkeypatch.setattr(demos, "demo", full)
    result = run_command("demo")
    assert result.exit_code == 2 and result.stderr.startswith("lens-defense: 9 rows")


def test_a_device_that_runs_full_is_one_sentence(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB")

    monkeypatch.setattr(demos, "demo", full)
    result = run_command("demo")
    assert result.exit_code == 2 and "do not fit into memory; take a smaller model" in " ".join(
        result.stderr.split()
    )


def three_requests():
    return requests("organism")[:3]
