"""Batched answers equal one prompt at a time by full forwards without a cache, on every family."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, PADDING_COUNTS, byte_tokenizer, tiny_model

from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import end_token_ids

MAX_NEW_TOKENS = 6
SHARED = (5, 9, 120, 33)
PROMPTS = [SHARED + tail for tail in [(7, 8, 41), (99,), (41, 7, 250, 3, 17, 60, 61), (7, 8), (200, 14)]]


@torch.no_grad()
def one_by_one(model, prompts, max_new_tokens=MAX_NEW_TOKENS):
    """Greedy answers, one whole forward pass per token."""
    answers = []
    for ids in prompts:
        answer = []
        while len(answer) < max_new_tokens and model.tokenizer.eos_token_id not in answer:
            logits = model(torch.tensor([[*ids, *answer]]))
            answer.append(int(logits[0, -1].argmax()))
        answers.append(tuple(answer))
    return answers


def with_an_end(model):
    """The model with an end-of-turn token that some answers contain early and others do not."""
    answers = [answer for answer in one_by_one(model, PROMPTS) if max(answer[1:-1]) < 297]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(answers[0][2])
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *PADDING_COUNTS])
def test_generate_is_greedy_one_by_one(family):
    model = tiny_model(family)
    assert generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS) == one_by_one(model, PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_rows_that_ended_leave(family):
    model = with_an_end(tiny_model(family))
    expected, rows = one_by_one(model, PROMPTS), []

    def pick(logits):
        rows.append(len(logits))
        return logits.argmax(-1)

    assert generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, pick=pick) == expected
    assert min(map(len, expected)) < MAX_NEW_TOKENS
    assert rows == [sum(len(a) > i for a in expected) for i in range(max(map(len, expected)))]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("batch_size", "prefill_batch_size"), [(1, 1), (2, 1), (3, 2), (5, 2), (5, 1)])
def test_batch_and_order_change_nothing(family, batch_size, prefill_batch_size):
    model, ended = with_an_end(tiny_model(family)), []
    batches = {"batch_size": batch_size, "prefill_batch_size": prefill_batch_size}
    whole = generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    answers = generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, progress=ended.append, **batches)
    assert answers == whole
    assert sum(ended) == len(PROMPTS)
    backwards = generate(model, PROMPTS[::-1], max_new_tokens=MAX_NEW_TOKENS, **batches)
    assert backwards == whole[::-1]


@pytest.mark.parametrize(("batch_size", "prefill_batch_size"), [(1, 1), (2, 1), (96, 32)])
def test_the_tokens_watched_are_the_answers(batch_size, prefill_batch_size):
    model, tokens = with_an_end(tiny_model("llama")), []
    batches = {"batch_size": batch_size, "prefill_batch_size": prefill_batch_size}
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **batches}
    answers = generate(model, PROMPTS, watch=lambda *token: tokens.append(token), **settings)
    assert answers == generate(model, PROMPTS, **settings) and len(set(map(len, answers))) > 1
    for i, answer in enumerate(answers):
        assert tuple(token for prompt, token in tokens if prompt == i) == answer
    assert len(tokens) == sum(map(len, answers))


def test_a_token_is_watched_before_the_next_one_is_chosen():
    model, order = tiny_model("gpt2"), []

    def pick(logits):
        order.append("pick")
        return logits.argmax(-1)

    generate(model, PROMPTS[:1], max_new_tokens=3, pick=pick, watch=lambda *_: order.append("watch"))
    assert order == ["pick", "watch"] * 3


def test_what_a_watcher_raises_ends_the_answers():
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model("llama"), PROMPTS, watch=stop)


@pytest.mark.parametrize(
    "prompts",
    [[], [(7,)], [(7,), (8, 9)], [SHARED] * 3, [SHARED, SHARED[:2]], [(7, 8), (9, 8, 7)]],
    ids=["none", "one token", "nothing shared", "the same", "one inside the other", "ragged"],
)
def test_any_shared_prefix(prompts):
    model = tiny_model("gpt2")
    assert generate(model, prompts, max_new_tokens=3) == one_by_one(model, prompts, 3)


def test_ends_at_the_tokenizers_end_of_turn():
    model = tiny_model("llama", chat=True)
    end = byte_tokenizer(chat=True).eos_token_id
    answers = generate(model, PROMPTS, pick=lambda logits: torch.full((len(logits),), end))
    assert answers == [(end,)] * len(PROMPTS)


def test_ends_at_either_token():
    model = tiny_model("llama")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    turn, text = end_token_ids(model.tokenizer)
    assert turn != text
    for end in (turn, text):
        answers = generate(model, PROMPTS, pick=lambda logits, end=end: torch.full((len(logits),), end))
        assert answers == [(end,)] * len(PROMPTS)
