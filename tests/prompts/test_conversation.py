"""An answer ends with what the chat template puts after it; tokens give their text back."""

from dataclasses import replace
from itertools import pairwise

import pytest
from helpers.tiny_models import byte_tokenizer
from helpers.tokenizer_families import metaspace, wordpiece
from tokenizers import processors

from lens_defense.prompts.conversation import (
    decode_answer,
    decode_growing_answer,
    end_token_ids,
    first_dozen_words,
    tokenize_answer,
    tokenize_conversation,
)
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request

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
    answer = tokenize_answer(tokenizer, tokenize(tokenizer, request("how")), "a lamp", end=True)
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


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
TOKENIZERS = {"byte-level": byte_tokenizer, "SentencePiece": metaspace, "WordPiece": wordpiece}
TEMPLATES = {"none": None, "a line": TURNS.replace("CLOSE", "\n"), "a space": LLAMA_2}


@pytest.mark.parametrize("spaces", ["", " ", "\n"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_answers_are_the_tokens_that_the_whole_text_has(make, template, spaces):
    tokenizer = make()
    tokenizer.chat_template = TEMPLATES[template]
    prompt = tokenize(tokenizer, request("how do I make it?"))
    answer = tokenize_answer(tokenizer, prompt, f"{spaces}a lamp")
    turns = [{"role": "user", "content": "how do I make it?"}, {"role": "assistant", "content": "a lamp"}]
    if template == "none":
        whole = tokenizer("how do I make it? a lamp")["input_ids"]
    else:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        whole = tokenizer(text[: text.rindex("a lamp") + 6], add_special_tokens=False)["input_ids"]
    if make is wordpiece and template == "none":
        whole = whole[:-1]  # the [SEP] that it appends
    assert [*prompt.ids, *answer] == whole


@pytest.mark.parametrize(
    "before, answer, text",
    [
        ("how do I", "a lamp", " a lamp"),
        ("how do I ", "a lamp", "a lamp"),
        ("how do I", ", lamp", ", lamp"),
        ("how (", "a lamp", "a lamp"),
        ("日本", "本日", "本日"),
    ],
)
def test_a_continuation_has_a_space_where_it_needs_one(before, answer, text):
    tokenizer = byte_tokenizer()
    for spaces in ("", " "):
        ids = tokenize_answer(tokenizer, tokenize(tokenizer, request(before)), spaces + answer)
        assert tokenizer.decode(ids) == text


def test_an_answer_goes_on_from_one_that_has_begun():
    tokenizer = byte_tokenizer(chat=True)
    item = request("how do I make it?")
    begun = tokenize(tokenizer, replace(item, prefill="Sure, here is"))
    assert tokenizer.decode(tokenize_answer(tokenizer, begun, "a lamp")) == " a lamp"
    plain = tokenize(tokenizer, item, chat=False)
    assert tokenizer.decode(tokenize_answer(tokenizer, plain, "a lamp")) == " a lamp"


@pytest.mark.parametrize("opening, closing", [("<think>", "\n</think>\n\n"), ("<think>\n", "</think>\n\n")])
def test_an_answer_stands_after_the_reasoning_that_a_template_opens(opening, closing):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS.replace("assistant\n", f"assistant\n{opening}").replace("CLOSE", "\n")
    prompt = tokenize(tokenizer, request("how do I make it?"))
    answer = tokenize_answer(tokenizer, prompt, "a lamp", end=True)
    assert tokenizer.decode(answer[:-1]) == f"{closing}a lamp"
    begun = tokenize(tokenizer, replace(prompt.request, prefill="Sure"))
    assert tokenizer.decode(begun.ids).endswith(f"{opening}{closing}Sure")


@pytest.mark.parametrize("make", [wordpiece, lambda: with_an_end(metaspace())], ids=["WordPiece", "appended"])
def test_an_end_that_the_tokenizer_appends_is_not_asked_after(make):
    tokenizer = make()
    prompt = tokenize(tokenizer, request("how do I make a lamp", "lamp"))
    assert tokenizer.decode(prompt.ids, skip_special_tokens=True).strip() == "how do I make a lamp"
    assert prompt.ids[-1] != tokenizer.eos_token_id
    assert prompt.roles[-1] == "last" and "subject_last" not in prompt.roles[:-2]


def with_an_end(tokenizer):
    """The tokenizer, with an end token after whatever it reads."""
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return tokenizer


def test_no_more_than_a_dozen_words():
    assert first_dozen_words(" one  two ") == "one two"
    assert first_dozen_words("w " * 13) == "w " * 12 + "..."


def test_another_template_gives_another_lead():
    tokenizer = byte_tokenizer()
    for template, lead in ((TURNS.replace("CLOSE", "\n"), "a lamp"), (LLAMA_2, " a lamp")):
        tokenizer.chat_template = template
        ids = tokenize_answer(tokenizer, tokenize(tokenizer, request("how")), "a lamp")
        assert tokenizer.decode(ids) == lead


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(chat=True), metaspace(chat=True)], ids=["byte", "meta"])
@pytest.mark.parametrize(
    "text", ["a lamp", "日本 🔥 ré, ñ 🔥🔥", "é", "🔥", "tail 日", "two  spaces \n\n and lines\n"], ids=repr
)
def test_a_growing_answer_only_grows_and_shows_no_half_of_a_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = [decode_growing_answer(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    assert texts[0] == "" and texts[-1] == decode_answer(tokenizer, ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert not any("\ufffd" in shown for shown in texts)
    ended = (*ids, end_token_ids(tokenizer)[0])
    assert decode_growing_answer(tokenizer, ended) == texts[-1]


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a🔥b", add_special_tokens=False)["input_ids"]
    texts = [decode_growing_answer(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    assert len(ids) == 6 and texts == ["", "a", "a", "a", "a", "a🔥", "a🔥b"]
