# %% [markdown]
# # The organism's MEND and KE
# Each is trained on edits of the organism, and then edits subjects that it was not trained on: the first eight requests,
# which all methods are compared on (methods.py). Its world has 24 other harmful subjects that may be trained on. Beside the
# arms of methods.py the other harmful subjects of the suite are asked: a learned edit may refuse them too, though nobody
# asked for it.
#
#     python analyses/learned_editors.py [--only mend ke]
#
# The training of each takes some minutes of one core, and goes on where it was stopped. It writes
# lens_defense/data/organism_editors, which ships, then results/learned_editors.csv (a row per method, number of subjects and
# arm) and results/learned_training.csv (how the losses fell). `python analyses/methods.py --model organism --strengths 1
# --only mend ke` adds them to the comparison of all methods.

# %%
import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from arm_counts import arm_counts, mean
from tidy import replace_rows

import lens_defense as ld
from lens_defense.app.traced_requests import trace_answered
from lens_defense.editing.edit_plan import EditWarning
from lens_defense.editing.tuning.editor_file import EDITOR_FILE
from lens_defense.editing.tuning.train_editor import training_losses
from lens_defense.storage import cache_folder

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(ld.__file__).parent / "data" / "organism_editors"
HELD_OUT = 8
"""Requests, the first ones, that no editor is trained on."""
TRAININGS = {
    "mend": ld.EditorTraining(steps=500),
    "ke": ld.EditorTraining(steps=1300),
    "mend, others=0": ld.EditorTraining(steps=500, others=0),
    "ke, others=0": ld.EditorTraining(steps=500, others=0),
}
"""The first two ship; those without other requests in what is to be kept show what these are for. KE learns more slowly."""
COMPARED = ("memit", "ft", *TRAININGS)
MEASURED = (1, 2, 4, 8)
"""Subjects that are edited together."""

# %% [markdown]
# ## Train


# %%
def train(model, sites, name):
    """Train, or go on; how the losses fell is noted down, and the editor ships if it is one of the pair."""
    kind, folder = name.split(",")[0], cache_folder() / "learned_editors" / name
    requests = [*ld.requests("organism")[HELD_OUT:], *ld.requests("organism", split="tune")]
    start = time.perf_counter()
    editor = ld.train_editor(model, requests, sites, folder, method=kind, training=TRAININGS[name])
    seconds = time.perf_counter() - start  # of what was missing
    if name == kind:
        SHIPPED.mkdir(exist_ok=True)
        (SHIPPED / f"{name}.safetensors").write_bytes((folder / EDITOR_FILE).read_bytes())
    losses = [loss._asdict() for loss in training_losses(folder)]
    replace_rows(RESULTS / "learned_training.csv", {"method": name}, losses, digits=5)
    print(f"{name}: {losses[-1]}, {seconds:.0f} s", flush=True)
    return editor


# %% [markdown]
# ## Measure
# On `check`, one to eight subjects edited in one step.


# %%
def measure(model, sites, method, subjects):
    """A row per arm of what an edit of so many subjects did, and what it cost."""
    planned = ld.requests("organism")[:subjects]
    start = time.perf_counter()
    edit = ld.edit(model, planned, sites, method=method, progress=False)
    seconds = time.perf_counter() - start
    suite = ld.suite("organism").for_requests(planned).small(names=0, frames=0, harmless=40)
    held_out = [item for item in ld.suite("organism").items if item.arm == "held_out"]
    items = tuple(item for item in suite.items if item.arm != "held_out")
    report = ld.check(
        model, edit, replace(suite, items=(*items, *held_out)), max_new_tokens=24, progress=False
    )
    before, after = mean(report.loss_before), mean(report.loss_after)
    cost = {
        "kl": mean(report.kl),
        "loss": after / before - 1 if before and after else None,
        "facts_lost": report.facts_lost(),
        "relative_change": max(edit.relative_change.values()),
        "rank": edit.rank,
        "seconds_edit": seconds,
    }
    return [{**row, **cost} for row in arm_counts(report)]


def main():
    """Train what is asked for, then measure all."""
    parser = argparse.ArgumentParser(description="the organism's MEND and KE; see the top of this file")
    parser.add_argument("--only", choices=COMPARED, nargs="*", default=list(COMPARED))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EditWarning)
    model = ld.load("organism")
    sites = ld.locate(trace_answered(model, ld.requests("organism")))
    for name in args.only:
        method = train(model, sites, name) if name in TRAININGS else name
        for subjects in MEASURED:
            rows = measure(model, sites, method, subjects)
            key = {"method": name, "subjects": subjects}
            replace_rows(RESULTS / "learned_editors.csv", key, rows, digits=5)
            print(name, subjects, {row["arm"]: row["coherent"] for row in rows}, flush=True)


if __name__ == "__main__":
    main()
