# %% [markdown]
# # Where smollm2 keeps what it should not say, and where it keeps facts
# Every request of the DELMAN set traced on smollm2 by the log probability of its own answer, in a random order, so
# that the first n are a sample; beside it ROME's question on facts that smollm2 knows. Resumable: a file a request
# in the package's cache. What is committed holds ids and effects, no request and no answer.
#
#     python analyses/storage_sites.py --data DIR [--only facts|roles|whole] [--first N] [--whole N]
#
# DIR holds delman/HarmBench.json (README: sources).

# %%
import argparse
import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lens_defense as ld
from lens_defense.storage import atomic_write, cache_folder
from lens_defense.tracing.clean_corrupted import answered
from lens_defense.tracing.map_statistics import reliability, request_effects
from lens_defense.tracing.survey import survey

OUT = Path(__file__).parent / "results" / "storage_sites"
COMPONENTS = ("resid_post", "mlp_out", "attn_out")
ROLES = ("subject_first", "subject_mid", "subject_last", "next", "last")
WHOLE = 10
"""Requests that are traced at every token and layer: the first that can be traced at all."""
FACTS = (
    ("The capital of {} is", "France", "Paris"),
    ("The capital of {} is", "Japan", "Tokyo"),
    ("The capital of {} is", "Italy", "Rome"),
    ("The capital of {} is", "Germany", "Berlin"),
    ("The capital of {} is", "Greece", "Athens"),
    ("The capital of {} is", "Portugal", "Lisbon"),
    ("The capital of {} is", "Austria", "Vienna"),
    ("The capital of {} is", "Hungary", "Budapest"),
    ("The capital of {} is", "Poland", "Warsaw"),
    ("The capital of {} is", "Norway", "Oslo"),
    ("The capital of {} is", "Sweden", "Stockholm"),
    ("The capital of {} is", "Russia", "Moscow"),
    ("The capital of {} is", "China", "Beijing"),
    ("The capital of {} is", "Kenya", "Nairobi"),
    ("The capital of {} is", "Cuba", "Havana"),
    ("The capital of {} is", "Ireland", "Dublin"),
    ("The capital of {} is", "England", "London"),
    ("The capital of {} is", "Peru", "Lima"),
    ("The city of {} lies in the country of", "Munich", "Germany"),
    ("The city of {} lies in the country of", "Milan", "Italy"),
    ("The city of {} lies in the country of", "Marseille", "France"),
    ("The city of {} lies in the country of", "Mumbai", "India"),
    ("The city of {} lies in the country of", "Shanghai", "China"),
    ("The city of {} lies in the country of", "Vancouver", "Canada"),
    ("The city of {} lies in the country of", "Osaka", "Japan"),
    ("The city of {} lies in the country of", "Hamburg", "Germany"),
    ("The city of {} lies in the country of", "Naples", "Italy"),
    ("The city of {} lies in the country of", "Toronto", "Canada"),
    ("The city of {} lies in the country of", "Liverpool", "England"),
    ("The chemical symbol of {} is", "hydrogen", "H"),
    ("The chemical symbol of {} is", "oxygen", "O"),
    ("The play {} was written by William", "Romeo and Juliet", "Shakespeare"),
    ("The company {} makes a phone called the", "Apple", "iPhone"),
    ("The young of a {} is called a", "cat", "kitten"),
    ("The opposite of {} is", "hot", "cold"),
    ("A baby {} is called a", "cow", "calf"),
    ("The first president of the {} was George", "United States", "Washington"),
)
"""Written for this; kept where the model's next token is right."""


# %%
def known(model: Any) -> list[ld.Request]:
    """The facts whose next token the model gets right."""
    asked = [
        replace(ld.request(text.format(subject), subject, id=f"{i:02}", kind="benign"), target=target)
        for i, (text, subject, target) in enumerate(FACTS)
    ]
    own = answered(model, [replace(item, target=None) for item in asked], None, 1, False)
    wanted = answered(model, asked, None, 1, False)
    return [item for item, a, b in zip(asked, own, wanted, strict=True) if a.answer[0] == b.answer[0]]


def harmful(data: Path) -> list[ld.Request]:
    """The DELMAN set in a random order, each answered as the model answers."""
    every = ld.requests(data / "delman/HarmBench.json", distinct=False)
    rows = [replace(item, target=None, safe_target=None) for item in every]
    random.Random(0).shuffle(rows)
    return rows


def lean(trace: ld.Trace) -> ld.Trace:
    """The same effects in little room: no samples, no text of an answer."""
    n = len(trace.prompts)
    return replace(
        trace,
        patched=trace.effects[..., None],
        clean=torch.ones(n, dtype=torch.float64),
        corrupted=torch.zeros(n, 1, dtype=torch.float64),
        answers=("",) * n,
        prompts=tuple(_nameless(met) for met in trace.prompts),
    )


def _nameless(met: ld.Prompt) -> ld.Prompt:
    """A prompt without its words: roles, an id and a mark of its subject are left."""
    mark = hashlib.sha256((met.request.subject or "").encode()).hexdigest()[:8]
    asked = replace(met.request, pieces=("", ""), subject=mark, target=None, safe_target=None)
    return replace(
        met, request=asked, ids=(0,) * len(met.ids), token_texts=("",) * len(met.token_texts), answer_ids=()
    )


def told(trace: ld.Trace, name: str, left_out: int) -> dict[str, Any]:
    """What a set of maps says in numbers."""
    row: dict[str, Any] = {
        "set": name,
        "requests": len(trace.prompts),
        "left out": left_out,
    }
    for component in trace.components:
        one = trace.only(component)
        addresses, effects = request_effects(one)
        best = [addresses[i][1] for i in pd.DataFrame(effects).fillna(-9).to_numpy().argmax(1)]
        row[f"{component}: strongest in the subject"] = sum(r.startswith("subject") for r in best) / len(best)
        if len(set(one.subject_spans)) >= 4:  # fewer make no halves
            middle, (low, high) = reliability(one)
            row[f"{component}: reliability"] = middle
            row[f"{component}: reliability low"], row[f"{component}: reliability high"] = low, high
    return row


# %%
def main() -> None:
    """Trace what has no file yet, and write what there is."""
    asked = argparse.ArgumentParser(description="storage sites of a real model; see the top of this file")
    asked.add_argument("--data", type=Path, required=True, help="folder of the published sets")
    asked.add_argument("--only", choices=("facts", "roles", "whole"))
    asked.add_argument("--first", type=int, help="of the random order of requests")
    asked.add_argument(
        "--whole", type=int, default=WHOLE, help="how many are traced at every token and layer"
    )
    asked.add_argument("--device", help="cpu or cuda; without it, a GPU where there is one")
    given = asked.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    model, kept = ld.load("smollm2", device=given.device), cache_folder() / "storage_sites"
    some = harmful(given.data)[: given.first]
    by_role = {"positions": ROLES, "components": COMPONENTS}
    pieces: dict[str, tuple[list[ld.Request], dict[str, Any]]] = {
        "facts": (known(model), {**by_role, "layers": "all", "answer_tokens": 1, "chat": False}),
        "roles": (some, by_role),
        "whole": (some, {"positions": "all", "components": COMPONENTS, "layers": "all"}),
    }
    for name, (requests, settings) in pieces.items():
        if given.only not in (None, name):
            continue
        enough = given.whole if name == "whole" else None
        trace, refused = survey(model, requests, kept / name, enough=enough, **settings)
        assert trace is not None
        lean(trace).save(OUT / f"{name}.safetensors")
        row = told(trace, name, len(refused))
        with atomic_write(OUT / f"{name}.csv") as file:
            pd.DataFrame([row]).round(4).T.to_csv(file, header=False)
        print(row, flush=True)


if __name__ == "__main__":
    main()
