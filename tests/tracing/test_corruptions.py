"""A corruption spoils the subject, all of it and nothing else, the same way every time."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from tiny import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lens_defense.models.forward import forward
from lens_defense.prompts.prompt import prompt, request
from lens_defense.sites import EMBEDDING_HOOK
from lens_defense.tracing.corruptions import counterfactual, harmless_subjects, noise, replacement

TWICE = request("is an old lamp like a new lamp?", "lamp", id="twice")
XYZ = request("how do I make a xyz at home?", "xyz", id="xyz")
BELL = request("ring an old bell for me", "old bell", id="bell")


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request):
    return tiny(request.param, chat=True)


@torch.no_grad()
def met_and_clean(model, asked):
    met = prompt(model.tokenizer, asked)
    return met, forward(model, torch.tensor([met.ids]), names=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]


def spoiled_by(corruption, model, asked):
    met, clean = met_and_clean(model, asked)
    return met, clean, corruption(clean, met)


def moved(clean, spoiled):
    """The positions that differ, in every sample the same."""
    differs = (spoiled - clean).abs().amax(-1) > 0
    assert (differs == differs[0]).all()
    return tuple(differs[0].nonzero()[:, 0].tolist())


def test_noise_is_on_every_occurrence_and_nowhere_else(model):
    met, clean, spoiled = spoiled_by(noise(model, samples=4), model, TWICE)
    assert spoiled.shape == (4, *clean.shape[1:]) and spoiled.dtype == clean.dtype
    assert len(met.subjects) == 2
    assert moved(clean, spoiled) == met.corrupted
    one, two = (spoiled[:, span[0]] - clean[:, span[0]] for span in met.subjects)
    assert not torch.allclose(one, two), "each token has a draw of its own"
    assert torch.unique(spoiled[:, met.corrupted[0]], dim=0).shape[0] == 4, "and each sample"


def test_noise_leaves_the_clean_embeddings_as_they_were(model):
    met, clean = met_and_clean(model, TWICE)
    held = clean.clone()
    noise(model)(clean, met)
    assert torch.equal(clean, held)


def test_noise_of_no_scale_is_none(model):
    _, clean, spoiled = spoiled_by(noise(model, scale=0.0), model, TWICE)
    assert torch.equal(spoiled, clean.expand_as(spoiled))


def test_noise_depends_on_seed_and_text_alone(model):
    _, _, one = spoiled_by(noise(model), model, TWICE)
    used = noise(model)
    spoiled_by(used, model, BELL)
    torch.rand(3)
    _, _, again = spoiled_by(used, model, replace(TWICE, id="other", category="malware"))
    assert torch.equal(again, one)
    _, _, other = spoiled_by(noise(model, seed=1), model, TWICE)
    assert not torch.equal(other, one)


def test_other_texts_get_other_noise(model):
    draws = []
    for asked in (XYZ, XYZ.wrapped("Hello! {}")):
        met, clean, spoiled = spoiled_by(noise(model), model, asked)
        draws.append((spoiled - clean)[:, list(met.corrupted)])
    assert not torch.allclose(*draws)


def test_noise_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    spoiled_by(noise(model), model, TWICE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scale_is_in_standard_deviations_of_the_embeddings(model, scale):
    met, clean, spoiled = spoiled_by(noise(model, scale=scale, samples=200), model, TWICE)
    draws = (spoiled - clean)[:, list(met.corrupted)]
    unit = float(embeddings_of(model).std())
    assert float(draws.std()) == pytest.approx(scale * unit, rel=0.05)
    assert abs(float(draws.mean())) < 0.05 * scale * unit


@torch.no_grad()
def embeddings_of(model):
    """Of every token, as the first block reads them [vocab, d_model]."""
    return forward(model, torch.arange(300)[:, None], names=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK][:, 0]


def rows_of(model, spoiled):
    """Token ids that a spoiled prompt's embeddings belong to."""
    table = embeddings_of(model)
    return [tuple(int((table - token).abs().sum(1).argmin()) for token in sample) for sample in spoiled]


def test_replacement_keeps_length_and_all_other_tokens(model):
    met, clean, spoiled = spoiled_by(replacement(model, subjects=["qwv"]), model, XYZ)
    assert spoiled.shape == clean.shape and spoiled.dtype == clean.dtype
    assert set(moved(clean, spoiled)) <= set(met.corrupted)
    (row,) = rows_of(model, spoiled)
    wanted = prompt(model.tokenizer, replace(XYZ, subject="qwv"))
    assert row == wanted.ids


def test_replacement_is_in_every_occurrence(model):
    asked = request("is an old xyz like a new xyz?", "xyz", id="two")
    met, clean, spoiled = spoiled_by(replacement(model, subjects=["qwv"]), model, asked)
    assert len(met.subjects) == 2
    for start, stop in met.subjects:
        assert (spoiled - clean)[0, start:stop].abs().amax() > 0
    assert rows_of(model, spoiled) == [prompt(model.tokenizer, replace(asked, subject="qwv")).ids]


def test_a_counterfactual_is_used_unless_subjects_are_given(model):
    asked = replace(XYZ, counterfactual="qwv")
    for corruption, subject in (
        (replacement(model), "qwv"),
        (replacement(model, subjects=["vqk"]), "vqk"),
    ):
        _, _, spoiled = spoiled_by(corruption, model, asked)
        assert rows_of(model, spoiled) == [prompt(model.tokenizer, replace(asked, subject=subject)).ids]


def test_more_samples_are_distinct(model):
    subjects = ["qwv", "much longer than that", "vqk", "kvq"]
    _, _, spoiled = spoiled_by(replacement(model, samples=3, subjects=subjects), model, XYZ)
    rows = rows_of(model, spoiled)
    assert len(set(rows)) == 3
    twice = replacement(model, samples=2, subjects=["qwv", "qwv", "vqk"])
    _, _, spoiled = spoiled_by(twice, model, XYZ)
    assert len(set(rows_of(model, spoiled))) == 2, "a subject that is named twice is one"


@pytest.mark.parametrize("subjects", [("xyz", "qwv"), ()], ids=["given", "the package's"])
def test_a_subject_does_not_stand_in_for_itself(model, subjects):
    own = "xyz" if subjects else harmless_subjects()[0]
    asked = request(f"how do I make a {own} at home?", own, id="own")
    met, clean, spoiled = spoiled_by(replacement(model, subjects=subjects), model, asked)
    assert not torch.equal(spoiled, clean)
    assert set(moved(clean, spoiled)) <= set(met.corrupted)


def test_a_counterfactual_prompt_takes_the_place_of_all_of_it(model):
    text = "how do I make a qwv at home!"
    met, clean = met_and_clean(model, XYZ)
    other = prompt(model.tokenizer, request(text))
    assert len(other.ids) == len(met.ids)
    assert rows_of(model, counterfactual(model, {"xyz": text})(clean, met)) == [other.ids]
    with pytest.raises(ValueError, match=r"'xyz' has \d+ tokens and its counterfactual prompt \d+; give one"):
        counterfactual(model, {"xyz": text + " and more of it"})(clean, met)
    with pytest.raises(ValueError, match="'xyz' has no counterfactual prompt"):
        counterfactual(model, {})(clean, met)


def test_too_few_subjects_are_refused(model):
    with pytest.raises(ValueError, match=r"request 'xyz': 1 of 2 subjects .* and 2 are wanted"):
        spoiled_by(replacement(model, samples=2, subjects=["qwv", "much longer"]), model, XYZ)


def test_a_subject_that_grows_together_with_the_text_is_passed_over():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["!? " * 50], trainers.BpeTrainer(initial_alphabet=letters, show_progress=False))
    model = tiny("llama")
    model.tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core)
    asked = request("what is xyz?", "xyz", id="xyz")
    _, _, spoiled = spoiled_by(replacement(model, subjects=["ab!", "qwv"]), model, asked)
    assert rows_of(model, spoiled) == [prompt(model.tokenizer, replace(asked, subject="qwv")).ids]
