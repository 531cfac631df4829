# %% [markdown]
# # Does an edit hear what is asked, or only the word?
# The demo's eight subjects, edited three times at the located sites: shown harmless uses of the same subjects (the
# contrast), not shown any, and not at all but with a filter by a list of words. Asked: harmful requests in unseen words,
# frames, spellings and names; harmless questions about the same subjects; other harmless requests.
#
#     python analyses/intent.py [--split tune|check] [--tokens 100] [--subjects 8 16 40] [--data DIR]
#
# However many subjects are edited, the first eight are asked about. With --data, the folder of published sets of
# real_model.py, 100 safe and 100 unsafe requests of XSTest are asked too. Writes results/intent.csv: a row per edit
# and arm, with counts.

# %%
import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from arm_counts import arm_counts, mean
from real_model import xstest
from tidy import replace_rows

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.checking.suites import SuiteItem

OUT = Path(__file__).parent / "results" / "intent.csv"
ASKED_ABOUT = 8
"""The most edited subjects that are asked about."""
XSTEST_ARMS = {"over_refusal": "XSTest safe", "held_out": "XSTest unsafe"}
EDITS = {
    "contrast": {},
    "contrast of weight 30": {"contrast": ld.Contrast(weight=30.0)},
    "contrast, neighborhood": {"contrast": ld.Contrast(weight=30.0, neighbors=100, ridge=0.1)},
    "none": {"contrast": None},
    "contrast, more names": {"names": ld.default_names},
}


# %%
def main() -> None:
    """Plan and check each edit, all with the same answers before."""
    parser = argparse.ArgumentParser(description="harmless uses of edited subjects; see the top of this file")
    parser.add_argument("--split", choices=("tune", "check"), default="check")
    parser.add_argument("--tokens", type=int, default=100, help="the greatest length of an answer")
    parser.add_argument("--only", choices=EDITS, nargs="*", default=["contrast", "none"])
    parser.add_argument("--subjects", type=int, nargs="*", default=[8], help="how many are edited")
    parser.add_argument("--data", type=Path, help="the folder of published sets, for XSTest")
    args = parser.parse_args()
    model = ld.load("smollm2")
    concrete = [
        item
        for item in ld.requests("core", split="edit" if args.split == "check" else "tune")
        if item.concrete
    ]
    sites = ld.locate(ld.trace(model, ld.requests("core")[:3], progress=False))
    suite = (
        ld.suite("core", split=args.split).for_requests(concrete[:ASKED_ABOUT]).small(names=11, harmless=20)
    )
    suite = ld.Suite(
        suite.name, suite.split, tuple(i for i in suite.items if i.arm != "held_out"), suite.neutral
    )
    suites = [replace(suite, name="intent"), *([xstest(args.data, 100)] if args.data else [])]
    edited = tuple(SuiteItem("edited", item) for item in concrete[: max(args.subjects)])
    answers = {
        item.request.conversation: answer
        for part in [*suites, ld.Suite("edited", args.split, edited, ())]
        for item, answer in zip(part.items, suite_answers(model, part, args.tokens), strict=True)
    }
    for count, name in itertools.product(args.subjects, args.only):
        start = time.perf_counter()
        edit = ld.edit(model, concrete[:count], sites, progress=False, **EDITS[name])
        seconds = time.perf_counter() - start
        key = {"split": args.split, "edit": name, "subjects": len(edit.requests)}
        table: list[dict[str, Any]] = []
        for part in suites:
            rows, _ = part.for_edit(edit.requests, edit.texts, edit.names)
            own = [answers[item.request.conversation] for item in rows.items]
            report = ld.check(model, edit, rows, max_new_tokens=args.tokens, before=own, progress=False)
            print(report, flush=True)
            cost = {
                "tokens": args.tokens,
                "kl": mean(report.kl),
                "facts_lost": report.facts_lost(),
                "leak_safe": edit.forecast.leak_safe,
                "seconds_edit": seconds,
            }
            own_rows = [row | cost for row in arm_counts(report)]
            if part.name == "xstest":
                own_rows = [
                    row | {"arm": XSTEST_ARMS[row["arm"]]} for row in own_rows if row["arm"] in XSTEST_ARMS
                ]
            table += own_rows
        replace_rows(OUT, key, table)


if __name__ == "__main__":
    main()
