"""Any sequence of apply, undo and redo: whole or not at all, and back to the original bits."""

import threading
from functools import cache, partial

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st

import lens_defense.models.mlp_output as mlp_output
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger import Ledger
from lens_defense.models.mlp_output import mlp_output_matrix, standing_changes, weights_fingerprint

MOVES = ("apply A", "apply B", "apply D", "undo", "redo")


@cache
def world(family):
    """A model; A planned on it, B on top of A, D beside them; its bits."""
    model = tiny_model(family)
    original_weights = copy_weights(model)
    first = handmade_edit(model, (1, 2), seed=1)
    with first.applied(model):
        second = handmade_edit(model, (2, 3), seed=2)
    edits = {"A": first, "B": second, "D": handmade_edit(model, (0,), seed=3)}
    return model, edits, original_weights, {}


def fits(name, stack):
    """Whether the layers that an edit was planned on are as they were then."""
    if name == "D":
        return "D" not in stack
    return [other for other in stack if other != "D"] == ([] if name == "A" else ["A"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@settings(deadline=None, max_examples=30)
@given(moves=st.lists(st.sampled_from(MOVES), max_size=14))
def test_any_sequence_of_moves(family, moves):
    model, edits, original_weights, fingerprints = world(family)
    ledger, stack, undone = Ledger(model), [], []
    for move in moves:
        name = move.removeprefix("apply ")
        if move == "undo":
            if stack:
                undone.append(stack.pop())
                assert ledger.undo() is edits[undone[-1]]
            else:
                with pytest.raises(ValueError, match="nothing to undo"):
                    ledger.undo()
        elif move == "redo":
            if undone:
                stack.append(undone.pop())
                assert ledger.redo() is edits[stack[-1]]
            else:
                with pytest.raises(ValueError, match="nothing to redo"):
                    ledger.redo()
        elif fits(name, stack):
            ledger.apply(edits[name])
            stack.append(name)
            undone.clear()
        else:
            with pytest.raises(ValueError, match="planned on other weights"):
                ledger.apply(edits[name])
        assert ledger.edits == tuple(edits[name] for name in stack)
        fingerprint = weights_fingerprint(model)
        assert fingerprints.setdefault(frozenset(stack), fingerprint) == fingerprint
    while ledger.edits:
        ledger.undo()
    assert weights_equal(model, original_weights)
    assert standing_changes(model) == ()


def test_an_edit_changes_its_layers_alone():
    model, edits, original_weights, _ = world("llama")
    with edits["A"].applied(model):
        edited_weights = copy_weights(model)
        changed = {
            name for name in original_weights if not torch.equal(edited_weights[name], original_weights[name])
        }
        assert {name.split("layers.")[1][0] for name in changed} == {"1", "2"}
        for layer, delta in edits["A"].deltas().items():
            weight = mlp_output_matrix(tiny_model("llama"), layer)
            torch.testing.assert_close(mlp_output_matrix(model, layer), weight + delta)
    assert weights_equal(model, original_weights)


def test_a_second_ledger_on_an_edited_model_is_refused():
    model, edits, original_weights, _ = world("gpt2")
    ledger = Ledger(model)
    other = Ledger(model)
    ledger.apply(edits["A"])
    with pytest.raises(ValueError, match="an edit already stands in this model"):
        Ledger(model)
    with pytest.raises(ValueError, match="that this ledger did not make"):
        other.apply(edits["D"])
    ledger.undo()
    with edits["A"].applied(model), pytest.raises(ValueError, match="already stands"):
        Ledger(model)
    assert weights_equal(model, original_weights)


def test_no_undo_under_an_open_applied():
    model, edits, original_weights, _ = world("gpt2")
    ledger = Ledger(model)
    ledger.apply(edits["A"])
    with edits["B"].applied(model):
        with pytest.raises(ValueError, match="lies on top"):
            ledger.undo()
        with pytest.raises(ValueError, match="did not make"):
            ledger.apply(edits["D"])
    assert ledger.edits == (edits["A"],)
    ledger.undo()
    assert weights_equal(model, original_weights)


def test_applied_restores_after_an_error():
    model, edits, original_weights, _ = world("llama")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), edits["A"].applied(model) as edited_model:
            assert edited_model is model
            assert not weights_equal(model, original_weights)
            raise error
        assert weights_equal(model, original_weights)


def test_an_out_of_order_exit_is_refused():
    model, edits, original_weights, _ = world("llama")
    outer, inner = edits["A"].applied(model), edits["D"].applied(model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ValueError, match="lies on top"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert standing_changes(model) == () and weights_equal(model, original_weights)


@pytest.mark.parametrize("verb", ["apply", "redo"])
def test_an_interrupt_leaves_the_ledger_and_the_bits(verb, monkeypatch):
    model, edits, original_weights, _ = world("gpt2")
    ledger, add = Ledger(model), mlp_output._add_
    ledger.apply(edits["A"])
    ledger.undo()

    def interrupted(model, layer, delta):
        add(model, layer, delta)
        if layer == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlp_output, "_add_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.redo() if verb == "redo" else ledger.apply(edits["A"])
    assert weights_equal(model, original_weights)
    assert ledger.edits == ()
    assert ledger.redo() is edits["A"]
    ledger.undo()
    assert weights_equal(model, original_weights)


def test_an_interrupted_undo_is_finished_and_known(monkeypatch):
    model, edits, original_weights, _ = world("llama")
    ledger, copied = Ledger(model), []
    ledger.apply(edits["A"])
    edited_weights = copy_weights(model)
    restore = mlp_output._restore_

    def interrupted(model, saved):
        if not copied:
            copied.append(min(saved))
            restore(model, {copied[0]: saved[copied[0]]})
            raise KeyboardInterrupt
        restore(model, saved)

    with monkeypatch.context() as patch:
        patch.setattr(mlp_output, "_restore_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.undo()
    assert copied and weights_equal(model, original_weights)
    assert ledger.edits == () and standing_changes(model) == ()
    assert ledger.redo() is edits["A"]
    assert weights_equal(model, edited_weights)
    ledger.undo()
    assert weights_equal(model, original_weights)


def test_an_edit_of_another_model_is_refused(tmp_path):
    model, edits, *_ = world("llama")
    file = edits["A"].save(tmp_path / "a.safetensors")
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="planned on other weights of tiny"):
        Edit.load(file, other)
    with pytest.raises(ValueError, match="planned on other weights"):
        Ledger(other).apply(edits["A"])
    loaded = Edit.load(file, model)
    ledger = Ledger(model)
    ledger.apply(loaded)
    assert "edits that stand: 1" in repr(ledger)
    assert "lamp, bell" in repr(ledger)
    ledger.undo()


def run_in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_another_thread_changes_nothing_while_a_block_does():
    model, edits, original_weights, _ = world("llama")
    ledger, errors = Ledger(model), []

    def change():
        for verb in (lambda: ledger.apply(edits["D"]), lambda: edits["D"].applied(model).__enter__()):
            with pytest.raises(ValueError) as caught:
                verb()
            errors.append(str(caught.value))

    with edits["A"].applied(model):
        edited_weights = copy_weights(model)
        run_in_threads(change)
        assert weights_equal(model, edited_weights)
    assert weights_equal(model, original_weights) and len(errors) == 2
    assert "another thread is inside a `with` block that changes this model" in errors[1]
    run_in_threads(lambda: ledger.apply(edits["A"]))
    assert weights_equal(model, edited_weights), "a ledger is no thread's own"
    assert ledger.undo() is edits["A"] and weights_equal(model, original_weights)


def test_many_threads_leave_nothing_that_cannot_be_undone():
    model, edits, original_weights, _ = world("gpt2")
    ledger, refused, done = Ledger(model), [], []

    def work(name):
        for _ in range(15):
            try:
                with edits[name].applied(model):
                    done.append(name)
                ledger.apply(edits[name])
                ledger.undo()
            except ValueError as error:
                refused.append(str(error))

    run_in_threads(*(partial(work, name) for name in ("A", "D", "A")))
    assert done
    while ledger.edits:
        ledger.undo()
    assert standing_changes(model) == () and weights_equal(model, original_weights)
