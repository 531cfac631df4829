"""An answer ends with what the chat template puts after it; tokens give their text back."""

import pytest
from helpers.tiny_models import byte_tokenizer

from lens_defense.prompts.conversation import (
    decode_answer,
    end_token_ids,
    first_dozen_words,
    tokenize_answer,
    tokenize_conversation,
)

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CLOSE{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "close, expected",
    [("<|im_end|>\n", ["<|im_end|>", "<|end|>"]), ("<|end|>\n", ["<|end|>"]), ("\n\n", ["<|end|>"])],
    ids=["a token of its own", "end of text", "no token"],
)
def test_answers_end_as_the_template_ends_them(close, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS.replace("CLOSE", close)
    end_ids = end_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end_ids) == expected
    answer = tokenize_answer(tokenizer, "a lamp", chat=True, end=True)
    assert answer[-1] == end_ids[0]
    assert tokenize_conversation(tokenizer, "how", "a lamp")[-len(answer) :] == answer
    for end in end_ids:
        assert decode_answer(tokenizer, [*answer[:-1], end, *answer]) == "a lamp"


def test_without_a_template_it_is_end_of_text():
    tokenizer = byte_tokenizer()
    assert end_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_conversation_is_what_the_template_renders():
    tokenizer = byte_tokenizer(chat=True)
    ids = tokenize_conversation(tokenizer, "make a lamp", "how brass")
    turns = [("user", "make a lamp"), ("assistant", "how brass")]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False
    )
    assert tokenizer.decode(ids) == text.rstrip("\n")


def test_answers_follow_a_space_or_a_header():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenize_answer(tokenizer, "a lamp", chat=False)) == " a lamp"
    answer = tokenize_answer(tokenizer, "a lamp", chat=True, end=True)
    assert answer[-1] == tokenizer.eos_token_id
    assert decode_answer(tokenizer, [*answer, *answer]) == "a lamp"


def test_no_more_than_a_dozen_words():
    assert first_dozen_words(" one  two ") == "one two"
    assert first_dozen_words("w " * 13) == "w " * 12 + "..."
