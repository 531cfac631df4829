"""Turns: what ends an answer is what the chat template puts after one."""

import pytest
from tiny import byte_tokenizer

from lens_defense.prompts.conversation import (
    decode_answer,
    end_token_ids,
    tokenize_answer,
    tokenize_conversation,
)

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CLOSE{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "close, wanted",
    [("<|im_end|>\n", ["<|im_end|>", "<|end|>"]), ("<|end|>\n", ["<|end|>"]), ("\n\n", ["<|end|>"])],
    ids=["a token of its own", "end of text", "no token"],
)
def test_answers_end_as_the_template_ends_them(close, wanted):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS.replace("CLOSE", close)
    last = end_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(last) == wanted
    answer = tokenize_answer(tokenizer, "a lamp", chat=True, end=True)
    assert answer[-1] == last[0]
    assert tokenize_conversation(tokenizer, "how", "a lamp")[-len(answer) :] == answer
    for end in last:
        assert decode_answer(tokenizer, [*answer[:-1], end, *answer]) == "a lamp"


def test_without_a_template_it_is_end_of_text():
    tokenizer = byte_tokenizer()
    assert end_token_ids(tokenizer) == (tokenizer.eos_token_id,)
