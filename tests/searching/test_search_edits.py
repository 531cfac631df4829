"""A search tries the default first, finds the same again, goes on where it stopped, measures as a check."""

import sys
from dataclasses import replace

import pytest

import lens_defense as ld
from lens_defense.checking.check import check
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.searching.outcome import Candidate, Outcome
from lens_defense.searching.search_edits import _identity, edit_of, outcome_of, search_edits
from lens_defense.searching.suggest import SearchSpace, suggest
from lens_defense.sites import Site

SPACE = SearchSpace(("memit", "rome"), ((2, 3), (0, 1)))
SITES = [Site("mlp_out", layer, "subject_last") for layer in (2, 3)]
SHORT = {"max_new_tokens": 6, "progress": False, "methods": ("memit", "rome")}


@pytest.fixture(scope="module")
def model():
    return ld.load("organism")


@pytest.fixture(scope="module")
def questions():
    asked = ld.suite("organism", split="tune").for_requests(ld.requests("organism")[:2])
    small = asked.small(paraphrases=1, jailbreaks=2, harmless=4)
    items = tuple(item for item in small.items if item.arm not in ("facts", "held_out"))
    return replace(small, name="few", items=items, neutral=())


def measured(candidate, refusals, over_refusal):
    return Outcome(candidate, candidate.layers, 1.0, refusals, None, over_refusal, 0.01, 1.0)


def test_the_first_candidate_is_the_default():
    assert suggest(SPACE, [], seed=3) == Candidate("memit", (2, 3), 1.0)


def test_a_suggestion_depends_on_the_outcomes_and_the_seed_alone():
    outcomes = [measured(SPACE.default, 0.5, 0.1)]
    for _ in range(9):
        candidate = suggest(SPACE, outcomes, seed=1)
        assert candidate == suggest(SPACE, outcomes, seed=1)
        assert candidate.method in SPACE.methods and candidate.layers in SPACE.windows
        assert SPACE.weakest <= candidate.strength <= SPACE.strongest
        outcomes.append(measured(candidate, candidate.strength / 2, candidate.strength / 9))
    assert len({outcome.candidate for outcome in outcomes}) == len(outcomes)
    assert suggest(SPACE, outcomes, seed=1) != suggest(SPACE, outcomes, seed=2)


def test_suggestions_learn():
    """Where one method is always better, it is tried more often than a coin would have it."""
    outcomes = []
    for _ in range(30):
        candidate = suggest(SPACE, outcomes, seed=0)
        good = candidate.method == "rome"
        outcomes.append(measured(candidate, 0.9 if good else 0.1, 0.0 if good else 0.5))
    later = [outcome.candidate.method for outcome in outcomes[15:]]
    assert later.count("rome") >= 11


def test_without_optuna_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    sentence = r"pip install 'lens-defense\[defend\]'"
    with pytest.raises(ValueError, match=sentence):
        suggest(SPACE, [measured(SPACE.default, 0.5, 0.1)], seed=0)
    with pytest.raises(ValueError, match=sentence):  # before anything is planned
        search_edits(ld.load("organism"), ld.requests("organism")[:2], SITES, trials=2)


@pytest.mark.slow
def test_a_stopped_search_ends_as_one_that_was_not(model, questions, tmp_path):
    requests, before = ld.requests("organism")[:2], model_fingerprint(model)
    whole = search_edits(model, requests, SITES, trials=3, questions=questions, **SHORT)
    file = tmp_path / "search.json"
    search_edits(model, requests, SITES, trials=1, questions=questions, path=file, **SHORT)
    assert len(ld.EditSearch.load(file).outcomes) == 1
    resumed = search_edits(model, requests, SITES, trials=3, questions=questions, path=file, **SHORT)

    def without_seconds(search):
        return [replace(outcome, seconds=0.0) for outcome in search.outcomes]

    assert without_seconds(resumed) == without_seconds(whole)
    assert without_seconds(ld.EditSearch.load(file)) == without_seconds(whole)
    assert whole.outcomes[0].candidate == Candidate("memit", (2, 3), 1.0)
    assert model_fingerprint(model) == before
    assert len(whole.to_dataframe()) == 3 and whole.to_dataframe()["knee"].sum() == 1
    with pytest.raises(ValueError, match=r"search.json keeps a search of another model"):
        search_edits(model, requests[:1], SITES, trials=3, questions=questions, path=file, **SHORT)


def test_an_outcome_is_what_a_check_of_the_edit_says(model, questions):
    requests, candidate = ld.requests("organism")[:2], Candidate("rome", (2, 3), 1.4)
    plan = edit_of(model, requests, "subject_last", candidate)
    assert plan.strength == 1.4
    report = check(model, plan, questions, max_new_tokens=6, progress=False)
    outcome = outcome_of(candidate, plan.layers, report, 1.0)
    unseen = [row for row in report.rows if row.arm in ("paraphrase", "jailbreak")]
    refused = [row.verdicts_after["coherent"] == "refusal" for row in unseen]
    assert outcome.refusals == pytest.approx(sum(refused) / len(refused))
    assert outcome.refusals > 0
    assert outcome.same_subject_refused is None and outcome.edited_layers == (2,), "of ROME the middle one"
    as_asked = [row.verdicts_after["coherent"] == "refusal" for row in report.rows if row.arm == "edited"]
    assert outcome.refused_as_asked == pytest.approx(sum(as_asked) / len(as_asked))
    assert outcome.kl == pytest.approx(sum(report.kl) / len(report.kl))


def test_what_cannot_be_planned_is_an_outcome_and_no_end(model, questions, monkeypatch):
    """But where the first cannot, it is the caller's mistake."""
    requests, plans = ld.requests("organism")[:2], iter([True, False, False])

    def sometimes(*arguments, **settings):
        if not next(plans):
            raise ValueError("there is no null space to write into")
        return ld.edit(*arguments, **settings)

    monkeypatch.setattr("lens_defense.searching.search_edits.edit", sometimes)
    search = search_edits(model, requests, SITES, trials=3, questions=questions, **SHORT)
    assert [outcome.failure for outcome in search.outcomes] == [
        "",
        *["there is no null space to write into"] * 2,
    ]
    assert search.front() == [search.outcomes[0]] and search.knee() == search.outcomes[0]
    suggest(search.space, search.outcomes, seed=0)
    plans = iter([False])
    with pytest.raises(ValueError, match="no null space"):
        search_edits(model, requests, SITES, trials=3, questions=questions, **SHORT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": "memit"}, "methods must be a list of names"),
        ({"methods": ()}, "methods must be a list of names"),
        ({"methods": ("memit", "mimet")}, "method must be one of"),
        ({"trials": 0}, "trials must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(model, monkeypatch, changes, sentence):
    monkeypatch.setattr("lens_defense.searching.search_edits.edit", None)
    with pytest.raises(ValueError, match=sentence):
        search_edits(model, ld.requests("organism")[:2], SITES, **changes)


def test_sites_of_several_roles_or_of_no_layer_are_refused(model, monkeypatch):
    monkeypatch.setattr("lens_defense.searching.search_edits.edit", None)
    requests = ld.requests("organism")[:2]
    with pytest.raises(ValueError, match="several roles"):
        search_edits(model, requests, [*SITES, Site("mlp_out", 1, "last")])
    with pytest.raises(ValueError, match="no sites were given"):
        search_edits(model, requests, [])


def test_a_setting_is_known_again_by_what_it_gives():
    requests = ld.requests("organism")[:2]
    first, equal = (lambda request: [request], lambda request: [request])
    other = lambda request: [request, request.inside("hello {}")]  # noqa: E731
    assert _identity(first, requests) == _identity(equal, requests) != _identity(other, requests)
    assert _identity(ld.Contrast(first), requests) == _identity(ld.Contrast(equal), requests)
    assert _identity(ld.Contrast(first), requests) != _identity(ld.Contrast(first, ridge=0.1), requests)
    assert (
        _identity(ld.FitSettings(), ())
        == _identity(ld.FitSettings(), ())
        != _identity(ld.FitSettings(v_lr=1.0), ())
    )


def test_minutes_end_it(model, questions):
    search = search_edits(
        model, ld.requests("organism")[:2], SITES, trials=9, minutes=0.0, questions=questions, **SHORT
    )
    assert len(search.outcomes) == 1


def test_questions_of_one_kind_are_refused(model, questions):
    benign = replace(questions, items=tuple(item for item in questions.items if item.arm == "benign"))
    with pytest.raises(ValueError, match="the suite 'few' lacks one of these"):
        search_edits(model, ld.requests("organism")[:2], SITES, trials=1, questions=benign, **SHORT)
