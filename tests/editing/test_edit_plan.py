"""An Edit survives its file, whole, and is refused by a model that it was not planned on."""

from dataclasses import replace

import msgspec
import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from safetensors.torch import save_file

import lens_defense.editing.edit_plan as edit_plan
from lens_defense.editing.edit_plan import Edit
from lens_defense.models.mlp_output import mlp_output_matrix, weights_fingerprint
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


@pytest.mark.parametrize("strength", [0, 0.3, 1, 2.5])
def test_a_scaled_edit_changes_so_much_more_or_less(strength):
    model = chat_model(dtype=torch.float64)
    plan, weights, matrix = (
        handmade_edit(model, (1, 2)),
        copy_weights(model),
        mlp_output_matrix(model, 1).clone(),
    )
    scaled = plan.scaled(strength)
    assert scaled.strength == strength and plan.strength == 1
    assert scaled.relative_change == pytest.approx({1: 0.1 * strength, 2: 0.1 * strength})
    assert scaled.forecast == plan.forecast.scaled(strength)
    for layer, delta in plan.deltas().items():
        torch.testing.assert_close(scaled.deltas()[layer], strength * delta, rtol=1e-6, atol=1e-6)
        assert scaled.left[layer].dtype == plan.left[layer].dtype
    for name in ("right", "losses", "requests", "contexts", "settings", "fingerprint"):
        assert getattr(scaled, name) is getattr(plan, name), name
    with scaled.applied(model):
        assert weights_equal(model, weights) == (strength == 0)
        torch.testing.assert_close(mlp_output_matrix(model, 1), matrix + scaled.deltas()[1])
    assert weights_equal(model, weights)


@torch.no_grad()
def test_what_arrives_is_the_strength_times_as_much_to_first_order():
    model, ids = chat_model(dtype=torch.float64), torch.tensor([[5, 9, 120, 33]])
    plan, clean = handmade_edit(model, (1, 2)), model(ids)

    def shift(strength):
        with plan.scaled(strength).applied(model):
            return model(ids) - clean

    def curvature(strength):
        doubled = 2 * shift(strength)
        return float((shift(2 * strength) - doubled).norm() / doubled.norm())

    assert curvature(1e-2) < 0.1 and curvature(1e-3) < 0.01


def test_a_strength_is_relative_to_the_edit_that_is_scaled():
    plan = handmade_edit(chat_model(), (1, 2))
    back = plan.scaled(4).scaled(0.25)
    assert plan.scaled(3).scaled(0.5).strength == 1.5
    assert back.strength == 1 and back.forecast is plan.forecast
    assert all(torch.equal(back.left[layer], plan.left[layer]) for layer in plan.layers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "1", None, 1j])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0, got"):
        handmade_edit(chat_model(), (1, 2)).scaled(strength)


def test_a_strength_is_shown_where_it_is_not_1():
    plan = handmade_edit(chat_model(), (1, 2))
    for text in (repr(plan), plan._repr_html_()):
        assert "strength" not in text
    for text in (repr(plan.scaled(0.5)), plan.scaled(0.5)._repr_html_()):
        assert "strength 0.5" in text


def test_a_scaled_edit_survives_its_file(tmp_path):
    model = chat_model()
    scaled = handmade_edit(model, (1, 2)).scaled(0.3)
    loaded_edit = Edit.load(scaled.save(tmp_path / "plan.safetensors"), model)
    assert loaded_edit.forecast == scaled.forecast and loaded_edit.strength == 0.3
    assert loaded_edit.scaled(2).forecast == scaled.scaled(2).forecast
    assert all(torch.equal(loaded_edit.deltas()[layer], scaled.deltas()[layer]) for layer in (1, 2))


def test_a_file_from_before_edits_were_scaled_is_read(tmp_path):
    model = chat_model()
    plan = handmade_edit(model, (1, 2))
    content = msgspec.to_builtins(replace(plan, left={}, right={}), str_keys=True)
    for name in ("strength", "measured"):
        del content["forecast"][name]
    tensors = {
        f"{side}.{layer}": getattr(plan, side)[layer] for side in ("left", "right") for layer in (1, 2)
    }
    file = edit_plan.save_file(tmp_path / "plan.safetensors", "edit", content, tensors)
    loaded_edit = Edit.load(file, model)
    assert loaded_edit.strength == 1 and loaded_edit.forecast == plan.forecast


def test_the_warnings_of_an_edit_follow_its_strength():
    plan = handmade_edit(chat_model(), (1, 2))  # reach .9 and .8, leak .4, losses .5 and .25
    (unfitted,) = [text for text in plan.warnings if "could not be fitted" in text]
    assert "for: lamp (more than" in unfitted and unfitted in plan.scaled(0.2).warnings

    def starting(strength, start):
        return [text for text in plan.scaled(strength).warnings if text.startswith(start)]

    assert starting(1, "this edit leaks 0.40") and not starting(0.3, "this edit leaks")
    assert not starting(1, "less than 40%") and "bell (0.36)" in starting(0.45, "less than 40%")[0]
    assert "lamp (0.36), bell (0.32)" in starting(0.4, "less than 40%")[0]
    assert not [text for text in plan.warnings if "hardly tell requests apart" in text]
    assert "keys at 'last' hardly tell" in replace(plan, role="last").warnings[1]


@pytest.mark.parametrize("name", ["mom2_update_weight", "l2"])
def test_warnings_advise_only_a_setting_that_the_method_has(name):
    plan = handmade_edit(chat_model(), (1, 2))  # reach .9 and .8, leak .4
    for strength, advice in ((1, f"raise {name}"), (0.3, f"a lower {name}")):
        with_setting, without = (
            " ".join(replace(plan, settings=settings).scaled(strength).warnings)
            for settings in ({name: 10.0}, {"two_keys": False})
        )
        assert advice in with_setting
        assert name not in without and "strength" in without


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
