"""Turns: what ends an answer is what the chat template puts after one."""

import pytest
from tiny import byte_tokenizer

from lens_defense.prompts.conversation import answer_ids, conversation_ids, decode, ends

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
    last = ends(tokenizer)
    assert tokenizer.convert_ids_to_tokens(last) == wanted
    answer = answer_ids(tokenizer, "a lamp", chat=True, end=True)
    assert answer[-1] == last[0]
    assert conversation_ids(tokenizer, "how", "a lamp")[-len(answer) :] == answer
    for end in last:
        assert decode(tokenizer, [*answer[:-1], end, *answer]) == "a lamp"


def test_without_a_template_it_is_end_of_text():
    tokenizer = byte_tokenizer()
    assert ends(tokenizer) == (tokenizer.eos_token_id,)
