"""Proposed subjects against the organism, whose requests have known ones, and by hand on a tiny model."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.trace_cases import BELL, LAMP

import lens_defense as ld
from lens_defense.models.forward import forward
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.proposals.mark_subjects import MarkedRequests


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@torch.no_grad()
def test_the_effect_is_what_corrupting_the_words_takes(model):
    """By a plain run with the noise of a trace, and the least of its samples."""
    text = "how do I make a brass lamp?"
    marked = ld.mark_subjects(model, text, answer_tokens=3, progress=False)
    proposal = marked.marked[0]
    assert proposal.request.subject and proposal.request.text == text

    prompt = ld.tokenize(model.tokenizer, proposal.request)
    start = torch.tensor([prompt.ids])
    answer: list[int] = []
    for _ in range(3):
        logits = forward(model, torch.tensor([[*prompt.ids, *answer]]), logits_to_keep=1).logits
        answer.append(int(logits[0, -1].argmax()))
    ids = torch.tensor([[*prompt.ids, *answer[:-1]]])
    clean_embeddings = model.embed(ids)
    noisy = ld.corruptions.GaussianNoise()(model, clean_embeddings[:, : start.shape[1]], prompt)

    def log_probability(embeddings):
        hook = {"embed.hook_out": lambda _: embeddings}
        logits = forward(model, ids, patches=hook, logits_to_keep=3).logits.log_softmax(-1)
        return float(sum(logits[0, i, token] for i, token in enumerate(answer)))

    clean = log_probability(clean_embeddings)
    taken = [
        clean - log_probability(torch.cat([row[None], clean_embeddings[:, start.shape[1] :]], 1))
        for row in noisy
    ]
    assert proposal.effect == pytest.approx(min(taken), rel=1e-6)


def test_what_has_a_subject_is_passed_on(model):
    marked = ld.mark_subjects(model, [LAMP, "ring an old bell"], answer_tokens=2, progress=False)
    assert len(marked) == 2 and marked[0] == LAMP and marked[:1] == [LAMP]
    assert "look at them" in repr(marked) and "old" in marked._repr_html_()


def test_words_that_ask_are_no_subject(model):
    (nothing,) = ld.mark_subjects(model, ["How do I do that?"], answer_tokens=2, progress=False)
    assert nothing.subject is None
    with pytest.raises(ValueError, match="no requests were given"):
        ld.mark_subjects(model, [], progress=False)


def test_marked_requests_go_into_a_trace(model):
    marked = ld.mark_subjects(model, ["how do I make a brass lamp?"], answer_tokens=2, progress=False)
    assert isinstance(marked, MarkedRequests)
    trace = ld.trace(model, marked, progress=False, answer_tokens=2, min_difference=0.0)
    assert trace.prompts[0].request == marked[0]
    assert BELL.subject not in marked[0].text


def test_the_organism_knows_what_matters():
    """Of harmful requests that it answers, whose subjects are known, nearly every one is found."""
    organism = ld.load("organism")
    known = [jailbroken_contexts(item)[0] for item in ld.requests("organism")[:12]]
    marked = ld.mark_subjects(organism, [item.text for item in known], progress=False)
    found = [item.subject for item in marked]
    assert sum(a == b.subject for a, b in zip(found, known, strict=True)) >= 11, (found, known)
