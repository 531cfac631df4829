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
from tune import traced

import lens_defense as ld
from lens_defense.checking.judges import prefix
from lens_defense.editing.edit import REFUSAL
from lens_defense.statistics import rank_correlation
from lens_defense.storage import atomic_write
from lens_defense.tracing.corruptions import ablation
from lens_defense.tracing.lenses import logit_lens, safety_layers, toxic_layers
from lens_defense.tracing.map_statistics import agreement, request_effects

OUT = Path(__file__).parent / "results" / "locator_agreement.csv"


# %%
def methods(model: Any, asked: list[ld.Request]) -> dict[str, Callable[[], ld.Trace]]:
    """Ways to locate, by what they are called; the first is the default."""

    def mapped(**settings: Any) -> Callable[[], ld.Trace]:
        return lambda: ld.trace(model, asked, progress=False, **{"floor": 0.01, **settings})

    return {
        "noise 3": mapped(),
        "noise 3, another seed": mapped(seed=1),
        "noise 1": mapped(corruption=ld.noise(model, scale=1.0)),
        "noise 10": mapped(corruption=ld.noise(model, scale=10.0)),
        "replacement": mapped(corruption=ld.replacement(model)),
        "mean ablation": mapped(corruption=ablation(model, "mean")),
        "noise 3, noising": mapped(direction="noising"),
        "replacement, noising": mapped(corruption=ld.replacement(model), direction="noising"),
        "noise 3, gradient screen": mapped(exact=False),
        "replacement, gradient screen": mapped(corruption=ld.replacement(model), exact=False),
        "logit lens": lambda: logit_lens(model, asked),
        "toxic layer (DINM)": lambda: toxic_layers(model, asked, REFUSAL),
        "safety layers (LED)": lambda: safety_layers(model, asked, prefix, progress=False),
    }


def means(trace: ld.Trace) -> dict[tuple[str, int], float]:
    """Mean effects by role and layer."""
    addresses, effects = request_effects(trace)
    return {
        (role, layer): float(v) for (_, role, layer), v in zip(addresses, np.nanmean(effects, 0), strict=True)
    }


# %%
model = ld.load("smollm2")
asked = traced()
rows: list[dict[str, Any]] = []
reference: dict[tuple[str, int], float] = {}
exact: dict[str, ld.Trace] = {}
for name, make in methods(model, asked).items():
    start = time.perf_counter()
    try:
        told = make()
    except ValueError as error:
        rows.append({"way": name, "refused": str(error)[:90]})
        print(rows[-1], flush=True)
        continue
    effects = means(told)
    reference = reference or effects
    shared = sorted(set(effects) & set(reference))
    role, layer = max(effects, key=lambda key: effects[key])
    row: dict[str, Any] = {
        "way": name,
        "requests": len(told.prompts),
        "strongest role": role,
        "strongest layer": layer,
    }
    if len({role for role, _ in effects}) > 1:
        sites = ld.locate(told)
        row |= {"located": f"{sites[0].role} {sites[0].layer} to {sites[-1].layer}"}
        rho, (low, high) = rank_correlation([effects[k] for k in shared], [reference[k] for k in shared])
        row |= {"cells": len(shared), "rho": rho, "low": low, "high": high}
    if (measured := exact.get(name.removesuffix(", gradient screen"))) is not None:
        row["rho of single cells"], row["recall@10"] = agreement(told, measured, k=10)
    exact[name] = told
    rows.append({**row, "seconds": time.perf_counter() - start})
    print(rows[-1], flush=True)
with atomic_write(OUT) as file:
    pd.DataFrame(rows).convert_dtypes().round(3).to_csv(file, index=False)
