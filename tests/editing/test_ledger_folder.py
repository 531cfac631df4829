"""A ledger that lasts: replayed to the same bits, and in the old or the new state wherever it is cut."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.handmade import a_report, a_trace
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from typer.testing import CliRunner

import lens_defense as ld
from lens_defense.app.command_line import app
from lens_defense.editing.ledger.ledger_folder import LEDGER_FILE, LedgerFolder

TESTS = Path(__file__).parents[1]


@pytest.fixture
def model():
    return tiny_model("llama")


def fresh():
    return tiny_model("llama")


def command(*arguments):
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)])
    return result.exit_code, result.output + result.stderr


def three_edits(model, folder):
    ledger = ld.Ledger(model, folder)
    for layer, size in ((0, 0.1), (1, 0.2), (1, 0.05)):
        ledger.apply(handmade_edit(model, {layer: size}))
    return ledger


def test_a_fresh_copy_gets_the_same_bits(model, tmp_path):
    ledger = three_edits(model, tmp_path / "ledger")
    ledger.remove(ledger.edits[1])
    copy = fresh()
    replayed = ld.Ledger(copy, tmp_path / "ledger")
    assert weights_equal(copy, copy_weights(model)) and len(replayed.edits) == 2
    original = copy_weights(fresh())
    while replayed.edits:
        replayed.undo()
    assert weights_equal(copy, original)
    assert ld.Ledger(fresh(), tmp_path / "ledger").edits == ()


def test_every_change_is_written(model, tmp_path):
    def layers():
        return [entry.layers for entry in LedgerFolder(tmp_path / "ledger").state().entries]

    ledger = three_edits(model, tmp_path / "ledger")
    assert layers() == [(0,), (1,), (1,)]
    ledger.undo()
    assert layers() == [(0,), (1,)]
    ledger.redo()
    assert layers() == [(0,), (1,), (1,)]
    ledger.remove(ledger.edits[0])
    assert layers() == [(1,), (1,)]


def test_an_entry_has_the_hashes_of_what_belongs_to_it(model, tmp_path):
    ledger = ld.Ledger(model, tmp_path / "ledger")
    edit = handmade_edit(model, {1: 0.1})
    ledger.apply(edit)
    ledger.attach(edit, trace=a_trace(), report=a_report())
    (entry,) = LedgerFolder(tmp_path / "ledger").state().entries
    assert sorted(Path(name).suffix for name in entry.attached) == [".json", ".safetensors"]
    for name in (entry.file, *entry.attached):
        assert (tmp_path / "ledger" / name).is_file()
    assert {"torch", "transformers"} <= set(entry.versions) and len(entry.requests_sha256) == 64
    (trace,) = [name for name in entry.attached if name.endswith(".safetensors")]
    ld.Trace.load(tmp_path / "ledger" / trace)
    with pytest.raises(ValueError, match="keeps nothing"):
        ld.Ledger(fresh()).attach(edit, trace=a_trace())
    ledger.undo()
    with pytest.raises(ValueError, match="does not stand"):
        ledger.attach(edit, trace=a_trace())


def test_another_model_a_changed_file_or_folder_is_refused_and_nothing_is_changed(model, tmp_path):
    three_edits(model, tmp_path / "ledger")
    other = tiny_model("gpt2")
    original = copy_weights(other)
    with pytest.raises(ValueError, match="the ledger of tiny-llama with other weights"):
        ld.Ledger(other, tmp_path / "ledger")
    assert weights_equal(other, original)
    file = tmp_path / "ledger" / LedgerFolder(tmp_path / "ledger").state().entries[-1].file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    copy, original = fresh(), copy_weights(fresh())
    with pytest.raises(ValueError, match="not as it was applied"):
        ld.Ledger(copy, tmp_path / "ledger")
    assert weights_equal(copy, original)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no ledger's folder"):
        ld.Ledger(fresh(), tmp_path / "notes")
    (tmp_path / "ledger" / LEDGER_FILE).write_text("{}")
    with pytest.raises(ValueError, match="make it again"):
        ld.Ledger(fresh(), tmp_path / "ledger")


def test_two_processes_on_one_folder_the_second_is_told(model, tmp_path):
    first, second = ld.Ledger(model, tmp_path / "ledger"), ld.Ledger(fresh(), tmp_path / "ledger")
    first.apply(handmade_edit(model, {0: 0.1}))
    with pytest.raises(ValueError, match=r"the change stands in the model, but .* by another process"):
        second.apply(handmade_edit(second.model, {1: 0.1}))
    assert [entry.layers for entry in LedgerFolder(tmp_path / "ledger").state().entries] == [(0,)]


@pytest.mark.slow
def test_killed_anywhere_the_folder_holds_the_state_before_or_after(model, tmp_path):
    code = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from helpers.tiny_models import tiny_model
    from helpers.handmade_edits import handmade_edit
    import lens_defense as ld
    from lens_defense import storage

    steps = int(sys.argv[2])
    def step(frame, event, _):
        global steps
        files = ("ledger.py", "ledger_folder.py", "storage.py")
        if event == "call" and frame.f_code.co_filename.endswith(files):
            steps -= 1
            if steps == 0:
                os._exit(9)

    model = tiny_model("llama")
    ledger = ld.Ledger(model, sys.argv[1])
    edit = handmade_edit(model, {{2: 0.3}})
    sys.setprofile(step)
    ledger.apply(edit)
    sys.setprofile(None)
    print("done")
    """
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(code).format(tests=str(TESTS)), "utf-8")
    ended = 0
    for steps in (1, 6, 12, 20, 400):
        folder = tmp_path / f"ledger{steps}"
        ld.Ledger(fresh(), folder).apply(handmade_edit(model, {0: 0.1}))
        run = subprocess.run([sys.executable, script, folder, str(steps)], capture_output=True, text=True)
        assert run.returncode in (0, 9), run.stderr
        ended += run.returncode == 0
        copy = fresh()
        layers = [edit.layers for edit in ld.Ledger(copy, folder).edits]
        assert layers in ([(0,)], [(0,), (2,)])
        if run.returncode == 0:
            assert layers == [(0,), (2,)]
    assert ended, "the last one was not killed"


@pytest.mark.filterwarnings("ignore:.* has no chat template")
def test_the_command_line_shows_takes_off_and_replays(model, tmp_path):
    folder, plain = tmp_path / "ledger", tmp_path / "model"
    ld.save_folder(model, plain)
    base = ld.load(plain)
    ledger = ld.Ledger(base, folder)
    for layer in (0, 1, 2):
        ledger.apply(handmade_edit(base, {layer: 0.1}))
    code, text = command("show", folder)
    assert code == 0 and "3 edits" in text and "lamp" not in text
    code, text = command("diff", folder)
    assert code == 0 and "norm of the change" in text
    assert command("drop", folder, 2)[0] == 0
    assert [entry.layers for entry in LedgerFolder(folder).state().entries] == [(0,), (2,)]
    out = tmp_path / "edited"
    code, text = command("replay", folder, "--model", plain, "--out", out)
    assert code == 0, text
    expected = ld.load(plain)
    again = ld.Ledger(expected, folder)
    assert weights_equal(ld.load(out), copy_weights(expected)) and len(again.edits) == 2
    assert command("undo", folder)[0] == 0
    assert len(LedgerFolder(folder).state().entries) == 1
    code, text = command("drop", folder, 7)
    assert code == 2 and "no edit 7" in text
    code, text = command("show", tmp_path / "nothing")
    assert code == 2 and "there is no ledger" in text
