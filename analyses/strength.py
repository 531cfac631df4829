# %% [markdown]
# # How strong, and where: the settings of `ld.edit`, varied one at a time on tune
# One edit per setting, measured as analyses/tune.py says. Resumable: one row of results/strength.csv per setting.
#
#     python analyses/strength.py [NAME ...]

# %%
import sys
from pathlib import Path

import tidy
from tune import is_made, measure

import lens_defense as ld

OUT = Path(__file__).parent / "results" / "strength.csv"
SETTINGS = {
    "defaults": {},
    "fewer-steps": {"v_num_grad_steps": 24},
    "more-steps": {"v_num_grad_steps": 36},
    "one-context-per-step": {"contexts_per_step": 1},
    "three-contexts-per-step": {"contexts_per_step": 3},
    "whole-vectors": {"min_share": 1.0},
    "least-share-.8": {"min_share": 0.8},
    "sorry-first": {"target": "Sorry, but I can't assist with that."},
    "first-subject-token": {"role": "subject_first"},
    "layers-2-to-6": {"layers": (2, 6)},
    "layers-7-to-11": {"layers": (7, 11)},
    "layers-9-to-13": {"layers": (9, 13)},
    "kl-.0625": {"kl_factor": 0.0625},
    "clamp-1": {"clamp_norm_factor": 1.0},
    "clamp-1.5": {"clamp_norm_factor": 1.5},
    "lambda-3000": {"method": ld.methods.MEMIT(mom2_update_weight=3000.0)},
    "delman-of-8": {"method": ld.methods.DELMAN(batch_size=8)},
    "delman-of-1": {"method": ld.methods.DELMAN(batch_size=1)},
}

# %%
model = ld.load("smollm2")
for name in sys.argv[1:] or SETTINGS:
    if is_made(OUT, setting=name):
        continue
    row = measure(model, SETTINGS[name])
    tidy.replace_rows(OUT, {"setting": name}, [row])
    rates = "  ".join(
        f"{arm} {row[f'{arm}_coherent']:.0%}" for arm in ("paraphrase", "jailbreak", "held_out")
    )
    print(
        f"{name:24} {row['seconds']:4.0f} s  {rates}  new refusals {row['new_refusals']}  "
        f"facts lost {row['facts_lost']}  KL {row['kl']:.4f}  leak {row['leak_safe']:.3f}",
        flush=True,
    )
