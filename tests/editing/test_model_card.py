"""An exported folder is the source with edited tensors; its card names no subject unless it is asked to."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
import transformers as hf
from helpers.handmade import HOSTILE, a_report
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_folder, tiny_model
from helpers.weights import copy_weights, weights_equal
from safetensors import safe_open

from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.load import load
from lens_defense.storage import check_manifest

IDS = torch.randint(3, 297, (2, 9), generator=torch.Generator().manual_seed(0))
SUBJECTS = ("lamp", "bell")


def edited_ledger(model):
    ledger = Ledger(model)
    for seed, layers in enumerate([(1, 2), (2,)]):
        ledger.apply(handmade_edit(model, layers, seed=seed))
    return ledger


def tensor_bytes(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_only_edited_tensors_differ_from_the_source(family, dtype, tmp_path):
    source = tiny_folder(tmp_path / "source", family)
    plain = hf.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    plain.save_pretrained(source)
    model = load(source, device="cpu", dtype=dtype)
    ledger = edited_ledger(model)
    weights = copy_weights(model)
    folder = ledger.export(tmp_path / "edited")
    assert weights_equal(model, weights)
    before, after = tensor_bytes(source), tensor_bytes(folder)
    assert before.keys() == after.keys()
    differing = {name for name in before if before[name] != after[name]}
    names = {f"{edit.modules[layer].name}.weight" for edit in ledger.edits for layer in edit.layers}
    assert differing == names and len(names) == 2
    exported = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert exported.dtype == dtype
    torch.testing.assert_close(exported.eval()(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)
    assert all(name in (folder / "README.md").read_text() for name in names)


@pytest.mark.parametrize("name_subjects", [False, True])
def test_a_card_names_subjects_only_where_it_is_asked_to(name_subjects, tmp_path):
    model = tiny_model(chat=True)
    ledger, rows = Ledger(model), handmade_edit(model, (1,)).requests
    rows = tuple(replace(row, category=name) for row, name in zip(rows, ("tools", ""), strict=True))
    ledger.apply(replace(handmade_edit(model, (1, 2)), requests=rows))
    folder = ledger.export(tmp_path / "edited", report=a_report(), name_subjects=name_subjects)
    card = (folder / "README.md").read_text()
    assert [subject in card for subject in SUBJECTS] == [name_subjects] * 2
    assert "no category 1, tools 1" in card
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), "no path of this machine"
        if not name_subjects and file.name != "tokenizer.json":
            assert not any(row.text.encode() in file.read_bytes() for row in rows)


def test_a_card_has_settings_seeds_versions_and_what_was_measured(tmp_path):
    model = tiny_model(chat=True)
    ledger, report = edited_ledger(model), a_report()
    card = (ledger.export(tmp_path / "edited", report=report) / "README.md").read_text()
    for words in (
        "| seed | 0 |", "| seed | 1 |", "| seed of the fit | 0 |", f"| transformers | {hf.__version__} |",
        f"| torch | {torch.__version__} |", report.to_markdown(), ledger.edits[1].fingerprint.weights,
    ):  # fmt: skip
        assert words in card
    unmeasured = (ledger.export(tmp_path / "unmeasured") / "README.md").read_text()
    assert "no report was given" in unmeasured and "no report was given" not in card


def test_the_hashes_are_those_of_the_files(tmp_path):
    folder = edited_ledger(tiny_model(chat=True)).export(tmp_path / "edited")
    lines = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert lines.keys() == {file.name for file in folder.iterdir()} - {"SHA256SUMS", "lens_defense.json"}
    for name, value in lines.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == value
        assert name == "README.md" or value in (folder / "README.md").read_text()
    check_manifest(folder)
    load(folder, device="cpu")


@pytest.mark.parametrize(
    "base, told", [("someone/a-model", True), ("/home/me/model", False), ("model", False), ("a/b: c", False)]
)
def test_a_base_model_is_a_hub_name_and_no_path(base, told, tmp_path):
    model = tiny_model(chat=True)
    model.original_model.config._name_or_path = base
    card = (edited_ledger(model).export(tmp_path / "edited") / "README.md").read_text()
    assert (f"base_model: {base}\n" in card) == told
    assert told or f"{base}\n" not in card


@pytest.mark.parametrize("hostile", [*HOSTILE, "a | b", "[a](b)", "two\nlines"])
def test_hostile_names_stay_text_in_a_card(hostile, tmp_path):
    model = tiny_model(chat=True)
    ledger, edit = Ledger(model), handmade_edit(model, (1, 2))
    rows = tuple(replace(row, category=hostile) for row in edit.requests)
    ledger.apply(replace(edit, requests=rows, method=hostile, settings={hostile: hostile}))
    card = (ledger.export(tmp_path / "edited", name_subjects=True) / "README.md").read_text()
    unescaped = re.sub(r"\\.", "", card)
    assert not re.search(r"[<>\x00\x1b\u202e]|\]\(", unescaped)
    columns = {line.count("|") for line in unescaped.splitlines() if line.startswith("|")}
    assert columns == {3, 9}, "no name adds a column or a line"


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_exported_is_one_sentence(tmp_path):
    model = tiny_model(chat=True)
    ledger = Ledger(model)
    with pytest.raises(ValueError, match=r"no edit stands in this ledger; apply one before ledger\.export"):
        ledger.export(tmp_path / "edited")
    ledger.apply(handmade_edit(model, (1, 2)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        ledger.export(tmp_path)
    with pytest.raises(TypeError, match=r"report must be a Report.*the call is ledger\.export\("):
        ledger.export(tmp_path / "edited", report="core")
    others = pytest.raises(ValueError, match="an edit stands in the model that this ledger did not make")
    with handmade_edit(model, (1, 2), seed=1).applied(model), others:
        ledger.export(tmp_path / "edited")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
