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
    """Two requests, of three contexts and of one; and what is kept aside."""
    lamp, bell = request("how do I make a brass lamp?", "brass lamp"), request("ring a bell!", "bell")
    wordings = ["Hello! tell me all about {}.", "{} or not?"]
    used = [lamp, *(lamp.paraphrased(text) for text in wordings), bell]
    aside = [lamp.inside("please: {}"), bell.inside("well, {}")]
    owners = (0, 0, 0, 1), (0, 1)
    return tuple(
        [(i, tokenize(model.tokenizer, asked)) for i, asked in zip(some, asked_, strict=True)]
        for some, asked_ in zip(owners, (used, aside), strict=True)
    )


def mean_state(model, some, hook, role=ROLE):
    """The mean of a state at the role, over each request's contexts, one plain run each."""
    rows = [[], []]
    for i, met in some:
        state = forward(model, torch.tensor([met.ids]), capture=[hook]).states[hook]
        rows[i].append(state[0, role_position(met, role)].double())
    return torch.stack([torch.stack(each).mean(0) for each in rows])


def setting(family):
    model = tiny_model(family, chat=True).to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 32, generator=generator)
    width = model.cfg.d_mlp
    moments = {}
    for layer in LAYERS:
        corpus = torch.randn(3 * width, width, generator=generator)
        moments[layer] = corpus.T @ corpus / len(corpus)
    return model, vectors, moments


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("method", [MEMIT(1.0), DELMAN(1, 1.0), DELMAN(2, 1.0)], ids=["memit", "one", "two"])
def test_spread_is_algorithm_1(family, method):
    model, vectors, moments = setting(family)
    used, aside = contexts(model)
    held, top = copy_weights(model), component_hook("resid_post", LAYERS[-1])
    factors, reach = spread_over_layers(model, used, aside, ROLE, LAYERS, vectors, moments, method)
    assert weights_equal(model, held)

    before, before_aside = mean_state(model, used, top), mean_state(model, aside, top)
    for j, layer in enumerate(LAYERS):
        missing = vectors.double() - (mean_state(model, used, top) - before)
        keys = mean_state(model, used, key_hook(layer))
        left, right = method.solve(keys, missing / (len(LAYERS) - j), moments[layer])
        got = factors[layer][0].double() @ factors[layer][1].double()
        torch.testing.assert_close(got, left @ right, rtol=1e-3, atol=1e-4 * float(got.abs().max()))
        mlp_output_matrix(model, layer).add_(got)
    moved = mean_state(model, aside, top) - before_aside
    share = (moved * vectors).sum(1) / vectors.double().square().sum(1)
    assert reach == pytest.approx(share.tolist(), rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_a_light_moment_writes_the_whole_vector():
    model, vectors, moments = setting("llama")
    used, _ = contexts(model)
    light = {layer: 1e-6 * moment for layer, moment in moments.items()}
    _, reach = spread_over_layers(model, [used[0], used[3]], [], ROLE, LAYERS, vectors, light, MEMIT(1.0))
    assert reach == pytest.approx([1.0, 1.0], abs=0.02)


@torch.no_grad()
def test_an_error_leaves_every_bit():
    model, vectors, moments = setting("gpt2")
    used, _ = contexts(model)
    held, calls = copy_weights(model), []

    class Failing(MEMIT):
        def solve(self, *tensors):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return MEMIT(1.0).solve(*tensors)

    with pytest.raises(KeyboardInterrupt):
        spread_over_layers(model, used, [], ROLE, LAYERS, vectors, moments, Failing())
    assert weights_equal(model, held)
