# %% [markdown]
# # Does an edit hear what is asked, or only the word?
# The demo's eight subjects, edited three times at the located sites: shown harmless uses of the same subjects (the
# contrast), not shown any, and not at all but with a filter by a list of words. Asked: harmful requests in unseen words,
# frames, spellings and names; harmless questions about the same subjects; other harmless requests.
#
#     python analyses/intent.py [--split tune|check] [--tokens 100]
#
# Writes results/intent.csv: a row per edit and arm, with counts.

# %%
import argparse
import time
from pathlib import Path
from typing import Any

from tidy import replace_rows

import lens_defense as ld
from lens_defense.checking.check import suite_answers

OUT = Path(__file__).parent / "results" / "intent.csv"
EDITS = {
    "contrast": {},
    "contrast of weight 30": {"contrast": ld.Contrast(weight=30.0)},
    "none": {"contrast": None},
    "contrast, more names": {"names": ld.default_names},
}


# %%
def table_of(report: ld.Report, edit: ld.Edit, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """A row per arm, with counts; the interval is that of the share refused by prefix, by subject."""
    before, after = (report.verdicts(after=when).set_index("arm") for when in (False, True))
    return [
        {
            "arm": rate["arm"],
            "n": rate["n"],
            "refused_before": round(rate["before"] * rate["n"]),
            "refused": round(rate["after"] * rate["n"]),
            "low": rate["after low"],
            "high": rate["after high"],
            "coherent": int(after.loc[rate["arm"], "refusal"]),
            "deflected_before": int(before.loc[rate["arm"], "deflection"]),
            "deflected": int(after.loc[rate["arm"], "deflection"]),
            "newly_refused": report.new_refusals(arms=(rate["arm"],)),
            "word_list": round(rate["word list"] * rate["n"]),
            "tokens": tokens,
            "kl": sum(report.kl) / len(report.kl),
            "facts_lost": report.facts_lost(),
            "leak_safe": edit.forecast.leak_safe,
            "seconds_edit": seconds,
        }
        for rate in report.rates().to_dict("records")
        if rate["measure"] == "prefix"
    ]


# %%
def main() -> None:
    """Plan and check each edit, all with the same answers before."""
    parser = argparse.ArgumentParser(description="harmless uses of edited subjects; see the top of this file")
    parser.add_argument("--split", choices=("tune", "check"), default="check")
    parser.add_argument("--tokens", type=int, default=100, help="the greatest length of an answer")
    parser.add_argument("--only", choices=EDITS, nargs="*", default=["contrast", "none"])
    args = parser.parse_args()
    model = ld.load("smollm2")
    requests = [
        item
        for item in ld.requests("core", split="edit" if args.split == "check" else "tune")
        if item.concrete
    ][:8]
    sites = ld.locate(ld.trace(model, ld.requests("core")[:3], progress=False))
    suite = ld.suite("core", split=args.split).for_requests(requests).small(names=11, harmless=20)
    suite = ld.Suite(
        suite.name, suite.split, tuple(i for i in suite.items if i.arm != "held_out"), suite.neutral
    )
    before = suite_answers(model, suite, args.tokens)
    answers = {item.request.conversation: answer for item, answer in zip(suite.items, before, strict=True)}
    for name in args.only:
        start = time.perf_counter()
        edit = ld.edit(model, requests, sites, progress=False, **EDITS[name])
        seconds = time.perf_counter() - start
        rows, _ = suite.for_edit(edit.requests, edit.texts, edit.names)
        own = [answers[item.request.conversation] for item in rows.items]
        report = ld.check(model, edit, rows, max_new_tokens=args.tokens, before=own, progress=False)
        replace_rows(OUT, {"split": args.split, "edit": name}, table_of(report, edit, args.tokens, seconds))
        print(report, flush=True)


if __name__ == "__main__":
    main()
