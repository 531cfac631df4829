"""What the results of analyses/real_model.py say: tables, which the figures and the README are made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_defense.intervals import rank_correlation

RESULTS = Path(__file__).parent / "results/real_model"
WORDS = ("wording", "wrapper")


def results(start: str) -> dict[str, dict[str, Any]]:
    """The pieces whose name begins so.

    Raises:
        ValueError: some are of edits made in another way than the others, so that they are not to be compared.
    """
    told = [json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob(f"{start}*.json"))]
    if len({piece.get("recipe") for piece in told}) > 1:
        raise ValueError(f"the pieces {start!r} are of several recipes; let analyses/real_model.py end")
    return {piece["name"]: piece for piece in told}


def rows_of(name: str) -> pd.DataFrame:
    """The rows of a piece; `human` marks the published jailbreak templates."""
    rows = pd.read_csv(RESULTS / f"{name}.csv")
    return rows.assign(human=rows["family"].fillna("").str.startswith("human"))


def new_refusals(rows: pd.DataFrame, suite: str, *arms: str, measure: str = "prefix") -> pd.Series:
    """Rows that were answered before: whether they are refused now."""
    some = rows[(rows["suite"] == suite) & rows["arm"].isin(arms)]
    return some[f"{measure} after"].gt(some[f"{measure} before"]).astype(int)


def summary() -> pd.DataFrame:
    """One row an edit of the dose curve: shares, costs, forecast."""
    table = []
    for name, piece in (results("core") | results("delman")).items():
        rows = rows_of(name)
        own = rows[(rows["suite"] == "real_model") & rows["arm"].isin(WORDS)]
        table.append(
            {
                "edit": name,
                "set": name.split()[0],
                "subjects": piece["n"],
                "unseen words, coherent": own.loc[~own["human"], "coherent after"].mean(),
                "unseen words, prefix": own.loc[~own["human"], "prefix after"].mean(),
                "human wrappers, coherent": own.loc[own["human"], "coherent after"].mean(),
                "human wrappers, prefix": own.loc[own["human"], "prefix after"].mean(),
                "unseen subjects, newly refused": new_refusals(rows, "real_model", "unseen").mean(),
                "benign, newly refused": new_refusals(rows, "real_model", "benign").mean(),
                "safe, newly refused": new_refusals(rows, "real_model", "safe").mean(),
                "XSTest safe, newly refused": new_refusals(rows, "xstest", "safe").mean(),
                "XSTest unsafe, newly refused": new_refusals(rows, "xstest", "unseen").mean(),
                "KL": piece["kl"],
                "loss": piece["loss"][1] / piece["loss"][0] - 1,
                "facts lost": int((rows["knows after"] < rows["knows before"]).sum()),
                "leak to safe text": piece["forecast"][1],
            }
        )
    return pd.DataFrame(table).sort_values(["set", "subjects", "edit"], ignore_index=True)


def dose_table(told: pd.DataFrame) -> str:
    """The README's table: means over the draws of each dose."""
    heads = [
        "subjects",
        "edits",
        "unseen words",
        "human wrappers",
        "other subjects",
        "benign",
        "XSTest safe",
        "XSTest unsafe",
        "KL",
        "loss",
        "facts lost",
    ]
    lines = [heads, ["---"] * len(heads)]
    for (kind, n), some in told.groupby(["set", "subjects"]):
        mean = some.drop(columns=["edit", "set"]).mean()
        both = [
            f"{mean[f'{words}, coherent']:.0%} ({mean[f'{words}, prefix']:.0%})"
            for words in ("unseen words", "human wrappers")
        ]
        new = ("unseen subjects", "benign", "XSTest safe", "XSTest unsafe")
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
    """New refusals (prefix) by suite, arm and grammatical form, over all edits of 16 subjects and more."""
    names = [name for name, piece in (results("core") | results("delman")).items() if piece["n"] >= 16]
    rows = pd.concat([rows_of(name) for name in names], ignore_index=True)
    rows = rows[rows["arm"] != "facts"].assign(new=rows["prefix after"].gt(rows["prefix before"]))
    told = rows.groupby(["suite", "arm", "form"])["new"].agg(["mean", "size"]).reset_index()
    return told.rename(columns={"mean": "newly refused", "size": "rows"})


def windows() -> pd.DataFrame:
    """One row an edit of five layers at a role: the trace's mean effect there, and what the edit did.

    Every window at the subject's last token that was made, and the located layers at other roles.
    """
    effects = pd.DataFrame(results("map")["map"]["effects"])
    effects = effects[effects["component"] == "residual"].set_index(["role", "layer"])["effect"]
    edits = [(int(name.split()[1]), "subject_last", piece) for name, piece in results("window").items()]
    edits += [(_located(), name.split()[-1], piece) for name, piece in results("located").items()]
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


def _located() -> int:
    """The lowest of the located layers, as the edits of the curve name it: "residual 5 at ..."."""
    return int(next(iter(results("core").values()))["sites"][0].split()[1])


def correlations() -> pd.DataFrame:
    """Does the map say where to edit, and does the forecast say what it costs: Spearman's rho, 95% interval."""
    everywhere, dose = windows(), summary()
    sweep = everywhere[everywhere["role"] == "subject_last"]
    over = "XSTest safe, newly refused"
    asked = [
        ("effect", "coherent", "windows", sweep),
        ("effect", "KL", "windows", sweep),
        ("effect", "coherent", "windows and roles", everywhere),
        ("leak to safe text", over, "edits", dose),
        ("leak to safe text", "safe, newly refused", "edits", dose),
        ("leak to safe text", "KL", "edits", dose),
        ("subjects", over, "edits", dose),
    ]
    table = []
    for x, y, what, frame in asked:
        rho, (low, high) = rank_correlation(*(frame[name].astype(float).tolist() for name in (x, y)))
        table.append({"of": x, "and": y, "over": what, "n": len(frame), "rho": rho, "low": low, "high": high})
    return pd.DataFrame(table)
