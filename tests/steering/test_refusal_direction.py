"""The refusal direction equals a loop over single prompts in float64, and sees nothing that is for checks."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, PADDING_COUNTS, tiny_model

import lens_defense as ld
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import UnfitRequest
from lens_defense.steering.refusal_direction import last_token_states

HARMFUL = ("how do I make a brass lamp?", "ring a bell", "a thing")
HARMLESS = ("hello", "is it so? how do I make a thing at home?")


@torch.no_grad()
def by_loop(model, texts, layer):
    """The mean state of texts after a layer, at the last token, each text alone."""
    states = []
    for text in texts:
        ids = torch.tensor([tokenize(model.tokenizer, ld.request(text)).ids])
        _, cache = model.run_with_cache(ids)
        states.append(cache[f"blocks.{layer}.hook_out"][0, -1].double())
    return sum(states) / len(states)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, *PADDING_COUNTS])
def test_it_is_the_difference_of_the_mean_states(family, layer):
    model = tiny_model(family, chat=True)
    direction = ld.refusal_direction(model, HARMFUL, HARMLESS, layer)
    assert direction.dtype == torch.float64 and direction.shape == (32,)
    mean_difference = by_loop(model, HARMFUL, layer) - by_loop(model, HARMLESS, layer)
    torch.testing.assert_close(direction, mean_difference, rtol=1e-6, atol=1e-6)
    swapped = ld.refusal_direction(model, HARMLESS, HARMFUL, layer)
    torch.testing.assert_close(swapped, -direction, rtol=0, atol=1e-12)


def test_batches_change_nothing():
    model = tiny_model("llama", chat=True)
    requests = [ld.request(text) for text in (*HARMFUL, *HARMLESS)]
    whole = last_token_states(model, requests, 1)
    torch.testing.assert_close(last_token_states(model, requests, 1, batch_size=2), whole)


def test_it_has_the_dtype_of_the_model():
    model = tiny_model("llama", chat=True).to(torch.bfloat16)
    assert ld.refusal_direction(model, HARMFUL, HARMLESS, 1).dtype == torch.bfloat16


def test_what_cannot_be_read_is_refused():
    model, request = tiny_model("llama", chat=True), ld.request("ring a bell", split="check", id="bell")
    with pytest.raises(ValueError, match="'bell' belongs to the split 'check'"):
        ld.refusal_direction(model, HARMFUL, [request], 1)
    with pytest.raises(ValueError, match="'bell' belongs to the split 'check'"):
        ld.refusal_direction(model, request, HARMLESS, 1)
    with pytest.raises(ValueError, match="no harmless requests were given"):
        ld.refusal_direction(model, HARMFUL, [], 1)
    with pytest.raises(ValueError, match="layer 4 is not in the model, which has layers 0 to 3"):
        ld.refusal_direction(model, HARMFUL, HARMLESS, 4)
    with pytest.raises(UnfitRequest, match="reads 256 tokens"):
        ld.refusal_direction(model, HARMFUL, ["a lamp " * 300], 1)
