"""Any sequence of apply, undo, redo and remove: whole or not at all, and back to the original bits."""

import threading
from dataclasses import replace
from functools import cache, partial
from itertools import combinations

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st

import lens_defense.models.mlp_output as mlp_output
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.models.mlp_output import mlp_output_matrix, standing_changes, weights_fingerprint
from lens_defense.models.weight_journal import journal_of

MOVES = ("apply A", "apply B", "apply D", "undo", "redo", "remove A", "remove B", "remove D")


def add_one_after_another(model, edits):
    """The plain loop that a ledger has to equal to the bit: a sum in float64 per edit and layer, rounded."""
    for edit in edits:
        for layer, delta in edit.deltas().items():
            weight = mlp_output_matrix(model, layer)
            weight.copy_((weight.double() + delta).to(weight.dtype))
    return weights_fingerprint(model)


@cache
def world(family):
    """A model; A planned on it, B on top of A, D beside them; its bits; what they are by what stands."""
    model = tiny_model(family)
    original_weights = copy_weights(model)
    first = handmade_edit(model, (1, 2), seed=1)
    with first.applied(model):
        second = handmade_edit(model, (2, 3), seed=2)
    edits = {"A": first, "B": second, "D": handmade_edit(model, (0,), seed=3)}
    return model, edits, original_weights, {}


def expected_fingerprint(family, stack):
    """Of a fresh copy on which what stands was added in its order."""
    _, edits, _, fingerprints = world(family)
    if stack not in fingerprints:
        fingerprints[stack] = add_one_after_another(tiny_model(family), [edits[name] for name in stack])
    return fingerprints[stack]


def fits(name, stack):
    """Whether the layers that an edit was planned on are as they were then."""
    if name == "D":
        return "D" not in stack
    return [other for other in stack if other != "D"] == ([] if name == "A" else ["A"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@settings(deadline=None, max_examples=30)
@given(moves=st.lists(st.sampled_from(MOVES), max_size=14))
def test_any_sequence_of_moves(family, moves):
    model, edits, original_weights, _ = world(family)
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
        elif move.startswith("remove"):
            name = move.removeprefix("remove ")
            if name in stack:
                ledger.remove(edits[name])
                stack.remove(name)
                undone.append(name)
            else:
                with pytest.raises(ValueError, match="does not stand in this ledger"):
                    ledger.remove(edits[name])
        elif fits(name, stack):
            ledger.apply(edits[name])
            stack.append(name)
            undone.clear()
        else:
            with pytest.raises(ValueError, match="planned on other weights"):
                ledger.apply(edits[name])
        assert ledger.edits == tuple(edits[name] for name in stack)
        assert ledger.undone == tuple(edits[name] for name in undone)
        assert weights_fingerprint(model) == expected_fingerprint(family, tuple(stack))
    while ledger.edits:
        ledger.undo()
    assert weights_equal(model, original_weights)
    assert standing_changes(model) == ()


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float32), ("llama", torch.bfloat16)])
def test_what_stays_after_a_removal_is_as_if_it_had_been_applied_alone(family, dtype):
    model = tiny_model(family).to(dtype)
    original_weights, ledger, edits = copy_weights(model), Ledger(model), []
    for seed, layers in enumerate([(1, 2), (0,), (2, 3), (0, 1, 2, 3)]):
        edits.append(handmade_edit(model, layers, seed=seed))
        ledger.apply(edits[-1])
    for removed in [chosen for n in (1, 3) for chosen in combinations(edits, n)]:
        for edit in removed:
            ledger.remove(edit)
        remaining = tuple(edit for edit in edits if edit not in removed)
        assert ledger.edits == remaining
        fresh = tiny_model(family).to(dtype)
        assert weights_fingerprint(model) == add_one_after_another(fresh, remaining)
        for edit in reversed(removed):
            assert ledger.redo() is edit
        assert ledger.edits == (*remaining, *reversed(removed))
        fresh = tiny_model(family).to(dtype)
        assert weights_fingerprint(model) == add_one_after_another(fresh, ledger.edits)
        while ledger.edits:
            ledger.undo()
        assert weights_equal(model, original_weights)
        for edit in edits:
            ledger.apply(edit)


def test_to_remove_the_last_edit_is_to_undo_it():
    model, edits, original_weights, _ = world("llama")
    ledger = Ledger(model)
    ledger.apply(edits["A"])
    first_weights = copy_weights(model)
    ledger.apply(edits["B"])
    both_weights = copy_weights(model)
    ledger.remove(edits["B"])
    assert weights_equal(model, first_weights) and ledger.undone == (edits["B"],)
    assert ledger.redo() is edits["B"] and weights_equal(model, both_weights)
    ledger.remove(edits["A"])
    ledger.remove(edits["B"])
    assert weights_equal(model, original_weights) and ledger.undone == (edits["A"], edits["B"])


def test_an_edit_that_stands_twice_is_removed_once():
    model, edits, *_ = world("llama")
    nothing = replace(edits["A"], left={layer: 0 * left for layer, left in edits["A"].left.items()})
    ledger = Ledger(model)
    for edit in (nothing, edits["D"], nothing):
        ledger.apply(edit)
    ledger.remove(nothing)
    assert ledger.edits == (nothing, edits["D"])
    ledger.undo()
    ledger.undo()


@pytest.mark.usefixtures("unchecked")
def test_a_removal_that_cannot_be_changes_nothing():
    model, edits, original_weights, _ = world("gpt2")
    ledger, other = Ledger(model), Ledger(model)
    for name in ("A", "D"):
        ledger.apply(edits[name])

    def refuse(error, message, edit=edits["A"], ledger=ledger):
        weights, standing = copy_weights(model), standing_changes(model)
        with pytest.raises(error, match=message) as caught:
            ledger.remove(edit)
        assert "\n" not in str(caught.value)
        assert weights_equal(model, weights) and standing_changes(model) == standing

    refuse(ValueError, "this edit does not stand in this ledger", edits["B"])
    refuse(ValueError, "this edit does not stand in this ledger", ledger=other)
    refuse(TypeError, r"not the number 0; the call is ledger.remove\(edit\)", 0)
    with edits["B"].applied(model):
        refuse(ValueError, "that this ledger did not make")
    with ledger.set_aside():
        refuse(ValueError, "that this ledger did not make")
    for layer in (0, 1):  # of D, which would be made again, and of A
        weight = mlp_output_matrix(model, layer)
        value = weight[3, 3].clone()
        weight[3, 3] += 1
        refuse(ValueError, "changed by something else since this edit")
        weight[3, 3] = value
    ledger.remove(edits["A"])
    assert ledger.undo() is edits["D"] and weights_equal(model, original_weights)


def test_what_something_else_changed_is_not_made_again():
    model, edits, original_weights, _ = world("llama")
    ledger = Ledger(model)
    ledger.apply(edits["A"])
    ledger.apply(edits["B"])
    ledger.remove(edits["A"])
    for layer in (1, 2):  # one that nothing stands in, and one of B
        weight = mlp_output_matrix(model, layer)
        value = weight[0, 0].clone()
        weight[0, 0] += 1
        with pytest.raises(ValueError, match="changed by something else since this edit"):
            ledger.redo()
        assert ledger.edits == (edits["B"],) and ledger.undone == (edits["A"],)
        weight[0, 0] = value
    ledger.redo()
    while ledger.edits:
        ledger.undo()
    assert weights_equal(model, original_weights)


def test_a_removal_whose_result_is_not_finite_is_refused():
    model = tiny_model("llama").to(torch.float16)
    ledger, changes = Ledger(model), (-60_000.0, 100_000.0)  # float16 ends at 65,504
    for seed, change in enumerate(changes):
        plan = handmade_edit(model, (1, 2), seed=seed)
        left, right = torch.zeros(32, 1), torch.zeros(1, plan.right[1].shape[1])
        left[0, 0], right[0, 0] = change, 1.0
        ledger.apply(replace(plan, left={1: left, 2: 0 * left}, right={1: right, 2: right}))
    weights, edits = copy_weights(model), ledger.edits
    with pytest.raises(ValueError, match="the change of layer 1 is not finite; nothing was written"):
        ledger.remove(edits[0])
    assert weights_equal(model, weights) and ledger.edits == edits and ledger.undone == ()


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


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_removal_is_whole_or_not_at_all(moment, monkeypatch):
    model, edits, original_weights, _ = world("llama")
    ledger, restore, written = Ledger(model), mlp_output._restore_, []
    ledger.apply(edits["A"])
    ledger.apply(edits["B"])
    both = weights_fingerprint(model)

    def interrupted(*arguments):
        if not written and moment == "after":
            restore(model, dict(list(arguments[1].items())[:1]))
        written.append(1)
        if len(written) == 1:
            raise KeyboardInterrupt
        return (restore if moment == "after" else compute)(*arguments)

    compute = mlp_output._sum
    with monkeypatch.context() as patch:
        patch.setattr(mlp_output, "_restore_" if moment == "after" else "_sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.remove(edits["A"])
    stack = ("B",) if moment == "after" else ("A", "B")
    assert ledger.edits == tuple(edits[name] for name in stack)
    expected = expected_fingerprint("llama", stack)
    assert weights_fingerprint(model) == expected and (expected == both) == (moment == "before")
    while ledger.edits:
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


def test_watchers_are_called_after_each_change():
    model, edits, original_weights, _ = world("llama")
    ledger, calls = Ledger(model), []

    def watcher(name):
        return lambda: calls.append((name, ledger.edits))

    unwatch = ledger.watch(watcher("first"))
    ledger.watch(watcher("second"))
    for verb, expected in (
        (lambda: ledger.apply(edits["A"]), "A"),
        (lambda: ledger.apply(edits["D"]), "AD"),
        (lambda: ledger.remove(edits["A"]), "D"),
        (ledger.redo, "DA"),
        (ledger.undo, "D"),
    ):
        calls.clear()
        verb()
        standing = tuple(edits[name] for name in expected)
        assert calls == [("first", standing), ("second", standing)]
    calls.clear()
    for verb in (lambda: ledger.apply(edits["B"]), lambda: ledger.remove(edits["B"])):
        with pytest.raises(ValueError):
            verb()
    with ledger.set_aside():
        pass
    assert not calls, "nothing was changed"
    unwatch()
    unwatch()
    ledger.undo()
    assert calls == [("second", ())] and weights_equal(model, original_weights)


def test_a_watcher_that_fails_leaves_the_change_and_the_ledger():
    model, edits, original_weights, _ = world("llama")
    ledger = Ledger(model)

    def fail():
        raise RuntimeError("of the watcher")

    unwatch = ledger.watch(fail)
    for verb, names in ((lambda: ledger.apply(edits["A"]), "A"), (ledger.undo, ""), (ledger.redo, "A")):
        with pytest.raises(RuntimeError, match="of the watcher"):
            verb()
        assert ledger.edits == tuple(edits[name] for name in names)
        assert weights_fingerprint(model) == expected_fingerprint("llama", tuple(names))
    unwatch()
    ledger.undo()
    assert weights_equal(model, original_weights)


@pytest.mark.parametrize("verb", ["apply", "undo", "redo", "remove"])
def test_a_watcher_may_use_the_ledger_and_another_thread_may_meanwhile(verb):
    model, edits, original_weights, _ = world("llama")
    ledger, lock, free = Ledger(model), journal_of(model).lock, []
    if verb != "apply":
        ledger.apply(edits["A"])
    if verb == "redo":
        ledger.undo()

    def take_lock():
        free.append(lock.acquire(timeout=5))
        lock.release()

    def look():
        unwatch()
        run_in_threads(take_lock)
        while ledger.edits:
            ledger.undo()

    unwatch = ledger.watch(look)
    getattr(ledger, verb)(*([edits["A"]] if verb in ("apply", "remove") else []))
    assert free == [True] and weights_equal(model, original_weights)


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
