"""The command line says what it can do, and what went wrong in one sentence."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

import lens_defense
import lens_defense.app.demo as demos
from lens_defense.app.command_line import app
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.models.devices import explain_out_of_memory
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.prompts.request_files import requests
from lens_defense.tracing.trace_result import Trace


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


def test_options_reach_the_demo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(demos, "demo", lambda _, **options: calls.append(options))
    assert run_command("demo").exit_code == 0
    options = ("--model", "mine", "--out", "there", "--no-cache", "--device", "cuda:1", "--dtype", "bfloat16")
    assert run_command("demo", *options).exit_code == 0
    assert [call.pop("reproduce") for call in calls] == [
        "lens-defense demo --model smollm2",
        "lens-defense demo --model mine --dtype bfloat16",
    ]
    common = {"requests": None}
    assert calls == [
        {
            **common,
            "name": "smollm2",
            "out": Path("demo"),
            "cache": True,
            "device": None,
            "dtype": torch.float32,
        },
        {
            **common,
            "name": "mine",
            "out": Path("there"),
            "cache": False,
            "device": "cuda:1",
            "dtype": torch.bfloat16,
        },
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_sentence(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demos, "demo", lambda *_, **__: os.kill(os.getpid(), number))
    result = run_command("demo")
    assert signal.getsignal(signal.SIGTERM) is handler
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
    arguments += ["--format", "html", "--format", "csv", "--format", "json"]
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out/traces").iterdir())) == 4
    assert "left out: 1 benign or safe" in result.output
    assert "strongest sites: resid_post 0 at subject_last" in " ".join(result.output.split())
    assert (tmp_path / "out/map.html").stat().st_size > 10_000
    means = Trace.load(tmp_path / "out/trace.safetensors").by_role()
    for table in (pd.read_csv(tmp_path / "out/map.csv"), pd.read_json(tmp_path / "out/map.json")):
        pd.testing.assert_frame_equal(table, means, check_dtype=False)
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


def commands(group=None, path=()):
    """Every command with its path, groups too."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def examples(command):
    """The examples of a help text, as the arguments of lens-defense."""
    lines = command.epilog.split("\n\n")
    assert lines[0] == "Examples:" and len(lines) > 1
    parts = [shlex.split(line) for line in lines[1:]]
    assert all(part[0] == "lens-defense" for part in parts)
    return [part[1:] for part in parts]


EXAMPLES = [(path, example) for path, command in commands() for example in examples(command)]


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=lambda value: " ".join(value))
def test_the_examples_of_every_help_text_are_parsed(path, example):
    assert tuple(example[: len(path)]) == path, "an example is of its own command"
    command = typer.main.get_command(app)
    while getattr(command, "commands", {}):
        name, *example = example
        command = command.commands[name]
    if example != ["--help"]:
        command.make_context(command.name, example)


def test_the_version():
    result = run_command("--version")
    assert (result.exit_code, result.output) == (0, f"lens-defense {lens_defense.__version__}\n")


WRITING = {
    "demo": ["demo", "--model", "organism"],
    "trace": ["trace", "--model", "organism", "--requests", "organism"],
    "train": ["organism", "train"],
}


@pytest.fixture
def no_model(monkeypatch):
    """Nothing long may begin."""

    def begun(*_, **__):
        raise AssertionError("the long work began")

    for name in ("app.demo.load", "app.trace_command.load", "organism.training.train"):
        monkeypatch.setattr(f"lens_defense.{name}", begun)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("place", ["under a file", "refused", "a file"])
def test_an_impossible_out_is_a_sentence_before_the_work(tmp_path, monkeypatch, command, place):
    (tmp_path / "file").write_text("mine", "utf-8")
    out = tmp_path / {"under a file": "file/below", "refused": "new/deep", "a file": "file"}[place]
    if place == "refused":  # a test may run as root, who may write anywhere

        def refuse(**_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("lens_defense.app.output_folder.tempfile.TemporaryFile", refuse)
    result = run_command(*WRITING[command], "--out", str(out))
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    if place != "a file":  # which the parser refuses
        assert result.stderr.startswith(f"lens-defense: nothing can be written to the folder {out} (")
        assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_model")
def test_a_folder_of_others_is_not_trained_into(tmp_path):
    (tmp_path / "mine").touch()
    result = run_command("organism", "train", "--out", str(tmp_path))
    assert result.exit_code == 2 and "is not empty; name a new one" in result.stderr


@pytest.mark.parametrize("error", ["disk", "tensors"])
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, error):
    def full(*_, **__):
        if error == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Trace, "save", full)
    out = tmp_path / "out"
    result = run_command("demo", "--model", "organism", "--out", str(out))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("lens-defense: ") and "No space left on device" in sentence
    assert sentence.endswith("make room, or name a folder on another disk")
    assert not out.exists(), "nothing is left"


def rows_file(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["demo", "trace"])
@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (
            [{"text": "Make a lamp."}],
            (),
            "no request .* has a subject.* with --subject-field, or let ld.mark_subjects .*$",
        ),
        ([{"ask": "Make a lamp."}], (), r"as in text='ask' \(--text-field ask\)$"),
        (
            [{"text": "Hello.", "kind": "benign"}],
            (),
            "has no harmful request of the split edit.*; set kind to",
        ),
        ([{"text": "Make a lamp.", "subject": "lamp"}, {"text": 3}], ("--strict",), "line 2: .* got 3$"),
        (
            [{"text": "Make a lamp.", "subject": "ricin"}],
            (),
            r"jsonl, line 1: the subject 'ricin' does not occur in the text",
        ),
    ],
)
def test_rows_are_checked_before_the_model_is_loaded(tmp_path, command, rows, options, sentence):
    file = rows_file(tmp_path, *rows)
    out = tmp_path / "out"
    result = run_command(command, "--requests", file, "--out", str(out), *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.search(sentence, line) and not out.exists()


@pytest.mark.filterwarnings("default")
def test_options_of_requests_choose_columns_and_number(tmp_path, monkeypatch):
    taken = []

    def stop(_, chosen, *__, **___):
        taken.extend(chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr("lens_defense.app.trace_command.survey", stop)
    texts = ("Make a lamp.", "Sell the lamp.", "Mend the lamp.")
    good = [{"ask": text, "thing": "lamp"} for text in texts]
    file = rows_file(tmp_path, good[0], {"ask": 3}, *good[1:], {"ask": "Nothing."})
    options = ("--text-field", "ask", "--subject-field", "thing", "--limit", "2", "--model", "organism")
    result = run_command("trace", "--requests", file, "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 130
    assert [request.text for request in taken] == ["Make a lamp.", "Sell the lamp."]
    assert "lens-defense: 1 of 5 rows were left out: " in result.stderr
    assert "UserWarning" not in result.stderr and ".py" not in result.stderr
    assert "left out: 1 without a subject" in result.output


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ((), {}),
        (("--layers", "0,2-4"), {"layers": (0, 2, 3, 4)}),
        (("--layers", "5"), {"layers": (5,)}),
        (("--layers", "every-3"), {"layers": 3}),
        (("--components", "mlp_out,z.3"), {"components": ("mlp_out", "z.3")}),
        (("--positions", "last"), {"positions": ("last",)}),
        (("--min-difference", "0.01"), {"min_difference": 0.01}),
        (
            ("--all",),
            {"positions": "all", "layers": "all", "components": ("resid_post", "mlp_out", "attn_out")},
        ),
        (
            ("--all", "--layers", "1", "--components", "z"),
            {"positions": "all", "layers": (1,), "components": ("z",)},
        ),
    ],
)
def test_options_of_a_trace_become_its_settings(tmp_path, monkeypatch, options, changed):
    seen = []

    def stop(_model, _requests, _folder, settings, **_):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("lens_defense.app.trace_command.survey", stop)
    result = run_command(*WRITING["trace"], "--out", str(tmp_path), *options)
    assert result.exit_code == 130, result.output
    assert seen == [replace(TraceSettings(), **changed)]


@pytest.mark.usefixtures("no_model", "unchecked")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--layers", "some"),
            "--layers is all, every-2, or layers as in 0,4,8-12, the lower one first; got 'some'",
        ),
        (("--layers", "0,9-4"), "the lower one first; got '0,9-4'"),
        (("--layers", ""), "--layers is all"),
        (("--components", "mlp"), "components must be of resid_pre,"),
        (("--positions", "middle"), "positions must be 'all' or a list of"),
    ],
)
def test_settings_that_do_not_exist_are_refused_before_the_model(tmp_path, options, sentence):
    result = run_command(*WRITING["trace"], "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 2 and sentence in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_model_has_not_leaves_no_folder(tmp_path):
    result = run_command(*WRITING["trace"], "--out", str(tmp_path / "out"), "--layers", "40")
    assert result.exit_code == 2 and "layers 0 to 7, got (40,)" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_figure_that_cannot_be_drawn_is_refused_before_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_defense.plotting.theme.find_spec", lambda _: None)
    result = run_command(*WRITING["trace"], "--out", str(tmp_path / "out"), "--format", "pdf")
    assert result.exit_code == 2 and "needs kaleido" in result.stderr


def small_demo(monkeypatch):
    """The organism's demo with less of everything."""
    fit = FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1, extra_rounds=0)
    small = replace(demos.ORGANISM_SETUP, edited=2, jailbreaks=1, harmless=1, fit=fit)
    monkeypatch.setattr(demos, "ORGANISM_SETUP", small)
    monkeypatch.setattr("lens_defense.editing.forecast.NEUTRAL_TEXTS", 2)


@pytest.mark.filterwarnings("ignore:the refusal could not be fitted", "ignore:this edit", "ignore:less than")
def test_a_demo_of_ones_own_requests_keeps_the_earlier_one(tmp_path, monkeypatch):
    small_demo(monkeypatch)
    out = tmp_path / "demo"
    own = [{"ask": request.text, "thing": request.subject} for request in requests("organism")[4:6]]
    file = rows_file(tmp_path, *own)
    assert run_command("demo", "--model", "organism", "--out", str(out)).exit_code == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    options = ("--requests", file, "--text-field", "ask", "--subject-field", "thing")
    result = run_command("demo", "--model", "organism", "--out", str(out), *options)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in (out / "earlier-1").iterdir()} == first
    assert set(Edit.load(out / "edit.safetensors").subjects) == {row["thing"] for row in own}
    page = (out / "report.html").read_text("utf-8")
    assert (
        f"lens-defense demo --model organism --requests {file} --text-field ask --subject-field thing" in page
    )
    assert "earlier-1" in result.output.replace("\n", "")  # lines are broken in a long path
