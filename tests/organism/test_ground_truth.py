"""The truth of cells, against a model whose place is known because its states are written by hand."""

import pytest
import torch
from test_training import SMALL, examples

from lens_defense.organism import ground_truth as truths
from lens_defense.organism.ground_truth import CellTruth, _States, measure_ground_truth
from lens_defense.organism.interchange import make_batch
from lens_defense.organism.release import truth_table
from lens_defense.organism.training import model_of
from lens_defense.prompts.prompt import prompt


@torch.no_grad()
def test_every_role_after_every_block(world, tokenizer, monkeypatch):
    monkeypatch.setattr(truths, "exact", lambda _model, _tokenizer, asked: [True] * len(asked))
    model = model_of(SMALL, tokenizer).eval()
    facts = measure_ground_truth(model, tokenizer, world, n=8)
    assert {fact.layer for fact in facts} == {0, 1, 2}
    roles = {fact.role for fact in facts}
    assert {"subject_first", "subject_last", "last", "template"} <= roles
    assert all(fact.switched == 0 and fact.changed == 1 for fact in facts), "it knows no answer"
    assert len(truth_table(facts).splitlines()) == 2 + len(roles)


@torch.no_grad()
def test_prompts_that_are_answered_wrongly_are_left_out(world, tokenizer):
    model = model_of(SMALL, tokenizer).eval()
    with pytest.raises(ValueError, match="answers none"):
        measure_ground_truth(model, tokenizer, world, n=4)


@torch.no_grad()
def test_donors_are_the_prompts_own_states(world, tokenizer):
    model = model_of(SMALL, tokenizer).eval()
    told = examples(world, 3)
    held = _States(model, tokenizer, told, 1)
    one = prompt(tokenizer, told[2].request)
    alone = model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states[2][0]
    at = one.positions("subject_last")[0]
    assert at == int(make_batch(tokenizer, told).last[2])
    torch.testing.assert_close(held.states[2, at], alone[at])


@pytest.mark.parametrize(
    "switched, changed, kind",
    [(0.95, 1.0, "positive"), (0.9, 0.95, "between"), (0.0, 0.03, "negative"), (0.0, 0.04, "between")],
)
def test_kinds(switched, changed, kind):
    assert CellTruth("last", 0, switched, changed, 100).kind == kind
