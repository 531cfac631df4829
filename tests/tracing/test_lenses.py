"""The other maps: read by hand what they read, and the face that they share with a trace."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny_model

from lens_defense.checking.judges import prefix
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
    told = logit_lens(model, [LAMP, BELL])
    met = told.prompts[1]
    logits, cache = model.run_with_cache(torch.tensor([met.ids]))
    state = cache["blocks.1.hook_out"][0]
    by_hand = model.unembed(model.ln_final(state))
    if family == "gemma2":
        by_hand = (by_hand / 30).tanh() * 30  # its softcap
    assert torch.allclose(told.effects[1, 0, 1, : len(met.ids)], by_hand.softmax(-1)[:, met.answer_ids[0]])
    assert torch.allclose(told.effects[1, 0, -1, : len(met.ids)], logits[0].softmax(-1)[:, met.answer_ids[0]])
    assert told.effects[1, 0, :, len(met.ids) :].isnan().all(), "the shorter prompt ends before the longer"


@torch.no_grad()
def test_toxic_layers_are_distances_of_the_last_states():
    model = tiny_model("llama", chat=True)
    told = toxic_layers(model, [LAMP], "a thing", answers=["the lamp"], answer_tokens=3)
    met = told.prompts[0]
    ends = []
    for text in ("the lamp", "a thing"):
        answer = model.tokenizer(text)["input_ids"][:3]
        _, cache = model.run_with_cache(torch.tensor([[*met.ids, *answer]]))
        ends.append(torch.stack([cache[f"blocks.{layer}.hook_out"][0, -1] for layer in range(4)]))
    apart = (ends[0] - ends[1]).norm(dim=1)
    assert torch.allclose(told.effects[0, 0, :, -1], apart / apart.max())
    (site,) = locate(told, 1, by="cells")
    assert (site.role, site.layer) == ("last", int(apart.argmax()))


def test_toxic_layers_want_two_answers():
    with pytest.raises(ValueError, match="'lamp' is the safe one already"):
        toxic_layers(tiny_model("llama", chat=True), [LAMP], "a thing", answers=["a thing"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_layers_passed_over_are_layers_that_are_not_there(family):
    model, cut = tiny_model(family, chat=True), tiny_model(family, chat=True).original_model
    base = getattr(cut, cut.base_model_prefix)
    name = next(name for name in ("layers", "h") if hasattr(base, name))
    blocks = getattr(base, name)
    setattr(base, name, torch.nn.ModuleList([blocks[0], blocks[3]]))
    ids = torch.tensor([tokenize(model.tokenizer, LAMP).ids])
    wanted = cut(ids, use_cache=False).logits
    before = model(ids)
    with lenses._passed_over(model, range(1, 3)):
        assert torch.allclose(model(ids), wanted)
    assert torch.equal(model(ids), before)


def test_safety_layers_are_those_without_which_no_refusal_comes():
    """A judge that calls the whole model's answers refusals: what differs from them is lost."""
    model = tiny_model("llama", chat=True)
    met = [tokenize(model.tokenizer, item) for item in (LAMP, BELL)]
    whole = generate(model, [one.ids for one in met], max_new_tokens=4)
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in whole]

    def judge(_request, answer):
        return "refusal" if answer.strip() in texts else "answer"

    told = safety_layers(model, [LAMP, BELL], judge, tokens=4, progress=False)
    assert set(told.effects[told.effects.isfinite()].tolist()) <= {0.0, 1.0}
    for layer in range(4):
        with lenses._passed_over(model, [layer]):
            same = generate(model, [one.ids for one in met], max_new_tokens=4)
        for r, (a, b) in enumerate(zip(whole, same, strict=True)):
            assert told.effects[r, 0, layer, len(met[r].ids) - 1] == float(a != b)
    assert told.effects.nansum() > 0


def test_a_model_that_refuses_nothing_has_no_safety_layers():
    with pytest.raises(ValueError, match=r"does not refuse lamp, and .* leave these requests out"):
        safety_layers(tiny_model("llama", chat=True), [LAMP], prefix, tokens=2, progress=False)


def test_they_are_drawn_and_saved_like_a_trace(tmp_path):
    told = logit_lens(tiny_model("llama", chat=True), [LAMP])
    figure = heatmap(told)
    assert "the logit lens: probability of the first token" in figure.layout.title.text
    assert "brings back" not in figure.layout.title.text
    back = ScoreMap.load(told.save(tmp_path / "lens.safetensors"))
    assert back.quantity == told.quantity and back.prompts == told.prompts
    assert torch.equal(back.scores.nan_to_num(), told.scores.nan_to_num())
