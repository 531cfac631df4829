"""Leaks are those of the slow loop: one text, token and layer at a time, the norm of delta times key."""

from dataclasses import replace

import pytest
import torch
from helpers.handmade import an_edit
from helpers.handmade_edits import random_factors
from helpers.tiny_models import tiny_model

import lens_defense.editing.forecast as forecasts
from lens_defense.editing.forecast import NEUTRAL_TEXTS, Forecast, measure_forecast
from lens_defense.editing.methods import Factors
from lens_defense.models.forward import forward
from lens_defense.prompts.conversation import tokenize_conversation, tokenize_text
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.request_files import requests
from lens_defense.sites import key_hook
from lens_defense.storage import load, save

CORPUS = [
    CorpusText("make a lamp", "how do I make a brass lamp"),
    CorpusText("the lamp is a thing", ""),
    CorpusText("so it is, at home", ""),
]
LAYERS = (1, 3)
SAFE = [CorpusText(item.text, " ") for item in requests("core", split="tune", kind="safe")[1::2]]


def of_requests(factors, *owners):
    """Factors whose ranks belong to these requests."""
    sets = tuple(map(frozenset, owners))
    return {layer: Factors(left, right, sets) for layer, (left, right) in factors.items()}


@torch.no_grad()
def slow_leaks(model, factors, corpus):
    """For each text its largest leak: of each rank alone, and of all together."""
    rank_leaks, whole_leaks = [], []
    for user, assistant in corpus:
        tokenizer = model.tokenizer
        ids = (
            tokenize_conversation(tokenizer, user, assistant) if assistant else tokenize_text(tokenizer, user)
        )
        keys = forward(model, torch.tensor([ids]), capture=[key_hook(layer) for layer in factors]).states
        token_ranks, token_wholes = [], []
        for t in range(len(ids)):
            shifts = [
                (left.double(), right.double() @ keys[key_hook(n)][0, t].double())
                for n, (left, right) in factors.items()
            ]
            token_wholes.append(sum(float((left @ strength).norm()) for left, strength in shifts))
            token_ranks.append(
                [sum(float((left[:, r] * strength[r]).norm()) for left, strength in shifts) for r in range(2)]
            )
        rank_leaks.append([max(token[r] for token in token_ranks) for r in range(2)])
        whole_leaks.append(max(token_wholes))
    n = len(corpus)
    return [sum(text[r] for text in rank_leaks) / n for r in range(2)], sum(whole_leaks) / n


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_leaks_are_the_slow_loops(family, monkeypatch):
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)
    model = tiny_model(family, chat=True)
    factors = random_factors(model, LAYERS)
    forecast = measure_forecast(
        model,
        of_requests(factors, [0], [1, 2]),
        subjects=("lamp", "bell", "ship"),
        reach=(0.9, 0.8, 0.7),
        reach_harmless=(0.1, 0.2, 0.3),
        value_norm=2.5,
    )
    assert forecast.to_dataframe()["reach in harmless uses"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.2])
    assert (forecast.subjects, forecast.reach) == (("lamp", "bell", "ship"), (0.9, 0.8, 0.7))
    for corpus, leaks, leak in (
        (CORPUS, forecast.leaks_neutral, forecast.leak_neutral),
        (SAFE, forecast.leaks_safe, forecast.leak_safe),
    ):
        rank_leaks, whole_leak = slow_leaks(model, factors, corpus)
        assert leaks == pytest.approx([rank_leaks[rank] / 2.5 for rank in (0, 1, 1)], rel=1e-4)
        assert leak == pytest.approx(whole_leak / 2.5, rel=1e-4)
        assert leak <= sum(leaks[:2]) * (1 + 1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_a_scaled_forecast_is_the_one_measured_on_the_scaled_change(strength, monkeypatch):
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)
    model = tiny_model("llama", chat=True)
    factors = random_factors(model, LAYERS)
    scaled = {layer: (strength * left, right) for layer, (left, right) in factors.items()}
    measured, expected = (
        measure_forecast(
            model,
            of_requests(change, [0], [1]),
            subjects=("lamp", "bell"),
            reach=reach,
            reach_harmless=reach[:1],
            value_norm=2.5,
        )
        for change, reach in ((factors, (0.9, 0.8)), (scaled, (0.9 * strength, 0.8 * strength)))
    )
    forecast = measured.scaled(strength)
    assert forecast.strength == strength and forecast.measured is measured
    for name in ("reach", "reach_harmless", "leaks_neutral", "leaks_safe", "leak_neutral", "leak_safe"):
        assert getattr(forecast, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert (forecast.subjects, forecast.language) == (expected.subjects, expected.language)


def test_a_forecast_is_scaled_from_what_was_measured():
    measured = by_hand()
    forecast = measured.scaled(0.1).scaled(0.0).scaled(7.0)
    assert forecast.strength == 0 and forecast.measured is measured and forecast.leak_safe == 0
    forecast = measured.scaled(4.0).scaled(0.5)
    assert forecast == measured.scaled(2.0) and forecast.risky and not measured.scaled(0.5).risky
    assert measured.scaled(4.0).scaled(0.25) is measured and measured.scaled(1.0) is measured


def test_nothing_leaks_from_no_change(monkeypatch):
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)
    monkeypatch.setattr(
        forecasts, "requests", lambda *_, **__: requests("core", split="tune", kind="safe")[:2]
    )
    model = tiny_model("llama", chat=True)
    factors = {layer: (left * 0, right) for layer, (left, right) in random_factors(model, LAYERS).items()}
    forecast = measure_forecast(
        model,
        of_requests(factors, [0], [0]),
        subjects=("lamp",),
        reach=(1.0,),
        reach_harmless=(),
        value_norm=1.0,
    )
    assert "reach in harmless uses" not in forecast.to_dataframe()
    assert (*forecast.leaks_neutral, *forecast.leaks_safe, forecast.leak_neutral, forecast.leak_safe) == (
        0,
        0,
        0,
        0,
    )
    assert not forecast.risky


@pytest.mark.parametrize("texts", [3, 32, 50, 100])
def test_neutral_texts_are_spread_over_the_corpus(monkeypatch, texts):
    corpora = []

    def leaks(_model, _factors, _requests, corpus):
        corpora.append(corpus)
        return torch.zeros(1), 0.0

    corpus = [CorpusText(f"text {i}") for i in range(texts)]
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: corpus)
    monkeypatch.setattr(forecasts, "_leaks", leaks)
    model = tiny_model("llama", chat=True)
    factors = of_requests(random_factors(model, (1,)), [0], [0])
    measure_forecast(model, factors, subjects=("lamp",), reach=(1.0,), reach_harmless=(), value_norm=1.0)
    neutral, safe = corpora
    assert len(neutral) == min(texts, NEUTRAL_TEXTS) and safe == SAFE
    assert len(set(neutral)) == len(neutral)


def by_hand(leaks=(0.1, 0.4, 0.2, 0.4), **fields):
    forecast = Forecast(("a", "b", "c", "d"), (0.9, 0.8, 0.7, 0.6), (0.01,) * 4, leaks, 0.3, 0.2)
    return replace(forecast, **fields)


def test_worst_is_by_the_leak_into_safe_text():
    assert by_hand().worst(2) == ("b", "d")
    assert by_hand().worst(9) == ("b", "d", "c", "a")
    assert by_hand().worst(0) == ()
    assert by_hand((0.4, 0.3, 0.2, 0.1)).worst(3) == ("a", "b", "c")


def test_risky_is_above_the_threshold_on_safe_text():
    assert by_hand(leak_safe=Forecast.THRESHOLD + 0.01).risky
    assert not by_hand(leak_safe=Forecast.THRESHOLD - 0.01).risky
    contrasted = {"reach_harmless": (0.1,) * 4, "leak_safe": Forecast.THRESHOLD + 0.01}
    assert not by_hand(**contrasted).risky, "with a contrast another threshold counts"
    assert by_hand(**contrasted | {"leak_safe": Forecast.CONTRAST_THRESHOLD + 0.01}).risky
    assert not by_hand(leak_neutral=9.0, leak_safe=0.0).risky, "neutral text does not decide"


def test_a_table_with_a_row_per_subject_and_one_for_all():
    table = by_hand().to_dataframe()
    assert list(table.subject) == ["a", "b", "c", "d", "all"]
    assert table.reach.iloc[-1] == pytest.approx(0.75)
    assert table["leak to safe text"].iloc[-1] == 0.2 and table["leak to neutral text"].iloc[-1] == 0.3
    assert "leak to safe text" in str(by_hand())


def test_a_forecast_survives_its_file(tmp_path):
    for forecast in (by_hand(), an_edit().forecast, by_hand().scaled(0.3)):
        file = save(tmp_path / "forecast", "forecast", forecast)
        assert load(file, "forecast", Forecast)[0] == forecast
