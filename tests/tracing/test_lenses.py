"""Maps that patch no state: they equal what is read by hand, and are used like a trace."""

from functools import partial

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny_model

from lens_defense.checking.judges import prefix
from lens_defense.models.forward import with_hooks
from lens_defense.models.generate import generate
from lens_defense.plotting.heatmap import heatmap
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.tracing import lenses
from lens_defense.tracing.lenses import logit_lens, safety_layers, toxic_layers
from lens_defense.tracing.locate import locate
from lens_defense.tracing.site_map import ScoreMap

LAMP = request("how do I make a brass lamp at home?", "brass lamp", id="lamp")
BELL = request("ring an old bell for me", "old bell", id="bell")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_is_the_end_of_the_model_on_every_state(family):
    model = tiny_model(family, chat=True)
    lens = logit_lens(model, [LAMP, BELL])
    prompt = lens.prompts[1]
    logits, cache = model.run_with_cache(torch.tensor([prompt.ids]))
    state = cache["blocks.1.hook_out"][0]
    by_hand = model.unembed(model.ln_final(state))
    if family == "gemma2":
        by_hand = (by_hand / 30).tanh() * 30  # its softcap
    n, token = len(prompt.ids), prompt.answer_ids[0]
    assert torch.allclose(lens.effects[1, 0, 1, :n], by_hand.softmax(-1)[:, token])
    assert torch.allclose(lens.effects[1, 0, -1, :n], logits[0].softmax(-1)[:, token])
    assert lens.effects[1, 0, :, n:].isnan().all(), "the shorter prompt ends before the longer"


@torch.no_grad()
def test_toxic_layers_are_distances_of_the_last_states():
    model = tiny_model("llama", chat=True)
    distances = toxic_layers(model, [LAMP], "a thing", answers=["the lamp"], answer_tokens=3)
    prompt = distances.prompts[0]
    last_states = []
    for text in ("the lamp", "a thing"):
        answer = model.tokenizer(text)["input_ids"][:3]
        _, cache = model.run_with_cache(torch.tensor([[*prompt.ids, *answer]]))
        last_states.append(torch.stack([cache[f"blocks.{layer}.hook_out"][0, -1] for layer in range(4)]))
    expected = (last_states[0] - last_states[1]).norm(dim=1)
    assert torch.allclose(distances.effects[0, 0, :, -1], expected / expected.max())
    (site,) = locate(distances, 1, by="cells")
    assert (site.role, site.layer) == ("last", int(expected.argmax()))


def test_toxic_layers_want_two_answers():
    with pytest.raises(ValueError, match="'lamp' is the safe one already"):
        toxic_layers(tiny_model("llama", chat=True), [LAMP], "a thing", answers=["a thing"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_a_skipped_layer_is_as_if_deleted(family):
    model, shorter = tiny_model(family, chat=True), tiny_model(family, chat=True).original_model
    base = getattr(shorter, shorter.base_model_prefix)
    name = next(name for name in ("layers", "h") if hasattr(base, name))
    blocks = getattr(base, name)
    setattr(base, name, torch.nn.ModuleList([blocks[0], blocks[3]]))
    ids = torch.tensor([tokenize(model.tokenizer, LAMP).ids])
    expected = shorter(ids, use_cache=False).logits
    before = model(ids)
    assert torch.allclose(with_hooks(model, lenses._zero_hooks(range(1, 3)), lambda: model(ids)), expected)
    assert torch.equal(model(ids), before)


def test_safety_layers_are_those_without_which_no_refusal_comes():
    """A judge that calls the whole model's answers refusals: what differs from them is lost."""
    model = tiny_model("llama", chat=True)
    prompts = [tokenize(model.tokenizer, item) for item in (LAMP, BELL)]
    answers = generate(model, [prompt.ids for prompt in prompts], max_new_tokens=4)
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def judge(_request, answer):
        return "refusal" if answer.strip() in texts else "answer"

    losses = safety_layers(model, [LAMP, BELL], judge, max_new_tokens=4, progress=False)
    assert set(losses.effects[losses.effects.isfinite()].tolist()) <= {0.0, 1.0}
    for layer in range(4):
        ask = partial(generate, model, [prompt.ids for prompt in prompts], max_new_tokens=4)
        without = with_hooks(model, lenses._zero_hooks([layer]), ask)
        for r, prompt in enumerate(prompts):
            assert losses.effects[r, 0, layer, len(prompt.ids) - 1] == float(answers[r] != without[r])
    assert losses.effects.nansum() > 0


def test_a_model_that_refuses_nothing_has_no_safety_layers():
    with pytest.raises(ValueError, match=r"does not refuse lamp, and .* leave these requests out"):
        safety_layers(tiny_model("llama", chat=True), [LAMP], prefix, max_new_tokens=2, progress=False)


def test_they_are_drawn_and_saved_like_a_trace(tmp_path):
    lens = logit_lens(tiny_model("llama", chat=True), [LAMP])
    figure = heatmap(lens)
    assert "the logit lens: probability of the first token" in figure.layout.title.text
    assert "brings back" not in figure.layout.title.text
    loaded = ScoreMap.load(lens.save(tmp_path / "lens.safetensors"))
    assert loaded.quantity == lens.quantity and loaded.prompts == lens.prompts
    assert torch.equal(loaded.scores.nan_to_num(), lens.scores.nan_to_num())
