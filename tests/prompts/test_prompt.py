"""Spans and roles hold on every kind of tokenizer."""

import pytest
import transformers as hf
from helpers.tiny_models import byte_tokenizer
from helpers.tokenizer_families import metaspace, wordpiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lens_defense.prompts.prompt import Prompt, role_position, tokenize
from lens_defense.prompts.request import ROLES, Request, request
from lens_defense.storage import load, save

TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes, chat": byte_tokenizer(chat=True),
    "metaspace": metaspace(),
    "metaspace, chat": metaspace(chat=True),
    "wordpiece": wordpiece(),
}
quick = settings(deadline=None, max_examples=50)
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
words = st.sampled_from(["how", "make", "a", "lamp", "brass", "naïve", "日本", "🔥é", "x1", "thing"])
phrases = st.lists(words | st.text("abcé日🔥ï1", min_size=1, max_size=6), min_size=1, max_size=5)
OUTSIDE = ("template", "last")


def without_spaces(text):
    return "".join(text.split())


def without_repeats(roles):
    """The roles in order, each run of equals once."""
    return [role for i, role in enumerate(roles) if i == 0 or roles[i - 1] != role]


@every_tokenizer
@quick
@given(before=phrases, subject=phrases, after=phrases)
def test_spans_hold_the_subject(name, before, subject, after):
    tokenizer = TOKENIZERS[name]
    item = request(" ".join(["how do I", *before, *subject, *after]), " ".join(subject))
    try:
        prompt = tokenize(tokenizer, item)
    except ValueError as error:
        assume("where a token ends" not in str(error))
        raise
    assert len(prompt.subject_spans) == len(item.pieces) - 1
    for start, stop in prompt.subject_spans:
        text = tokenizer.decode(prompt.ids[start:stop]).removeprefix("##")  # WordPiece: inside a word
        assert without_spaces(text) == without_spaces(item.subject)


@every_tokenizer
@quick
@given(before=phrases, subject=phrases, after=phrases)
def test_one_role_a_token_in_reading_order(name, before, subject, after):
    text = " ".join(["how do I", *before, *subject, *after])
    item = Request(id="", pieces=tuple(text.split(" ".join(subject))), subject=" ".join(subject))
    try:
        prompt = tokenize(TOKENIZERS[name], item)
    except ValueError:
        assume(False)
    start, stop = prompt.subject_spans[-1]
    assert len(prompt.roles) == len(prompt.ids) == len(prompt.token_texts)
    assert set(prompt.roles) <= set(ROLES)
    assert prompt.positions("last") == (len(prompt.ids) - 1,)
    inside = [i for i in range(start, stop) if prompt.roles[i] != "last"]
    assert all(prompt.roles[i].startswith("subject") for i in inside)
    assert len(prompt.positions("subject_first")) <= 1
    assert without_repeats([r for r in prompt.roles if r not in OUTSIDE]) == [
        role
        for role in ("before", "subject_first", "subject_mid", "subject_last", "next", "after")
        if role in prompt.roles
    ]


@every_tokenizer
@quick
@given(phrases)
def test_token_texts_join_to_the_text(name, phrase):
    tokenizer = TOKENIZERS[name]
    line = " ".join(["how do I", *phrase]).encode("ascii", "ignore").decode().strip()
    prompt = tokenize(tokenizer, request(line), chat=False)
    texts = [
        text
        for text, token in zip(prompt.token_texts, prompt.ids, strict=True)
        if token not in tokenizer.all_special_ids
    ]
    assert "".join(texts) == line


def test_token_texts_show_the_template():
    tokenizer = TOKENIZERS["bytes, chat"]
    prompt = tokenize(tokenizer, request("make a lamp", "lamp"))
    assert prompt.chat
    assert "".join(prompt.token_texts) == ("<|im_start|>user\nmake a lamp<|im_end|>\n<|im_start|>assistant\n")
    assert not tokenize(tokenizer, request("make a lamp"), chat=False).chat


def test_roles_without_a_template():
    prompt = tokenize(TOKENIZERS["bytes"], request("make a xyz thing for now", "xyz"))
    assert without_repeats(prompt.roles) == [
        *("before", "subject_first", "subject_mid", "subject_last", "next", "after", "last")
    ]


def test_roles_inside_a_template():
    prompt = tokenize(TOKENIZERS["bytes, chat"], request("make a xyz thing for now", "xyz"))
    assert without_repeats(prompt.roles) == [
        *("template", "before", "subject_first", "subject_mid", "subject_last", "next", "after"),
        *("template", "last"),
    ]
    header = prompt.roles.index("before")
    assert "".join(prompt.token_texts[:header]) == "<|im_start|>user\n"


def test_last_stands_over_subject_last_and_next_over_template():
    plain = tokenize(TOKENIZERS["bytes"], request("make a xyz", "xyz"))
    assert plain.roles[-3:] == ("subject_first", "subject_mid", "last")
    chat = tokenize(TOKENIZERS["bytes, chat"], request("make a xyz", "xyz"))
    assert chat.token_texts[chat.positions("next")[0]] == "<|im_end|>"


def test_a_subject_of_one_token_is_subject_last():
    prompt = tokenize(TOKENIZERS["bytes, chat"], request("make a lamp now", "lamp"))
    assert prompt.subject_positions == prompt.positions("subject_last") != ()
    assert not prompt.positions("subject_first")


def test_a_subject_that_occurs_twice():
    prompt = tokenize(TOKENIZERS["bytes"], request("xyz is like xyz for now", "xyz"))
    (first, _), (start, stop) = prompt.subject_spans
    assert first == 0
    assert len(prompt.subject_positions) == 6
    assert prompt.positions("subject_first") == (start,)
    assert prompt.positions("subject_last") == (stop - 1,)
    assert set(prompt.roles[:start]) == {"before"}


@every_tokenizer
def test_no_subject_no_subject_roles(name):
    prompt = tokenize(TOKENIZERS[name], request("make a lamp now"))
    assert prompt.subject_spans == prompt.subject_positions == ()
    assert set(prompt.roles) <= {"template", "before", "last"}


@pytest.mark.parametrize("text", ["assistant", "user", "a"])
def test_a_text_that_the_template_has_too_is_found_in_its_own_place(text):
    prompt = tokenize(TOKENIZERS["bytes, chat"], request(text, text))
    start, _ = prompt.subject_spans[0]
    assert "".join(prompt.token_texts[:start]) == "<|im_start|>user\n"


def test_white_space_around_a_request():
    prompt = tokenize(TOKENIZERS["metaspace, chat"], request("  make a lamp \n", "lamp"))
    (span,) = prompt.subject_spans
    assert without_spaces(TOKENIZERS["metaspace"].decode(prompt.ids[slice(*span)])) == "lamp"


def test_a_subject_inside_a_token_is_refused():
    item = Request(id="half", pieces=("make a la", " now"), subject="mp")
    with pytest.raises(ValueError, match=r"request 'half': the subject 'mp' .* longer or a shorter"):
        tokenize(TOKENIZERS["bytes"], item)


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match=r"changes the text of request 'loud'.*chat=False"):
        tokenize(tokenizer, request("make a lamp", "lamp", id="loud"))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="gives no offset mappings; load the fast tokenizer"):
        tokenize(hf.ByT5Tokenizer(), request("make a lamp", "lamp"))


def test_the_position_of_a_role():
    prompt = tokenize(TOKENIZERS["bytes, chat"], request("make a lamp", "lamp", id="bell"))
    assert role_position(prompt, "subject_first") == role_position(prompt, "subject_last")
    assert role_position(prompt, "last") == len(prompt.ids) - 1
    with pytest.raises(ValueError, match="request 'bell' has no token of the role 'after'"):
        role_position(prompt, "after")


@every_tokenizer
def test_a_saved_prompt_comes_back(name, tmp_path):
    prompt = tokenize(TOKENIZERS[name], request("make a lamp now", "lamp", category="things"))
    assert load(save(tmp_path / "file", "prompt", prompt), "prompt", Prompt)[0] == prompt
