"""The output matrix is the linear map from key to value; changes are whole, and undone to the bit."""

import gc

import pytest
import torch
import transformers as hf
from helpers.handmade_edits import random_factors
from helpers.tiny_models import FAMILIES, SHAPE, byte_tokenizer, tiny_model
from helpers.weights import copy_weights, weights_equal
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from lens_defense.models import mlp_output, weight_journal
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import (
    apply_change_,
    mlp_output_matrix,
    refuse_uneditable,
    standing_changes,
    undo_change_,
    weights_fingerprint,
)
from lens_defense.prompts.request import request
from lens_defense.sites import key_hook, value_hook
from lens_defense.tracing.trace import trace

IDS = torch.randint(3, 300, (1, 7), generator=torch.Generator().manual_seed(0))
LAYERS = (1, 2, 3)


def deltas(model, **settings):
    factors = random_factors(model, LAYERS, **settings)
    return {layer: left.double() @ right.double() for layer, (left, right) in factors.items()}


def mixture():
    """A tiny mixture of experts."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        **SHAPE, intermediate_size=48, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=256,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return build_bridge_from_module(
        model, "MixtralForCausalLM", hf_config=config, tokenizer=byte_tokenizer(), model_name="moe"
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_value_is_matrix_times_key(family):
    model = tiny_model(family)
    hooks = [hook(layer) for layer in range(4) for hook in (key_hook, value_hook)]
    states = forward(model, IDS, capture=hooks).states
    for layer in range(4):
        bias = getattr(model.blocks[layer].mlp.out, "bias", None)
        value = states[key_hook(layer)] @ mlp_output_matrix(model, layer).T
        value = value if bias is None else value + bias
        torch.testing.assert_close(states[value_hook(layer)], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrix_is_a_view_of_the_weight(family):
    model = tiny_model(family)
    matrix = mlp_output_matrix(model, 1)
    assert matrix.shape == (32, model.cfg.d_mlp)
    assert not matrix.requires_grad
    assert matrix.data_ptr() == model.blocks[1].mlp.out.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_a_change_is_made_and_taken_back_to_the_bit(family, dtype):
    model = tiny_model(family).to(dtype)
    original, matrix = copy_weights(model), mlp_output_matrix(model, 2).clone()
    logits = model(IDS)
    changes = deltas(model)
    change = apply_change_(model, changes)
    assert standing_changes(model) == (change,)
    torch.testing.assert_close(mlp_output_matrix(model, 2), (matrix.double() + changes[2]).to(dtype))
    assert not torch.equal(model(IDS), logits)
    undo_change_(model, change)
    assert weights_equal(model, original)
    assert standing_changes(model) == ()
    assert torch.equal(model(IDS), logits)


def test_changes_are_taken_back_last_first():
    model = tiny_model("gpt2")
    original = copy_weights(model)
    first, second = apply_change_(model, deltas(model)), apply_change_(model, deltas(model, seed=1))
    with pytest.raises(ValueError, match="another edit lies on top"):
        undo_change_(model, first)
    undo_change_(model, second)
    undo_change_(model, first)
    assert weights_equal(model, original)
    with pytest.raises(ValueError):
        undo_change_(model, first)


def test_weights_that_something_else_touched_are_not_taken_back():
    model = tiny_model("llama")
    change = apply_change_(model, deltas(model))
    mlp_output_matrix(model, 1)[0, 0] += 1
    original = copy_weights(model)
    with pytest.raises(ValueError, match="changed by something else since this edit"):
        undo_change_(model, change)
    assert weights_equal(model, original)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "shape", "broadcast"])
def test_a_bad_delta_in_the_middle_leaves_every_bit(family, bad):
    model = tiny_model(family)
    original, changes = copy_weights(model), deltas(model)
    if bad == "shape":
        changes[2] = changes[2][:, :5]
    elif bad == "broadcast":
        changes[2] = changes[2][:1]
    else:
        changes[2][3, 3] = bad
    with pytest.raises(
        ValueError, match=r"of layer 2 is (.*, but the matrix there|not finite; nothing was written)"
    ):
        apply_change_(model, changes)
    assert weights_equal(model, original)
    assert standing_changes(model) == ()


def test_a_sum_that_overflows_the_dtype_is_refused():
    model = tiny_model("llama").to(torch.float16)
    original, changes = copy_weights(model), deltas(model)
    changes[3][0, 0] = 1e6
    with pytest.raises(ValueError, match="the change of layer 3 is not finite"):
        apply_change_(model, changes)
    assert weights_equal(model, original)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_in_the_middle_leaves_every_bit(family, moment, monkeypatch):
    model = tiny_model(family)
    original, add = copy_weights(model), mlp_output._add_

    def interrupted(model, layer, delta):
        if layer == 2 and moment == "before":
            raise KeyboardInterrupt
        add(model, layer, delta)
        if layer == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(mlp_output, "_add_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_change_(model, deltas(model))
    assert weights_equal(model, original)
    assert standing_changes(model) == ()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fingerprint_sees_one_bit_the_layers_and_the_dtype(family):
    model = tiny_model(family)
    fingerprints = {
        weights_fingerprint(model),
        weights_fingerprint(model, [1]),
        weights_fingerprint(model, [2]),
    }
    assert weights_fingerprint(model, [1]) == weights_fingerprint(tiny_model(family), [1])
    assert weights_fingerprint(model, [2, 1]) == weights_fingerprint(model, (1, 2, 2))
    weight = mlp_output_matrix(model, 1)
    weight[4, 5] = torch.nextafter(weight[4, 5], weight.new_tensor(9.0))
    assert weights_fingerprint(model, [2]) in fingerprints
    fingerprints |= {weights_fingerprint(model), weights_fingerprint(model, [1])}
    model.to(torch.float32)
    fingerprints |= {weights_fingerprint(model), weights_fingerprint(model, [1])}
    assert len(fingerprints) == 7


def test_a_post_norm_model_is_refused():
    with pytest.raises(ValueError, match="norms the MLP's output before or after it joins"):
        refuse_uneditable(tiny_model("gemma2"), [1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [-1, 4, "1", 1.0, None])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=rf"layer {layer!r} is not in the model.*0 to 3"):
        mlp_output_matrix(tiny_model("llama"), layer)


def test_a_mixture_of_experts_is_traced_and_not_edited():
    model = mixture()
    with pytest.raises(ValueError, match=r"layer 1 of moe cannot be edited.*mixture of experts"):
        refuse_uneditable(model, [1])
    result = trace(model, [request("make a brass lamp", "lamp")], min_difference=0.0, progress=False)
    assert result.effects.isfinite().any()


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    output = model.blocks[1].mlp.out.original_component
    output.weight = torch.nn.Parameter(output.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layer 1 of tiny-llama cannot be edited"):
        mlp_output_matrix(model, 1)


def test_models_that_are_gone_are_forgotten():
    model = tiny_model("llama")
    apply_change_(model, deltas(model))
    count = len(weight_journal._JOURNALS)
    del model
    gc.collect()
    assert len(weight_journal._JOURNALS) < count
