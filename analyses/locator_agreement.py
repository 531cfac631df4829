# %% [markdown]
# # Do locators agree on a real model?
# The same requests of smollm2 mapped by each corruption and direction, by the gradient screen, by the logit lens, and
# by DINM's and LED's layers. There is no truth here (analyses/locator_grades.py has one): the table says where each
# points, and how its map ranks the cells of the default one (Spearman's rho over mean cells, 95% interval). An estimate
# by gradient stands beside the exact map that it estimates: rho over all single cells, and recall@10.
#
#     python analyses/locator_agreement.py

# %%
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tune import traced_requests

import lens_defense as ld
from lens_defense.editing.solving.target_value import REFUSAL
from lens_defense.patching.corruptions import GaussianNoise, MeanAblation, TokenReplacement
from lens_defense.statistics import rank_correlation
from lens_defense.storage import atomic_write
from lens_defense.tracing.map_statistics import agreement, request_effects
from lens_defense.tracing.site_map import SiteMap

OUT = Path(__file__).parent / "results" / "locator_agreement.csv"


# %%
def locators(model: Any, requests: list[ld.Request]) -> dict[str, Callable[[], SiteMap]]:
    """Ways to locate, by what they are called; the first is the default."""

    def traced(**settings: Any) -> Callable[[], ld.Trace]:
        return lambda: ld.trace(model, requests, progress=False, min_difference=0.01, **settings)

    return {
        "noise 3": traced(),
        "noise 3, another seed": traced(corruption=GaussianNoise(seed=1)),
        "noise 1": traced(corruption=GaussianNoise(scale=1.0)),
        "noise 10": traced(corruption=GaussianNoise(scale=10.0)),
        "replacement": traced(corruption=TokenReplacement()),
        "mean ablation": traced(corruption=MeanAblation()),
        "noise 3, noising": traced(direction="noising"),
        "replacement, noising": traced(corruption=TokenReplacement(), direction="noising"),
        "noise 3, gradient screen": traced(exact=False),
        "replacement, gradient screen": traced(corruption=TokenReplacement(), exact=False),
        "logit lens": lambda: ld.lenses.logit_lens(model, requests),
        "toxic layer (DINM)": lambda: ld.lenses.toxic_layers(model, requests, REFUSAL),
        "safety layers (LED)": lambda: ld.lenses.safety_layers(
            model, requests, ld.judges.prefix, progress=False
        ),
    }


def mean_effects(site_map: SiteMap) -> dict[tuple[str, int], float]:
    """Mean effects by role and layer."""
    addresses, effects = request_effects(site_map)
    means = np.nanmean(effects, 0)
    return {(role, layer): float(mean) for (_, role, layer), mean in zip(addresses, means, strict=True)}


# %%
model = ld.load("smollm2")
rows: list[dict[str, Any]] = []
maps: dict[str, SiteMap] = {}
for name, make in locators(model, traced_requests()).items():
    start = time.perf_counter()
    try:
        site_map = maps[name] = make()
    except ValueError as error:
        rows.append({"way": name, "refused": str(error)[:90]})
        continue
    effects, reference = mean_effects(site_map), mean_effects(maps["noise 3"])
    role, layer = max(effects, key=lambda key: effects[key])
    row: dict[str, Any] = {"way": name, "requests": len(site_map.prompts)}
    row |= {"strongest_role": role, "strongest_layer": layer}
    if len({role for role, _ in effects}) > 1:
        sites = ld.locate(site_map)
        shared = sorted(set(effects) & set(reference))
        rho, (low, high) = rank_correlation([effects[k] for k in shared], [reference[k] for k in shared])
        row |= {"located_role": sites[0].role, "first_layer": sites[0].layer, "last_layer": sites[-1].layer}
        row |= {"cells": len(shared), "rho": rho, "low": low, "high": high}
    measured = maps.get(name.removesuffix(", gradient screen"))
    if measured is not None and measured is not site_map:
        row["rho_of_single_cells"], row["recall_at_10"] = agreement(site_map, measured, k=10)
    rows.append({**row, "seconds": time.perf_counter() - start})
    print(rows[-1], flush=True)
with atomic_write(OUT) as file:
    pd.DataFrame(rows).convert_dtypes().round(3).to_csv(file, index=False)
