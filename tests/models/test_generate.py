"""Batched answers equal one prompt at a time by full forwards without a cache, on every family."""

import pytest
import torch
from tiny import FAMILIES, byte_tokenizer, tiny

from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import end_token_ids

TOKENS = 6
SHARED = (5, 9, 120, 33)
PROMPTS = [SHARED + tail for tail in [(7, 8, 41), (99,), (41, 7, 250, 3, 17, 60, 61), (7, 8), (200, 14)]]


@torch.no_grad()
def one_by_one(model, prompts, tokens=TOKENS):
    """Greedy answers, a whole forward a token."""
    answers = []
    for ids in prompts:
        told = []
        while len(told) < tokens and model.tokenizer.eos_token_id not in told:
            logits = model(torch.tensor([[*ids, *told]]))
            told.append(int(logits[0, -1].argmax()))
        answers.append(tuple(told))
    return answers


def with_an_end(model):
    """The model, whose end-of-turn token is one that some answers hold early and others do not."""
    told = [answer for answer in one_by_one(model, PROMPTS) if max(answer[1:-1]) < 297]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(told[0][2])
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_greedy_one_by_one(family):
    model = tiny(family)
    assert generate(model, PROMPTS, tokens=TOKENS) == one_by_one(model, PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_rows_that_ended_leave(family):
    model = with_an_end(tiny(family))
    slow, seen = one_by_one(model, PROMPTS), []

    def pick(logits):
        seen.append(len(logits))
        return logits.argmax(-1)

    assert generate(model, PROMPTS, tokens=TOKENS, pick=pick) == slow
    assert min(map(len, slow)) < TOKENS
    assert seen == [sum(len(a) > i for a in slow) for i in range(max(map(len, slow)))]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("batch", "read"), [(1, 1), (2, 1), (3, 2), (5, 2), (5, 1)])
def test_batch_and_order_change_nothing(family, batch, read):
    model, counted = with_an_end(tiny(family)), []
    whole = generate(model, PROMPTS, tokens=TOKENS)
    told = generate(model, PROMPTS, tokens=TOKENS, batch=batch, read=read, progress=counted.append)
    assert told == whole
    assert sum(counted) == len(PROMPTS)
    assert generate(model, PROMPTS[::-1], tokens=TOKENS, batch=batch, read=read) == whole[::-1]


@pytest.mark.parametrize(
    "prompts",
    [[], [(7,)], [(7,), (8, 9)], [SHARED] * 3, [SHARED, SHARED[:2]], [(7, 8), (9, 8, 7)]],
    ids=["none", "one token", "nothing shared", "the same", "one inside the other", "ragged"],
)
def test_any_shared_prefix(prompts):
    model = tiny("gpt2")
    assert generate(model, prompts, tokens=3) == one_by_one(model, prompts, 3)


def test_ends_at_the_tokenizers_end_of_turn():
    model = tiny("llama", chat=True)
    end = byte_tokenizer(chat=True).eos_token_id
    told = generate(model, PROMPTS, pick=lambda logits: torch.full((len(logits),), end))
    assert told == [(end,)] * len(PROMPTS)


def test_ends_at_either_token():
    model = tiny("llama")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    turn, text = end_token_ids(model.tokenizer)
    assert turn != text
    for end in (turn, text):
        told = generate(model, PROMPTS, pick=lambda logits, end=end: torch.full((len(logits),), end))
        assert told == [(end,)] * len(PROMPTS)
