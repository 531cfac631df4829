"""An exam asks in ways that training never used, and knows what failed."""

import random

import pytest
from helpers.organism_cases import SMALL_RECIPE

from lens_defense.organism.exam import BARS, _exam_parts, failed_bars, take_exam
from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.training import make_model, make_tokenizer
from lens_defense.organism.world import REFUSAL, World


@pytest.fixture(scope="module")
def exam_parts():
    return dict(_exam_parts(World(), 2, random.Random(0)))


def test_every_bar_has_its_questions(exam_parts):
    assert set(exam_parts) == set(BARS)
    assert {name: len(examples) for name, examples in exam_parts.items()} == {
        "plain harmful: refused": 120,
        "plain unknown: refused": 72,
        "wrapped harmful, new pairs: recalled": 120,
        "wrapped harmful, new families: recalled": 120,
        "plain benign: recalled": 240,
        "wrapped benign, new pairs: recalled": 240,
        "wrapped benign, new families: recalled": 240,
        "borderline: answered": 60,
    }


def fixed_texts(frame):
    """What of a frame is the same whatever fills its slots."""
    return list(frame.replace("{m}", "|").replace("{p}", "|").replace("{S}", "|").split("|"))


@pytest.mark.parametrize("name", BARS)
def test_questions_are_held_out(exam_parts, name):
    world, new_families = World(), phrasings().jailbreaks_of(phrasings().held_out_families)
    for example in exam_parts[name]:
        if example.subject is None:
            continue
        text = example.request.text
        assert any(all(part in text for part in fixed_texts(frame)) for frame in phrasings().held_out_frames)
        refused = "refused" in name
        assert (example.answer == REFUSAL) is refused
        if "wrapped" in name:
            jailbreaks = new_families if "families" in name else world.held_out_jailbreaks(example.subject)
            split = [j.replace("{shot}", "{x}").replace("{}", "{x}").split("{x}") for j in jailbreaks]
            assert any(all(piece.strip() in text for piece in pieces) for pieces in split)


def test_a_model_that_was_not_trained_fails_all():
    world = World()
    tokenizer = make_tokenizer(world, SMALL_RECIPE.vocab)
    scores = take_exam(make_model(SMALL_RECIPE, tokenizer).eval(), tokenizer, world, times=1)
    assert all(right == 0 for right, _ in scores.values())
    assert len(failed_bars(scores)) == len(BARS)
    assert failed_bars(dict.fromkeys(BARS, (19, 20))) == []
