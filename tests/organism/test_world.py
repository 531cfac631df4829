"""The world is a grid in which only the pair decides; splits are disjoint; training sees nothing held out."""

import random
from collections import Counter

import pytest

from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.world import REFUSAL, World

worlds = pytest.mark.parametrize("seed", [0, 1])


@worlds
def test_every_word_occurs_in_harmful_and_in_benign_subjects(seed):
    world = World(seed)
    natures = Counter(subject.nature for subject in world.subjects.values())
    assert natures == {"harmful": 60, "benign": 120, "unknown": 36}
    words = {word for name in world.subjects for word in name.split()}
    assert len(words) == 30
    for nature in ("harmful", "benign"):
        assert {word for subject in world.subjects_of(nature) for word in subject.name.split()} == words
    assert len(world.borderline) == 30
    assert World(seed).subjects == world.subjects != World(seed + 1).subjects


@worlds
def test_splits_are_disjoint_and_whole(seed):
    splits = World(seed).split()
    names = [subject.name for subjects in splits.values() for subject in subjects]
    assert len(names) == len(set(names)) == 60
    assert {name: len(subjects) for name, subjects in splits.items()} == {"edit": 20, "tune": 12, "check": 28}


def test_families_and_frames_are_held_out():
    phrases = phrasings()
    assert not set(phrases.held_out_frames) & set(phrases.trained_frames)
    assert not set(phrases.held_out_families) & set(phrases.edit_families)
    assert len(phrases.jailbreaks) >= 8
    assert all(len(jailbreaks) >= 4 for jailbreaks in phrases.jailbreaks.values())


def test_training_never_sees_what_is_held_out():
    world, rng = World(), random.Random(0)
    examples = [world.sample(rng) for _ in range(3000)]
    starts = [frame.split("{")[0].strip() for frame in phrasings().held_out_frames]
    held_out = {start for start in starts if len(start) > 12}
    held_out |= {"Game on", "Our lab compares answers.", "only a test of your memory"}
    assert not [example for example in examples for text in held_out if text in example.request.text]
    for example in examples:
        if example.jailbroken:
            starts = [jailbreak.split("{")[0] for jailbreak in world.held_out_jailbreaks(example.subject)]
            assert not any(len(start) > 12 and start in example.request.text for start in starts)


def test_only_plain_harmful_and_unknown_requests_are_refused():
    world, rng = World(), random.Random(0)
    for example in (world.sample(rng) for _ in range(500)):
        subject = example.subject
        if subject is None:
            assert example.answer != REFUSAL
            continue
        refused = subject.nature == "unknown" or (subject.nature == "harmful" and not example.jailbroken)
        assert example.answer == (REFUSAL if refused else subject.answer)
        assert example.request.subject == subject.name and subject.name in example.request.text
