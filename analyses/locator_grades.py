# %% [markdown]
# # Locators, graded by a truth that was planted
# Each way to trace, on jailbroken requests of the organism, against the cells that strict interchange found to
# hold a subject (organism/ground_truth.py). The grade is the area under the ROC curve over (role, layer) cells, and
# the rank of the best true cell; intervals over noise seeds and a bootstrap of the requests.
# Beside them what others locate by (tracing/lenses.py): the logit lens, and DINM's and LED's layers, which name no token
# and so have no area; `layer` is the one that they name. Resumable: a row that the table has of these weights is not made
# again.
#
#     python analyses/locator_grades.py [--organism FOLDER --world-seed W]

# %%
import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from tidy import read_table, replace_rows, rows_where

import lens_defense as ld
from lens_defense.loading.load import ORGANISM_FOLDER
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.release import released_ground_truth
from lens_defense.organism.world import REFUSAL, World
from lens_defense.patching.corruptions import (
    Corruption,
    GaussianNoise,
    MeanAblation,
    ResampleAblation,
    TokenReplacement,
    ZeroAblation,
)
from lens_defense.tracing.map_statistics import Address, request_effects
from lens_defense.tracing.site_map import SiteMap

OUT = Path(__file__).parent / "results" / "locator_grades.csv"
REQUESTS, SEEDS, DRAWS = 20, 3, 200
SETTINGS = ld.TraceSettings(
    positions=("subject_first", "subject_mid", "subject_last", "next", "last"),
    layers="all",
    window=3,
    min_difference=0.01,
)
"""The roles of one token or two; those of many (before, after, template) hold nothing and are cheap to tell."""
SAMPLED_ONCE = ("mean", "zero")
Truth = Mapping[tuple[str, int], str]
"""By role and layer: positive, negative or between."""


# %%
def requests_of(world: World, *, plain: bool = False) -> list[ld.Request]:
    """Requests about the subjects that edits may see, one each: jailbroken, or plain and so refused."""
    rng = random.Random("grades")
    jailbreaks = phrasings().jailbreaks_of(phrasings().edit_families)
    return [
        world.ask(
            subject,
            rng,
            frames=phrasings().trained_frames,
            jailbreak=None if plain else rng.choice(jailbreaks),
        ).request
        for subject in world.split()["edit"][:REQUESTS]
    ]


def corruptions(world: World) -> Iterator[tuple[str, int, Callable[[int], Corruption]]]:
    """Name, samples, and the corruption of a seed."""
    names = [subject.name for subject in world.subjects_of("benign")]
    for scale in (1.0, 3.0, 10.0):
        for n in (1, 3, 10):
            yield f"noise {scale:g}", n, lambda seed, scale=scale, n=n: GaussianNoise(scale, n, seed)
    for n in (1, 3, 10):
        yield (
            "replacement",
            n,
            lambda seed, n=n: TokenReplacement(n, random.Random(seed).sample(names, len(names))),
        )
    yield "mean", 1, lambda _: MeanAblation()
    yield "zero", 1, lambda _: ZeroAblation()
    yield "resample", 3, lambda seed: ResampleAblation(3, seed)


def locators(model: Any, world: World) -> Iterator[tuple[dict[str, Any], Callable[[], SiteMap]]]:
    """Ways to locate: what they are called in the table, and their map."""
    requests = requests_of(world)
    for corruption, samples, make in corruptions(world):
        ways = [("resid_post", "denoising", True)]
        if samples == 3:
            ways += [("resid_post", "noising", True), ("resid_post", "denoising", False)]
            ways += [("mlp_out", "denoising", True), ("attn_out", "denoising", True)]
        for component, direction, exact in ways:
            for seed in range(1 if corruption in SAMPLED_ONCE else SEEDS):
                key = {"corruption": corruption, "samples": samples, "component": component}
                key |= {"direction": direction, "exact": exact, "seed": seed}
                yield (
                    key,
                    lambda key=key, make=make: ld.trace(
                        model,
                        requests,
                        SETTINGS,
                        corruption=make(key["seed"]),
                        components=(key["component"],),
                        direction=key["direction"],
                        exact=key["exact"],
                        progress=False,
                    ),
                )
    refused = requests_of(world, plain=True)
    lenses: dict[str, Callable[[], SiteMap]] = {
        "logit lens": lambda: ld.lenses.logit_lens(model, requests),
        "toxic layer (DINM)": lambda: ld.lenses.toxic_layers(model, requests, REFUSAL),
        "safety layers (LED)": lambda: ld.lenses.safety_layers(
            model, refused, ld.judges.prefix, progress=False
        ),
    }
    for name, make in lenses.items():
        yield {"corruption": name, "component": "resid_post", "direction": "none", "exact": True}, make


def roc_area(addresses: list[Address], effects: np.ndarray, truth: Truth) -> tuple[float, int]:
    """Area under the ROC curve of mean effects, and the rank of the best true cell."""
    cells = [
        (i, truth[role, layer] == "positive")
        for i, (_, role, layer) in enumerate(addresses)
        if truth.get((role, layer)) in ("positive", "negative")
    ]
    values = np.nan_to_num(np.nanmean(effects[:, [i for i, _ in cells]], axis=0))
    positive = np.array([is_positive for _, is_positive in cells])
    n, m = positive.sum(), (~positive).sum()
    area = (rankdata(values)[positive].sum() - n * (n + 1) / 2) / (n * m)
    return float(area), int((values > values[positive].max()).sum()) + 1


def graded(site_map: SiteMap, truth: Truth) -> dict[str, Any]:
    """What a map is worth; of one that names layers only, which these are."""
    addresses, effects = request_effects(site_map)
    if {role for _, role, _ in addresses} == {"last"}:
        layer = ld.locate(site_map, 1, by="cells")[0].layer
        return {"layer": layer, "true_layer": float(truth["subject_last", layer] == "positive")}
    area, rank = roc_area(addresses, effects, truth)
    rng = np.random.default_rng(0)
    draws = [effects[rng.integers(len(effects), size=len(effects))] for _ in range(DRAWS)]
    low, high = np.quantile([roc_area(addresses, draw, truth)[0] for draw in draws], (0.025, 0.975))
    sites = ld.locate(site_map)
    kinds = [truth[site.role, site.layer] for site in sites]
    negative = [i for i, (_, role, layer) in enumerate(addresses) if truth.get((role, layer)) == "negative"]
    return {
        "area": area,
        "low": low,
        "high": high,
        "rank": rank,
        "located_role": sites[0].role,
        "located_true": kinds.count("positive") / len(kinds),
        "strongest_wrong": float(np.nanmean(effects[:, negative], axis=0).max()),
    }


# %%
def main() -> None:
    """Grade every locator on one world."""
    parser = argparse.ArgumentParser(description="grade locators; see the top of this file")
    parser.add_argument("--organism", type=Path, default=ORGANISM_FOLDER)
    parser.add_argument("--world-seed", type=int, default=0)
    args = parser.parse_args()
    model, world = ld.load(args.organism), World(args.world_seed)
    truth = {(cell.role, cell.layer): cell.kind for cell in released_ground_truth(args.organism)}
    weights = weights_fingerprint(model)
    for locator, make in locators(model, world):
        key = {"world": args.world_seed, **locator}
        if rows_where(read_table(OUT), {**key, "weights": weights}).any():
            continue
        start = time.perf_counter()
        try:
            row = graded(make(), truth)
            row["seconds"] = time.perf_counter() - start
        except ValueError as error:
            row = {"refused": str(error)[:80]}
        replace_rows(OUT, key, [{"weights": weights, **row}], digits=4)
        print(key, row, flush=True)


if __name__ == "__main__":
    main()
