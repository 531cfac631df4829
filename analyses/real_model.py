# %% [markdown]
# # The full run on a real model and on requests that we did not write
# How many subjects can be taken out, at what price; whether the map says where to edit; whether the forecast
# predicts what an edit costs. The model is smollm2. Resumable: what the tables have, made as edits are made now, is
# not run again. Two processes may share the work, one per half.
#
#     python analyses/real_model.py --data DIR [--only edits|windows] [--short FOLDER]
#
# DIR holds the published sets as their authors lay them out (docs/results/index.md: sources): delman/HarmBench.json,
# xstest/xstest_v2_prompts.csv, gptfuzzer/GPTFuzzer.csv. Results hold ids and verdicts, no request and no answer:
# edits.csv has a row per edit, rows.csv one per edit and question, windows.csv one per edit of five layers.

# %%
import argparse
import csv
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tidy import replace_rows
from tune import is_made, measure, recipe, traced_requests

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.storage import atomic_write, cache_folder

OUT = Path(__file__).parent / "results" / "real_model"
COMPONENTS = ("resid_post", "mlp_out", "attn_out")
DOSES, DRAWS = (16, 8, 4, 1, 32), 3
DELMAN_DOSES = (8, 20, 40)
WHOLE_XSTEST = (8, 16, 32)
"""Doses of "core" that are measured on all of XSTest; the others on a fixed 100 and 100."""
ASKED_ABOUT = 8
"""The most subjects of an edit that are asked about in other words; drawn at random."""
HUMAN_TEMPLATES = ("74", "29", "16", "65")
"""Ids of four GPTFuzzer templates, taken by their lengths (370 to 970 characters) before any was run."""
WIDTH = 5
"""Layers of a window."""


# %% [markdown]
# ## What is asked


# %%
def xstest(data: Path, per_half: int | None) -> Suite:
    """XSTest: safe requests as over_refusal, their unsafe contrasts as held_out; all, or so many of each."""
    with (data / "xstest/xstest_v2_prompts.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    items: list[SuiteItem] = []
    for arm, kind in (("over_refusal", "safe"), ("held_out", "harmful")):
        rows = [row for row in table if row["type"].startswith("contrast") == (arm == "held_out")]
        if per_half:
            rows = random.Random(0).sample(rows, per_half)
        items += [
            SuiteItem(arm, ld.request(row["prompt"], id=row["id_v2"], kind=kind, split="check"), row["type"])
            for row in rows
        ]
    return Suite("xstest", "check", tuple(items), ())


def own_suite(planned: list[ld.Request], data: Path, harmless: int) -> Suite:
    """The rows of "core" about some of an edit's subjects, and the same inside four human templates."""
    requests = random.Random(1).sample(planned, min(ASKED_ABOUT, len(planned)))
    core = ld.suite("core").small(paraphrases=6, jailbreaks=6, harmless=harmless).for_requests(requests)
    with (data / "gptfuzzer/GPTFuzzer.csv").open(encoding="utf-8", newline="") as file:
        templates = {
            row["id"]: row["text"].replace("[INSERT PROMPT HERE]", "{}") for row in csv.DictReader(file)
        }
    jailbreaks = [
        SuiteItem("jailbreak", request.inside(templates[name]), f"human ({name})")
        for name in HUMAN_TEMPLATES
        for request in requests
    ]
    return replace(core, name="real_model", items=(*core.items, *jailbreaks))


# %% [markdown]
# ## Edits


# %%
class Edit(NamedTuple):
    """One edit of the dose curve."""

    set: str
    draw: int | None
    subjects: int

    @property
    def name(self) -> str:
        return "-".join(
            [self.set, str(self.subjects), *([] if self.draw is None else ["draw", str(self.draw)])]
        )

    @property
    def xstest_per_half(self) -> int | None:
        return None if self.set == "core" and self.subjects in WHOLE_XSTEST else 100

    def requests(self, data: Path) -> list[ld.Request]:
        """The first of a random order: the concrete subjects of core, in nested draws, or DELMAN's, distinct ones.

        DELMAN's get the refusal that all edits here plant.
        """
        if self.set == "core":
            requests = [item for item in ld.requests("core") if item.concrete]
        else:
            requests = [
                replace(item, safe_target=None) for item in ld.requests(data / "delman/HarmBench.json")
            ]
        random.Random(self.draw or 0).shuffle(requests)
        return requests[: self.subjects]


def edits() -> Iterator[Edit]:
    """The dose of the bars in every draw, then one draw of the others, DELMAN's, and the rest."""
    yield from (Edit("core", draw, DOSES[0]) for draw in range(DRAWS))
    yield from (Edit("core", 0, dose) for dose in DOSES[1:])
    yield from (Edit("delman", None, dose) for dose in DELMAN_DOSES)
    yield from (Edit("core", draw, dose) for draw in range(1, DRAWS) for dose in DOSES[1:])


class Bench:
    """The model, where it is edited, and its answers before any edit, which stay on this machine."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.model = ld.load("smollm2")
        self.sites = ld.locate(ld.trace(self.model, ld.requests("core")[:3], progress=False))
        self.answers_file = cache_folder() / "answers" / f"{weights_fingerprint(self.model)}.json"

    def answers_before(self, suite: Suite, max_new_tokens: int) -> list[tuple[int, ...]]:
        """The unedited model's answers, asked once."""
        file = self.answers_file
        answers = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        texts = [f"{max_new_tokens} {item.request.text}" for item in suite.items]
        keys = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
        missing = [i for i, key in enumerate(keys) if key not in answers]
        items = tuple(suite.items[i] for i in missing)
        new_answers = suite_answers(self.model, replace(suite, items=items), max_new_tokens)
        answers |= {keys[i]: list(answer) for i, answer in zip(missing, new_answers, strict=True)}
        with atomic_write(file) as unfinished:
            unfinished.write_text(json.dumps(answers), "utf-8")
        return [tuple(answers[key]) for key in keys]

    def check(
        self, edit: ld.Edit, suite: Suite, max_new_tokens: int
    ) -> tuple[ld.Report, list[dict[str, Any]]]:
        """The report, and its rows as ids, forms and verdicts."""
        suite, _ = suite.for_edit(edit.requests, edit.texts, edit.names)
        before = self.answers_before(suite, max_new_tokens)
        report = ld.check(
            self.model, edit, suite, max_new_tokens=max_new_tokens, before=before, progress=False
        )
        rows = [
            {
                "suite": suite.name,
                "arm": row.arm,
                "family": row.family,
                "id": row.id,
                "form": "question" if item.request.text.rstrip().endswith("?") else "imperative",
                **{
                    f"{judge}_{when}": int(row.hit(judge, after=when == "after"))
                    for judge in (("knows",) if row.arm == "facts" else ("prefix", "coherent"))
                    for when in ("before", "after")
                },
            }
            for row, item in zip(report.rows, suite.items, strict=True)
        ]
        return report, rows

    def measure(
        self, requests: list[ld.Request], *, per_half: int | None, harmless: int = 80
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Edit at the located sites and ask everything: a row about the edit, and the rows of its questions."""
        start = time.perf_counter()
        edit = ld.edit(self.model, requests, self.sites)
        edited = time.perf_counter()
        report, rows = self.check(edit, own_suite(requests, self.data, harmless), 24)
        _, xstest_rows = self.check(edit, xstest(self.data, per_half), 16)
        xstest_rows = [row for row in xstest_rows if row["arm"] != "edited"]  # asked with the others already
        loss_before, loss_after = (
            sum(losses) / len(losses) for losses in (report.loss_before, report.loss_after)
        )
        summary = {
            "subjects": len(requests),
            "component": self.sites[0].component,
            "role": edit.role,
            "first_layer": edit.layers[0],
            "last_layer": edit.layers[-1],
            "leak_neutral": edit.forecast.leak_neutral,
            "leak_safe": edit.forecast.leak_safe,
            "reach": sum(edit.forecast.reach) / len(requests),
            "kl": sum(report.kl) / len(report.kl),
            "loss_before": loss_before,
            "loss_after": loss_after,
            "seconds_edit": edited - start,
            "seconds_check": time.perf_counter() - edited,
            "recipe": recipe(),
            "subject_ids": " ".join(item.id for item in requests),
        }
        return summary, rows + xstest_rows


# %% [markdown]
# ## Run


# %%
def run_edits(bench: Bench) -> None:
    """How many subjects: make the edits that edits.csv lacks. Their rows are written first."""
    for edit in edits():
        if is_made(OUT / "edits.csv", edit=edit.name):
            continue
        summary, rows = bench.measure(edit.requests(bench.data), per_half=edit.xstest_per_half)
        key = {"edit": edit.name}
        replace_rows(OUT / "rows.csv", key, rows)
        replace_rows(OUT / "edits.csv", key, [{"set": edit.set, "draw": edit.draw, **summary}])
        print(f"{edit.name:16} {summary['seconds_edit'] + summary['seconds_check']:5.0f} s", flush=True)


def run_windows(bench: Bench) -> None:
    """Where: the maps, then every window of layers, every third first, then other roles; all on tune."""
    maps = {
        "map": (traced_requests(), {}),
        "single_map": (ld.requests("core")[:1], {"positions": "all"}),
    }
    for name, (requests, settings) in maps.items():
        file = OUT / f"{name}.safetensors"
        if not file.is_file():
            ld.trace(bench.model, requests, components=COMPONENTS, layers="all", **settings).save(file)
    located = bench.sites[0].layer
    starts = range(bench.model.cfg.n_layers - WIDTH + 1)
    windows = [
        (first, "subject_last")
        for first in sorted(starts, key=lambda first: (first % 3 != located % 3, first))
    ]
    windows += [(located, role) for role in ("subject_first", "next", "last")]
    for first, role in windows:
        key = {"first_layer": first, "role": role}
        if is_made(OUT / "windows.csv", **key):
            continue
        row = measure(bench.model, {"layers": (first, first + WIDTH - 1), "role": role})
        replace_rows(OUT / "windows.csv", key, [row])
        print(f"window {first:2} at {role:13} {row['seconds']:5.0f} s", flush=True)


def main() -> None:
    """Make what the tables do not have yet."""
    parser = argparse.ArgumentParser(description="the full run; see the top of this file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the published sets")
    parser.add_argument("--only", choices=("edits", "windows"), help="half of it, for two processes at once")
    parser.add_argument(
        "--short", type=Path, help="one small edit (8 requests), its tables written to this folder"
    )
    args = parser.parse_args()
    bench = Bench(args.data)
    if args.short:
        summary, rows = bench.measure(ld.requests("core")[:8], per_half=20, harmless=20)
        replace_rows(args.short / "edits.csv", {"edit": "short"}, [summary])
        replace_rows(args.short / "rows.csv", {"edit": "short"}, rows)
        return
    if args.only != "windows":
        run_edits(bench)
    if args.only != "edits":
        run_windows(bench)


if __name__ == "__main__":
    main()
