"""Inside the block the direction is added at every token; after it, however it is left, nothing is there."""

import re

import pytest
import torch
from helpers.tiny_models import FAMILIES, plain_model, tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
from lens_defense.models.forward import forward
from lens_defense.models.generate import generate
from lens_defense.sites import component_hook

IDS = torch.arange(3, 15)[None]
LAYER = 1


def random_direction(seed=0):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def by_plain_transformers(family, direction, strength):
    """Logits of a plain model whose layer writes the direction too: a hook of torch alone."""
    model = plain_model(family)
    blocks = next(
        module
        for name, module in model.named_modules()
        if name.endswith(("layers", ".h")) and len(module) == 4
    )

    def add(_module, _arguments, output):
        if isinstance(output, tuple):
            return (output[0] + strength * direction, *output[1:])
        return output + strength * direction

    blocks[LAYER].register_forward_hook(add)
    return model(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 3, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_a_plain_model_that_adds_it(family, strength):
    model, direction = tiny_model(family), random_direction()
    weights, before = copy_weights(model), model(IDS)
    with ld.steered(model, direction, LAYER, strength) as steered:
        assert steered is model
        inside = model(IDS)
    reference_logits = by_plain_transformers(family, direction, strength)
    torch.testing.assert_close(
        inside, reference_logits, rtol=1e-4, atol=1e-4
    )  # its rotary angles are of single precision
    assert (inside - before).abs().max() > 0.1
    assert torch.equal(model(IDS), before) and weights_equal(model, weights)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "neox"])  # these have a bias
def test_it_is_what_a_bias_of_the_mlps_output_does(family):
    model, direction = tiny_model(family), random_direction()
    with ld.steered(model, direction, LAYER, 0.5):
        inside = model(IDS)
    model.blocks[LAYER].mlp.out.original_component.bias += 0.5 * direction
    torch.testing.assert_close(model(IDS), inside, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_runs_inside_read_and_patch_the_steered_state():
    model, direction, hook = tiny_model("llama"), random_direction(), component_hook("resid_post", LAYER)
    clean = forward(model, IDS, capture=[hook]).states[hook]
    with ld.steered(model, direction, LAYER, 2):
        read = forward(model, IDS, capture=[hook]).states[hook]
        patched = forward(model, IDS, capture=[hook], patches={hook: lambda state: 2 * state}).states[hook]
    torch.testing.assert_close(read, clean + 2 * direction)
    torch.testing.assert_close(patched, 2 * (clean + 2 * direction))


@torch.no_grad()
def test_answers_behind_a_cached_prefix_are_steered_at_every_token():
    model, direction = tiny_model("llama"), 3 * random_direction()
    prompts = [(5, 9, 120, 33, 7), (5, 9, 120, 8, 41, 12)]
    answers = generate(model, prompts, max_new_tokens=6)
    with ld.steered(model, direction, LAYER):
        inside = generate(model, prompts, max_new_tokens=6)
        for prompt, answer in zip(prompts, inside, strict=True):
            logits = model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
            assert tuple(logits.argmax(-1).tolist()) == answer
    assert inside != answers == generate(model, prompts, max_new_tokens=6)


@torch.no_grad()
def test_blocks_add_up_and_are_left_in_any_order():
    model, one, two = tiny_model("llama"), random_direction(1), random_direction(2)
    before = model(IDS)
    with ld.steered(model, one + two, LAYER):
        sum_logits = model(IDS)
    with ld.steered(model, one, LAYER):
        first_logits = model(IDS)
    outer, inner = ld.steered(model, one, LAYER), ld.steered(model, two, LAYER)
    outer.__enter__()
    inner.__enter__()
    torch.testing.assert_close(model(IDS), sum_logits, rtol=1e-9, atol=1e-9)
    outer.__exit__(None, None, None)
    assert not torch.allclose(model(IDS), before)
    inner.__exit__(None, None, None)
    assert torch.equal(model(IDS), before)
    assert not torch.allclose(first_logits, sum_logits)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_where_the_block_is_left_by_an_error(error):
    model, hooks = tiny_model("llama"), []
    before = model(IDS)
    point = model.hook_dict[component_hook("resid_post", LAYER)]
    with pytest.raises(error), ld.steered(model, random_direction(), LAYER):
        hooks += point.fwd_hooks
        raise error
    assert len(hooks) == 1 and not point.fwd_hooks and not point._forward_hooks
    assert torch.equal(model(IDS), before)


@torch.no_grad()
def test_half_precision_stays_half():
    model, direction = tiny_model("llama").to(torch.bfloat16), random_direction()
    hook = component_hook("resid_post", LAYER)
    clean = forward(model, IDS, capture=[hook]).states[hook]
    with ld.steered(model, direction, LAYER, 2):
        state = forward(model, IDS, capture=[hook]).states[hook]
    assert torch.equal(state, clean + (2 * direction).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 9}, "layer 9 is not in the model, which has layers 0 to 3"),
        ({"strength": 0}, "strength must be a finite number above 0, got 0"),
        ({"strength": float("nan")}, "strength must be a finite number above 0, got nan"),
        ({"direction": torch.ones(31)}, "a vector of 32 real numbers, got [31] of float32"),
        ({"direction": torch.full((32,), torch.inf)}, "the direction is not finite"),
    ],
)
def test_what_cannot_be_added_is_refused(change, message):
    arguments = {"direction": random_direction(), "layer": LAYER, "strength": 1.0} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ld.steered(tiny_model("llama"), **arguments)


def test_what_is_no_direction_is_refused_in_a_sentence(unchecked):
    del unchecked
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="direction must be a tensor"):
        ld.steered(model, [1.0] * 32, LAYER)
    with pytest.raises(ValueError, match="got \\[32\\] of int64"):
        ld.steered(model, torch.ones(32, dtype=torch.long), LAYER)
