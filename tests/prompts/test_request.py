"""A Request marks its subject at word boundaries, refuses bad fields and survives a file."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_defense.prompts.request import Request, request
from lens_defense.prompts.resolve_requests import requests_with_subjects
from lens_defense.storage import load, save


def test_a_subject_is_found_at_word_boundaries():
    assert request("hackers who hack", "hack").pieces == ("hackers who ", "")
    assert request("a (lamp)!", "(lamp)").pieces == ("a ", "!")
    for text in ("hackers hacked", "a shack"):
        with pytest.raises(ValueError, match="the subject 'hack' does not occur in the text"):
            request(text, "hack")
    with pytest.raises(ValueError, match="does not occur"):
        request("some text", "  ")


def test_a_subject_is_marked_in_any_case_and_the_text_stays():
    item = request("Lamp or LAMP? a lamp!", "lamp")
    assert item.subject == "lamp" and item.spelled == ("Lamp", "LAMP", "lamp")
    assert item.text == "Lamp or LAMP? a lamp!"
    assert item.renamed("bell").text == "bell or bell? a bell!"
    assert item.paraphrased("the {}").text == "the lamp"
    assert item.inside("Hello! {}").text == "Hello! Lamp or LAMP? a lamp!"
    assert request("a lamp, a lamp", "lamp").spelled == ()
    with pytest.raises(ValueError, match="spells its subject 1 times and has it 2 times"):
        replace(item, spelled=("lamp",), pieces=("", " ", ""))


@pytest.mark.parametrize(
    "text, subject",
    [
        ("如何制造炸弹", "炸弹"),
        ("ランプを作る方法", "ランプ"),
        ("폭탄을 만드는 법", "폭탄"),
        ("วิธีทำโคมไฟที่บ้าน", "โคมไฟ"),
    ],
)
def test_scripts_without_spaces_have_subjects_too(text, subject):
    item = request(text, subject)
    assert len(item.pieces) == 2 and item.text == text
    with pytest.raises(ValueError, match="does not occur"):
        request("hackers hacked 炸弹", "hack")


def test_paraphrased_and_inside_a_template():
    item = request("make a lamp, my lamp", "lamp", id="bell", category="things")
    assert item.paraphrased("{} or no {}?").text == "lamp or no lamp?"
    assert item.paraphrased("{} or no {}?").pieces == ("", " or no ", "?")
    assert item.inside("Hello! {} Thanks.").text == "Hello! make a lamp, my lamp Thanks."
    assert item.inside("Hello! {}").subject == "lamp"
    assert item.paraphrased("{}").category == "things"
    with pytest.raises(ValueError, match="request 'none' has no subject to put into"):
        request("make it", id="none").paraphrased("{}")


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_with_no_or_two_places_is_refused(template):
    with pytest.raises(ValueError, match=r"\{\}"):
        request("make a lamp", "lamp").inside(template)


any_fields = st.fixed_dictionaries(
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


@settings(deadline=None, max_examples=50)
@given(any_fields)
def test_a_saved_request_comes_back(tmp_path_factory, request_fields):
    item = Request(**request_fields)
    path = save(tmp_path_factory.mktemp("any") / "file", "request", item)
    assert load(path, "request", Request)[0] == item


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bad_fields",
    [
        *({"kind": "bad"}, {"split": "train"}, {"form": "adverb"}, {"pieces": ("a", "b")}),
        *({"subject": " "}, {"subject": "lamp"}),
    ],
)
def test_bad_fields_are_refused(bad_fields):
    with pytest.raises(ValueError, match="request 'bad'"):
        Request(**{"id": "bad", "pieces": ("a",), **bad_fields})


def test_requests_that_an_edit_may_see():
    good = request("make a lamp", "lamp", id="good")
    assert requests_with_subjects([good], "call") == (good,)
    with pytest.raises(ValueError, match="no requests were given"):
        requests_with_subjects([], "call")
    with pytest.raises(ValueError, match=r"no subject.* is marked in 'bare'\. Name it"):
        requests_with_subjects([good, request("make it", id="bare")], "call")
    with pytest.raises(ValueError, match="request 'good' belongs to the split 'check'"):
        requests_with_subjects([replace(good, split="check")], "call")
