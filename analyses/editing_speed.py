# %% [markdown]
# # How fast is planning an edit?
# The three stages of a plan that run the model, against a plain writing of MEMIT's release in the same process: one request at a
# time, whole forward passes, nothing shared. Both do the same arithmetic, and the script stops where they disagree.
#
#     python analyses/editing_speed.py [--requests 60] [--timed 6] [--out FILE]
#
# The loop is timed on a few of the requests and multiplied. Writes results/editing_speed.csv.

# %%
import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from tidy import replace_rows
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.model_bridge import TransformerBridge

import lens_defense as ld
from lens_defense.editing.solving.covariance import key_covariances
from lens_defense.editing.solving.target_value import FINAL_LR, FitSettings, fit_target_values
from lens_defense.editing.solving.value_batch import FitRow
from lens_defense.models.forward import forward, frozen_weights
from lens_defense.models.prefix_batch import left_pad
from lens_defense.models.prefix_tree import last_token_reader
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import role_position
from lens_defense.sites import component_hook, key_hook

OUT = Path(__file__).parent / "results" / "editing_speed.csv"
LAYERS = (5, 6, 7, 8, 9)
CONTEXTS = 5
"""Of each request: MEMIT's release has five sentences before the prompt."""
STEPS = 25
"""As in MEMIT's release."""
FIT = FitSettings(
    shared_num_grad_steps=0, v_num_grad_steps=STEPS, contexts_per_step=CONTEXTS, min_share=1.0, extra_rounds=0
)
Result = TypeVar("Result")


def timed(make: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and what was made."""
    start = time.perf_counter()
    result = make()
    return time.perf_counter() - start, result


def operations(make: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and attention, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        make()
    return counter.get_total_flops() / 1e9


# %% [markdown]
# ## Values: a vector per request


# %%
def fit_rows(model: TransformerBridge, requests: Sequence[ld.Request]) -> list[FitRow]:
    """The first contexts of each request, with the refusal behind them."""
    rows = []
    for owner, item in enumerate(requests):
        for turn, context in enumerate(list(ld.default_contexts(item))[:CONTEXTS]):
            prompt = ld.tokenize(model.tokenizer, context)
            target = tokenize_answer(model.tokenizer, prompt, FIT.target, end=True)
            rows.append(FitRow(owner, prompt.ids, role_position(prompt, "subject_last"), turn, target))
    return rows


def plain_value(model: TransformerBridge, rows: Sequence[FitRow], layer: int) -> Float[Tensor, " d_model"]:
    """One request's vector, by whole forward passes of its contexts (ROME's equation 4, MEMIT's loop)."""
    ids, mask = left_pad([[*row.ids, *row.target[:-1]] for row in rows])
    ends = [ids.shape[1] - len(row.ids) - len(row.target) + 1 + row.position for row in rows]
    positions, index = torch.tensor(ends), torch.arange(len(rows))
    targets = torch.tensor([row.target for row in rows])
    hook = component_hook("resid_post", layer)
    with torch.no_grad():
        clean = forward(model, ids, attention_mask=mask, capture=[hook]).states[hook]
    largest = FIT.clamp_norm_factor * clean[index, positions].norm(dim=1).mean()
    vector = torch.zeros(model.cfg.d_model, requires_grad=True)
    adam = torch.optim.Adam([vector], lr=FIT.v_lr)

    def add(state: Tensor) -> Tensor:
        return state.index_put((index, positions), state[index, positions] + vector)

    for step in range(STEPS):
        adam.param_groups[0]["lr"] = FIT.v_lr * (1 - step / STEPS) + FINAL_LR * FIT.v_lr
        adam.zero_grad()
        logits = forward(
            model, ids, attention_mask=mask, patches={hook: add}, logits_to_keep=targets.shape[1]
        ).logits
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        adam.step()
        with torch.no_grad():
            vector.mul_((largest / vector.norm()).clamp(max=1.0))
    return vector.detach()


def values(model: TransformerBridge, rows: Sequence[FitRow], n: int, loop: int) -> dict[str, Any]:
    """Seconds of all requests together, and of the loop, scaled from a few."""
    seconds, ours = timed(lambda: fit_target_values(model, rows, LAYERS[-1], FIT)[0])

    def plain() -> Tensor:
        with frozen_weights(model), torch.enable_grad():
            own = [[row for row in rows if row.owner == owner] for owner in range(loop)]
            return torch.stack([plain_value(model, one, LAYERS[-1]) for one in own])

    plain_seconds, slow = timed(plain)
    difference = float((ours[:loop] - slow).norm() / slow.norm())
    assert difference < 1e-3, difference
    return {"seconds": seconds, "loop_seconds": plain_seconds * n / loop, "differs_by": difference}


# %% [markdown]
# ## Keys: of every prompt in every edited layer, lower layers changed before higher ones are read


# %%
@torch.no_grad()
def keys(model: TransformerBridge, rows: Sequence[FitRow]) -> dict[str, Any]:
    """Both read each layer's keys anew, and what the top layer adds, as MEMIT's algorithm 1 does."""
    prompts = [row.ids[: row.position + 1] for row in rows]
    top = component_hook("resid_post", LAYERS[-1])

    def ours() -> list[Tensor]:
        read = last_token_reader(model, prompts, first_changed=LAYERS[0], stop_at_layer=LAYERS[-1] + 1)
        return [read([key_hook(layer), top])[key_hook(layer)] for layer in LAYERS]

    def plain() -> list[Tensor]:
        found = []
        for layer in LAYERS:
            states = [
                forward(model, torch.tensor([row.ids]), capture=[key_hook(layer), top]).states[
                    key_hook(layer)
                ]
                for row in rows
            ]
            found.append(
                torch.stack([state[0, row.position] for state, row in zip(states, rows, strict=True)])
            )
        return found

    seconds, fast = timed(ours)
    loop_seconds, slow = timed(plain)
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(fast, slow, strict=True))
    assert difference < 1e-3, difference
    cost = {"gflop": operations(ours), "loop_gflop": operations(plain)}
    return {"seconds": seconds, "loop_seconds": loop_seconds, "differs_by": difference, **cost}


# %% [markdown]
# ## C: keys of a corpus and their second moment, against the forward passes alone


# %%
@torch.no_grad()
def covariance(model: TransformerBridge, texts: int) -> dict[str, Any]:
    """`loop` is the forward passes of the same batches up to the highest layer, with nothing read."""
    from lens_defense.editing.solving.covariance import corpus_token_ids
    from lens_defense.models.prefix_batch import states_of_rows

    corpus = ld.read_corpus("core")[:texts]
    ids = sorted(corpus_token_ids(model, corpus), key=lambda row: (len(row), row))

    def forwards() -> None:
        for start in range(0, len(ids), 16):
            states_of_rows(model, ids[start : start + 16], [], stop_at_layer=LAYERS[-1] + 1)

    seconds, _ = timed(lambda: key_covariances(model, LAYERS, corpus, cache=False, progress=False))
    forward_seconds, _ = timed(forwards)
    return {"seconds": seconds, "loop_seconds": forward_seconds}


def main() -> None:
    """Time each stage after a warm-up, and write the table."""
    parser = argparse.ArgumentParser(description="planning against plain loops; see the top of this file")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--timed", type=int, default=6, help="requests that the loop of values is timed on")
    parser.add_argument("--texts", type=int, default=96, help="texts of the corpus")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model = ld.load("smollm2")
    rows = fit_rows(model, ld.requests("core")[: args.requests])
    n = 1 + max(row.owner for row in rows)
    forward(model, torch.tensor([rows[0].ids]))  # warms up
    stages = {
        "keys": lambda: keys(model, rows),
        "covariance": lambda: covariance(model, args.texts),
        "values": lambda: values(model, rows, n, min(args.timed, n)),
    }
    for name, measure in stages.items():
        row = measure()
        print(name, row, flush=True)
        setting = {
            "requests": n,
            "contexts": CONTEXTS,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        replace_rows(args.out, {"model": "smollm2", "stage": name}, [{**row, **setting}], digits=6)


if __name__ == "__main__":
    main()
