"""The weight form of steering equals its formula in float64, and writes the direction on average."""

import random
import re

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
import lens_defense.editing.forecast as forecasts
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.conversation import tokenize_conversation
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.prompt import tokenize
from lens_defense.sites import key_hook

WORDS = ("how", "do", "I", "make", "a", "brass", "lamp", "the", "is", "bell", "ring", "old", "who", "tree")
SHUFFLE = random.Random(0)
CORPUS = [
    CorpusText(" ".join(SHUFFLE.choices(WORDS, k=5)), " ".join(SHUFFLE.choices(WORDS, k=9)))
    for _ in range(40)
]
REQUESTS = (
    ld.request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    ld.request("ring a bell now", "bell", id="bell"),
)
LAYER, STRENGTH = 1, 0.5
pytestmark = [
    pytest.mark.filterwarnings("ignore:this edit leaks"),
    pytest.mark.filterwarnings("ignore:less than 40% of the value arrives"),
]


@pytest.fixture(autouse=True)
def small_neutral_text(monkeypatch):
    """The forecast's neutral texts, short enough for a tiny model of 256 positions."""
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS[:4])


def random_direction():
    return torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def planned(model, direction, requests=REQUESTS, strength=STRENGTH, **settings):
    settings = {"corpus": CORPUS, "cache": False, "progress": False} | settings
    return ld.steering_edit(model, direction, LAYER, requests, strength, **settings)


@torch.no_grad()
def states_of_corpus(model, hook):
    """States at a hook over all tokens of the corpus, each text alone."""
    states = []
    for text in CORPUS:
        ids = torch.tensor([tokenize_conversation(model.tokenizer, text.user, text.assistant)])
        states.append(forward(model, ids, capture=[hook]).states[hook][0].double())
    return torch.cat(states)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_formula(family):
    model, direction = tiny_model(family, chat=True), random_direction()
    edit, keys = planned(model, direction), states_of_corpus(model, key_hook(LAYER))
    mean, covariance = keys.mean(0), keys.T @ keys / len(keys)
    solved = torch.linalg.inv(covariance) @ mean
    expected_change = STRENGTH * torch.outer(direction, solved) / (mean @ solved)
    delta = edit.deltas()[LAYER]
    assert edit.layers == (LAYER,) and edit.rank == 1 and edit.method == "steering-edit"
    assert (delta - expected_change).norm() < 1e-3 * expected_change.norm(), "C is summed in single precision"
    share = edit.right[LAYER][0].double()
    assert edit.settings["share_deviation"] == pytest.approx(float((keys @ share).std()), rel=1e-2)
    matrix = mlp_output_matrix(model, LAYER)
    assert edit.relative_change[LAYER] == pytest.approx(float(delta.norm() / matrix.norm()))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "granite"])  # granite scales what it adds
def test_the_direction_arrives_on_average_after_the_layer(family):
    model, direction, hook = tiny_model(family, chat=True), random_direction(), f"blocks.{LAYER}.hook_out"
    edit, clean, weights = planned(model, direction), states_of_corpus(model, hook), copy_weights(model)
    with edit.applied(model):
        shift = (states_of_corpus(model, hook) - clean).mean(0)
    torch.testing.assert_close(shift, STRENGTH * direction, rtol=1e-4, atol=1e-4)
    assert weights_equal(model, weights)


def test_no_change_that_writes_it_on_average_writes_it_more_evenly():
    model = tiny_model("llama", chat=True)
    edit, keys = planned(model, random_direction()), states_of_corpus(model, key_hook(LAYER))
    share, mean, generator = edit.right[LAYER][0].double(), keys.mean(0), torch.Generator().manual_seed(0)
    least = float((keys @ share).var())
    for _ in range(20):
        other = torch.randn(len(share), generator=generator, dtype=torch.float64)
        other -= mean * (other @ mean) / (mean @ mean)  # what it adds to the mean share is 0
        assert float((keys @ (share + 0.1 * share.norm() * other / other.norm())).var()) > least


@torch.no_grad()
def test_the_forecast_is_what_arrives_at_the_last_token():
    model, direction, hook = tiny_model("llama", chat=True), random_direction(), key_hook(LAYER)
    edit = planned(model, direction)
    share = edit.right[LAYER][0].double()
    for request, reach in zip(REQUESTS, edit.forecast.reach, strict=True):
        ids = torch.tensor([tokenize(model.tokenizer, request).ids])
        key = forward(model, ids, capture=[hook]).states[hook][0, -1].double()
        assert reach == pytest.approx(STRENGTH * float(share @ key), rel=1e-4)
    forecast = edit.forecast
    assert forecast.leaks_safe == (pytest.approx(forecast.leak_safe),) * 2, "one rank, of all requests"
    assert planned(model, 3 * direction).forecast.leak_safe == pytest.approx(forecast.leak_safe, rel=1e-4)
    twice = planned(model, direction, strength=2 * STRENGTH).forecast
    assert twice.leak_safe == pytest.approx(2 * forecast.leak_safe, rel=1e-4)


def test_it_is_an_edit_like_any_other(tmp_path):
    model, direction = tiny_model("llama", chat=True), random_direction()
    edit, weights = planned(model, direction), copy_weights(model)
    assert edit.strength == STRENGTH and edit.subjects == ("brass lamp", "bell")
    loaded = ld.Edit.load(edit.save(tmp_path / "edit.safetensors"), model)
    assert torch.equal(loaded.deltas()[LAYER], edit.deltas()[LAYER]) and loaded.settings == edit.settings
    ledger = ld.Ledger(model)
    ledger.apply(edit)
    assert not weights_equal(model, weights)
    again = planned(model, direction)  # C and m are those of the model without what stands
    torch.testing.assert_close(again.deltas()[LAYER], edit.deltas()[LAYER])
    ledger.undo()
    assert weights_equal(model, weights)


def test_c_and_the_mean_key_are_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path))
    model, direction = tiny_model("llama", chat=True), random_direction()
    first = planned(model, direction, cache=True)
    monkeypatch.setattr("lens_defense.editing.solving.covariance.iterate_keys", lambda *_, **__: iter(()))
    assert torch.equal(planned(model, direction, cache=True).deltas()[LAYER], first.deltas()[LAYER])


def test_the_plan_warns_that_it_leaks():
    with pytest.warns(UserWarning, match="of a value's norm into harmless text, .*; or take less strength"):
        planned(tiny_model("llama", chat=True), random_direction(), strength=2)


def test_no_edit_is_planned_while_a_hook_is_in_the_model():
    model, direction = tiny_model("llama", chat=True), random_direction()
    message = f"there is a hook at blocks.{LAYER}.hook_out, as inside ld.steered"
    with ld.steered(model, direction, LAYER):
        with pytest.raises(ValueError, match=message):
            planned(model, direction)
        with pytest.raises(ValueError, match=message):
            ld.edit(model, REQUESTS, ld.Site("mlp_out", LAYER, "subject_last"), progress=False)
    assert planned(model, direction).layers == (LAYER,)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"layer": 4}, "layer 4 is not in the model"),
        ("llama", {"strength": -1}, "strength must be a finite number above 0, got -1"),
        ("llama", {"direction": torch.ones(31)}, "a vector of 32 real numbers, got [31]"),
        ("llama", {"requests": ["ring a bell"]}, "no subject, the words that carry the harm, is marked"),
        ("gemma2", {}, "norms the MLP's output"),
    ],
)
def test_what_cannot_be_planned_is_refused(family, change, message):
    arguments = {"direction": random_direction(), "layer": LAYER, "requests": REQUESTS} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ld.steering_edit(tiny_model(family, chat=True), **arguments)
