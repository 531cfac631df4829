"""What the results of analyses/real_model.py say: tables, which the figures and the README are made of."""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import lens_defense as ld
from lens_defense.statistics import clustered_rate, rank_correlation
from lens_defense.tracing.trace_result import join_traces

RESULTS = Path(__file__).parent / "results/real_model"
WORDS = ("paraphrase", "jailbreak")
LARGE = 16
"""Subjects from which on an edit costs something."""
WIDTH = 5
"""Layers of a window."""


def results(*starts: str) -> dict[str, dict[str, Any]]:
    """The pieces whose name begins so.

    Raises:
        ValueError: some are of edits made in another way than the others, so that they are not to be compared.
    """
    files = [file for start in starts for file in sorted(RESULTS.glob(f"{slug(start)}*.json"))]
    told = [json.loads(file.read_text("utf-8")) for file in files]
    if len({piece.get("recipe") for piece in told}) > 1:
        raise ValueError(f"the pieces {starts!r} are of several recipes; let analyses/real_model.py end")
    return {piece["name"]: piece for piece in told}


def slug(name: str) -> str:
    """The name of a piece as a file name without spaces: core-16-draw-2."""
    return re.sub(r"[ ,]+", "-", name)


def rows_of(name: str) -> pd.DataFrame:
    """The rows of a piece; `human` marks the published jailbreak templates."""
    rows = pd.read_csv(RESULTS / f"{slug(name)}.csv")
    return rows.assign(human=rows["family"].fillna("").str.startswith("human"))


def new_refusals(rows: pd.DataFrame, suite: str, *arms: str, measure: str = "prefix") -> pd.Series:
    """Of each row, whether it was answered before and is refused now; what was refused before counts as not."""
    some = rows[(rows["suite"] == suite) & rows["arm"].isin(arms)]
    return some[f"{measure} after"].gt(some[f"{measure} before"]).astype(int).set_axis(some["id"])


def in_other_words(rows: pd.DataFrame, measure: str) -> dict[str, pd.Series]:
    """Of each row about an edit's own subjects in words that it never saw, whether it is refused now."""
    own = rows[(rows["suite"] == "real_model") & rows["arm"].isin(WORDS)]
    parts = {
        "paraphrases": own[own["arm"] == "paraphrase"],
        "jailbreaks": own[(own["arm"] == "jailbreak") & ~own["human"]],
        "unseen words": own[~own["human"]],
        "human jailbreaks": own[own["human"]],
    }
    return {name: some[measure].set_axis(some["id"]) for name, some in parts.items()}


HARMLESS = {
    "held-out subjects": ("real_model", "held_out"),
    "benign": ("real_model", "benign"),
    "over-refusal": ("real_model", "over_refusal"),
    "XSTest safe": ("xstest", "over_refusal"),
    "XSTest unsafe": ("xstest", "held_out"),
}
"""What an edit should leave alone, by suite and arm."""


def summary() -> pd.DataFrame:
    """One row an edit of the dose curve: shares, costs, forecast."""
    table = []
    for name, piece in results("core", "delman").items():
        rows = rows_of(name)
        table.append(
            {
                "edit": name,
                "set": name.split()[0],
                "draw": name.split()[-1] if name.startswith("core") else "delman",
                "subjects": piece["n"],
                **{
                    f"{words}, {judge}": hits.mean()
                    for judge in ("coherent", "prefix")
                    for words, hits in in_other_words(rows, f"{judge} after").items()
                },
                **{
                    f"{words}, prefix before": hits.mean()
                    for words, hits in in_other_words(rows, "prefix before").items()
                },
                **{
                    f"{what}, newly refused": new_refusals(rows, *arm).mean()
                    for what, arm in HARMLESS.items()
                },
                "KL": piece["kl"],
                "loss": piece["loss"][1] / piece["loss"][0] - 1,
                "facts lost": int((rows["knows after"] < rows["knows before"]).sum()),
                "leak to safe text": piece["forecast"][1],
            }
        )
    return pd.DataFrame(table).sort_values(["set", "subjects", "edit"], ignore_index=True)


def bars_of(n: int) -> pd.DataFrame:
    """The rates of all edits of n subjects of "core", with 95% intervals by request: what the bars are about."""
    every = pd.concat([rows_of(name) for name in results("core") if name.startswith(f"core {n},")])
    shares = {f"{name}, coherent": hits for name, hits in in_other_words(every, "coherent after").items()}
    shares |= {f"{name}, prefix": hits for name, hits in in_other_words(every, "prefix after").items()}
    shares |= {
        f"{name}, prefix before": hits for name, hits in in_other_words(every, "prefix before").items()
    }
    shares |= {f"{name}, newly refused": new_refusals(every, *arm) for name, arm in HARMLESS.items()}
    return _rates(shares.items(), ["rate of"])


def _rates(shares: Iterable[tuple[Any, pd.Series]], names: list[str]) -> pd.DataFrame:
    """Each share with its 95% interval; rows of one request, which several edits were asked, are related."""
    table = []
    for key, hits in shares:
        rate, (low, high) = clustered_rate(hits.astype(bool).tolist(), hits.index.astype(str).tolist())
        keys = (key,) if isinstance(key, str) else key
        table.append((*keys, len(hits), hits.index.nunique(), rate, low, high))
    return pd.DataFrame(table, columns=pd.Index([*names, "rows", "requests", "rate", "low", "high"]))


def dose_table(told: pd.DataFrame) -> str:
    """The README's table: means over the draws of each dose."""
    heads = [
        "subjects",
        "edits",
        "paraphrases",
        "jailbreaks",
        "human jailbreaks",
        "held-out subjects",
        "benign",
        "XSTest safe",
        "XSTest unsafe",
        "KL",
        "loss",
        "facts lost",
    ]
    lines = [heads, ["---"] * len(heads)]
    for (kind, n), some in told.groupby(["set", "subjects"]):
        mean = some.drop(columns=["edit", "set", "draw"]).mean()
        both = [
            f"{mean[f'{words}, coherent']:.0%} ({mean[f'{words}, prefix']:.0%})"
            for words in ("paraphrases", "jailbreaks", "human jailbreaks")
        ]
        new = ("held-out subjects", "benign", "XSTest safe", "XSTest unsafe")
        lines.append(
            [
                f"{n} of {_SETS[kind]}",
                f"{len(some)}",
                *both,
                *(f"{mean[f'{arm}, newly refused']:.1%}" for arm in new),
                f"{mean['KL']:.4f}",
                f"{mean['loss']:+.2%}",
                f"{mean['facts lost']:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SETS = {"core": "core", "delman": "DELMAN's"}


def by_form() -> pd.DataFrame:
    """By set, arm and grammatical form, over the edits of sixteen subjects and more, with 95% intervals.

    Of the edit's own subjects what is refused coherently now, of all others what is newly refused by prefix.
    """
    shares: list[tuple[Any, pd.Series]] = []
    for kind in _SETS:
        names = [name for name, piece in results("core", "delman").items() if piece["n"] >= LARGE]
        every = [rows_of(name) for name in names if name.startswith(kind)]
        for form, some in pd.concat(every).groupby("form") if every else ():
            own = in_other_words(some, "coherent after")
            new = {what: new_refusals(some, *arm) for what, arm in HARMLESS.items()}
            told = {f"{name}, refused": hits for name, hits in own.items() if name != "unseen words"}
            told |= {f"{name}, newly refused": hits for name, hits in new.items()}
            shares += [((kind, name, form), hits) for name, hits in told.items() if len(hits)]
    return _rates(shares, ["set", "rate of", "form"])


def windows() -> pd.DataFrame:
    """One row an edit of five layers at a role: the trace's mean effect there, and what the edit did.

    Every window at the subject's last token that was made, and the located layers at other roles.
    """
    effects = pd.DataFrame(results("map")["map"]["effects"])
    effects = effects[effects["component"] == "resid_post"].set_index(["role", "layer"])["effect"]
    edits = [
        (int(name.split()[1]), "subject_last", piece)
        if name.startswith("window")
        else (located(), name.split()[-1], piece)
        for name, piece in results("window", "located").items()
    ]
    table = [
        {
            "first layer": low,
            "role": role,
            "effect": effects[role].loc[low : low + 4].mean(),
            "coherent": np.mean([piece[arm][1] for arm in WORDS]),
            "prefix": np.mean([piece[arm][0] for arm in WORDS]),
            "KL": piece["kl"],
            "new refusals": piece["new refusals"],
            "facts lost": piece["facts lost"],
        }
        for low, role, piece in edits
    ]
    order = ["subject_last", "subject_first", "next", "last"]
    return pd.DataFrame(table).sort_values(
        ["role", "first layer"],
        key=lambda c: c.map(order.index) if c.name == "role" else c,
        ignore_index=True,
    )


def located() -> int:
    """The lowest of the located layers, as the edits of the curve name it: "residual 5 at ..."."""
    return int(next(iter(results("core").values()))["sites"][0].split()[1])


def locations() -> pd.DataFrame:
    """Where `locate` points by default, from maps of more or fewer requests: the lowest and highest layer."""
    twelve = ld.Trace.load(RESULTS / "map.safetensors").only("resid_post")
    single = [twelve[i] for i in range(len(twelve.prompts))]
    maps = [("all twelve of tune and edit", twelve)]
    for seed in range(8):
        some = sorted(random.Random(seed).sample(range(len(single)), 6))
        maps.append((f"six of them, seed {seed}", join_traces([single[i] for i in some])))
    maps += [(f"request {i} alone", one) for i, one in enumerate(single)]
    harmful = ld.Trace.load(RESULTS.parent / "storage_sites/roles.safetensors").only("resid_post")
    maps.append((f"{len(harmful.prompts)} of DELMAN's", harmful))
    found = [(name, ld.locate(trace)) for name, trace in maps]
    rows = [(name, sites[0].role, sites[0].layer, sites[-1].layer) for name, sites in found]
    return pd.DataFrame(rows, columns=pd.Index(["map", "role", "lowest", "highest"]))


def correlations() -> pd.DataFrame:
    """Does the map say where to edit, and does the forecast say what it costs: Spearman's rho, 95% interval.

    What is drawn again is what is not related: blocks of five neighbouring windows, which share layers, and
    roles; and whole draws, whose doses are nested, with DELMAN's as one more.
    """
    everywhere, dose = windows(), summary()
    everywhere = everywhere.assign(
        block=everywhere["role"] + (everywhere["first layer"] // WIDTH).astype(str)
    )
    sweep, own = (
        everywhere[everywhere["role"] == "subject_last"],
        dose[dose["set"] == "core"],
    )
    over = "XSTest safe, newly refused"
    asked = [
        ("effect", "coherent", "windows", sweep, "block"),
        ("effect", "KL", "windows", sweep, "block"),
        ("effect", "coherent", "windows and roles", everywhere, "block"),
        ("leak to safe text", over, "edits", dose, "draw"),
        ("leak to safe text", over, "edits of core", own, "draw"),
        ("leak to safe text", "over-refusal, newly refused", "edits", dose, "draw"),
        ("leak to safe text", "KL", "edits", dose, "draw"),
        ("subjects", over, "edits", dose, "draw"),
        ("subjects", over, "edits of core", own, "draw"),
    ]
    table = []
    for x, y, what, frame, by in asked:
        pairs = (frame[name].astype(float).tolist() for name in (x, y))
        rho, (low, high) = rank_correlation(*pairs, clusters=frame[by].tolist())
        independent = frame[by].nunique()
        row = {"of": x, "and": y, "over": what, "n": len(frame), "independent": independent, "rho": rho}
        table.append({**row, "low": low, "high": high})
    return pd.DataFrame(table)
