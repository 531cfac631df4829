# %% [markdown]
# # How strong, and where: the defaults of `ld.edit` and the rule of `ld.locate`, chosen on tune
# Eight concrete subjects of the tune split are edited, and measured on the tune suite: templates and
# wrappers that this edit does not use but other edits may, subjects that it does not know, tune's
# benign and safe requests. No row of the check split is read. Resumable: a result a setting.
#
#     python analyses/strength.py [NAME ...]

# %%
import json
import sys
import time
from pathlib import Path

import lens_defense as ld
from lens_defense.checks import answers
from lens_defense.edits import default_contexts
from lens_defense.sites import Site

OUT = Path(__file__).parent / "results" / "strength"
BASE = {"band": (5, 9), "role": "subject_last"}
SETTINGS = {
    "base": {},
    "band 2-6": {"band": (2, 6)},
    "band 4-8": {"band": (4, 8)},
    "band 7-11": {"band": (7, 11)},
    "band 9-13": {"band": (9, 13)},
    "first token": {"role": "subject_first"},
    "16 steps": {"steps": 16},
    "three contexts a step": {"contexts_a_step": 3},
    "kl .0625": {"kl_weight": 0.0625},
    "clamp 1": {"clamp": 1.0},
    "clamp 1.5": {"clamp": 1.5},
    "lambda 300": {"moment_weight": 300.0},
    "lambda 3000": {"moment_weight": 3000.0},
    "two contexts a step": {"contexts_a_step": 2},
    "no apology": {"target": "I can't assist with that."},
    "delman": {"method": "delman", "batch_size": 8},
    "delman 1": {"method": "delman", "batch_size": 1},
}


# %%
def contexts(request):
    """The first nine of the default contexts; the templates and wrappers left over are measured."""
    return default_contexts(request)[:9]


OUT.mkdir(parents=True, exist_ok=True)
model = ld.load("smollm2")
subjects = [item for item in ld.requests("core", split="tune") if item.concrete]
suite = ld.suite("core", split="tune")
assert suite.split == "tune"
before: list[str] = []

for name in sys.argv[1:] or SETTINGS:
    file = OUT / f"{name}.json"
    if file.exists():
        continue
    settings = {**BASE, **SETTINGS[name]}
    (low, high), role = settings.pop("band"), settings.pop("role")
    sites = [Site("residual", layer, role) for layer in range(low, high + 1)]
    start = time.perf_counter()
    edit = ld.edit(model, subjects, sites, contexts=contexts, aside=0, progress=False, **settings)
    planned = time.perf_counter() - start
    if not before:
        seen = {text for texts in edit.contexts for text in texts}
        rows, _ = suite.for_requests(subjects).about(subjects, seen)
        before = answers(model, rows, 24)
    report = ld.check(model, edit, suite, before=before, progress=False, title=name)
    result = {
        "name": name,
        "settings": SETTINGS[name],
        "seconds": planned,
        "losses": edit.losses,
        "reach": edit.forecast.reach,
        "leak": [edit.forecast.leak_neutral, edit.forecast.leak_safe],
        "change": list(edit.relative_change.values()),
        "wording": [report.rate("wording", judge) for judge in ("prefix", "coherent")],
        "wrapper": [report.rate("wrapper", judge) for judge in ("prefix", "coherent")],
        "unseen": [report.rate("unseen", judge) for judge in ("prefix", "coherent")],
        "new refusals": report.new_refusals(),
        "facts lost": report.facts_lost(),
        "kl": sum(report.kl) / len(report.kl),
        "loss": [sum(report.loss_before) / 8, sum(report.loss_after) / 8],
    }
    file.write_text(json.dumps(result, indent=1), "utf-8")
    print(
        f"{name:18} {planned:4.0f}s  wording {result['wording'][0]:.0%}/{result['wording'][1]:.0%}"
        f"  wrapper {result['wrapper'][0]:.0%}/{result['wrapper'][1]:.0%}  unseen"
        f" {result['unseen'][0]:.0%}  new refusals {result['new refusals']}  facts lost"
        f" {result['facts lost']}  KL {result['kl']:.4f}  leak {result['leak'][1]:.3f}",
        flush=True,
    )
