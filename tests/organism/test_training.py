"""Training resumes to the bit, and an interchange is what it says: one state, put in one place."""

from dataclasses import replace

import pytest
import torch
from helpers.organism_cases import SMALL_RECIPE, examples

from lens_defense.organism.interchange import (
    answer_loss,
    answered_exactly,
    interchange,
    make_batch,
    states_after,
)
from lens_defense.organism.training import make_model, train
from lens_defense.prompts.conversation import decode_answer


def test_a_third_of_the_words_split(world, tokenizer):
    words = {word for name in world.subjects for word in name.split()}
    split = {word for word in words if len(tokenizer.encode(" " + word)) > 1}
    assert world.rare <= split
    assert len(split) <= len(words) / 2


def test_labels_are_the_answer_after_the_prompt(world, tokenizer):
    answered = examples(world, 4)
    batch = make_batch(tokenizer, answered)
    for i, example in enumerate(answered):
        answer_ids = batch.labels[i][batch.labels[i] != -100]
        assert decode_answer(tokenizer, answer_ids.tolist()) == example.answer
        assert int(answer_ids[-1]) == tokenizer.eos_token_id
        span = batch.ids[i, int(batch.subject_first[i]) : int(batch.subject_last[i]) + 1]
        assert tokenizer.decode(span).strip() == example.subject.name


@pytest.mark.slow
def test_training_resumes_to_the_bit(tmp_path):
    whole = train(SMALL_RECIPE, tmp_path / "whole", progress=False, save_every=2)

    def stop(line):
        if line.startswith("4 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SMALL_RECIPE, tmp_path / "parts", progress=False, save_every=2, log=stop)
    resumed = train(SMALL_RECIPE, tmp_path / "parts", progress=False, save_every=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(SMALL_RECIPE, seed=1), tmp_path / "parts", progress=False)


@torch.no_grad()
def test_an_interchange_of_a_prompt_with_itself_changes_nothing(world, tokenizer):
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    base = examples(world, 3)
    batch, patch = interchange(model, tokenizer, base, base, layer=1, others=[None] * 3)
    torch.testing.assert_close(answer_loss(model, batch, layer=1, patch=patch), answer_loss(model, batch))


@torch.no_grad()
def test_an_interchange_moves_one_state_and_asks_for_the_other_answer(world, tokenizer):
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    chosen = examples(world, 6)
    base, sources = chosen[:3], chosen[3:]
    batch, patch = interchange(model, tokenizer, base, sources, layer=1, others=[None, sources[0], None])
    for i, (example, source) in enumerate(zip(base, sources, strict=True)):
        answer = decode_answer(tokenizer, batch.labels[i][batch.labels[i] != -100].tolist())
        refused = source.subject.nature != "benign"
        assert answer == ("I cannot help with that." if refused else source.subject.answer), example
    before = states_after(model, batch, 1)
    after = patch(before)
    donor = make_batch(tokenizer, sources)
    state = states_after(model, donor, 1)
    moved = (after != before).any(-1)
    for i in range(3):
        first, last = int(batch.subject_first[i]), int(batch.subject_last[i])
        assert torch.equal(after[i, last], state[i, int(donor.subject_last[i])])
        expected = set(range(first, last + 1)) if i == 1 else {last}
        assert set(moved[i].nonzero()[:, 0].tolist()) <= expected


@torch.no_grad()
def test_a_model_that_was_not_trained_knows_nothing(world, tokenizer):
    model = make_model(SMALL_RECIPE, tokenizer).eval()
    assert answered_exactly(model, tokenizer, examples(world, 2)) == [False, False]
