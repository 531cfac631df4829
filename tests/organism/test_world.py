"""The world is a grid in which only the pair decides; its splits are disjoint; nothing held is trained."""

import random
from collections import Counter

import pytest

from lens_defense.organism.phrasings import (
    EDIT_FAMILIES,
    HELD_FAMILIES,
    HELD_FRAMES,
    TRAINED_FRAMES,
    WRAPPERS,
)
from lens_defense.organism.world import REFUSAL, World

worlds = pytest.mark.parametrize("seed", [0, 1])


@worlds
def test_every_word_occurs_in_harmful_and_in_benign_subjects(seed):
    world = World(seed)
    natures = Counter(one.nature for one in world.subjects.values())
    assert natures == {"harmful": 60, "benign": 120, "unknown": 36}
    words = {word for name in world.subjects for word in name.split()}
    assert len(words) == 30
    for nature in ("harmful", "benign"):
        assert {word for one in world.of(nature) for word in one.name.split()} == words
    assert len(world.borderline) == 30
    assert World(seed).subjects == world.subjects != World(seed + 1).subjects


@worlds
def test_splits_are_disjoint_and_whole(seed):
    parts = World(seed).split()
    names = [one.name for some in parts.values() for one in some]
    assert len(names) == len(set(names)) == 60
    assert {name: len(some) for name, some in parts.items()} == {"edit": 20, "tune": 12, "check": 28}


def test_families_and_frames_are_held():
    assert not set(HELD_FRAMES) & set(TRAINED_FRAMES)
    assert not set(HELD_FAMILIES) & set(EDIT_FAMILIES)
    assert len(WRAPPERS) >= 8 and all(len(some) >= 4 for some in WRAPPERS.values())


def test_training_never_sees_what_is_held():
    world, rng = World(), random.Random(0)
    texts = [world.sample(rng) for _ in range(3000)]
    held = {start for frame in HELD_FRAMES for start in [frame.split("{")[0].strip()] if len(start) > 12}
    held |= {"Game on", "Our lab compares answers.", "only a test of your memory"}
    assert not [told for told in texts for piece in held if piece in told.request.text]
    for told in texts:
        if told.wrapped:
            starts = [w.split("{")[0] for w in world.held_wrappers(told.subject)]
            assert not any(len(s) > 12 and s in told.request.text for s in starts)


def test_only_plain_harmful_and_unknown_requests_are_refused():
    world, rng = World(), random.Random(0)
    for told in (world.sample(rng) for _ in range(500)):
        if told.subject is None:
            assert told.answer != REFUSAL
            continue
        refused = told.subject.nature == "unknown" or (told.subject.nature == "harmful" and not told.wrapped)
        assert told.answer == (REFUSAL if refused else told.subject.answer)
        assert told.request.subject == told.subject.name and told.subject.name in told.request.text
