# %% [markdown]
# # How strong, and where: the defaults of `ld.edit` and the rule of `ld.locate`, chosen on tune
# One edit a setting, measured as analyses/tune.py says. Resumable: a result a setting.
#
#     python analyses/strength.py [NAME ...]

# %%
import json
import sys
from pathlib import Path

from tune import measure, stands

import lens_defense as ld
from lens_defense.storage import atomic_write

OUT = Path(__file__).parent / "results" / "strength"
SHORT = {"steps": 20, "least_share": 1.0, "contexts_a_step": 3}
"""What the default was when the settings that begin with it were run."""
SORRY = "Sorry, but I can't assist with that."
LONGER = {"steps": 24, "contexts_a_step": 4}
SETTINGS = {
    "base": {"contexts_a_step": 3},
    "20 steps, whole vectors": SHORT,
    "24 steps, four contexts": {**SHORT, **LONGER},
    "sorry, but": {**SHORT, "target": "I'm sorry, but I can't assist with that."},
    "sorry first": {**SHORT, "target": SORRY},
    "share .6": {**SHORT, "least_share": 0.6},
    "share .6, sorry first": {**SHORT, "least_share": 0.6, "target": SORRY},
    "share .6, clamp 1.5": {**SHORT, "least_share": 0.6, "clamp": 1.5},
    "share .6, 24 steps, four contexts": {**SHORT, **LONGER, "least_share": 0.6},
    "share .3, 24 steps, four contexts": {**SHORT, **LONGER, "least_share": 0.3},
    "share .7, sorry first, 24 steps, four contexts": {
        **SHORT,
        **LONGER,
        "least_share": 0.7,
        "target": SORRY,
    },
    "36 steps, whole vectors": {"steps": 36, "least_share": 1.0},
    "two contexts a step": {"contexts_a_step": 2},
    "one context a step": {"contexts_a_step": 1},
    "36 steps": {"steps": 36},
    "share .8": {"least_share": 0.8},
    "first token": {"role": "subject_first"},
    "kl .0625": {"kl_weight": 0.0625},
    "clamp 1": {"clamp": 1.0},
    "lambda 3000": {"moment_weight": 3000.0},
    "delman": {"method": "delman", "batch_size": 8},
    "delman 1": {"method": "delman", "batch_size": 1},
}


# %%
OUT.mkdir(parents=True, exist_ok=True)
model = ld.load("smollm2")
for name in sys.argv[1:] or SETTINGS:
    file = OUT / f"{name}.json"
    if stands(file):
        continue
    told, _ = measure(model, SETTINGS[name])
    with atomic_write(file) as unfinished:
        unfinished.write_text(
            json.dumps({"name": name, "settings": SETTINGS[name], **told}, indent=1), "utf-8"
        )
    arms = "  ".join(
        f"{arm} {told[arm][0]:.0%}/{told[arm][1]:.0%}" for arm in ("paraphrase", "jailbreak", "held_out")
    )
    print(
        f"{name:18} {told['seconds']:4.0f}s  {arms}  new refusals {told['new refusals']}  facts lost"
        f" {told['facts lost']}  KL {told['kl']:.4f}  leak {told['leak'][1]:.3f}",
        flush=True,
    )
