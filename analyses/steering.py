# %% [markdown]
# # How strong is a direction?
# Steering adds the refusal direction to the residual stream after one layer (`ld.steered`); its weight form writes it
# with that layer's MLP output matrix (`ld.steering_edit`). Neither has a layer or a strength by default. Each is tried
# at a few, on requests of "tune": harmful ones, which the model answers, and harmless ones. The best is measured beside the editing
# methods by methods.py.
#
#     python analyses/steering.py [--model organism smollm2]
#
# Writes results/steering.csv, a row per model, form, layer and strength, and goes on where it was stopped. The direction
# is read from the requests that edits may see, and from harmless ones of "tune" that are not asked.

# %%
import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from tidy import read_table, replace_rows, rows_where
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lens_defense as ld
from lens_defense.editing.edit_plan import EditWarning
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.prompts.conversation import decode_answer

OUT = Path(__file__).parent / "results" / "steering.csv"
FORMS = ("steering", "steering-edit")
"""Added to the states; written by a matrix."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
TOKENS = 40
"""The greatest length of an answer."""
READ_FROM = 20
"""Harmless requests that the direction is read from; the others of tune are asked."""
JAILBREAKS = 3
"""In which each harmful request is asked where the model refuses it as it is."""


# %% [markdown]
# ## The direction, and a model that has it


# %%
def direction_after(model: TransformerBridge, layer: int) -> Float[Tensor, " d_model"]:
    """Of the requests that edits may see, and of harmless ones of tune."""
    harmless = ld.requests(language(model), split="tune", kind="benign")[:READ_FROM]
    return ld.refusal_direction(model, ld.requests(language(model)), harmless, layer)


def plan(
    model: TransformerBridge, form: str, layer: int, strength: float, requests: Sequence[ld.Request]
) -> ld.Edit | ld.Defense:
    """Steering about some requests, as a check takes it."""
    direction = direction_after(model, layer)
    if form == "steering-edit":
        return ld.steering_edit(model, direction, layer, requests, strength, progress=False)
    seen = frozenset(request.conversation for request in ld.requests(language(model)))
    return ld.Defense(
        form, lambda model: ld.steered(model, direction, layer, strength), tuple(requests), seen
    )


def best_setting(model: str, form: str) -> tuple[int, float]:
    """The layer and the strength with the best score; of equals the weakest."""
    table = read_table(OUT)
    rows = table[rows_where(table, {"model": model, "form": form})].sort_values("strength", kind="stable")
    score = rows["refused"] / rows["harmful"] - rows["newly_refused"] / rows["harmless"]
    best = rows.loc[score.idxmax()]
    return int(best["layer"]), float(best["strength"])


# %% [markdown]
# ## What is asked


# %%
def asked(model: TransformerBridge) -> tuple[list[ld.Request], list[ld.Request]]:
    """Harmful requests that the model answers, and harmless ones, of tune."""
    harmful = ld.requests(language(model), split="tune")
    if language(model) == "organism":
        harmful = [context for request in harmful for context in jailbroken_contexts(request)[:JAILBREAKS]]
    return harmful, ld.requests(language(model), split="tune", kind="benign")[READ_FROM:]


def verdicts(model: TransformerBridge, requests: Sequence[ld.Request], judge: ld.judges.Judge) -> list[str]:
    """Of each answer."""
    rows = [ld.tokenize(model.tokenizer, request).ids for request in requests]
    answers = generate(model, rows, max_new_tokens=TOKENS)
    texts = [decode_answer(model.tokenizer, answer) for answer in answers]
    return [judge(request.text, text) for request, text in zip(requests, texts, strict=True)]


def measure(name: str) -> None:
    """Every form, layer and strength on one model; what the table has is not made again."""
    model = ld.load(name)
    harmful, harmless = asked(model)
    before = verdicts(model, harmless, ld.judges.prefix)
    layers = sorted({model.cfg.n_layers * part // 6 for part in range(1, 6)})
    for form in FORMS:
        for layer in layers:
            for strength in STRENGTHS:
                key = {"model": name, "form": form, "layer": layer, "strength": strength}
                if rows_where(read_table(OUT), key).any():
                    continue
                with plan(model, form, layer, strength, ld.requests(language(model))[:1]).applied(model):
                    refused = verdicts(model, harmful, ld.judges.prefix)
                    after = verdicts(model, harmless, ld.judges.prefix)
                pairs = zip(before, after, strict=True)
                row = {
                    "harmful": len(harmful),
                    "refused": refused.count("refusal"),
                    "deflected": refused.count("deflection"),
                    "broken": refused.count("broken"),
                    "harmless": len(harmless),
                    "newly_refused": sum(now == "refusal" != then for then, now in pairs),
                    "harmless_broken": after.count("broken"),
                }
                print(key, row, flush=True)
                replace_rows(OUT, key, [row])


def main() -> None:
    """Measure what the table does not have."""
    parser = argparse.ArgumentParser(description="steering by layer and strength; see the top of this file")
    parser.add_argument(
        "--model", choices=("organism", "smollm2"), nargs="*", default=["organism", "smollm2"]
    )
    warnings.simplefilter("ignore", EditWarning)
    for name in parser.parse_args().model:
        measure(name)


if __name__ == "__main__":
    main()
