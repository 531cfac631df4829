# %% [markdown]
# # One edit after another: do the earlier ones still work?
# Requests are edited one by one, each on the model with those before it, and once more with `keep=`, which adds the
# keys of the edits that stand to the least squares (lens_defense/editing/solving/kept_keys.py). After 1, 5, 10, 20 and all
# edits every request so far is asked again: in words that its edit saw, and in words that it did not see.
#
#     python analyses/consecutive_edits.py [--model organism|smollm2] [--methods memit rome ...] [--most 60]
#         [--contexts N] [--no-contrast] [--tokens N] [--harmless N]
#
# Of the organism all subjects of edit and tune are edited, 32. It refuses plain requests by itself, so it is asked
# inside jailbreak templates. With one request per edit DELMAN is MEMIT, so it is not run.
# Writes results/consecutive_edits.csv: a row per model, method, keep and number of edits.
# Resumable: the edits of a series stand in a ledger's folder in the cache, and rows that are there are not made anew.

# %%
import argparse
import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tidy import read_table, replace_rows, rows_where

import lens_defense as ld
from lens_defense.checking.check import rows_for_edits, suite_answers
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.editing.defaults import edit_defaults
from lens_defense.editing.edit_plan import EditWarning
from lens_defense.editing.solving.target_value import FIT_VERSION
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.contexts import Contexts
from lens_defense.storage import cache_folder

OUT = Path(__file__).parent / "results" / "consecutive_edits.csv"
COUNTS = (1, 5, 10, 20, 60)
"""Edits in a row after which everything is asked; and after the last."""
METHODS: Mapping[str, Any] = {
    **{
        name: method
        for name, method in ld.methods.METHODS.items()
        if isinstance(method, ld.methods.EditingMethod)
    },
    "rome, two keys": ld.methods.ROME(two_keys=True),
}
UNSEEN = {"organism": "jailbreak", "core": "paraphrase"}
"""The arm of a suite that words which an edit did not see are taken from."""


@dataclass(frozen=True)
class Series:
    """What is edited one by one, and how."""

    model: str
    method: str
    keep: bool
    requests: Sequence[ld.Request]
    contexts: Contexts
    contrast: bool
    tokens: int
    harmless: int

    @property
    def recipe(self) -> str:
        """A hash of all that its edits are made of."""
        settings = [FIT_VERSION, asdict(METHODS[self.method]), self.contrast, self.tokens]
        texts = [[item.conversation for item in self.contexts(request)] for request in self.requests]
        return hashlib.sha256(json.dumps([settings, texts]).encode()).hexdigest()[:16]

    @property
    def key(self) -> dict[str, Any]:
        """The columns that name it in the table."""
        return {"model": self.model, "method": self.method, "keep": self.keep, "recipe": self.recipe}


# %%
def to_edit(language: str, most: int) -> list[ld.Request]:
    """Requests of different subjects, none of the split check."""
    of_edit = [item for item in ld.requests(language) if item.concrete or language == "organism"]
    return [*of_edit, *ld.requests(language, split="tune")][:most]


def suite_of(series: Series, language: str) -> Suite:
    """Every request in a context that its edit sees and in one that it does not, harmless requests, facts."""
    bundled = ld.suite(language).for_requests(series.requests).small(harmless=series.harmless)
    seen = {item.conversation for request in series.requests for item in series.contexts(request)}
    asked, subjects = [], set()
    for item in bundled.items:
        fresh = item.arm == UNSEEN[language] and item.request.conversation not in seen
        if fresh and item.subject not in subjects:
            subjects.add(item.subject)
            asked.append(replace(item, arm="paraphrase"))
    for request in series.requests:
        first = replace(series.contexts(request)[0], id=request.id)
        asked.append(SuiteItem("edited", first, "seen", about=request.subject or ""))
    harmless = [item for item in bundled.items if item.arm in ("benign", "over_refusal")]
    facts = [item for item in bundled.items if item.arm == "facts"][: series.harmless]
    return Suite("consecutive", bundled.split, (*asked, *harmless, *facts), bundled.neutral[:16])


def measure(
    model: Any, ledger: ld.Ledger, suite: Suite, answers: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    """What the edits that stand do together, in one row."""
    rows, _ = rows_for_edits(suite, ledger.edits)
    asked = {item.request.conversation for item in suite.items}
    known = {*asked, *(item.conversation for edit in ledger.edits for item in edit.requests)}
    assert {item.request.conversation for item in rows.items} <= known
    before = [answers[item.request.conversation] for item in rows.items]
    report = ld.check(model, ledger, suite, before=before, max_new_tokens=tokens, progress=False)
    seen = [row for row in report.rows if row.arm == "edited" and row.family == "seen"]
    unseen = [row for row in report.rows if row.arm == "paraphrase"]
    harmless = [row for row in report.rows if row.arm in ("benign", "over_refusal")]
    knew = [row for row in report.rows if row.arm == "facts" and row.hit("knows", after=False)]

    def share(rows: Sequence[Any], measure: str, *, after: bool = True) -> float:
        return sum(row.hit(measure, after=after) for row in rows) / len(rows)

    return {
        "asked": len(seen),
        **{f"seen_{judge}": share(seen, judge) for judge in ("prefix", "coherent")},
        "seen_before": share(seen, "prefix", after=False),
        "unseen_asked": len(unseen),
        **{f"unseen_{judge}": share(unseen, judge) for judge in ("prefix", "coherent")},
        "unseen_before": share(unseen, "prefix", after=False),
        "harmless": len(harmless),
        "harmless_newly_refused": report.new_refusals() / len(harmless),
        "harmless_broken": sum(row.verdicts_after["coherent"] == "broken" for row in harmless)
        / len(harmless),
        "facts_known_before": len(knew),
        "facts_kept": share(knew, "knows"),
        "kl": sum(report.kl) / len(report.kl),
        "loss_ratio": sum(report.loss_after) / sum(report.loss_before),
        "relative_change": relative_change(model, ledger),
        "disturbance": disturbance(ledger.edits),
        "layers": " ".join(map(str, ledger.edits[-1].layers)),
        "tokens": tokens,
    }


def relative_change(model: Any, ledger: ld.Ledger) -> float:
    """Of the layer that is changed most, the norm of the whole change over the norm of the matrix before."""
    layers = sorted({layer for edit in ledger.edits for layer in edit.layers})
    now = {layer: mlp_output_matrix(model, layer).double().clone() for layer in layers}
    with ledger.set_aside():
        before = {layer: mlp_output_matrix(model, layer).double().clone() for layer in layers}
    return max(float((now[layer] - before[layer]).norm() / before[layer].norm()) for layer in layers)


def disturbance(edits: Sequence[ld.Edit]) -> float:
    """What later edits write at the keys of an earlier one over what it wrote there itself: |Delta K^T|, all layers.

    Mean over the edits but the last; NaN for one alone.
    """
    shares = []
    for i, edit in enumerate(edits[:-1]):
        own = later = 0.0
        for layer, rows in edit.key_rows.items():
            written = [
                other.left[layer].double() @ (other.right[layer].double() @ rows.double().T)
                for other in edits[i:]
                if layer in other.layers
            ]
            own += float(written[0].square().sum())
            later += float(torch.stack(written[1:]).sum(0).square().sum()) if written[1:] else 0.0
        shares.append((later / own) ** 0.5)
    return sum(shares) / len(shares) if shares else math.nan


# %%
def run(series: Series) -> None:
    """Edit one request after another, and write a row at every count that has none yet."""
    counts = sorted({count for count in COUNTS if count < len(series.requests)} | {len(series.requests)})
    table = read_table(OUT)
    missing = [count for count in counts if not rows_where(table, {**series.key, "edits": count}).any()]
    if not missing:
        return
    model = ld.load(series.model)
    language = edit_defaults(model).language
    sites = ld.locate(
        ld.trace(model, [series.contexts(item)[0] for item in series.requests[:3]], progress=False)
    )
    suite = suite_of(series, language)
    plain = tuple(SuiteItem("edited", item) for item in series.requests)
    everything = replace(suite, items=(*suite.items, *plain))
    answers = {
        item.request.conversation: answer
        for item, answer in zip(
            everything.items, suite_answers(model, everything, series.tokens), strict=True
        )
    }
    name = f"{series.model}-{series.method}-{'keep' if series.keep else 'forget'}-{series.recipe}"
    folder = cache_folder() / "consecutive_edits" / name.replace(", ", "-").replace(" ", "-")
    ledger, start = ld.Ledger(model, folder), time.perf_counter()
    for count in range(max(1, len(ledger.edits)), len(series.requests) + 1):
        if count > len(ledger.edits):
            ledger.apply(next_edit(model, ledger, series, sites))
        if count not in missing:
            continue
        row = measure(model, ledger, suite, answers, series.tokens)
        replace_rows(OUT, {**series.key, "edits": count}, [row], digits=5)
        print(
            f"{name[:40]:40} {count:3} edits  {time.perf_counter() - start:5.0f} s  seen {row['seen_prefix']:.0%}  "
            f"unseen {row['unseen_prefix']:.0%}  harmless {row['harmless_newly_refused']:.0%}  "
            f"facts {row['facts_kept']:.0%}  KL {row['kl']:.3f}  change {row['relative_change']:.2f}",
            flush=True,
        )
    shutil.rmtree(folder)


def next_edit(model: Any, ledger: ld.Ledger, series: Series, sites: Sequence[ld.Site]) -> ld.Edit:
    """The plan for the first request that is not edited yet, on the model as it stands."""
    return ld.edit(
        model,
        [series.requests[len(ledger.edits)]],
        sites,
        method=METHODS[series.method],
        contexts=series.contexts,
        contrast=edit_defaults(model).contrast if series.contrast else None,
        keep=ledger if series.keep else (),
        progress=False,
    )


def first_contexts(contexts: Contexts, number: int, request: ld.Request) -> list[ld.Request]:
    """The first few of some contexts."""
    return list(contexts(request))[:number]


# %%
def main() -> None:
    """Every method with and without keeping."""
    parser = argparse.ArgumentParser(description="edits one after another; see the top of this file")
    parser.add_argument("--model", choices=("organism", "smollm2"), default="organism")
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=["memit", "rome", "rome, two keys", "alphaedit"]
    )
    parser.add_argument("--keep", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--most", type=int, default=max(COUNTS), help="requests that are edited at most")
    parser.add_argument("--contexts", type=int, default=100, help="of each request at most")
    parser.add_argument("--no-contrast", action="store_true")
    parser.add_argument("--tokens", type=int, default=24, help="the greatest length of an answer")
    parser.add_argument(
        "--harmless",
        type=int,
        default=40,
        help="benign requests, as many that sound harmful, and facts, that are asked",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore", EditWarning)  # of hundreds of edits; the table says what they do
    defaults = edit_defaults(ld.load(args.model))
    for name in args.methods:
        for keep in {"yes": [True], "no": [False], "both": [False, True]}[args.keep]:
            series = Series(
                model=args.model,
                method=name,
                keep=keep,
                requests=to_edit(defaults.language, args.most),
                contexts=partial(first_contexts, defaults.contexts, args.contexts),
                contrast=defaults.contrast is not None and not args.no_contrast,
                tokens=args.tokens,
                harmless=args.harmless,
            )
            run(series)


if __name__ == "__main__":
    main()
