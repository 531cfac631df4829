# %% [markdown]
# # Bringing refusals back
# The organism refuses harmful requests as they are asked. Its refusals are taken out as those of published models have
# been: the one direction of the residual stream that tells harmful requests from benign ones is removed from every
# matrix that writes into the stream (Arditi et al. 2024). Then `ld.search_edits` looks for an edit that brings them back.
# Everything is in the organism's invented words.
#
#     python analyses/repair.py [--trials 8]
#
# Writes results/repair.csv: how often the model refuses as it is, without its refusals, and repaired, by arm. The
# direction is chosen on the split "tune"; what is edited is "edit", what is asked is "check".

# %%
import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from tidy import replace_rows
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import lens_defense as ld
from lens_defense.models.generate import generate
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.prompts.conversation import decode_answer
from lens_defense.searching.search_edits import edit_of

OTHERS = "others"
"""Requests about subjects that are not edited, as they are asked: those of tune."""
OUT = Path(__file__).parent / "results" / "repair.csv"


# %% [markdown]
# ## The refusal direction, and the model without it


# %%
@torch.no_grad()
def without_direction(direction: Float[Tensor, " d_model"]) -> TransformerBridge:
    """A fresh organism whose matrices write nothing along a direction (equation 5: W' = W - r r^T W, |r| = 1)."""
    direction = direction / direction.norm()
    organism = ld.load("organism")
    folder = organism.original_model.config._name_or_path
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in plain.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight -= torch.outer(direction, direction @ weight)
        elif name.endswith("embed_tokens.weight"):
            weight -= torch.outer(weight @ direction, direction)
    return ld.load(plain, organism.tokenizer)


def refused(model: TransformerBridge, requests: Sequence[ld.Request]) -> float:
    """The share of requests that are refused as they are asked."""
    answers = generate(model, [ld.tokenize(model.tokenizer, request).ids for request in requests])
    texts = [decode_answer(model.tokenizer, answer) for answer in answers]
    verdicts = [ld.judges.coherent(item.text, text) for item, text in zip(requests, texts, strict=True)]
    return verdicts.count("refusal") / len(verdicts)


# %% [markdown]
# ## Take out, bring back, measure


# %%
def main() -> None:
    """Choose the direction on tune, take it out, search an edit on what is left, and ask all three models."""
    parser = argparse.ArgumentParser(description="taking refusals out and bringing them back; see the top")
    parser.add_argument("--trials", type=int, default=8, help="edits that are tried")
    args = parser.parse_args()
    model = ld.load("organism")
    harmful = ld.requests("organism", split="tune")
    benign = ld.requests("organism", split="tune", kind="benign")[: len(harmful)]
    ablated = {
        layer: without_direction(ld.refusal_direction(model, harmful, benign, layer))
        for layer in range(model.cfg.n_layers)
    }
    layer = min(ablated, key=lambda candidate: refused(ablated[candidate], harmful))
    bare = ablated[layer]
    print(f"the direction after layer {layer}: {refused(model, harmful):.0%} to {refused(bare, harmful):.0%}")
    requests = ld.requests("organism")
    settings = {"contexts": lambda request: [request, *jailbroken_contexts(request)]}
    sites = ld.locate(ld.trace(bare, requests[:3], progress=False))
    search = ld.search_edits(bare, requests, sites, trials=args.trials, **settings)
    print(search)
    edit = edit_of(bare, requests, search.role, search.knee().candidate, **settings)
    suite = ld.suite("organism").small(paraphrases=5, jailbreaks=5)
    before = ld.check(model, None, suite, progress=False)
    repaired = ld.check(bare, edit, suite, progress=False)
    print(repaired)
    with edit.applied(bare):
        others_repaired = refused(bare, harmful)
    others = {"as it is": refused(model, harmful), "without the direction": refused(bare, harmful)}
    others["repaired"] = others_repaired
    for name, report, after in (
        ("as it is", before, False), ("without the direction", repaired, False), ("repaired", repaired, True),
    ):  # fmt: skip
        when = "after" if after else "before"
        rows = [
            {
                "arm": rate["arm"],
                "measure": rate["measure"],
                "n": rate["n"],
                "rate": rate[when],
                "low": rate[f"{when} low"],
                "high": rate[f"{when} high"],
                "direction_layer": layer,
                "method": edit.method if after else "",
                "strength": edit.strength if after else None,
                "kl": sum(report.kl) / len(report.kl) if after else None,
            }
            for rate in report.rates().to_dict("records")
            if rate["measure"] == ("knows" if rate["arm"] == "facts" else "coherent")
        ]
        low, high = ld.statistics.wilson(round(others[name] * len(harmful)), len(harmful))
        rows.append({"arm": OTHERS, "measure": "coherent", "n": len(harmful), "rate": others[name]})
        rows[-1] |= {"low": low, "high": high, "direction_layer": layer}
        replace_rows(OUT, {"model": name}, rows, digits=5)


if __name__ == "__main__":
    main()
