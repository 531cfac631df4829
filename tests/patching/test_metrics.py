"""A metric is one number per row: what log_softmax and a gather give, and differences of the right sign."""

from dataclasses import replace

import pytest
import torch
from helpers.handmade import a_prompt
from helpers.tiny_models import tiny_model

from lens_defense.patching.metrics import (
    answer_logprob,
    answer_probability,
    kl_to_clean,
    logit_diff,
    refusal_logit_diff,
)
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request

ANSWER = (4, 0, 19, 4)


def some_logits(rows=3, seed=0, vocab=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, len(ANSWER), vocab, generator=generator, dtype=torch.float64) * 5


PROMPT = replace(a_prompt(), answer_ids=ANSWER)


def test_answer_logprob_is_log_softmax_at_the_answer():
    logits = some_logits()
    logprobs = answer_logprob(logits, PROMPT, logits[:1])
    assert logprobs.shape == (3,)
    for row, logprob in zip(logits, logprobs, strict=True):
        expected = sum(row[i].log_softmax(-1)[token] for i, token in enumerate(ANSWER))
        torch.testing.assert_close(logprob, expected)


def test_answer_logprob_has_no_unit_of_the_logits():
    logits = some_logits()
    shifted = logits + torch.arange(len(ANSWER))[:, None] * 100.0
    torch.testing.assert_close(
        answer_logprob(shifted, PROMPT, logits[:1]), answer_logprob(logits, PROMPT, logits[:1])
    )
    assert (answer_logprob(logits * 100, PROMPT, logits[:1]) <= 0).all()


def test_answer_probability_is_the_first_tokens():
    logits = some_logits()
    probabilities = answer_probability(logits, PROMPT, logits[:1])
    torch.testing.assert_close(probabilities, logits[:, 0].log_softmax(-1)[:, ANSWER[0]].exp())
    of_each_token = [
        answer_probability(logits, replace(PROMPT, answer_ids=(i,)), logits[:1]) for i in range(20)
    ]
    torch.testing.assert_close(sum(of_each_token), torch.ones(3, dtype=torch.float64))
    one_token = replace(PROMPT, answer_ids=ANSWER[:1])
    torch.testing.assert_close(answer_logprob(logits[:, :1], one_token, logits[:1, :1]), probabilities.log())


@pytest.mark.parametrize("chat", [True, False])
def test_refusal_logit_diff_is_positive_where_refusals_are_likelier(chat):
    model = tiny_model("llama", chat=chat)
    metric = refusal_logit_diff(model, refusals=["how"], compliances=["make", "lamp"])
    prompt = tokenize(model.tokenizer, request("ring"))
    first = [tokenize_answer(model.tokenizer, prompt, text)[0] for text in ("how", "make", "lamp")]
    assert len(set(first)) == 3
    logits = torch.zeros(4, len(ANSWER), 300)
    logits[0, 0, first[0]] = 6.0
    logits[1, 0, first[1]] = 6.0
    logits[2, 1, first[0]] = 6.0  # not the first step
    logits[3, 0] = 6.0
    assert metric(logits, PROMPT, logits[:1]).tolist() == [6.0, -3.0, 0.0, 0.0]


def test_openings_that_begin_alike_count_once():
    model = tiny_model("llama", chat=True)
    logits = torch.randn(2, 1, 300, generator=torch.Generator().manual_seed(0))
    metric = refusal_logit_diff(model, refusals=["how", "make"], compliances=["lamp"])
    with_repeats = refusal_logit_diff(
        model, refusals=["how", "make", "how do I"], compliances=["lamp", "lamp?"]
    )
    torch.testing.assert_close(with_repeats(logits, PROMPT, logits[:1]), metric(logits, PROMPT, logits[:1]))


def test_logit_diff_is_the_first_tokens_logits_apart():
    model = tiny_model("llama")
    prompt = replace(tokenize(model.tokenizer, request("ring")), answer_ids=ANSWER)
    against = tokenize_answer(model.tokenizer, prompt, "lamp")[0]
    logits = some_logits(vocab=300)
    differences = logit_diff(model, "lamp")(logits, prompt, logits[:1])
    torch.testing.assert_close(differences, logits[:, 0, ANSWER[0]] - logits[:, 0, against])
    assert differences.std() > 1


def test_kl_to_clean_is_the_sum_of_p_log_p_over_q():
    logits, clean = some_logits(), some_logits(rows=1, seed=1)
    divergences = kl_to_clean(logits, PROMPT, clean)
    p = clean[0].softmax(-1)
    expected = [(p * (p.log() - row.softmax(-1).log())).sum(-1).mean() for row in logits]
    torch.testing.assert_close(divergences, torch.stack(expected))
    torch.testing.assert_close(kl_to_clean(clean, PROMPT, clean), torch.zeros(1, dtype=torch.float64))
