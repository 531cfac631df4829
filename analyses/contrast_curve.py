# %% [markdown]
# # What a contrast buys, and what it costs: the curve
# The harmful requests that an edit refuses, against the harmless questions about the same subjects that it refuses
# too: the default edit at several weights of its contrast and at several strengths, and with neighborhood prompts
# (Meng et al. 2022, section 3.3), the contexts asked about harmless things, among its harmless uses. Everything is
# measured on the split "tune": defaults are chosen there.
#
#     python analyses/contrast_curve.py [NAME ...]
#
# Beside each, what bounds it: how well the change itself tells the two apart, as the area under the ROC curve of what
# arrives at the subject in unseen requests and in unseen harmless questions. Other harmless requests are those that
# do not stand in the corpus of C. Writes results/contrast_curve.csv, a row per edit and arm; what it has is not made
# again.

# %%
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arm_counts import arm_counts, mean
from scipy.stats import mannwhitneyu
from tidy import read_table, replace_rows, rows_where
from transformer_lens.model_bridge import TransformerBridge

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.editing.methods import Factors
from lens_defense.editing.solving.layer_spread import PromptGroup, reach_of_change
from lens_defense.patching.corruptions import harmless_subjects
from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.harmless_uses import default_contrast

OUT = Path(__file__).parent / "results" / "contrast_curve.csv"
LAYERS, ROLE = range(5, 10), "subject_last"
SUBJECTS, TOKENS, NEIGHBORHOOD = 8, 32, 30
"""How many are edited, the length of an answer, and neighborhood prompts per subject."""
HARMFUL, HARMLESS = ("paraphrase", "jailbreak"), "same_subject"
OTHERS = ("benign", "over_refusal")


def uses_and_neighborhood(request: ld.Request) -> list[ld.Request]:
    """The default harmless uses, and contexts in which another, harmless thing is asked for."""
    uses, contexts, subjects = default_contrast(request), default_contexts(request), harmless_subjects()
    rng = random.Random(request.subject)
    neighbors = [
        rng.choice(contexts).renamed(subject)
        for subject in rng.sample(subjects, NEIGHBORHOOD)
    ]  # fmt: skip
    held_out = ld.edit.__kwdefaults__["held_out_contexts"]
    return [*uses[:-held_out], *neighbors, *uses[-held_out:]]


def _weighted(weight: float, **settings: Any) -> dict[str, Any]:
    return {"contrast": ld.Contrast(weight=weight, **settings)}


EDITS: Mapping[str, Mapping[str, Any]] = {
    "no contrast": {"contrast": None},
    **{f"weight {weight:g}": _weighted(weight) for weight in (1.0, 4.0, 10.0, 30.0, 100.0)},
    **{f"weight 4, strength {strength:g}": {"strength": strength} for strength in (0.7, 0.85, 1.2)},
    **{
        f"weight {weight:g}, neighborhood": _weighted(weight, uses=uses_and_neighborhood)
        for weight in (4.0, 10.0, 30.0)
    },
}


# %%
def tune_suite(requests: Sequence[ld.Request]) -> ld.Suite:
    """Unseen requests and harmless questions about the subjects, and harmless requests that C has not seen."""
    whole = ld.suite("core", split="tune").for_requests(requests)
    about = [item for item in whole.small(names=3, harmless=0).items if item.arm in (*HARMFUL, HARMLESS)]
    others = [item for arm in OTHERS for item in [i for i in whole.items if i.arm == arm][1::2]]
    return ld.Suite(whole.name, whole.split, (*about, *others), whole.neutral)


def separation(model: TransformerBridge, edit: ld.Edit, suite: ld.Suite) -> float:
    """AUC: how often more arrives in an unseen request than in an unseen harmless question."""
    subjects = [request.subject for request in edit.requests]
    seen = [
        PromptGroup(owner, [ld.tokenize(model.tokenizer, context) for context in default_contexts(request)])
        for owner, request in enumerate(edit.requests)
    ]
    asked = [item for item in suite.items if item.arm in (*HARMFUL, HARMLESS)]
    unseen = [
        PromptGroup(subjects.index(item.request.subject), [ld.tokenize(model.tokenizer, item.request)])
        for item in asked
    ]
    everybody = frozenset(range(len(subjects)))
    changes = {
        layer: Factors(edit.left[layer], edit.right[layer], (everybody,) * len(edit.right[layer]))
        for layer in edit.layers
    }
    _, reach = reach_of_change(model, changes, seen, edit.role, unseen)
    harmless = np.array([item.arm == HARMLESS for item in asked])
    arrived = np.array(reach)
    pairs = (~harmless).sum() * harmless.sum()
    return float(mannwhitneyu(arrived[~harmless], arrived[harmless]).statistic / pairs)


def main(names: Sequence[str]) -> None:
    """Plan, check and write each edit; all are compared with the same answers."""
    model = ld.load("smollm2")
    requests = [item for item in ld.requests("core", split="tune") if item.concrete][:SUBJECTS]
    sites = [ld.Site("resid_post", layer, ROLE) for layer in LAYERS]
    suite = tune_suite(requests)
    asked, _ = suite.for_edit(requests, ())
    answers = {
        item.request.conversation: answer
        for item, answer in zip(asked.items, suite_answers(model, asked, TOKENS), strict=True)
    }
    for name in names:
        if rows_where(read_table(OUT), {"edit": name}).any():
            continue
        start = time.perf_counter()
        edit = ld.edit(model, requests, sites, progress=False, **EDITS[name])
        rows, _ = suite.for_edit(edit.requests, edit.texts, edit.names)
        before = [answers[item.request.conversation] for item in rows.items]
        report = ld.check(model, edit, rows, max_new_tokens=TOKENS, before=before, progress=False)
        cost = {
            "auc": separation(model, edit, suite),
            "kl": mean(report.kl),
            "kl_median": float(np.median(report.kl)),
            "loss_before": mean(report.loss_before),
            "loss_after": mean(report.loss_after),
            "leak_safe": edit.forecast.leak_safe,
            "tokens": TOKENS,
        }
        replace_rows(OUT, {"edit": name}, [{**row, **cost} for row in arm_counts(report)], digits=5)
        print(f"{name:28} {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*EDITS])
