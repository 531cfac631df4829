"""The spread equals MEMIT's algorithm 1 written out: one context at a time, one layer after another."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

from lens_defense.editing.layer_spread import spread_over_layers
from lens_defense.editing.methods import DELMAN, MEMIT
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.prompt import role_position, tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import component_hook, key_hook

LAYERS = (1, 3)
ROLE = "subject_last"


def contexts(model):
    """Two requests, of three contexts and of one; and the held-out contexts."""
    lamp, bell = request("how do I make a brass lamp?", "brass lamp"), request("ring a bell!", "bell")
    paraphrases = [lamp.paraphrased(text) for text in ("Hello! tell me all about {}.", "{} or not?")]
    owned = [(0, lamp), *((0, paraphrase) for paraphrase in paraphrases), (1, bell)]
    held_out = [(0, lamp.inside("please: {}")), (1, bell.inside("well, {}"))]
    return tuple(
        [(owner, tokenize(model.tokenizer, context)) for owner, context in group]
        for group in (owned, held_out)
    )


def mean_state(model, prompts, hook, role=ROLE):
    """The mean of a state at the role, over each request's contexts, one plain run each."""
    states = [[], []]
    for owner, prompt in prompts:
        state = forward(model, torch.tensor([prompt.ids]), capture=[hook]).states[hook]
        states[owner].append(state[0, role_position(prompt, role)].double())
    return torch.stack([torch.stack(rows).mean(0) for rows in states])


def setting(family):
    model = tiny_model(family, chat=True).to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 32, generator=generator)
    width = model.cfg.d_mlp
    covariances = {}
    for layer in LAYERS:
        corpus = torch.randn(3 * width, width, generator=generator)
        covariances[layer] = corpus.T @ corpus / len(corpus)
    return model, values, covariances


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("method", [MEMIT(1.0), DELMAN(1, 1.0), DELMAN(2, 1.0)], ids=["memit", "one", "two"])
def test_spread_is_algorithm_1(family, method):
    model, values, covariances = setting(family)
    prompts, held_out = contexts(model)
    original_weights, top = copy_weights(model), component_hook("resid_post", LAYERS[-1])
    factors, reach = spread_over_layers(model, prompts, held_out, ROLE, LAYERS, values, covariances, method)
    assert weights_equal(model, original_weights)

    clean_states, clean_held_out = mean_state(model, prompts, top), mean_state(model, held_out, top)
    for j, layer in enumerate(LAYERS):
        missing = values.double() - (mean_state(model, prompts, top) - clean_states)
        keys = mean_state(model, prompts, key_hook(layer))
        left, right = method.solve(keys, missing / (len(LAYERS) - j), covariances[layer])
        delta = factors[layer][0].double() @ factors[layer][1].double()
        torch.testing.assert_close(delta, left @ right, rtol=1e-3, atol=1e-4 * float(delta.abs().max()))
        mlp_output_matrix(model, layer).add_(delta)
    shift = mean_state(model, held_out, top) - clean_held_out
    share = (shift * values).sum(1) / values.double().square().sum(1)
    assert reach == pytest.approx(share.tolist(), rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_a_light_covariance_writes_the_whole_vector():
    model, values, covariances = setting("llama")
    prompts, _ = contexts(model)
    light = {layer: 1e-6 * covariance for layer, covariance in covariances.items()}
    _, reach = spread_over_layers(
        model, [prompts[0], prompts[3]], [], ROLE, LAYERS, values, light, MEMIT(1.0)
    )
    assert reach == pytest.approx([1.0, 1.0], abs=0.02)


@torch.no_grad()
def test_an_error_leaves_every_bit():
    model, values, covariances = setting("gpt2")
    prompts, _ = contexts(model)
    original_weights, calls = copy_weights(model), []

    class Failing(MEMIT):
        def solve(self, *tensors):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return MEMIT(1.0).solve(*tensors)

    with pytest.raises(KeyboardInterrupt):
        spread_over_layers(model, prompts, [], ROLE, LAYERS, values, covariances, Failing())
    assert weights_equal(model, original_weights)
