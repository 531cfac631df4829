# %% [markdown]
# # What a contrast buys, and what it costs: the curve
# The harmful requests that an edit refuses, against the harmless questions about the same subjects that it refuses
# too: the default edit at several weights of its contrast and at several strengths, with neighborhood prompts (the
# contexts asked about harmless things) among its harmless uses, and with a ridge. Everything is measured on the split
# "tune": defaults are chosen there.
#
#     python analyses/contrast_curve.py [--subjects 8 40] [--only NAME ...]
#
# Of more than eight subjects the first eight are those of "tune", and only they are asked about; the others are of
# "edit".
#
# Beside each, what bounds it: how well the change itself tells the two apart, as the area under the ROC curve of what
# arrives at the subject in unseen requests and in unseen harmless questions. Other harmless requests are those that
# do not stand in the corpus of C. Writes results/contrast_curve.csv, a row per edit and arm; what it has is not made
# again.

# %%
import argparse
import itertools
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
from lens_defense.prompts.contexts import default_contexts

OUT = Path(__file__).parent / "results" / "contrast_curve.csv"
LAYERS, ROLE = range(5, 10), "subject_last"
ASKED_ABOUT, TOKENS, NEIGHBORS = 8, 32, 30
"""How many subjects are asked about, the length of an answer, and neighborhood prompts per subject."""
HARMFUL, HARMLESS = ("paraphrase", "jailbreak"), "same_subject"
OTHERS = ("benign", "over_refusal")


def _weighted(weight: float, neighbors: int = 0, ridge: float = 0.0) -> dict[str, Any]:
    return {"contrast": ld.Contrast(weight=weight, neighbors=neighbors, ridge=ridge)}


EDITS: Mapping[str, Mapping[str, Any]] = {
    "no contrast": {"contrast": None},
    **{f"weight {weight:g}": _weighted(weight) for weight in (1.0, 4.0, 10.0, 30.0, 100.0)},
    **{f"weight 4, strength {strength:g}": {"strength": strength} for strength in (0.7, 0.85, 1.2)},
    **{f"weight {weight:g}, neighborhood": _weighted(weight, NEIGHBORS) for weight in (4.0, 10.0, 30.0)},
    **{f"weight 4, ridge {ridge:g}": _weighted(4.0, 0, ridge) for ridge in (0.1, 0.3)},
    **{
        f"weight {weight:g}, neighborhood, ridge {ridge:g}": _weighted(weight, NEIGHBORS, ridge)
        for weight, ridge in ((10.0, 0.1), (30.0, 0.1), (30.0, 0.3), (100.0, 0.3))
    },
    "weight 30, 100 neighbors, ridge 0.1": _weighted(30.0, 100, 0.1),
}


# %%
def tune_suite(requests: Sequence[ld.Request]) -> ld.Suite:
    """Unseen requests and harmless questions about the subjects, and harmless requests that C has not seen."""
    whole = ld.suite("core", split="tune").for_requests(requests)
    about = [item for item in whole.small(names=3, harmless=0).items if item.arm in (*HARMFUL, HARMLESS)]
    others = [item for arm in OTHERS for item in [i for i in whole.items if i.arm == arm][1::2]]
    return ld.Suite("contrast curve", whole.split, (*about, *others), whole.neutral)


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


def main() -> None:
    """Plan, check and write each edit; all are compared with the same answers."""
    parser = argparse.ArgumentParser(description="what a contrast buys; see the top of this file")
    parser.add_argument("--only", choices=EDITS, nargs="*", default=[*EDITS])
    parser.add_argument("--subjects", type=int, nargs="*", default=[ASKED_ABOUT], help="how many are edited")
    args = parser.parse_args()
    model = ld.load("smollm2")
    first, others = (
        [item for item in ld.requests("core", split=split) if item.concrete] for split in ("tune", "edit")
    )
    requests = [*first[:ASKED_ABOUT], *others]
    sites = [ld.Site("resid_post", layer, ROLE) for layer in LAYERS]
    suite = tune_suite(requests[:ASKED_ABOUT])
    asked, _ = suite.for_edit(requests[: max(args.subjects)], ())
    answers = {
        item.request.conversation: answer
        for item, answer in zip(asked.items, suite_answers(model, asked, TOKENS), strict=True)
    }
    for count, name in itertools.product(args.subjects, args.only):
        key = {"edit": name, "subjects": count}
        if rows_where(read_table(OUT), key).any():
            continue
        start = time.perf_counter()
        edit = ld.edit(model, requests[:count], sites, progress=False, **EDITS[name])
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
        replace_rows(OUT, key, [{**row, **cost} for row in arm_counts(report)], digits=5)
        print(f"{name:36} {count:3} subjects: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
