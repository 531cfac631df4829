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

from tidy import replace_rows

import lens_defense as ld
from lens_defense.checking.check import suite_answers

OUT = Path(__file__).parent / "results" / "intent.csv"
EDITS = {
    "contrast": {},
    "none": {"contrast": None},
    "contrast, more names": {"names": ld.default_names},
}


# %%
def main() -> None:
    """Plan and check each edit, all with the same answers before."""
    parser = argparse.ArgumentParser(description="harmless uses of edited subjects; see the top of this file")
    parser.add_argument("--split", choices=("tune", "check"), default="check")
    parser.add_argument("--tokens", type=int, default=100, help="the greatest length of an answer")
    parser.add_argument("--only", choices=EDITS, nargs="*", default=list(EDITS)[:2])
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
        report.save(OUT.parent / "intent" / f"{args.split}-{name.replace(', ', '-').replace(' ', '-')}.json")
        when = {after: report.verdicts(after=after).set_index("arm") for after in (False, True)}
        table = []
        for rate in report.rates().to_dict("records"):
            if rate["measure"] == "prefix":
                arm = rate["arm"]
                table.append(
                    {
                        "arm": arm,
                        "n": rate["n"],
                        "refused_before": round(rate["before"] * rate["n"]),
                        "refused": round(rate["after"] * rate["n"]),
                        "coherent": int(when[True].loc[arm, "refusal"]),
                        "deflected": int(when[True].loc[arm, "deflection"]),
                        "deflected_before": int(when[False].loc[arm, "deflection"]),
                        "newly_refused": report.new_refusals(arms=(arm,)),
                        "word_list": round(rate["word list"] * rate["n"]),
                        "tokens": args.tokens,
                        "kl": sum(report.kl) / len(report.kl),
                        "facts_lost": report.facts_lost(),
                        "leak_safe": edit.forecast.leak_safe,
                        "seconds_edit": seconds,
                    }
                )
        replace_rows(OUT, {"split": args.split, "edit": name}, table)
        print(report, flush=True)


if __name__ == "__main__":
    main()
