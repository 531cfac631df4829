"""What is longer than a model reads is refused by name before anything runs."""

import pytest
from helpers.tiny_models import tiny_model

import lens_defense as ld
import lens_defense.models.prefix_batch as prefix_batch
from lens_defense.checking.check import check
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.models.context_length import context_length, refuse_too_long
from lens_defense.models.generate import generate
from lens_defense.prompts.prompt import tokenize

LONG = ld.request("tell me of a brass lamp " + "and of a thing " * 40, "brass lamp", id="long one")
SHORT = ld.request("tell me of an old ship", "old ship", id="ship")
SITES = [ld.Site("resid_post", 1, "subject_last")]


def suite_of(request, neutral=("a lamp",)):
    items = (SuiteItem("edited", request),)
    return Suite("own", "check", items, neutral)


@pytest.mark.parametrize("family, length", [("llama", 256), ("gpt2", 256), ("mpt", 256), ("bloom", None)])
def test_the_length_is_the_configs(family, length):
    assert context_length(tiny_model(family)) == length


def test_what_fits_to_the_last_token_is_read():
    model = tiny_model("llama")
    refuse_too_long(model, [("a", 256), ("b", 1)])
    with pytest.raises(ValueError, match=r"reads 256 tokens.*more: a \(257\), c \(300\); shorten"):
        refuse_too_long(model, [("a", 257), ("b", 1), ("c", 300)])
    refuse_too_long(tiny_model("bloom"), [("a", 10**9)])


@pytest.mark.parametrize(
    "run",
    [
        lambda model: ld.trace(model, [SHORT, LONG], progress=False),
        lambda model: ld.trace(model, [SHORT], answers=["a lamp " * 200], progress=False),
        lambda model: ld.edit(model, [SHORT, LONG], SITES, cache=False, progress=False),
        lambda model: check(model, None, suite_of(LONG), progress=False),
        lambda model: check(model, None, suite_of(SHORT, ("lamp " * 300,)), max_new_tokens=2, progress=False),
        lambda model: generate(model, [tokenize(model.tokenizer, SHORT).ids], max_new_tokens=255),
    ],
    ids=["trace", "answer", "edit", "check", "neutral text", "generate"],
)
def test_it_is_refused_by_name_before_it_runs(run, monkeypatch):
    model = tiny_model("gpt2", chat=True)
    ran = []
    forward = prefix_batch.forward
    monkeypatch.setattr(prefix_batch, "forward", lambda *a, **k: ran.append(a[1].shape) or forward(*a, **k))
    with pytest.raises(
        ValueError, match=r"reads 256 tokens.*(long one|ship|neutral text 0|prompt 0) \(\d+\)"
    ):
        run(model)
    assert all(shape[1] <= 256 for shape in ran)


@pytest.mark.filterwarnings("ignore")
def test_contexts_that_are_too_long_are_left_out():
    """Some of the default contexts have more than 256 tokens here; the plan is made with the others."""
    model = tiny_model("gpt2", chat=True)
    fit = ld.FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1, extra_rounds=0)
    corpus = ld.read_corpus()[:2]
    edit = ld.edit(model, [SHORT], SITES, fit=fit, corpus=corpus, cache=False, progress=False)
    lengths = {item.text: len(tokenize(model.tokenizer, item).ids) for item in ld.default_contexts(SHORT)}
    used = {text: length for text, length in lengths.items() if text in edit.texts}
    assert max(lengths.values()) > 256 > max(used.values()) and len(used) > 10
