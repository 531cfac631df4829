"""An Edit survives its file, whole, and is refused by a model that it was not planned on."""

from dataclasses import replace

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from safetensors.torch import save_file

import lens_defense.editing.edit_plan as edit_plan
from lens_defense.editing.edit_plan import Edit
from lens_defense.models.mlp_output import weights_fingerprint
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
        with pytest.raises(ValueError, match=f"{name} (cannot be read|holds no).*{kind.__name__.lower()}"):
            kind.load(tmp_path / name)


def test_an_edit_of_other_weights_is_refused(tmp_path):
    file = handmade_edit(chat_model(), (1, 2)).save(tmp_path / "plan.safetensors")
    assert Edit.load(file).layers == (1, 2)
    for other in (chat_model(seed=1), chat_model(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="planned on other weights"):
            Edit.load(file, other)


FACTORS = {
    "complex": (
        lambda left, right: (left.to(torch.complex64), right),
        "left factor of layer 2 is of complex64",
    ),
    "boolean": (lambda left, right: (left, right > 0), "right factor of layer 2 is of bool numbers"),
    "integer": (lambda left, right: (left.int(), right), "left factor of layer 2 is of int32 numbers"),
    "meta": (lambda left, right: (left.to("meta"), right), "left factor of layer 2 is on the meta device"),
    "vector": (
        lambda left, right: (left[:, 0], right),
        r"left factor of layer 2 is a tensor of the shape \[32\]",
    ),
    "sparse": (lambda left, right: (left, right.to_sparse()), "right factor of layer 2 is a tensor .*sparse"),
    "list": (lambda left, right: (left.tolist(), right), "left factor of layer 2 is of the type list"),
    "ranks": (lambda left, right: (left, right[:1]), "factors of layer 2 have different ranks"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", FACTORS)
def test_factors_that_are_no_change_are_refused_where_the_edit_is_made(kind):
    plan, (change, message) = handmade_edit(chat_model(), (1, 2)), FACTORS[kind]
    left, right = change(plan.left[2], plan.right[2])
    with pytest.raises(ValueError, match=message) as caught:
        replace(plan, left={**plan.left, 2: left}, right={**plan.right, 2: right})
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layers", [("1", "2"), (1.0, 2.0), (1, 1), (-1, 2), (), (True, 2), (None,)])
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(ValueError, match=r"layers of an edit are different whole numbers from 0, got"):
        replace(handmade_edit(chat_model(), (1, 2)), layers=layers)


def test_a_layer_without_factors_is_refused(tmp_path):
    plan = handmade_edit(chat_model(), (1, 2))
    with pytest.raises(ValueError, match="this edit has no factors of layer 3"):
        replace(plan, layers=(1, 3))
    empty = replace(plan, left={}, right={})  # as its header in a file
    with pytest.raises(ValueError, match="this edit has no factors of layer 1"):
        empty.deltas()
    file = edit_plan.save_file(tmp_path / "plan.safetensors", "edit", empty, {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensors that do not fit its content: left\.1"):
        Edit.load(file)


def test_factors_of_another_shape_than_the_matrix_change_nothing():
    model = chat_model()
    plan, weights = handmade_edit(model, (1, 2)), copy_weights(model)
    wide = replace(plan, right={**plan.right, 2: plan.right[2].repeat(1, 2)})
    with (
        pytest.raises(ValueError, match=r"layer 2 is \[32, 128\] of torch.float64, but .* \[32, 64\]"),
        wide.applied(model),
    ):
        pass
    assert weights_equal(model, weights)


def test_a_model_without_values_is_refused():
    plan, model = handmade_edit(chat_model(), (1, 2)), chat_model().to("meta")
    with pytest.raises(ValueError, match="on the meta device and have no values"), plan.applied(model):
        pass
    with pytest.raises(ValueError, match="on the meta device and have no values"):
        weights_fingerprint(model)
