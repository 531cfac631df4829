"""The spread equals MEMIT's algorithm 1 written out: one context at a time, one layer after another."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny_model
from helpers.weights import copy_weights, weights_equal

from lens_defense.editing.methods import DELMAN, MEMIT, KeyGroup
from lens_defense.editing.solving.layer_spread import (
    PromptGroup,
    layer_shares,
    residual_scale,
    spread_over_layers,
)
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.prompt import role_position, tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import component_hook, key_hook

LAYERS = (1, 3)
SHARES = {1: 0.5, 3: 1.0}
ROLE = "subject_last"


def contexts(model):
    """Two requests, of three contexts and of one; and the held-out contexts."""
    lamp, bell = request("how do I make a brass lamp?", "brass lamp"), request("ring a bell!", "bell")
    paraphrases = [lamp.paraphrased(text) for text in ("Hello! tell me all about {}.", "{} or not?")]
    owned = [(0, lamp), *((0, paraphrase) for paraphrase in paraphrases), (1, bell)]
    held_out = [(0, lamp.inside("please: {}")), (1, bell.inside("well, {}"))]
    return tuple(
        [
            PromptGroup(i, [tokenize(model.tokenizer, context) for owner, context in group if owner == i])
            for i in (0, 1)
        ]
        for group in (owned, held_out)
    )


def harmless_uses(model):
    """Harmless uses of both subjects."""
    lamp, bell = request("is a brass lamp dear?", "brass lamp"), request("who made the bell?", "bell")
    uses = ([lamp, lamp.inside("say: {}")], [bell])
    return [
        PromptGroup(i, [tokenize(model.tokenizer, use) for use in group], 2.0, harmless=True)
        for i, group in enumerate(uses)
    ]


def states_of(model, groups, hook):
    """A state at the role in every prompt, one plain run each; a tensor per group."""
    return [
        torch.stack(
            [
                forward(model, torch.tensor([prompt.ids]), capture=[hook])
                .states[hook][0, role_position(prompt, ROLE)]
                .double()
                for prompt in group.prompts
            ]
        )
        for group in groups
    ]


def mean_state(model, groups, hook):
    return torch.stack([states.mean(0) for states in states_of(model, groups, hook)])


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
    factors, reach, _ = spread_over_layers(
        model, prompts, ROLE, SHARES, values, covariances, method, mean_keys=True, measured=held_out
    )
    assert weights_equal(model, original_weights)

    clean_states, clean_held_out = mean_state(model, prompts, top), mean_state(model, held_out, top)
    for j, layer in enumerate(LAYERS):
        missing = values.double() - (mean_state(model, prompts, top) - clean_states)
        keys = mean_state(model, prompts, key_hook(layer))
        groups = [KeyGroup(i, keys[i : i + 1], missing[i] / (len(LAYERS) - j)) for i in range(len(prompts))]
        left, right, _ = method.solve(groups, covariances[layer])
        delta = factors[layer][0].double() @ factors[layer][1].double()
        torch.testing.assert_close(delta, left @ right, rtol=1e-3, atol=1e-4 * float(delta.abs().max()))
        mlp_output_matrix(model, layer).add_(delta)
    shift = mean_state(model, held_out, top) - clean_held_out
    share = (shift * values).sum(1) / values.double().square().sum(1)
    assert reach == pytest.approx(share.tolist(), rel=1e-3, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", [MEMIT(1.0), DELMAN(1, 1.0)], ids=["memit", "delman"])
def test_every_context_is_a_row_and_harmless_uses_are_taken_back(method):
    model, values, covariances = setting("llama")
    groups = [*contexts(model)[0], *harmless_uses(model)]
    top = component_hook("resid_post", LAYERS[-1])
    factors, *_ = spread_over_layers(model, groups, ROLE, SHARES, values, covariances, method)
    clean = states_of(model, groups, top)
    for j, layer in enumerate(LAYERS):
        now, keys = states_of(model, groups, top), states_of(model, groups, key_hook(layer))
        rows = []
        for i, group in enumerate(groups):
            shift = (now[i] - clean[i]).mean(0)
            missing = -shift if group.harmless else values[group.owner] - shift
            residual = missing / (len(LAYERS) - j)
            rows.append(KeyGroup(group.owner, keys[i], residual, group.weight, group.harmless))
        left, right, _ = method.solve(rows, covariances[layer])
        delta = factors[layer].left.double() @ factors[layer].right.double()
        torch.testing.assert_close(delta, left @ right, rtol=1e-3, atol=1e-4 * float(delta.abs().max()))
        mlp_output_matrix(model, layer).add_(delta)


@torch.no_grad()
def test_a_light_covariance_writes_the_whole_vector():
    model, values, covariances = setting("llama")
    prompts, _ = contexts(model)
    light = {layer: 1e-6 * covariance for layer, covariance in covariances.items()}
    alone = [PromptGroup(group.owner, group.prompts[:1]) for group in prompts]
    _, reach, _ = spread_over_layers(model, alone, ROLE, SHARES, values, light, MEMIT(1.0), measured=alone)
    assert reach == pytest.approx([1.0, 1.0], abs=0.02)


class Uneven(MEMIT):
    """MEMIT with other shares, and without the lowest layer."""

    def __init__(self, shares):
        super().__init__(1.0)
        object.__setattr__(self, "_shares", shares)

    def layer_shares(self, _layers):
        return self._shares


def test_memits_layers_all_write_as_much():
    shares = layer_shares(MEMIT(), (2, 3, 5, 8))
    assert list(shares) == [2, 3, 5, 8]
    missing, written = 1.0, []
    for share in shares.values():
        written.append(share * missing)
        missing -= written[-1]
    assert written == pytest.approx([1 / 4] * 4) and missing == pytest.approx(0)


@torch.no_grad()
def test_a_method_may_share_otherwise():
    model, values, covariances = setting("llama")
    prompts, _ = contexts(model)
    shares = layer_shares(Uneven({3: 0.7, 1: 0.2}), (0, 1, 3))
    assert list(shares.items()) == [(1, 0.2), (3, 0.7)], "lowest first, without the layer that has none"
    factors, *_ = spread_over_layers(
        model, prompts, ROLE, shares, values, covariances, MEMIT(1.0), mean_keys=True
    )
    top = component_hook("resid_post", LAYERS[-1])
    clean = mean_state(model, prompts, top)
    for layer, share in shares.items():
        residuals = share * (values.double() - (mean_state(model, prompts, top) - clean))
        keys = mean_state(model, prompts, key_hook(layer))
        groups = [KeyGroup(i, keys[i : i + 1], residual) for i, residual in enumerate(residuals)]
        left, right, _ = MEMIT(1.0).solve(groups, covariances[layer])
        delta = factors[layer].left.double() @ factors[layer].right.double()
        torch.testing.assert_close(delta, left @ right, rtol=1e-3, atol=1e-4 * float(delta.abs().max()))
        mlp_output_matrix(model, layer).add_(delta)


@pytest.mark.parametrize("shares", [{}, {0: 0.0}, {0: 1.5}, {0: -0.5}, {0: float("nan")}, {4: 1.0}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"layer_shares of the method 'memit' must give some of .*\(0, 1\)"):
        layer_shares(Uneven(shares), (0, 1))


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
        spread_over_layers(model, prompts, ROLE, SHARES, values, covariances, Failing())
    assert weights_equal(model, original_weights)


@pytest.mark.parametrize("family", [*FAMILIES[:3], "gptj", "bloom", "granite"])
def test_the_scale_of_a_blocks_output(family):
    model = tiny_model(family)
    assert residual_scale(model, 1) == pytest.approx(0.22 if family == "granite" else 1.0)
