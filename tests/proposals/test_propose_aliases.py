"""Proposed aliases are short names that the model gave, the subject's own words left out."""

import pytest
from helpers.tiny_models import tiny_model

import lens_defense as ld
from lens_defense.proposals import propose_aliases as module

ANSWERS = [
    "1. Glow stone, 2. shine rock",
    "a shine rock, glow stone; NaCl",
    "the lamp.",
    "glow stone or NaCl",
    "",
]


def test_names_of_several_answers_come_first(monkeypatch):
    answers = iter(ANSWERS)
    monkeypatch.setattr(module, "generate", lambda _model, prompts, **_: [()] * len(prompts))
    monkeypatch.setattr(module, "decode_answer", lambda _tokenizer, _ids: next(answers))
    names = module.propose_aliases(tiny_model("llama"), ld.request("how do I light a lamp?", "lamp"))
    assert names == ("glow stone", "shine rock", "NaCl")


def test_a_model_is_asked_and_not_changed():
    names = ld.propose_aliases(tiny_model("llama"), ld.request("how do I light a lamp?", "lamp"))
    assert all("lamp" not in name.lower() and len(name.split()) <= 4 for name in names)


def test_a_request_needs_a_subject():
    with pytest.raises(ValueError, match="no subject"):
        ld.propose_aliases(tiny_model("llama"), ld.request("how do I light it?"))
