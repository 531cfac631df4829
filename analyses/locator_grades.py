# %% [markdown]
# # Locators, graded by a truth that was planted
# Each way to trace, on jailbroken requests of the organism, against the cells that strict interchange found to
# hold a subject (organisms/truths.py). The grade is the area under the ROC curve over (role, layer) cells, and
# the rank of the best true cell; intervals over noise seeds and a bootstrap of the requests. One CSV a world.
# Beside them what others locate by (lenses.py): the logit lens, and DINM's and LED's layers, which name no token
# and so have no area; `layer` is the one that they name. Resumable: a row that the CSV has of these weights is not made again.
#
#     python analyses/locator_grades.py [--organism FOLDER --world-seed W]

# %%
import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

import lens_defense as ld
from lens_defense.checking.judges import prefix
from lens_defense.models.load import ORGANISM_FOLDER
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.release import released_ground_truth
from lens_defense.organism.world import REFUSAL, World
from lens_defense.storage import atomic_write
from lens_defense.tracing.corruptions import ablation
from lens_defense.tracing.lenses import logit_lens, safety_layers, toxic_layers
from lens_defense.tracing.map_statistics import Address, request_effects

OUT = Path(__file__).parent / "results" / "locator_grades"
REQUESTS, SEEDS, DRAWS = 20, 3, 200
ROLES = ("subject_first", "subject_mid", "subject_last", "next", "last")
"""The roles of one token or two; those of many (before, after, template) hold nothing and are cheap to tell."""
EVERY = {"positions": ROLES, "layers": "all", "progress": False, "floor": 0.01}


# %%
def asked(world: World, *, plain: bool = False) -> list[ld.Request]:
    """Requests about the subjects that edits may see, one each: jailbroken, or plain and so refused."""
    rng = random.Random("grades")
    wrappers = [wrapper for family in phrasings().edit_families for wrapper in phrasings().jailbreaks[family]]
    return [
        world.ask(
            one, rng, frames=phrasings().trained_frames, jailbreak=None if plain else rng.choice(wrappers)
        ).request
        for one in world.split()["edit"][:REQUESTS]
    ]


Method = tuple[dict[str, Any], Callable[[], ld.Trace]]


def methods(model: Any, world: World) -> Iterator[Method]:
    """Ways to locate: what they are called, and their map."""
    requests = asked(world)
    for what, settings in tracings(model, world):
        yield what, lambda some=settings: ld.trace(model, requests, **{**EVERY, **some})
    refused = asked(world, plain=True)
    others: dict[str, Callable[[], ld.Trace]] = {
        "logit lens": lambda: logit_lens(model, requests),
        "toxic layer (DINM)": lambda: toxic_layers(model, requests, REFUSAL),
        "safety layers (LED)": lambda: safety_layers(model, refused, prefix, progress=False),
    }
    for name, make in others.items():
        yield {"corruption": name, "component": "resid_post", "direction": "none", "exact": True}, make


def tracings(model: Any, world: World) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Ways to trace: what they are called, and trace's arguments."""
    names = [one.name for one in world.subjects_of("benign")]
    noises: list[tuple[str, int, Callable[[int], Any]]] = [
        (f"noise {scale:g}", n, lambda seed, s=scale, n=n: ld.noise(model, scale=s, samples=n, seed=seed))
        for scale, n in itertools.product((1.0, 3.0, 10.0), (1, 3, 10))
    ]
    others: list[tuple[str, int, Callable[[int], Any]]] = [
        ("replacement", n, lambda seed, n=n: ld.replacement(model, samples=n, subjects=_turned(names, seed)))
        for n in (1, 3, 10)
    ]
    others += [
        ("mean", 1, lambda _: ablation(model, "mean")),
        ("zero", 1, lambda _: ablation(model, "zero")),
        ("resample", 3, lambda seed: ablation(model, "resample", samples=3, seed=seed)),
    ]
    for corruption, samples, make in (*noises, *others):
        for component in ("resid_post", "mlp_out", "attn_out"):
            ways = [("denoising", True)]
            ways += (
                [("noising", True), ("denoising", False)]
                if component == "resid_post" and samples == 3
                else []
            )
            for direction, exact in ways:
                if component != "resid_post" and samples != 3:
                    continue
                what = {
                    "corruption": corruption,
                    "samples": samples,
                    "component": component,
                    "direction": direction,
                    "exact": exact,
                }
                for seed in range(SEEDS if corruption not in ("mean", "zero") else 1):
                    settings = {
                        "components": (component,),
                        "corruption": make(seed),
                        "direction": direction,
                        "exact": exact,
                        "window": 3,
                    }
                    yield {**what, "seed": seed}, settings


def _turned(names: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(names, len(names))


def grade(
    addresses: list[Address], effects: np.ndarray, kinds: dict[tuple[str, int], str]
) -> tuple[float, int]:
    """Area under the ROC curve of mean effects, and the rank of the best true cell."""
    graded = [
        (i, kinds[role, layer] == "positive")
        for i, (_, role, layer) in enumerate(addresses)
        if kinds.get((role, layer)) in ("positive", "negative")
    ]
    values = np.nan_to_num(np.nanmean(effects[:, [i for i, _ in graded]], axis=0))
    true = np.array([is_true for _, is_true in graded])
    ranks = rankdata(values)
    n, m = true.sum(), (~true).sum()
    area = (ranks[true].sum() - n * (n + 1) / 2) / (n * m)
    return float(area), int((values > values[true].max()).sum()) + 1


def graded(trace: ld.Trace, kinds: dict[tuple[str, int], str]) -> dict[str, Any]:
    """What a map is worth; of one that names layers only, which these are."""
    addresses, effects = request_effects(trace)
    if {role for _, role, _ in addresses} == {"last"}:
        layer = ld.locate(trace, 1, by="cells")[0].layer
        return {"layer": layer, "true layer": float(kinds["subject_last", layer] == "positive")}
    area, rank = grade(addresses, effects, kinds)
    rng = np.random.default_rng(0)
    drawn = [
        grade(addresses, effects[rng.integers(len(effects), size=len(effects))], kinds)[0]
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    sites = ld.locate(trace)
    found = [kinds[site.role, site.layer] for site in sites]
    return {
        "area": area,
        "low": low,
        "high": high,
        "rank": rank,
        "located role": sites[0].role,
        "located true": found.count("positive") / len(found),
        "strongest wrong": _strongest_wrong(addresses, effects, kinds),
    }


# %%
def main() -> None:
    """Grade every method on one world."""
    given = argparse.ArgumentParser(description="grade locators; see the top of this file")
    given.add_argument("--organism", type=Path, default=ORGANISM_FOLDER)
    given.add_argument("--world-seed", type=int, default=0)
    told = given.parse_args()
    model, world = ld.load(told.organism), World(told.world_seed)
    kinds = {(fact.role, fact.layer): fact.kind for fact in released_ground_truth(told.organism)}
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"world {told.world_seed}.csv"
    weights = weights_fingerprint(model)
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    rows = [row for row in rows if row["weights"] == weights]
    for what, make in methods(model, world):
        if any(what.items() <= row.items() for row in rows):
            continue
        start = time.perf_counter()
        try:
            trace = make()
        except ValueError as error:
            rows.append({"weights": weights, **what, "refused": str(error)[:80]})
        else:
            seconds = time.perf_counter() - start
            rows.append({"weights": weights, **what, **graded(trace, kinds), "seconds": seconds})
        print({name: value for name, value in rows[-1].items() if value == value}, flush=True)
        with atomic_write(file) as unfinished:
            pd.DataFrame(rows).convert_dtypes().round(4).to_csv(unfinished, index=False)


def _strongest_wrong(
    addresses: list[Address], effects: np.ndarray, kinds: dict[tuple[str, int], str]
) -> float:
    """The largest mean effect of a cell that holds nothing."""
    wrong = [i for i, (_, role, layer) in enumerate(addresses) if kinds.get((role, layer)) == "negative"]
    return float(np.nanmean(effects[:, wrong], axis=0).max())


if __name__ == "__main__":
    main()
