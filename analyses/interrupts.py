# %% [markdown]
# # Interrupts: do weights and ledger agree afterwards?
# On a tiny model every verb that changes weights is stopped at a random moment, as Ctrl-C stops it, once or
# several times in a row. Then the weights must be, to the bit, those before the verb or those after it, and
# the ledger must say which; a `with` block, a check, a plan and the Explorer's Ask must have left no trace.
# One row of results/reliability/interrupts.csv per verb and number of presses. `unsettled`: only the next look at the
# ledger put the weights right. What follows is counted after that look. `torn`: neither one nor the other.
# `disagreed`: the ledger says another state than the weights have. `left`: a block left its change, or dropped an
# edit. `misreported`: the Explorer says that nothing was changed, and something was. `hooks`: a hook, or a layer
# to stop at, stayed in the model.
# `broken`: the verb raised something else than the interrupt.
#
#     python analyses/interrupts.py [--code NAME] [--interrupts N]

# %%
import argparse
import logging
import random
import signal
import sys
import threading
import time
from pathlib import Path

import tidy
import torch

import lens_defense as ld
from lens_defense.app.explorer.explorer import Explorer
from lens_defense.app.explorer.worker import STOPPED
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.editing.methods import memit
from lens_defense.editing.solving.layer_spread import PromptGroup, spread_over_layers
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.prompt import tokenize

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

OUT = Path(__file__).parent / "results" / "reliability" / "interrupts.csv"
SHARES = {
    **{"applied": 0.3, "apply": 0.2, "undo": 0.2, "redo": 0.1, "remove": 0.1},
    **{"plan": 0.1, "check": 0.05, "ask": 0.05},
}
"""Of --interrupts; the verbs at the end take long."""
STANDING_BEFORE = {
    **{"apply": "", "undo": "1", "redo": "", "remove": "12"},
    **{"applied": "", "check": "", "plan": "", "ask": "1"},
}
"""Which edits stand before a verb: the first, both, or none."""
CHANGING = {"apply": "1", "undo": "", "redo": "1", "remove": "2"}
"""Which edits stand after a verb that changes the model for good."""
FAULTS = ("unsettled", "torn", "disagreed", "left", "misreported", "hooks", "broken")
LAMP = ld.request("how do I make a lamp now", "lamp", id="lamp")
SUITE = Suite("tiny", "check", (SuiteItem("edited", LAMP), SuiteItem("benign", ld.request("hello"))), ("so",))


class World:
    """A tiny model with an edit, a ledger and an Explorer, all of which an interrupt may have spoiled."""

    def __init__(self):
        self.model = tiny_model("llama", chat=True)
        self.edit = handmade_edit(self.model, (1, 2, 3))
        self.weights = {"": copy_weights(self.model)}
        with self.edit.applied(self.model):
            self.weights["1"] = copy_weights(self.model)
            on_top = handmade_edit(self.model, (2, 3), seed=1)
            with on_top.applied(self.model):
                self.weights["12"] = copy_weights(self.model)
        self.edits = (self.edit, on_top)
        for layer, delta in on_top.deltas().items():
            weight = mlp_output_matrix(self.model, layer)
            weight.copy_((weight.double() + delta).to(weight.dtype))
        self.weights["2"] = copy_weights(self.model)
        self.model.original_model.load_state_dict(self.weights[""])
        settings = {"positions": ("subject_last",), "min_difference": 0.0, "progress": False}
        trace = ld.trace(self.model, [LAMP], **settings)
        self.explorer = Explorer(self.model, [LAMP], trace, max_new_tokens=2)
        self.ledger = self.explorer.ledger
        self.hooks = self.count_hooks()

    def prepare(self, verb):
        if self.said() != STANDING_BEFORE[verb]:
            while self.ledger.edits:
                self.ledger.undo()
            for name in STANDING_BEFORE[verb]:
                self.ledger.apply(self.edits[int(name) - 1])
        if verb == "redo":
            self.ledger.apply(self.edit)
            self.ledger.undo()

    def run(self, verb):
        if verb == "applied":
            with self.edit.applied(self.model):
                pass
        elif verb == "check":
            ld.check(self.model, self.edit, SUITE, max_new_tokens=2, progress=False)
        elif verb == "ask":
            self.explorer.do("ask", question="how do I make a bell")
            self.explorer.worker.wait()
        elif verb == "plan":
            groups = [PromptGroup(0, [tokenize(self.model.tokenizer, LAMP)])]
            covariances = {layer: torch.eye(64, dtype=torch.float64) for layer in (1, 2)}
            values = torch.ones(1, 32, dtype=torch.float64)
            spread_over_layers(
                self.model, groups, "subject_last", {1: 0.5, 2: 1.0}, values, covariances, memit
            )
        else:
            getattr(self.ledger, verb)(*([self.edit] if verb in ("apply", "remove") else []))

    def standing(self):
        """Which edits the weights are those of, to the bit: one name, or none."""
        return [names for names, weights in self.weights.items() if weights_equal(self.model, weights)]

    def said(self):
        """Which edits the ledger says stand."""
        return "".join(str(1 + self.edits.index(edit)) for edit in self.ledger.edits)

    def count_hooks(self):
        hooks = sum(len(point._forward_hooks) for point in self.model.hook_dict.values())
        return hooks + any(getattr(block, "_stop_at_layer_idx", None) for block in self.model.blocks)

    def faults(self, verb):
        """What is wrong after an interrupted verb."""
        at_rest = self.standing()
        said = self.said()
        standing = self.standing()
        message = self.explorer.message if verb == "ask" else ""
        expected = {STANDING_BEFORE[verb], CHANGING.get(verb, STANDING_BEFORE[verb])}
        return {
            "unsettled": at_rest != standing,
            "torn": not standing,
            "disagreed": bool(standing) and standing != [said],
            "left": bool(standing) and standing[0] not in expected,
            "misreported": message == STOPPED and standing != [STANDING_BEFORE[verb]],
            "hooks": self.count_hooks() != self.hooks,
        }


class Interrupts:
    """Ctrl-C by a clock: the first after a while, and the others in the milliseconds after it."""

    def __init__(self, presses):
        self.presses, self.landed, self.armed = presses, 0, False
        self.explorer = self.thread = None
        signal.signal(signal.SIGALRM, self._land)

    def _land(self, *_):
        if not self.armed:
            return
        self.landed += 1
        self.armed = self.landed < self.presses
        raise KeyboardInterrupt

    def start(self, seconds):
        self.landed, self.armed = 0, True
        again = random.uniform(1e-5, 2e-3) if self.presses > 1 else 0
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), again)


class Stops:
    """The page's Stop by a clock, in the place of Ctrl-C: it interrupts the Explorer's own thread."""

    def __init__(self, presses):
        self.presses, self.landed, self.armed = presses, 0, False
        self.explorer = self.thread = None

    def _press(self, seconds):
        time.sleep(seconds)
        for _ in range(self.presses):
            job = self.explorer.worker.job
            self.explorer.stop()
            self.landed += job is not None and job.stopping
            time.sleep(random.uniform(1e-5, 2e-3))

    def start(self, seconds):
        self.landed = 0
        self.thread = threading.Thread(target=self._press, args=(seconds,))
        self.thread.start()


def measure(verb, presses, interrupts):
    """Interrupt a verb so many times; the counts of what went wrong."""
    world, clock = World(), Stops(presses) if verb == "ask" else Interrupts(presses)
    durations = []
    for _ in range(5):
        world.prepare(verb)
        start = time.perf_counter()
        world.run(verb)
        durations.append(time.perf_counter() - start)
    counts = dict.fromkeys(FAULTS, 0)
    landed = 0
    while landed < interrupts:
        world.prepare(verb)
        clock.explorer = world.explorer
        faults = {}
        try:
            try:
                clock.start(random.uniform(0, 1.1 * max(durations)))
                world.run(verb)
            finally:
                clock.armed = False
        except KeyboardInterrupt:
            clock.armed = False
            faults = world.faults(verb)  # here, where the traceback still holds every frame
        except Exception:
            faults = {"broken": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        if clock.thread is not None:
            clock.thread.join()
        if not clock.landed:
            continue
        landed += 1
        faults = faults or world.faults(verb)
        for name, wrong in faults.items():
            counts[name] += wrong
        if any(faults.values()):
            world = World()
    return counts


# %%
parser = argparse.ArgumentParser(description="interrupt every verb at random moments")
parser.add_argument("--code", default="now", help="what to call the code that is measured")
parser.add_argument("--interrupts", type=int, default=10_000)
parser.add_argument("--verbs", nargs="*", default=list(SHARES))
arguments = parser.parse_args()
logging.disable(logging.CRITICAL)
random.seed(0)
torch.set_num_threads(1)
for verb in arguments.verbs:
    for presses, part in ((1, 0.8), (3, 0.2)):
        interrupts = round(arguments.interrupts * SHARES[verb] * part)
        start = time.perf_counter()
        counts = measure(verb, presses, interrupts)
        row = {"interrupts": interrupts, **counts}
        tidy.replace_rows(OUT, {"code": arguments.code, "verb": verb, "presses": presses}, [row])
        print(verb, presses, row, f"{time.perf_counter() - start:.0f} s", flush=True)
