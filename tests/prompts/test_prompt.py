"""Spans and roles hold on every kind of tokenizer; a Request is text that survives JSON."""

import json
from dataclasses import replace

import pytest
import transformers as hf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers_of import metaspace, wordpiece

from lens_defense.prompts.conversation import (
    decode_answer,
    first_dozen_words,
    tokenize_answer,
    tokenize_conversation,
)
from lens_defense.prompts.prompt import ROLES, Request, prompt, request, request_from_json, validated_requests

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


def squeezed(text):
    return "".join(text.split())


def runs(roles):
    """The roles in order, each run of equals once."""
    return [role for i, role in enumerate(roles) if i == 0 or roles[i - 1] != role]


@every_tokenizer
@quick
@given(before=phrases, subject=phrases, after=phrases)
def test_spans_hold_the_subject(name, before, subject, after):
    tokenizer = TOKENIZERS[name]
    asked = request(" ".join(["how do I", *before, *subject, *after]), " ".join(subject))
    try:
        met = prompt(tokenizer, asked)
    except ValueError as error:
        assume("where a token ends" not in str(error))
        raise
    assert len(met.subjects) == len(asked.pieces) - 1
    for start, stop in met.subjects:
        told = tokenizer.decode(met.ids[start:stop]).removeprefix("##")  # WordPiece: inside a word
        assert squeezed(told) == squeezed(asked.subject)


@every_tokenizer
@quick
@given(before=phrases, subject=phrases, after=phrases)
def test_one_role_a_token_in_reading_order(name, before, subject, after):
    text = " ".join(["how do I", *before, *subject, *after])
    asked = Request(id="", pieces=tuple(text.split(" ".join(subject))), subject=" ".join(subject))
    try:
        met = prompt(TOKENIZERS[name], asked)
    except ValueError:
        assume(False)
    start, stop = met.subjects[-1]
    assert len(met.roles) == len(met.ids) == len(met.words)
    assert set(met.roles) <= set(ROLES)
    assert met.positions("last") == (len(met.ids) - 1,)
    inside = [i for i in range(start, stop) if met.roles[i] != "last"]
    assert all(met.roles[i].startswith("subject") for i in inside)
    assert len(met.positions("subject_first")) <= 1
    assert runs([r for r in met.roles if r not in OUTSIDE]) == [
        role
        for role in ("before", "subject_first", "subject_mid", "subject_last", "next", "after")
        if role in met.roles
    ]


@every_tokenizer
@quick
@given(phrases)
def test_words_join_to_the_text(name, some):
    tokenizer = TOKENIZERS[name]
    text = " ".join(["how do I", *some]).encode("ascii", "ignore").decode().strip()
    met = prompt(tokenizer, request(text), chat=False)
    told = [
        word for word, token in zip(met.words, met.ids, strict=True) if token not in tokenizer.all_special_ids
    ]
    assert "".join(told) == text


def test_words_show_the_template():
    tokenizer = TOKENIZERS["bytes, chat"]
    met = prompt(tokenizer, request("make a lamp", "lamp"))
    assert met.chat
    assert "".join(met.words) == ("<|im_start|>user\nmake a lamp<|im_end|>\n<|im_start|>assistant\n")
    assert not prompt(tokenizer, request("make a lamp"), chat=False).chat


def test_roles_without_a_template():
    met = prompt(TOKENIZERS["bytes"], request("make a xyz thing for now", "xyz"))
    assert runs(met.roles) == [
        *("before", "subject_first", "subject_mid", "subject_last", "next", "after", "last")
    ]


def test_roles_inside_a_template():
    met = prompt(TOKENIZERS["bytes, chat"], request("make a xyz thing for now", "xyz"))
    assert runs(met.roles) == [
        *("template", "before", "subject_first", "subject_mid", "subject_last", "next", "after"),
        *("template", "last"),
    ]
    header = met.roles.index("before")
    assert "".join(met.words[:header]) == "<|im_start|>user\n"


def test_last_stands_over_subject_last_and_next_over_template():
    plain = prompt(TOKENIZERS["bytes"], request("make a xyz", "xyz"))
    assert plain.roles[-3:] == ("subject_first", "subject_mid", "last")
    chat = prompt(TOKENIZERS["bytes, chat"], request("make a xyz", "xyz"))
    assert chat.words[chat.positions("next")[0]] == "<|im_end|>"


def test_a_subject_of_one_token_is_subject_last():
    met = prompt(TOKENIZERS["bytes, chat"], request("make a lamp now", "lamp"))
    assert met.corrupted == met.positions("subject_last") != ()
    assert not met.positions("subject_first")


def test_a_subject_that_occurs_twice():
    met = prompt(TOKENIZERS["bytes"], request("xyz is like xyz for now", "xyz"))
    (first, _), (start, stop) = met.subjects
    assert first == 0
    assert len(met.corrupted) == 6
    assert met.positions("subject_first") == (start,)
    assert met.positions("subject_last") == (stop - 1,)
    assert set(met.roles[:start]) == {"before"}


@every_tokenizer
def test_no_subject_no_subject_roles(name):
    met = prompt(TOKENIZERS[name], request("make a lamp now"))
    assert met.subjects == met.corrupted == ()
    assert set(met.roles) <= {"template", "before", "last"}


@pytest.mark.parametrize("text", ["assistant", "user", "a"])
def test_a_text_that_the_template_has_too_is_found_in_its_own_place(text):
    met = prompt(TOKENIZERS["bytes, chat"], request(text, text))
    start, _ = met.subjects[0]
    assert "".join(met.words[:start]) == "<|im_start|>user\n"


def test_white_space_around_a_request():
    met = prompt(TOKENIZERS["metaspace, chat"], request("  make a lamp \n", "lamp"))
    (span,) = met.subjects
    assert squeezed(TOKENIZERS["metaspace"].decode(met.ids[slice(*span)])) == "lamp"


def test_a_subject_inside_a_token_is_refused():
    asked = Request(id="half", pieces=("make a la", " now"), subject="mp")
    with pytest.raises(ValueError, match=r"request 'half': the subject 'mp' .* longer or a shorter"):
        prompt(TOKENIZERS["bytes"], asked)


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match=r"changes the text of request 'loud'.*chat=False"):
        prompt(tokenizer, request("make a lamp", "lamp", id="loud"))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="gives no offset mappings; load the fast tokenizer"):
        prompt(hf.ByT5Tokenizer(), request("make a lamp", "lamp"))


def test_a_subject_is_found_at_word_boundaries():
    assert request("hackers who hack", "hack").pieces == ("hackers who ", "")
    assert request("a (lamp)!", "(lamp)").pieces == ("a ", "!")
    for text in ("hackers hacked", "a shack"):
        with pytest.raises(ValueError, match="the subject 'hack' does not occur in the text"):
            request(text, "hack")
    with pytest.raises(ValueError, match="does not occur"):
        request("some text", "  ")


def test_reworded_and_wrapped():
    asked = request("make a lamp, my lamp", "lamp", id="one", category="things")
    assert asked.reworded("{} or no {}?").text == "lamp or no lamp?"
    assert asked.reworded("{} or no {}?").pieces == ("", " or no ", "?")
    assert asked.wrapped("Hello! {} Thanks.").text == "Hello! make a lamp, my lamp Thanks."
    assert asked.wrapped("Hello! {}").subject == "lamp"
    assert asked.reworded("{}").category == "things"
    with pytest.raises(ValueError, match="request 'none' has no subject to put into"):
        request("make it", id="none").reworded("{}")


@pytest.mark.parametrize("wrapper", ["no place", "{} and {}"])
def test_a_bad_wrapper_is_named(wrapper):
    with pytest.raises(ValueError, match=r"\{\}"):
        request("make a lamp", "lamp").wrapped(wrapper)


fields = st.fixed_dictionaries(
    {
        "id": st.text(),
        "pieces": st.lists(st.text(), min_size=2, max_size=4).map(tuple),
        "subject": st.text(min_size=1).filter(str.strip),
        "kind": st.sampled_from(["harmful", "benign", "safe"]),
        "form": st.sampled_from(["noun", "gerund", "verb phrase"]),
        "concrete": st.booleans(),
        "split": st.sampled_from(["edit", "tune", "check"]),
        "target": st.none() | st.text(),
        "counterfactual": st.none() | st.text(),
    }
)


@quick
@given(fields)
def test_a_request_survives_json(some):
    one = Request(**some)
    assert request_from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "some",
    [
        *({"kind": "bad"}, {"split": "train"}, {"form": "adverb"}, {"pieces": ("a", "b")}),
        *({"subject": " "}, {"subject": "lamp"}),
    ],
)
def test_bad_fields_are_refused(some):
    with pytest.raises(ValueError, match="request 'bad'"):
        Request(**{"id": "bad", "pieces": ("a",), **some})


def test_for_planning():
    good = request("make a lamp", "lamp", id="good")
    assert validated_requests([good]) == (good,)
    with pytest.raises(ValueError, match="no requests were given"):
        validated_requests([])
    with pytest.raises(ValueError, match="request 'bare' has no subject"):
        validated_requests([good, request("make it", id="bare")])
    with pytest.raises(ValueError, match="request 'good' belongs to the split 'check'"):
        validated_requests([replace(good, split="check")])


def test_a_conversation_is_what_the_template_renders():
    tokenizer = TOKENIZERS["bytes, chat"]
    ids = tokenize_conversation(tokenizer, "make a lamp", "how brass")
    turns = [("user", "make a lamp"), ("assistant", "how brass")]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False
    )
    assert tokenizer.decode(ids) == whole.rstrip("\n")


def test_answers_follow_a_space_or_a_header():
    tokenizer = TOKENIZERS["bytes"]
    assert tokenizer.decode(tokenize_answer(tokenizer, "a lamp", chat=False)) == " a lamp"
    ended = tokenize_answer(tokenizer, "a lamp", chat=True, end=True)
    assert ended[-1] == tokenizer.eos_token_id
    assert decode_answer(tokenizer, [*ended, *ended]) == "a lamp"


def test_a_dozen_words_are_kept():
    assert first_dozen_words(" one  two ") == "one two"
    assert first_dozen_words("w " * 13) == "w " * 12 + "..."
