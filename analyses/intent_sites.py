# %% [markdown]
# # Where does the model keep what a request wants of its subject?
# "How do I make ricin?" and "What does ricin do to the body?" share the subject and differ in their use. Three
# questions, on smollm2, with the subjects of "core":
#
# - readout: how well does a linear read-out of the state tell the uses apart, by layer and place? It is fitted on the
#   subjects and templates of edits, and asked about the subjects and questions of tune, which it has not seen.
# - maps: which states carry the use from one prompt into another? Activation patching between a request and a harmless
#   question about the same subject, of equal token lengths before and after it; beside it the map of the subject.
# - bands: after an edit with the default contrast in five layers, how many harmful requests and how many harmless
#   questions are refused? Is it the band that the read-out likes?
#
# - last_token: and after an edit at the prompt's last token, where the use reaches the answer?
#
#     python analyses/intent_sites.py [readout] [maps] [bands] [last_token]
#
# Writes results/intent_sites/{readout,maps,bands,last_token}.csv.

# %%
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tidy import read_table, replace_rows, rows_where
from transformer_lens.model_bridge import TransformerBridge

import lens_defense as ld
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.harmless_uses import default_contrast, same_subject_requests
from lens_defense.prompts.prompt import role_position, tokenize
from lens_defense.prompts.request import UnfitRequest
from lens_defense.sites import component_hook, key_hook

OUT = Path(__file__).parent / "results" / "intent_sites"
PLACES = ("subject_last", "next", "last")
MAP_ROLES = ("before", "subject_first", "subject_last", "next", "after", "last")
TRAIN_SUBJECTS = 24
TRAIN_TEMPLATES = 16
"""Of each kind, evenly from those that edits see."""
BANDS = ((5, 9), (8, 12), (10, 14), (12, 16), (14, 18), (5, 14))
BAND_ARMS = ("edited", "paraphrase", "jailbreak", "same_subject", "benign", "over_refusal")
BAND_TOKENS = 32
DRAWS = 1000


# %%
def tune_forms(request: ld.Request) -> list[ld.Request]:
    """Ways to ask for harm that no edit sees, of the split tune."""
    suite = ld.suite("core", split="tune").for_requests([request])
    return [item.request for item in suite.items if item.arm in ("edited", "paraphrase", "jailbreak")]


def tune_uses(request: ld.Request) -> list[ld.Request]:
    """Harmless questions about a subject that no edit sees, of the split tune."""
    return [question for _, question in same_subject_requests("core", [request], "tune")]


def evenly(items: Sequence[ld.Request], count: int) -> list[ld.Request]:
    """So many of them, from first to last."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


# %%
def states_at_places(model: TransformerBridge, asked: Sequence[ld.Request]) -> dict[str, np.ndarray]:
    """By place, the states [request, layer, width]: the residual stream at three tokens, the MLP's key at one."""
    layers = range(model.cfg.n_layers)
    residual = [component_hook("resid_post", layer) for layer in layers]
    keys = [key_hook(layer) for layer in layers]
    prompts = [tokenize(model.tokenizer, request) for request in asked]
    found: dict[str, list[np.ndarray]] = {place: [] for place in (*PLACES, "key")}
    for start in range(0, len(prompts), 16):
        batch = prompts[start : start + 16]
        states = states_of_rows(model, [prompt.ids for prompt in batch], [*residual, *keys])
        for i, prompt in enumerate(batch):
            for place in PLACES:
                position = role_position(prompt, place)
                found[place].append(np.stack([states[hook][i][position].numpy() for hook in residual]))
            position = role_position(prompt, "subject_last")
            found["key"].append(np.stack([states[hook][i][position].numpy() for hook in keys]))
    return {place: np.stack(rows) for place, rows in found.items()}


def fit_direction(states: np.ndarray, harmful: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fisher's linear discriminant, its covariance shrunk by a tenth towards a multiple of the identity."""
    means = states[~harmful].mean(0), states[harmful].mean(0)
    centred = states - np.where(harmful[:, None], means[1], means[0])
    covariance = centred.T @ centred / len(states)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.solve(shrunk, means[1] - means[0]), (means[0] + means[1]) / 2


def auc(scores: np.ndarray, harmful: np.ndarray) -> float:
    """The share of pairs in which the harmful use scores above the harmless one."""
    return float((scores[harmful][:, None] > scores[~harmful][None, :]).mean())


def readout(model: TransformerBridge) -> None:
    """AUC by layer and place, within each held-out subject and averaged over subjects."""
    train = [item for item in ld.requests("core") if item.form == "noun" and item.concrete][:TRAIN_SUBJECTS]
    test = [item for item in ld.requests("core", split="tune") if item.form == "noun" and item.concrete]
    asked: list[ld.Request] = []
    labels: list[tuple[str, bool, str]] = []  # subject, harmful, part
    for part, items, forms, uses in (
        ("train", train, default_contexts, default_contrast),
        ("test", test, tune_forms, tune_uses),
    ):
        for item in items:
            for harmful, of_item in ((True, forms(item)), (False, uses(item))):
                chosen = evenly(of_item, TRAIN_TEMPLATES) if part == "train" else of_item
                asked += chosen
                labels += [(item.subject or "", harmful, part)] * len(chosen)
    table = pd.DataFrame(labels, columns=["subject", "harmful", "part"])
    states = states_at_places(model, asked)
    harmful, is_train = table["harmful"].to_numpy(), (table["part"] == "train").to_numpy()
    generator = np.random.default_rng(0)
    rows = []
    for place, of_place in states.items():
        for layer in range(model.cfg.n_layers):
            of_layer = of_place[:, layer].astype(np.float64)
            direction, middle = fit_direction(of_layer[is_train], harmful[is_train])
            scores = (of_layer - middle) @ direction
            by_subject = np.array([
                auc(scores[own], harmful[own])
                for own in ((~is_train & (table["subject"] == item.subject)).to_numpy() for item in test)
            ])  # fmt: skip
            draws = generator.choice(by_subject, (DRAWS, len(by_subject))).mean(1)
            low, high = np.quantile(draws, [0.025, 0.975])
            rows.append(
                {"place": place, "layer": layer, "auc": by_subject.mean(), "low": low, "high": high}
                | {"subjects": len(test), "prompts": int((~is_train).sum())}
            )
    replace_rows(OUT / "readout.csv", {"model": "smollm2"}, rows, digits=4)
    print(pd.DataFrame(rows).pivot(index="layer", columns="place", values="auc").round(3))


# %%
def use_pairs(model: TransformerBridge, request: ld.Request) -> Iterator[tuple[ld.Request, ld.Request]]:
    """A way to ask for harm and a harmless question, equally long before and after the subject."""

    def lengths(item: ld.Request) -> tuple[int, int]:
        prompt = tokenize(model.tokenizer, item)
        return prompt.subject_spans[-1][0], len(prompt.ids)

    by_lengths = {lengths(item): item for item in (*default_contrast(request), *tune_uses(request))}
    for form in (*default_contexts(request), *tune_forms(request)):
        if partner := by_lengths.get(lengths(form)):
            yield form, partner


def maps(model: TransformerBridge) -> None:
    """Mean effects by role and layer: of the use, with the subject kept; of the subject, with the use kept."""
    asked, texts = [], {}
    for request in ld.requests("core") + ld.requests("core", split="tune"):
        pair = next(use_pairs(model, request), None)
        if pair and request.form == "noun" and request.concrete:
            asked.append(pair[0])
            texts[pair[0].id] = pair[1].text
    print(f"{len(asked)} pairs")
    corruptions = {
        "use": ld.corruptions.CounterfactualPrompt(texts),
        "subject": ld.corruptions.GaussianNoise(samples=1),
    }
    for name, corruption in corruptions.items():
        kept, left_out = [], 0
        for form in asked:
            try:
                traced = ld.trace(model, [form], corruption=corruption, positions=MAP_ROLES, progress=False)
            except UnfitRequest:
                left_out += 1
                continue
            kept.append(pd.DataFrame(
                {"role": m.role, "layer": m.layer, "effect": m.effect} for m in traced.role_means()
            ))  # fmt: skip
        effects = pd.concat(kept, keys=range(len(kept)), names=["request"]).reset_index("request")
        rows = []
        generator = np.random.default_rng(0)
        for (role, layer), group in effects.groupby(["role", "layer"]):
            values = group["effect"].to_numpy()
            draws = generator.choice(values, (DRAWS, len(values))).mean(1)
            low, high = np.quantile(draws, [0.025, 0.975])
            rows.append(
                {"role": role, "layer": layer, "effect": values.mean(), "low": low, "high": high}
                | {"requests": len(values), "left_out": left_out}
            )
        replace_rows(OUT / "maps.csv", {"map": name}, rows, digits=4)
        print(name, pd.DataFrame(rows).pivot(index="layer", columns="role", values="effect").round(2))


# %%
def check_on_tune(
    model: TransformerBridge, file: Path, key: dict[str, Any], arms: Sequence[str], **settings: Any
) -> None:
    """Edit tune's eight subjects in some layers, and write what is refused then; a row per arm.

    Args:
        model: smollm2.
        file: the table; rows of the same key are not made again.
        key: first_layer, last_layer and role.
        arms: what is asked.
        settings: further ones of ld.edit.
    """
    if rows_where(read_table(file), key).any():
        return
    requests = [item for item in ld.requests("core", split="tune") if item.concrete][:8]
    suite = ld.suite("core", split="tune").for_requests(requests).small(names=3, harmless=20)
    items = tuple(item for item in suite.items if item.arm in arms)
    suite = ld.Suite(suite.name, suite.split, items, suite.neutral)
    sites = [
        ld.Site("resid_post", layer, key["role"])
        for layer in range(key["first_layer"], key["last_layer"] + 1)
    ]
    edit = ld.edit(model, requests, sites, progress=False, **settings)
    report = ld.check(model, edit, suite, max_new_tokens=BAND_TOKENS, progress=False)
    verdicts = report.verdicts(after=True).set_index("arm")
    rates = {row["arm"]: row for row in report.rates().to_dict("records") if row["measure"] == "prefix"}
    rows = [
        {
            "arm": arm,
            "n": rate["n"],
            "refused": round(rate["after"] * rate["n"]),
            "coherent": int(verdicts.loc[arm, "refusal"]),
            "newly_refused": report.new_refusals(arms=(arm,)),
            "kl": sum(report.kl) / len(report.kl),
            "leak_safe": edit.forecast.leak_safe,
        }
        for arm, rate in rates.items()
    ]
    replace_rows(file, key, rows, digits=4)
    print(key, pd.DataFrame(rows).set_index("arm"), flush=True)


def bands(model: TransformerBridge) -> None:
    """The default edit in each band of layers."""
    for low, high in BANDS:
        key = {"first_layer": low, "last_layer": high, "role": "subject_last"}
        check_on_tune(model, OUT / "bands.csv", key, BAND_ARMS)


def last_token(model: TransformerBridge) -> None:
    """An edit at the prompt's last token, which must be shown other harmless prompts too; beside the default.

    The corpus of C has some; each subject is shown its share of them.
    """
    others = [ld.request(text.user) for text in ld.read_corpus() if text.assistant]
    subjects = [item.subject for item in ld.requests("core", split="tune") if item.concrete][:8]

    def uses(request: ld.Request) -> list[ld.Request]:
        return [*others[subjects.index(request.subject) :: len(subjects)], *default_contrast(request)]

    arms = (*BAND_ARMS, "surface", "alias", "prefill", "plain", "multi_turn")
    default = {"first_layer": 5, "last_layer": 9, "role": "subject_last"}
    check_on_tune(model, OUT / "last_token.csv", default, arms)
    at_last = {"first_layer": 14, "last_layer": 18, "role": "last"}
    check_on_tune(model, OUT / "last_token.csv", at_last, arms, contrast=ld.Contrast(uses))


# %%
PARTS = {"readout": readout, "maps": maps, "bands": bands, "last_token": last_token}

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    smollm2 = ld.load("smollm2")
    for part in sys.argv[1:] or PARTS:
        with torch.enable_grad():
            PARTS[part](smollm2)
