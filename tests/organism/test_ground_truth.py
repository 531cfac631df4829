"""The ground truth of cells, against a model whose place is known because its states are written by hand."""

import pytest
import torch
from helpers.organism_cases import SMALL_RECIPE, examples

from lens_defense.organism import ground_truth
from lens_defense.organism.ground_truth import CellTruth, _donor_run, measure_ground_truth
from lens_defense.organism.interchange import make_batch
from lens_defense.organism.release import truth_table
from lens_defense.organism.training import make_model
from lens_defense.prompts.prompt import tokenize


@torch.no_grad()
def test_every_role_after_every_block(world, tokenizer, monkeypatch):
    monkeypatch.setattr(ground_truth, "answered_exactly", lambda _, __, examples: [True] * len(examples))
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    cells = measure_ground_truth(model, tokenizer, world, n=8)
    assert {cell.layer for cell in cells} == {0, 1, 2}
    roles = {cell.role for cell in cells}
    assert {"subject_first", "subject_last", "last", "template"} <= roles
    assert all(cell.switched == 0 and cell.changed == 1 for cell in cells), "it knows no answer"
    assert len(truth_table(cells).splitlines()) == 2 + len(roles)


@torch.no_grad()
def test_prompts_that_are_answered_wrongly_are_left_out(world, tokenizer):
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    with pytest.raises(ValueError, match="answers none"):
        measure_ground_truth(model, tokenizer, world, n=4)


@torch.no_grad()
def test_donors_are_the_prompts_own_states(world, tokenizer):
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    donors = _donor_run(model, tokenizer, examples(world, 3), 1)
    prompt = tokenize(tokenizer, donors.examples[2].request)
    alone = model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[2][0]
    position = prompt.positions("subject_last")[0]
    assert position == int(make_batch(tokenizer, donors.examples).subject_last[2])
    torch.testing.assert_close(donors.states[2, position], alone[position])


@pytest.mark.parametrize(
    "switched, changed, kind",
    [(0.95, 1.0, "positive"), (0.9, 0.95, "between"), (0.0, 0.03, "negative"), (0.0, 0.04, "between")],
)
def test_kinds(switched, changed, kind):
    assert CellTruth("last", 0, switched, changed, 100).kind == kind
