"""An interrupt at any line of ours leaves the weights before or after the verb, and the ledger says which."""

import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense
from lens_defense.checking.check import check
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.methods import memit
from lens_defense.editing.solving.layer_spread import PromptGroup, spread_over_layers
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import standing_changes
from lens_defense.models.restoring_block import RestoringBlock, finish
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import component_hook

PACKAGE = Path(lens_defense.__file__).parent
WEIGHT_FILES = tuple(
    str(PACKAGE / file)
    for file in (
        "editing/ledger/ledger.py",
        "editing/edit_plan.py",
        "models/mlp_output.py",
        "models/restoring_block.py",
        "models/weight_journal.py",
    )
)
LAMP = request("make a lamp", "lamp", id="lamp")
SUITE = Suite("tiny", "check", (SuiteItem("edited", LAMP), SuiteItem("benign", request("hello"))), ("so",))


class Interrupts:
    """KeyboardInterrupt at lines, by their number among the lines of these files that run."""

    def __init__(self, *lines, files=WEIGHT_FILES):
        self.lines, self.files, self.seen, self.raised = set(lines), files, 0, 0

    def __enter__(self):
        sys.setprofile(self.arm)
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        sys.settrace(None)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.seen += 1
            if self.seen in self.lines:
                self.raised += 1
                raise KeyboardInterrupt
        return self.trace

    def arm(self, frame, event, _):
        """Python drops a tracer that has raised: trace again, from the next call on."""
        if event == "call" and 0 < self.raised < len(self.lines) and sys.gettrace() is None:
            sys.settrace(self.trace)
            while frame is not None:
                if frame.f_code.co_filename.startswith(self.files):
                    frame.f_trace = self.trace
                frame = frame.f_back


@cache
def world():
    """A model, an edit of it, one on top, and the weights by which of them stand: "1", "2", "12" or none."""
    model = tiny_model("llama", chat=True).to(torch.float32)
    edit, weights = handmade_edit(model, (1, 2)), {"": copy_weights(model)}
    with edit.applied(model):
        weights["1"] = copy_weights(model)
        on_top = handmade_edit(model, (2, 3), seed=1)
        with on_top.applied(model):
            weights["12"] = copy_weights(model)
    alone = replace(on_top, fingerprint=model_fingerprint(model, on_top.layers))
    with alone.applied(model):
        weights["2"] = copy_weights(model)
    return model, (edit, on_top), weights


def standing_edits(model):
    """Which edits the weights are those of, to the bit."""
    *_, by_edits = world()
    return next((names for names, weights in by_edits.items() if weights_equal(model, weights)), "torn")


def edits_of(ledger):
    """Which edits a ledger says stand."""
    _, edits, _ = world()
    return "".join(str(1 + edits.index(edit)) for edit in ledger.edits)


def use_block(ledger):
    _, (edit, _), _ = world()
    with edit.applied(ledger.model):
        pass


def set_aside(ledger):
    with ledger.set_aside():
        pass


VERBS = {
    "apply": ("", lambda ledger: ledger.apply(world()[1][0]), {"", "1"}),
    "undo": ("1", Ledger.undo, {"", "1"}),
    "redo": ("", Ledger.redo, {"", "1"}),
    "applied": ("", use_block, {""}),
    "set_aside": ("1", set_aside, {"1"}),
    "remove": ("12", lambda ledger: ledger.remove(world()[1][0]), {"12", "2"}),
}
"""By name: the edits that stand before, the verb, and which may stand when it was interrupted."""


def ready(verb):
    """A ledger as it is before the verb."""
    model, edits, _ = world()
    ledger = Ledger(model)
    for name in "1" if verb == "redo" else VERBS[verb][0]:
        ledger.apply(edits[int(name) - 1])
    if verb == "redo":
        ledger.undo()
    return ledger


def lines_of(verb):
    """How many lines of ours a verb runs."""
    (_, run, _), ledger = VERBS[verb], ready(verb)
    with Interrupts(0) as count:
        run(ledger)
    while ledger.edits:
        ledger.undo()
    return count.seen


def interrupt(verb, *lines):
    """Run a verb with interrupts, and look at the weights while the traceback holds every frame.

    Returns:
        Whether all of them came.
    """
    model, *_ = world()
    _, run, legal = VERBS[verb]
    ledger = ready(verb)
    interrupts = Interrupts(*lines)
    try:
        with interrupts:
            run(ledger)
    except KeyboardInterrupt:
        at_rest = standing_edits(model)
        said = edits_of(ledger)
        settled = standing_edits(model)
        assert settled == said and settled in legal, (verb, lines, at_rest, said, settled)
        assert len(lines) > 1 or at_rest == settled, (verb, lines, "one is put right before it is seen")
    assert len(standing_changes(model)) == len(ledger.edits), "a block's change is gone"
    while ledger.edits:
        ledger.undo()
    assert standing_edits(model) == "" and standing_changes(model) == ()
    return interrupts.raised == len(lines)


SIMILAR = ("redo", "set_aside")
"""Verbs that run the lines of others."""


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow if verb in SIMILAR else ()) for verb in VERBS]
)
def test_an_interrupt_at_every_line(verb):
    line = 1
    while interrupt(verb, line):
        line += 1
    assert line > 30


@pytest.mark.parametrize("verb", VERBS)
def test_two_and_three_interrupts(verb):
    """The others come while the first one is put right."""
    draw, landed = random.Random(verb), 0
    lines = lines_of(verb)
    for _ in range(40):
        first, gaps = draw.randint(lines // 3, lines), draw.sample(range(1, 12), draw.choice([1, 2]))
        landed += interrupt(verb, first, *(first + gap for gap in gaps))
    assert landed > 5


def check_edit():
    model, (edit, _), _ = world()
    check(model, edit, SUITE, max_new_tokens=2, progress=False)


def plan():
    model, *_ = world()
    groups = [PromptGroup(0, [tokenize(model.tokenizer, LAMP)])]
    covariances = {layer: torch.eye(64, dtype=torch.float64) for layer in (1, 2)}
    spread_over_layers(model, groups, "subject_last", {1: 0.5, 2: 1.0}, torch.ones(1, 32), covariances, memit)


@pytest.mark.parametrize("verb", [check_edit, plan])
def test_what_changes_weights_for_a_while_leaves_none_of_it(verb):
    model, *_ = world()
    verb()  # the first run looks at more, once
    with Interrupts(0) as count:
        verb()
    for line in range(1, count.seen, count.seen // 6):
        with pytest.raises(KeyboardInterrupt) as traceback_alive, Interrupts(line):
            verb()
        assert standing_edits(model) == "" and standing_changes(model) == ()
        del traceback_alive


def test_restoring_goes_on_through_interrupts():
    calls = []

    def restore():
        calls.append(1)
        if len(calls) < 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(restore)
    assert len(calls) == 4


def test_a_block_that_is_dropped_unleft_restores():
    calls = []
    block = RestoringBlock(lambda: 7, lambda: calls.append(1))
    assert block.__enter__() == 7 and not calls
    del block
    assert calls


def test_a_block_that_was_never_entered_restores_nothing():
    calls = []
    with pytest.raises(ValueError), RestoringBlock(lambda: None, lambda: calls.append(1)):
        raise ValueError
    block = RestoringBlock(lambda: None, lambda: calls.append("never"))
    del block
    assert set(calls) == {1}


def test_an_interrupt_leaves_no_hook(monkeypatch):
    model, *_ = world()
    ids = torch.tensor([[5, 6, 7]])
    clean = forward(model, ids).logits

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "_remove_temporary_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward(model, ids, patches={component_hook("resid_post", 1): torch.zeros_like})
    monkeypatch.undo()
    model.blocks[2]._stop_at_layer_idx = 2
    with pytest.raises(KeyboardInterrupt):
        forward(model, ids, patches={component_hook("resid_post", 1): interrupted})
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values())
    assert torch.equal(forward(model, ids).logits, clean)
