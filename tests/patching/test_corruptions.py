"""A corruption spoils the subject, all of it and nothing else, the same way every time."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from helpers.tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lens_defense.models.forward import forward
from lens_defense.patching.corruptions import (
    CounterfactualPrompt,
    GaussianNoise,
    TokenReplacement,
    harmless_subjects,
)
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import EMBEDDING_HOOK

TWICE = request("is an old lamp like a new lamp?", "lamp", id="twice")
XYZ = request("how do I make a xyz at home?", "xyz", id="xyz")
BELL = request("ring an old bell for me", "old bell", id="bell")


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def model(request):
    return tiny_model(request.param, chat=True)


@torch.no_grad()
def prompt_and_clean(model, asked):
    prompt = tokenize(model.tokenizer, asked)
    return prompt, forward(model, torch.tensor([prompt.ids]), capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]


def corrupted_by(corruption, model, asked):
    prompt, clean = prompt_and_clean(model, asked)
    return prompt, clean, corruption(model, clean, prompt)


def moved(clean, corrupted):
    """The positions that differ, in every sample the same."""
    differs = (corrupted - clean).abs().amax(-1) > 0
    assert (differs == differs[0]).all()
    return tuple(differs[0].nonzero()[:, 0].tolist())


def test_noise_is_on_every_occurrence_and_nowhere_else(model):
    prompt, clean, corrupted = corrupted_by(GaussianNoise(samples=4), model, TWICE)
    assert corrupted.shape == (4, *clean.shape[1:]) and corrupted.dtype == clean.dtype
    assert len(prompt.subject_spans) == 2
    assert moved(clean, corrupted) == prompt.subject_positions
    one, two = (corrupted[:, span[0]] - clean[:, span[0]] for span in prompt.subject_spans)
    assert not torch.allclose(one, two), "each token has a draw of its own"
    assert torch.unique(corrupted[:, prompt.subject_positions[0]], dim=0).shape[0] == 4, "and each sample"


def test_noise_leaves_the_clean_embeddings_as_they_were(model):
    prompt, clean = prompt_and_clean(model, TWICE)
    held = clean.clone()
    GaussianNoise()(model, clean, prompt)
    assert torch.equal(clean, held)


def test_noise_of_no_scale_is_none(model):
    _, clean, corrupted = corrupted_by(GaussianNoise(scale=0.0), model, TWICE)
    assert torch.equal(corrupted, clean.expand_as(corrupted))


def test_noise_depends_on_seed_and_text_alone(model):
    _, _, one = corrupted_by(GaussianNoise(), model, TWICE)
    used = GaussianNoise()
    corrupted_by(used, model, BELL)
    torch.rand(3)
    _, _, again = corrupted_by(used, model, replace(TWICE, id="other", category="malware"))
    assert torch.equal(again, one)
    _, _, other = corrupted_by(GaussianNoise(seed=1), model, TWICE)
    assert not torch.equal(other, one)


def test_other_texts_get_other_noise(model):
    draws = []
    for asked in (XYZ, XYZ.inside("Hello! {}")):
        prompt, clean, corrupted = corrupted_by(GaussianNoise(), model, asked)
        draws.append((corrupted - clean)[:, list(prompt.subject_positions)])
    assert not torch.allclose(*draws)


def test_noise_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    corrupted_by(GaussianNoise(), model, TWICE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scale_is_in_standard_deviations_of_the_embeddings(model, scale):
    prompt, clean, corrupted = corrupted_by(GaussianNoise(scale=scale, samples=200), model, TWICE)
    draws = (corrupted - clean)[:, list(prompt.subject_positions)]
    unit = float(embeddings_of(model).std())
    assert float(draws.std()) == pytest.approx(scale * unit, rel=0.05)
    assert abs(float(draws.mean())) < 0.05 * scale * unit


@torch.no_grad()
def embeddings_of(model):
    """Of every token, as the first block reads them [vocab, d_model]."""
    return forward(model, torch.arange(300)[:, None], capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK][:, 0]


def rows_of(model, corrupted):
    """Token ids that a corrupted prompt's embeddings belong to."""
    table = embeddings_of(model)
    return [tuple(int((table - token).abs().sum(1).argmin()) for token in sample) for sample in corrupted]


def test_replacement_keeps_length_and_all_other_tokens(model):
    prompt, clean, corrupted = corrupted_by(TokenReplacement(subjects=["qwv"]), model, XYZ)
    assert corrupted.shape == clean.shape and corrupted.dtype == clean.dtype
    assert set(moved(clean, corrupted)) <= set(prompt.subject_positions)
    (row,) = rows_of(model, corrupted)
    wanted = tokenize(model.tokenizer, replace(XYZ, subject="qwv"))
    assert row == wanted.ids


def test_replacement_is_in_every_occurrence(model):
    asked = request("is an old xyz like a new xyz?", "xyz", id="two")
    prompt, clean, corrupted = corrupted_by(TokenReplacement(subjects=["qwv"]), model, asked)
    assert len(prompt.subject_spans) == 2
    for start, stop in prompt.subject_spans:
        assert (corrupted - clean)[0, start:stop].abs().amax() > 0
    assert rows_of(model, corrupted) == [tokenize(model.tokenizer, replace(asked, subject="qwv")).ids]


def test_a_counterfactual_is_used_unless_subjects_are_given(model):
    asked = replace(XYZ, counterfactual="qwv")
    for corruption, subject in (
        (TokenReplacement(), "qwv"),
        (TokenReplacement(subjects=["vqk"]), "vqk"),
    ):
        _, _, corrupted = corrupted_by(corruption, model, asked)
        assert rows_of(model, corrupted) == [tokenize(model.tokenizer, replace(asked, subject=subject)).ids]


def test_more_samples_are_distinct(model):
    subjects = ["qwv", "much longer than that", "vqk", "kvq"]
    _, _, corrupted = corrupted_by(TokenReplacement(samples=3, subjects=subjects), model, XYZ)
    rows = rows_of(model, corrupted)
    assert len(set(rows)) == 3
    twice = TokenReplacement(samples=2, subjects=["qwv", "qwv", "vqk"])
    _, _, corrupted = corrupted_by(twice, model, XYZ)
    assert len(set(rows_of(model, corrupted))) == 2, "a subject that is named twice is one"


@pytest.mark.parametrize("subjects", [("xyz", "qwv"), ()], ids=["given", "the package's"])
def test_a_subject_does_not_stand_in_for_itself(model, subjects):
    own = "xyz" if subjects else harmless_subjects()[0]
    asked = request(f"how do I make a {own} at home?", own, id="own")
    prompt, clean, corrupted = corrupted_by(TokenReplacement(subjects=subjects), model, asked)
    assert not torch.equal(corrupted, clean)
    assert set(moved(clean, corrupted)) <= set(prompt.subject_positions)


def test_a_counterfactual_prompt_takes_the_place_of_all_of_it(model):
    text = "how do I make a qwv at home!"
    prompt, clean = prompt_and_clean(model, XYZ)
    other = tokenize(model.tokenizer, request(text))
    assert len(other.ids) == len(prompt.ids)
    assert rows_of(model, CounterfactualPrompt({"xyz": text})(model, clean, prompt)) == [other.ids]
    with pytest.raises(ValueError, match=r"'xyz' has \d+ tokens and its counterfactual prompt \d+; give one"):
        CounterfactualPrompt({"xyz": text + " and more of it"})(model, clean, prompt)
    with pytest.raises(ValueError, match="'xyz' has no counterfactual prompt"):
        CounterfactualPrompt({})(model, clean, prompt)


def test_too_few_subjects_are_refused(model):
    with pytest.raises(ValueError, match=r"request 'xyz': 1 of 2 subjects .* and 2 are wanted"):
        corrupted_by(TokenReplacement(samples=2, subjects=["qwv", "much longer"]), model, XYZ)


def test_a_subject_that_grows_together_with_the_text_is_passed_over():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["!? " * 50], trainers.BpeTrainer(initial_alphabet=letters, show_progress=False))
    model = tiny_model("llama")
    model.tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core)
    asked = request("what is xyz?", "xyz", id="xyz")
    _, _, corrupted = corrupted_by(TokenReplacement(subjects=["ab!", "qwv"]), model, asked)
    assert rows_of(model, corrupted) == [tokenize(model.tokenizer, replace(asked, subject="qwv")).ids]
