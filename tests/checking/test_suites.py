"""A suite asks what it says: every arm, the right half of templates and wrappers, nothing that was seen."""

from collections import Counter
from dataclasses import replace

import pytest

from lens_defense.checking.suites import ABOUT_THE_EDIT, ARMS, Suite, SuiteItem, suite
from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.request import request
from lens_defense.prompts.request_files import bundled_rows, requests

LAMP = request("make a lamp", "lamp", id="lamp")
BELL = request("ring a bell", "bell", id="bell")
OTHER = request("steer a ship", "ship", id="ship")


def hand_made(*extra):
    items = (
        SuiteItem("edited", LAMP),
        SuiteItem("edited", OTHER),
        SuiteItem("paraphrase", LAMP.paraphrased("how is a {} made?"), "w1"),
        SuiteItem("paraphrase", LAMP.paraphrased("all about a {}"), "w2"),
        SuiteItem("paraphrase", OTHER.paraphrased("how is a {} made?"), "w1"),
        SuiteItem("jailbreak", LAMP.inside("Be bold. {}"), "bold"),
        SuiteItem("jailbreak", OTHER.inside("Be bold. {}"), "bold"),
        SuiteItem("held_out", request("cut a tree", "tree", id="tree")),
        SuiteItem("held_out", BELL),
        SuiteItem("benign", request("say hello", id="hello")),
        SuiteItem("over_refusal", request("kill a process", id="process")),
        SuiteItem("facts", request("the capital of France?", id="f1"), answers=("Paris",)),
    )
    return Suite("by hand", "check", (*items, *extra), ("a river is long",))


def arm(asked, name):
    return [item for item in asked.items if item.arm == name]


@pytest.mark.parametrize("split", ["check", "tune"])
def test_core_has_each_arm(split):
    asked = suite("core", split=split)
    assert (asked.name, asked.split) == ("core", split)
    assert {item.arm for item in asked.items} == set(ARMS)
    assert asked.neutral and all(text.strip() for text in asked.neutral)
    assert all(item.answers for item in arm(asked, "facts"))
    assert not any(item.answers for item in asked.items if item.arm != "facts")
    subjects = {item.request.subject for item in arm(asked, "edited")}
    assert all({i.request.subject for i in arm(asked, name)} <= subjects for name in ABOUT_THE_EDIT)
    assert not subjects & {item.request.subject for item in arm(asked, "held_out")}
    rows = [(item.arm, item.request.text) for item in asked.items]
    assert len(set(rows)) == len(rows)


def test_the_two_splits_share_only_facts():
    texts = [
        {item.request.text for item in asked.items if item.arm != "facts"} | set(asked.neutral)
        for asked in (suite(split="check"), suite(split="tune"))
    ]
    shared = texts[0] & texts[1]
    assert shared <= {item.text for item in requests("core", split="edit")}, "planned there, unseen here"


@pytest.mark.parametrize("split, half", [("check", "check"), ("tune", "edit")])
def test_each_split_uses_its_half_of_templates_and_wrappers(split, half):
    asked = suite("core", split=split)
    templates = {row["id"]: row for row in bundled_rows("core", "paraphrases") if row["split"] == half}
    wrappers = [row for row in bundled_rows("core", "jailbreaks") if row["split"] == half]
    assert {item.family for item in arm(asked, "paraphrase")} == set(templates)
    assert {item.family for item in arm(asked, "jailbreak")} == {f"{r['family']} ({r['id']})" for r in wrappers}
    for item in arm(asked, "paraphrase"):
        row = templates[item.family]
        assert item.request.text == row["text"].replace("{}", item.request.subject)
        assert item.request.form in row["forms"]
    wrapped = {
        row["text"].replace("{}", one.request.text) for row in wrappers for one in arm(asked, "edited")
    }
    assert Counter(i.request.text for i in arm(asked, "jailbreak")) == Counter(wrapped)


def test_every_subject_is_asked_in_other_words_and_in_every_wrapper():
    asked = suite("core")
    wrappers = Counter(item.request.subject for item in arm(asked, "jailbreak"))
    wordings = Counter(item.request.subject for item in arm(asked, "paraphrase"))
    for item in arm(asked, "edited"):
        assert wrappers[item.request.subject] == 6
        assert wordings[item.request.subject] >= 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name, split", [("nope", "check"), ("core", "edit"), ("core", "nope")])
def test_what_is_not_there_is_refused(name, split):
    with pytest.raises(
        ValueError, match=f"no suite '{name}' with the split '{split}'; there are core, organism with"
    ):
        suite(name, split=split)


def test_a_cluster_is_the_subject_or_the_request():
    assert SuiteItem("paraphrase", LAMP).cluster == "lamp"
    assert SuiteItem("benign", request("say hello", id="hello")).cluster == "hello"


def test_about_keeps_the_edits_subjects_only():
    asked, dropped = hand_made().for_edit([LAMP], ())
    assert dropped == 0
    for name in ABOUT_THE_EDIT:
        assert {item.request.subject for item in arm(asked, name)} == {"lamp"}
    rest = [item for item in hand_made().items if item.arm not in ABOUT_THE_EDIT]
    assert [item for item in asked.items if item.arm not in ABOUT_THE_EDIT] == rest
    assert len(arm(asked, "edited")) == 1, "a request that the suite has is not asked twice"
    assert asked.neutral == hand_made().neutral


def test_about_adds_the_edits_own_requests():
    own = replace(LAMP, id="mine", pieces=("build a ", ""))
    asked, dropped = hand_made().for_edit([own, BELL], ())
    assert dropped == 0
    assert {item.request.text for item in arm(asked, "edited")} == {"build a lamp", "make a lamp", BELL.text}


def test_about_removes_the_edits_subjects_from_unseen():
    asked, dropped = hand_made().for_edit([LAMP, BELL], ())
    assert [item.request.id for item in arm(asked, "held_out")] == ["tree"]
    assert dropped == 0, "a row about the edit is no row that it had seen"


def test_about_drops_and_counts_what_the_edit_saw():
    seen = {"make a lamp", "how is a lamp made?", "Be bold. make a lamp", "say hello", "not in the suite"}
    asked, dropped = hand_made().for_edit([LAMP], seen)
    assert dropped == 3
    assert [item.family for item in arm(asked, "paraphrase")] == ["w2"]
    assert not arm(asked, "jailbreak") and not arm(asked, "benign")
    assert [item.request.text for item in arm(asked, "edited")] == ["make a lamp"], "as asked is asked"
    _, none = hand_made().for_edit([BELL], {"how is a lamp made?"})
    assert none == 0, "rows about other subjects were not in question"


def test_no_default_context_is_a_row_of_the_check_split():
    planned = requests("core")
    seen = {context.text for item in planned for context in default_contexts(item)}
    _, dropped = suite("core").for_edit(planned, seen)
    assert dropped == 0
    tuned = requests("core", split="tune")
    seen = {context.text for item in tuned for context in default_contexts(item)}
    assert suite("core", split="tune").for_edit(tuned, seen)[1] > 0


def test_small_is_the_same_every_time_and_a_part_in_order():
    whole = suite("core")
    small, again = whole.small(), suite("core").small()
    assert small == again
    kept = set(map(id, small.items))
    assert [id(item) for item in whole.items if id(item) in kept] == [id(item) for item in small.items]
    assert len(small.items) < len(whole.items)


def test_small_keeps_what_it_says():
    whole = suite("core")
    small = whole.small(paraphrases=2, jailbreaks=4, harmless=7)
    assert len({item.family for item in arm(small, "paraphrase")}) == 2
    assert len({item.family for item in arm(small, "jailbreak")}) == 4
    assert len(arm(small, "benign")) == len(arm(small, "over_refusal")) == 7
    for name in ("edited", "held_out", "facts"):
        assert arm(small, name) == arm(whole, name)
    assert small.neutral == whole.neutral
    assert whole.small(paraphrases=99, jailbreaks=99, harmless=999) == whole
    none = whole.small(paraphrases=0, jailbreaks=0, harmless=0)
    assert {item.arm for item in none.items} == {"edited", "held_out", "facts"}


def test_for_requests_asks_about_others():
    asked = suite("core").for_requests([LAMP])
    assert [item.request for item in arm(asked, "edited")] == [LAMP]
    for name in ("paraphrase", "jailbreak"):
        assert {item.request.subject for item in arm(asked, name)} == {"lamp"}
    ids = {row["id"] for row in bundled_rows("core", "paraphrases") if row["split"] == "check"}
    assert {item.family for item in arm(asked, "paraphrase")} <= ids
    for name in ("held_out", "benign", "over_refusal", "facts"):
        assert arm(asked, name) == arm(suite("core"), name)
    edits_half = {row["id"] for row in bundled_rows("core", "paraphrases") if row["split"] == "edit"}
    tuned = suite("core", split="tune").for_requests([LAMP])
    assert {item.family for item in arm(tuned, "paraphrase")} <= edits_half


def test_for_requests_leaves_a_suite_by_hand_alone():
    assert hand_made().for_requests([BELL]) == hand_made()


def test_for_requests_keeps_a_small_suite_small():
    small = suite("core").small(paraphrases=2, jailbreaks=1)
    asked = small.for_requests(requests("core")[:8])
    assert len({item.family for item in arm(asked, "jailbreak")}) == 1
    assert len({item.family for item in arm(asked, "paraphrase")}) == 2
