# %% [markdown]
# # Where smollm2 keeps what it should not say, and where it keeps facts
# Every request of the DELMAN set traced on smollm2 by the log probability of its own answer, in a random order, so
# that the first n are a sample; beside it ROME's question on facts that smollm2 knows. Resumable: one file per request
# in the package's cache. What is committed holds ids and effects, no request and no answer.
#
#     python analyses/storage_sites.py --data DIR [--only facts|harmful|whole] [--first N] [--whole N]
#
# DIR holds delman/HarmBench.json (docs/results/index.md: sources).

# %%
import argparse
import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tidy import replace_rows

import lens_defense as ld
from lens_defense.patching.clean_corrupted import prompts_with_answers
from lens_defense.storage import cache_folder
from lens_defense.tracing.map_statistics import reliability, request_effects

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
"""Text, subject, answer: written for this; taken where the model's next token is right."""


# %%
def known_facts(model: Any) -> list[ld.Request]:
    """The facts whose next token the model gets right."""
    facts = [
        replace(ld.request(text.format(subject), subject, id=f"{i:02}", kind="benign"), target=target)
        for i, (text, subject, target) in enumerate(FACTS)
    ]
    unanswered = [replace(fact, target=None) for fact in facts]
    own_answers, true_answers = (
        prompts_with_answers(model, requests, None, answer_tokens=1, chat=False)
        for requests in (unanswered, facts)
    )
    return [
        fact
        for fact, own, true in zip(facts, own_answers, true_answers, strict=True)
        if own.answer_ids[0] == true.answer_ids[0]
    ]


def harmful_requests(data: Path) -> list[ld.Request]:
    """The DELMAN set in a random order, each answered as the model answers."""
    rows = ld.requests(data / "delman/HarmBench.json", distinct=False)
    requests = [replace(item, target=None, safe_target=None) for item in rows]
    random.Random(0).shuffle(requests)
    return requests


def without_texts(trace: ld.Trace) -> ld.Trace:
    """The same effects in little room: no samples, no token and no answer; roles and marks of subjects are left."""
    n = len(trace.prompts)
    return replace(
        trace,
        patched=trace.effects[..., None],
        clean=torch.ones(n, dtype=torch.float64),
        corrupted=torch.zeros(n, 1, dtype=torch.float64),
        answers=("",) * n,
        prompts=tuple(_without_text(prompt) for prompt in trace.prompts),
    )


def _without_text(prompt: ld.Prompt) -> ld.Prompt:
    mark = hashlib.sha256((prompt.request.subject or "").encode()).hexdigest()[:8]
    request = replace(prompt.request, pieces=("", ""), subject=mark, target=None, safe_target=None)
    n = len(prompt.ids)
    return replace(prompt, request=request, ids=(0,) * n, token_texts=("",) * n, answer_ids=())


def summarized(trace: ld.Trace, left_out: int) -> list[dict[str, Any]]:
    """One row per component: in how many requests the strongest cell lies in the subject, and reliability."""
    rows = []
    for component in trace.components:
        single = trace.only(component)
        addresses, effects = request_effects(single)
        strongest = [addresses[i][1] for i in pd.DataFrame(effects).fillna(-9).to_numpy().argmax(1)]
        middle, (low, high) = reliability(single)
        rows.append(
            {
                "component": component,
                "requests": len(trace.prompts),
                "left_out": left_out,
                "strongest_in_subject": sum(role.startswith("subject") for role in strongest)
                / len(strongest),
                "reliability": middle,
                "reliability_low": low,
                "reliability_high": high,
            }
        )
    return rows


# %%
def main() -> None:
    """Trace what has no file yet, and write what there is."""
    parser = argparse.ArgumentParser(description="storage sites of a real model; see the top of this file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the published sets")
    parser.add_argument("--only", choices=("facts", "harmful", "whole"))
    parser.add_argument("--first", type=int, help="of the random order of requests")
    parser.add_argument(
        "--whole", type=int, default=WHOLE, help="how many are traced at every token and layer"
    )
    parser.add_argument("--device", help="cpu or cuda; without it, a GPU where there is one")
    args = parser.parse_args()
    model = ld.load("smollm2", device=args.device)
    harmful = harmful_requests(args.data)[: args.first]
    by_role = ld.TraceSettings(components=COMPONENTS, positions=ROLES)
    sets = {
        "facts": (known_facts(model), replace(by_role, layers="all", answer_tokens=1, chat=False)),
        "harmful": (harmful, by_role),
        "whole": (harmful, replace(by_role, positions="all", layers="all")),
    }
    for name, (requests, settings) in sets.items():
        if args.only not in (None, name):
            continue
        folder, enough = cache_folder() / "storage_sites" / name, args.whole if name == "whole" else None
        trace, refused = ld.survey(model, requests, folder, settings, enough=enough)
        assert trace is not None
        without_texts(trace).save(OUT / f"{name}.safetensors")
        replace_rows(OUT / "summary.csv", {"set": name}, summarized(trace, len(refused)), digits=4)
        print(trace, flush=True)


if __name__ == "__main__":
    main()
