# %% [markdown]
# # The full run on a real model and on requests that we did not write
# How many subjects can be taken out, at what price; whether the map says where to edit; whether the forecast
# predicts what an edit costs. The model is smollm2. Resumable: one result a piece, and a piece that has its
# result, made as edits are made now, is not run again; two processes may share the work.
#
#     python analyses/real_model.py --data DIR [--only doses|places] [--short FILE]
#
# DIR holds the published sets as their authors lay them out (README: sources): delman/HarmBench.json,
# xstest/xstest_v2_prompts.csv, gptfuzzer/GPTFuzzer.csv. Results hold ids and verdicts, no request and no answer.

# %%
import argparse
import csv
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tables import slug
from tune import measure, recipe, stands, traced

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.storage import atomic_write, cache_folder

OUT = Path(__file__).parent / "results" / "real_model"
DOSES, DRAWS = (16, 8, 4, 1, 32), 3
DELMAN_DOSES = (8, 20, 40)
WHOLE_XSTEST = (8, 16, 32)
"""Doses of "core" that are measured on all of XSTest; the others on a fixed 100 and 100."""
ASKED = 8
"""The most subjects of an edit that are asked about in other words; drawn at random."""
HUMAN = ("74", "29", "16", "65")
"""Ids of four GPTFuzzer templates, taken by their lengths (370 to 970 characters) before any was run."""
WIDTH = 5


# %% [markdown]
# ## What is asked


# %%
def xstest(data: Path, *, halves: int | None) -> Suite:
    """XSTest: safe requests as `safe`, their unsafe contrasts as `unseen`; all, or a fixed number of each."""
    with (data / "xstest/xstest_v2_prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    items: list[SuiteItem] = []
    for arm, kind in (("over_refusal", "safe"), ("held_out", "harmful")):
        some = [row for row in rows if row["type"].startswith("contrast") == (arm == "held_out")]
        if halves:
            some = random.Random(0).sample(some, halves)
        items += [
            SuiteItem(arm, ld.request(row["prompt"], id=row["id_v2"], kind=kind, split="check"), row["type"])
            for row in some
        ]
    return Suite("xstest", "check", tuple(items), ())


def words(planned: list[ld.Request], data: Path, *, harmless: int) -> Suite:
    """The rows of "core" about some of an edit's subjects, and the same inside four human templates."""
    some = random.Random(1).sample(planned, min(ASKED, len(planned)))
    core = ld.suite("core").small(paraphrases=6, jailbreaks=6, harmless=harmless).for_requests(some)
    with (data / "gptfuzzer/GPTFuzzer.csv").open(encoding="utf-8", newline="") as file:
        human = {row["id"]: row["text"] for row in csv.DictReader(file) if row["id"] in HUMAN}
    wrapped = [
        SuiteItem(
            "jailbreak", item.inside(human[name].replace("[INSERT PROMPT HERE]", "{}")), f"human ({name})"
        )
        for name in HUMAN
        for item in some
    ]
    return replace(core, name="real_model", items=(*core.items, *wrapped))


def drawn(n: int, draw: int) -> list[ld.Request]:
    """The first n of a random order of the concrete subjects of "core": draws are nested."""
    concrete = [item for item in ld.requests("core") if item.concrete]
    random.Random(draw).shuffle(concrete)
    return concrete[:n]


def delman(n: int, data: Path) -> list[ld.Request]:
    """n distinct subjects of the DELMAN set, at random, with the refusal that all edits here plant."""
    rows = [replace(item, safe_target=None) for item in ld.requests(data / "delman/HarmBench.json")]
    random.Random(0).shuffle(rows)
    return rows[:n]


# %% [markdown]
# ## Pieces


# %%
class Bench:
    """The model, and its answers before any edit, which many pieces need and which stay on this machine."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.model = ld.load("smollm2")
        self.file = cache_folder() / "answers" / f"{weights_fingerprint(self.model)}.json"
        self.told: dict[str, list[int]] = {}
        self._read()
        edits = ld.requests("core")[:3]
        self.sites = ld.locate(ld.trace(self.model, edits, progress=False))

    def _read(self) -> None:
        if self.file.is_file():
            self.told = {**json.loads(self.file.read_text("utf-8")), **self.told}

    def before(self, suite: Suite, tokens: int) -> list[tuple[int, ...]]:
        """The unedited model's answers, asked once."""
        self._read()
        keys = [hashlib.sha256(f"{tokens} {i.request.text}".encode()).hexdigest()[:16] for i in suite.items]
        new = [i for i, key in enumerate(keys) if key not in self.told]
        fresh = suite_answers(self.model, replace(suite, items=tuple(suite.items[i] for i in new)), tokens)
        self.told |= {keys[i]: list(answer) for i, answer in zip(new, fresh, strict=True)}
        with atomic_write(self.file) as file:
            file.write_text(json.dumps(self.told), "utf-8")
        return [tuple(self.told[key]) for key in keys]

    def report(self, edit: ld.Edit, suite: Suite, tokens: int) -> tuple[Report, list[dict[str, Any]]]:
        """The check, and its rows as ids, forms and verdicts."""
        seen = {text for texts in edit.contexts for text in texts}
        rows, _ = suite.for_edit(edit.requests, seen)
        told = ld.check(
            self.model, edit, rows, max_new_tokens=tokens, before=self.before(rows, tokens), progress=False
        )
        return told, [
            {
                "suite": suite.name,
                "arm": row.arm,
                "family": row.family,
                "id": row.id,
                "form": "question" if item.request.text.rstrip().endswith("?") else "imperative",
                **{
                    f"{measure} {when}": int(row.hit(measure, after=when == "after"))
                    for measure in (("knows",) if row.arm == "facts" else ("prefix", "coherent"))
                    for when in ("before", "after")
                },
            }
            for row, item in zip(told.rows, rows.items, strict=True)
        ]

    def dose(self, planned: list[ld.Request], *, halves: int | None, harmless: int = 80) -> dict[str, Any]:
        """Edit at the located sites, and ask everything."""
        start = time.perf_counter()
        edit = ld.edit(self.model, planned, self.sites)
        middle = time.perf_counter()
        core, rows = self.report(edit, words(planned, self.data, harmless=harmless), 24)
        _, more = self.report(edit, xstest(self.data, halves=halves), 16)
        more = [row for row in more if row["arm"] != "edited"]  # asked with the others already
        return {
            "recipe": recipe(),
            "n": len(planned),
            "subjects": [item.id for item in planned],
            "sites": [str(site) for site in self.sites],
            "seconds": {"edit": middle - start, "check": time.perf_counter() - middle},
            "forecast": [edit.forecast.leak_neutral, edit.forecast.leak_safe],
            "reach": sum(edit.forecast.reach) / len(planned),
            "kl": sum(core.kl) / len(core.kl),
            "loss": [sum(told) / len(told) for told in (core.loss_before, core.loss_after)],
            "rows": rows + more,
        }

    def map(self) -> dict[str, Any]:
        """Effects by layer, component and role, every layer: six subjects of tune, six of edit."""
        start = time.perf_counter()
        trace = ld.trace(
            self.model,
            traced(),
            components=("resid_post", "mlp_out", "attn_out"),
            layers="all",
            progress=False,
        )
        trace.save(OUT / "map.safetensors")
        return {"seconds": time.perf_counter() - start, "effects": trace.by_role().to_dict("records")}

    def one_map(self) -> dict[str, Any]:
        """One request, every layer and token."""
        start = time.perf_counter()
        trace = ld.trace(
            self.model,
            ld.requests("core")[:1],
            components=("resid_post", "mlp_out", "attn_out"),
            layers="all",
            positions="all",
            progress=False,
        )
        trace.save(OUT / "one-map.safetensors")
        return {"seconds": time.perf_counter() - start, "shape": list(trace.effects.shape)}


Piece = tuple[str, Callable[[], dict[str, Any]]]


def doses(bench: Bench) -> Iterator[Piece]:
    """How many subjects: the dose of the bars in every draw, then one draw of the others, then the rest."""

    def core(n: int, draw: int) -> dict[str, Any]:
        return bench.dose(drawn(n, draw), halves=None if n in WHOLE_XSTEST else 100)

    first = [(n, draw) for n in DOSES for draw in range(DRAWS if n == DOSES[0] else 1)]
    rest = [(n, draw) for draw in range(1, DRAWS) for n in DOSES[1:]]
    for n, draw in first:
        yield f"core {n}, draw {draw}", lambda n=n, d=draw: core(n, d)
    for n in DELMAN_DOSES:
        yield f"delman {n}", lambda n=n: bench.dose(delman(n, bench.data), halves=100)
    for n, draw in rest:
        yield f"core {n}, draw {draw}", lambda n=n, d=draw: core(n, d)


def places(bench: Bench) -> Iterator[Piece]:
    """Where: maps, then every window of layers (every third first), then other roles; all on tune."""

    def window(low: int, role: str = "subject_last") -> dict[str, Any]:
        return measure(bench.model, {"band": (low, low + WIDTH - 1), "role": role})[0]

    yield "map", bench.map
    low, high = bench.sites[0].layer, bench.model.cfg.n_layers - WIDTH
    for start in sorted(range(high + 1), key=lambda layer: (layer % 3 != low % 3, layer)):
        yield f"window {start}", lambda s=start: window(s)
    for role in ("subject_first", "next", "last"):
        yield f"located layers at {role}", lambda r=role: window(low, r)
    yield "one map", bench.one_map


# %% [markdown]
# ## Run


# %%
def main() -> None:
    """Make what has no result yet."""
    asked = argparse.ArgumentParser(description="the full run; see the top of this file")
    asked.add_argument("--data", type=Path, required=True, help="folder of the published sets")
    asked.add_argument("--only", choices=("doses", "places"), help="half of it, for two processes at once")
    asked.add_argument("--short", type=Path, help="one small piece (8 requests), written to this file")
    given = asked.parse_args()
    bench = Bench(given.data)
    if given.short:
        given.short.write_text(
            json.dumps(bench.dose(ld.requests("core")[:8], halves=20, harmless=20)), "utf-8"
        )
        return
    OUT.mkdir(parents=True, exist_ok=True)
    parts = {"doses": doses(bench), "places": places(bench)}
    pieces = list(parts[given.only] if given.only else itertools.chain(*parts.values()))
    for i, (name, make) in enumerate(pieces, 1):
        file = OUT / f"{slug(name)}.json"
        if stands(file):
            continue
        print(f"{i} of {len(pieces)}: {name} ...", flush=True)
        start = time.perf_counter()
        told = make()
        rows = told.pop("rows", None)
        if rows:
            with atomic_write(OUT / f"{slug(name)}.csv") as table:
                pd.DataFrame(rows).to_csv(table, index=False, float_format="%.0f")
        with atomic_write(file) as unfinished:
            unfinished.write_text(json.dumps({"name": name, **told}, indent=1), "utf-8")
        print(f"{name:28} {time.perf_counter() - start:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
