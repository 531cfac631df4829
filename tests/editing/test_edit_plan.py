"""An Edit survives its file, whole, and is refused by a model that it was not planned on."""

from dataclasses import replace

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from safetensors.torch import save_file

import lens_defense.editing.edit_plan as edit_plan
from lens_defense.editing.edit_plan import Edit
from lens_defense.tracing.trace_result import Trace


def chat_model(dtype=torch.float32, **settings):
    return tiny_model("llama", chat=True, **settings).to(dtype)


def test_an_edit_survives_its_file(tmp_path):
    model = chat_model()
    plan = handmade_edit(model, (1, 2))
    file = plan.save(tmp_path / "plan.safetensors")
    loaded_edit = Edit.load(file, model)
    for name in Edit.__slots__:
        if name not in ("left", "right"):
            assert getattr(loaded_edit, name) == getattr(plan, name), name
    for layer, delta in plan.deltas().items():
        assert torch.equal(loaded_edit.deltas()[layer], delta)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]
    with loaded_edit.applied(model):
        pass


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    plan = handmade_edit(chat_model(), (1, 2))
    file = plan.save(tmp_path / "plan.safetensors")
    content = file.read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(edit_plan, "save_file", full)
    with pytest.raises(OSError):
        replace(plan, method="delman").save(file)
    assert file.read_bytes() == content


def test_a_file_without_an_edit_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"tensor": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no edit"):
        Edit.load(file)


@pytest.mark.parametrize("kind", [Edit, Trace])
def test_a_file_that_is_none_is_refused(tmp_path, kind):
    (tmp_path / "note.txt").write_text("a note")
    for name in ("note.txt", "nothing.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{kind.__name__.lower()}"):
            kind.load(tmp_path / name)


def test_an_edit_of_other_weights_is_refused(tmp_path):
    file = handmade_edit(chat_model(), (1, 2)).save(tmp_path / "plan.safetensors")
    assert Edit.load(file).layers == (1, 2)
    for other in (chat_model(seed=1), chat_model(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="with other weights than this model has"):
            Edit.load(file, other)
