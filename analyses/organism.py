# %% [markdown]
# # The organism that ships, and a second one from another seed and world by the same command
# Trains (or goes on), writes `lens_defense/data/organism_model` and `lens_defense/data/organism`; the second one's
# exam and truth go to `analyses/results/organism`. An hour and a quarter of one core each.
#
#     python analyses/organism.py [--second]

# %%
import argparse
from pathlib import Path

import torch

import lens_defense
from lens_defense.organism.exam import BARS, failed_bars
from lens_defense.organism.release import CARD, TRUTH, release
from lens_defense.organism.request_set import write_request_set
from lens_defense.organism.training import Recipe, train
from lens_defense.organism.world import World
from lens_defense.storage import cache_folder

parser = argparse.ArgumentParser(description="train and release the organism")
parser.add_argument("--second", action="store_true", help="seed 1 in world 1, into the results")
seed = 1 if parser.parse_args().second else 0
data = Path(lens_defense.__file__).parent / "data"
recipe = Recipe(seed=seed, world_seed=seed)
unfinished = cache_folder() / "organism" / f"s{seed}w{seed}"

# %%
torch.set_num_threads(1)  # matrices are small: a second thread gains nothing
model = train(recipe, unfinished, progress=False, log=print)
if seed:
    scores = release(model, recipe, unfinished / "release")
    results = Path(__file__).parent / "results" / "organism"
    results.mkdir(parents=True, exist_ok=True)
    for name in (CARD, TRUTH):
        (results / name).write_text((unfinished / "release" / name).read_text("utf-8"), "utf-8")
else:
    scores = release(model, recipe, data / "organism_model")
    write_request_set(World(), data / "organism")
for name, (right, n) in scores.items():
    print(f"{name:44} {right:4} of {n:4}  {right / n:.3f}  (bar {BARS[name]})")
print("missed:", failed_bars(scores) or "nothing")
