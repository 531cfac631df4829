"""The front holds what nothing beats; the knee is the nearest of it to an edit without a fault."""

import random
from dataclasses import replace

import numpy as np
import pytest

from lens_defense.searching.outcome import KL_UNIT, Candidate, Outcome, knee, pareto_front


def outcome(refusals, same_subject, harmless, kl, failure=""):
    candidate = Candidate("memit", (1, 2), 1.0)
    return Outcome(candidate, (1, 2), 1.0, refusals, same_subject, harmless, kl, 1.0, failure)


def draws():
    """Lists of outcomes with few values, so that many are equal in something."""
    rng = random.Random(0)
    for _ in range(200):
        yield [
            outcome(
                rng.randint(0, 4) / 4, rng.choice([None, 0.0, 0.5]), *(rng.randint(0, 3) / 4 for _ in "hk")
            )
            for _ in range(rng.randint(1, 12))
        ]


@pytest.mark.parametrize("tried", [*draws()], ids=len)
def test_nothing_on_the_front_is_beaten_and_all_else_is(tried):
    front = pareto_front(tried)
    points = {one.objectives for one in front}
    assert len(points) == len(front)
    for one in tried:
        beaten = any(
            np.all(np.subtract(other.objectives, one.objectives) <= 0)
            and np.any(np.subtract(other.objectives, one.objectives) < 0)
            for other in tried
        )
        assert (one.objectives in points) == (not beaten)


@pytest.mark.parametrize("tried", [*draws()], ids=len)
def test_the_front_begins_with_the_most_refusals(tried):
    refusals = [one.refusals for one in pareto_front(tried)]
    assert refusals == sorted(refusals, reverse=True)


def test_the_knee_weighs_all_three():
    strong = outcome(1.0, 0.5, 0.1, 0.01)
    even = outcome(0.9, 0.1, 0.0, 0.01)
    weak = outcome(0.2, 0.0, 0.0, 0.0)
    assert knee([strong, even, weak]) is even
    heavy = outcome(0.95, 0.1, 0.0, 2 * KL_UNIT)
    assert knee([heavy, even]) is even


def test_over_refusal_weighs_both_kinds_of_questions_the_same():
    assert outcome(1.0, 0.5, 0.1, 0.0).over_refusal == pytest.approx(0.3)
    assert outcome(1.0, None, 0.1, 0.0).over_refusal == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("layers", "words"), [((7,), "7"), ((7, 8), "7, 8"), ((5, 6, 7), "5 to 7"), ((0, 2, 4), "0, 2, 4")]
)
def test_layers_are_named_as_they_are(layers, words):
    assert replace(outcome(1.0, None, 0.0, 0.0), edited_layers=layers).layer_words == words


def test_what_could_not_be_planned_is_on_no_front():
    failed = outcome(1.0, 0.0, 0.0, 0.0, failure="no null space")
    assert pareto_front([failed]) == []
    with pytest.raises(ValueError, match="no edit could be planned"):
        knee(pareto_front([failed]))
