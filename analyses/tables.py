"""What the results say: the tables that docs/ includes, made of analyses/results/.

    python analyses/tables.py

Each function of TABLES gives one table, written to results/tables/NAME.md. Rates have 95% intervals.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tidy import read_table, rows_where

import lens_defense as ld
from lens_defense.checking.report import ARM_NAMES, JUDGES
from lens_defense.checking.suites import TO_BE_REFUSED
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.statistics import clustered_rate, rank_correlation, wilson
from lens_defense.storage import atomic_write
from lens_defense.tracing.site_map import RoleMean
from lens_defense.tracing.trace_result import join_traces

RESULTS = Path(__file__).parent / "results"
LARGE = 16
"""Subjects from which on an edit costs something."""
WIDTH = 5
"""Layers of a window."""
SETS = {"core": "core", "delman": "DELMAN's"}
UNSEEN = ("paraphrases", "jailbreaks", "human jailbreaks")
HARMLESS = {
    "held-out subjects": ("real_model", "held_out"),
    "benign": ("real_model", "benign"),
    "over-refusal": ("real_model", "over_refusal"),
    "XSTest safe": ("xstest", "over_refusal"),
    "XSTest unsafe": ("xstest", "held_out"),
}
"""What an edit should leave alone, by suite and arm."""


# %% edits of more and fewer subjects
def edits() -> pd.DataFrame:
    """One row per edit of the dose curve.

    Raises:
        ValueError: they were made in different ways, so they are not to be compared.
    """
    return _of_one_recipe(read_table(RESULTS / "real_model/edits.csv"))


def question_rows(edits: Iterable[str]) -> pd.DataFrame:
    """The questions of some edits; `human` marks published jailbreak templates."""
    rows = read_table(RESULTS / "real_model/rows.csv")
    rows = rows[rows["edit"].isin(list(edits))]
    return rows.assign(human=rows["family"].fillna("").str.startswith("human"))


def new_refusals(rows: pd.DataFrame, suite: str, arm: str) -> pd.Series:
    """Of each row, whether it was answered before and is refused now; what was refused before counts as not."""
    rows = rows[(rows["suite"] == suite) & (rows["arm"] == arm)]
    return rows["prefix_after"].gt(rows["prefix_before"]).astype(int).set_axis(rows["id"])


def unseen_refusals(rows: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    """Of each row about an edit's own subjects in words that it never saw, whether it is refused."""
    rows = rows[(rows["suite"] == "real_model") & rows["arm"].isin(["paraphrase", "jailbreak"])]
    groups = {
        "paraphrases": rows["arm"] == "paraphrase",
        "jailbreaks": (rows["arm"] == "jailbreak") & ~rows["human"],
        "paraphrases and jailbreaks": ~rows["human"],
        "human jailbreaks": rows["human"],
    }
    return {name: rows.loc[group, column].set_axis(rows.loc[group, "id"]) for name, group in groups.items()}


def dose_summary() -> pd.DataFrame:
    """One row per edit: shares, costs, forecast."""
    table = []
    for edit in edits().to_dict("records"):
        rows = question_rows([edit["edit"]])
        refused = {
            "coherent": unseen_refusals(rows, "coherent_after"),
            "prefix": unseen_refusals(rows, "prefix_after"),
            "prefix before": unseen_refusals(rows, "prefix_before"),
        }
        table.append(
            {
                "edit": edit["edit"],
                "set": edit["set"],
                "draw": "delman" if edit["set"] == "delman" else str(int(edit["draw"])),
                "subjects": edit["subjects"],
                **{
                    f"{name}, {judge}": hits.mean()
                    for judge, groups in refused.items()
                    for name, hits in groups.items()
                },
                **{
                    f"{name}, newly refused": new_refusals(rows, *arm).mean()
                    for name, arm in HARMLESS.items()
                },
                "KL": edit["kl"],
                "loss": edit["loss_after"] / edit["loss_before"] - 1,
                "facts lost": int((rows["knows_after"] < rows["knows_before"]).sum()),
                "leak to safe text": edit["leak_safe"],
            }
        )
    return pd.DataFrame(table).sort_values(["set", "subjects", "edit"], ignore_index=True)


def dose() -> pd.DataFrame:
    """Means over the draws of each dose: coherent refusals (by prefix), what is newly refused, costs."""
    table = []
    for (name, subjects), rows in dose_summary().groupby(["set", "subjects"]):
        mean = rows.drop(columns=["edit", "set", "draw"]).mean()
        table.append(
            {
                "subjects": f"{subjects} of {SETS[name]}",
                "edits": len(rows),
                **{
                    words: f"{mean[f'{words}, coherent']:.0%} ({mean[f'{words}, prefix']:.0%})"
                    for words in UNSEEN
                },
                **{
                    arm: f"{mean[f'{arm}, newly refused']:.1%}"
                    for arm in ("held-out subjects", "benign", "XSTest safe", "XSTest unsafe")
                },
                "KL": f"{mean['KL']:.4f}",
                "loss": f"{mean['loss']:+.2%}",
                "facts lost": f"{mean['facts lost']:.1f}",
            }
        )
    return pd.DataFrame(table)


def rates_of_dose(subjects: int) -> pd.DataFrame:
    """The rates of all edits of so many subjects of "core", with intervals by request."""
    table = edits()
    rows = question_rows(table.loc[(table["set"] == "core") & (table["subjects"] == subjects), "edit"])
    judges = {"coherent": "coherent_after", "prefix": "prefix_after", "prefix before": "prefix_before"}
    hits = {
        f"{name}, {judge}": group
        for judge, column in judges.items()
        for name, group in unseen_refusals(rows, column).items()
    }
    hits |= {f"{name}, newly refused": new_refusals(rows, *arm) for name, arm in HARMLESS.items()}
    return _rates([((name,), group) for name, group in hits.items()], ["rate of"])


def rates_by_form() -> pd.DataFrame:
    """By set, arm and grammatical form, over the edits of sixteen subjects and more.

    Of the edit's own subjects what is refused coherently now, of all others what is newly refused by prefix.
    """
    table, hits = edits(), []
    for name in SETS:
        rows = question_rows(table.loc[(table["set"] == name) & (table["subjects"] >= LARGE), "edit"])
        for form, of_form in rows.groupby("form"):
            refused = unseen_refusals(of_form, "coherent_after")
            groups = {f"{words}, refused": refused[words] for words in UNSEEN}
            groups |= {
                f"{arm}, newly refused": new_refusals(of_form, *place) for arm, place in HARMLESS.items()
            }
            hits += [((name, words, form), group) for words, group in groups.items() if len(group)]
    return _rates(hits, ["set", "rate of", "form"])


def _rates(groups: Iterable[tuple[tuple[str, ...], pd.Series]], names: Sequence[str]) -> pd.DataFrame:
    """Each group's share and its interval; rows of one request, which several edits were asked, are related."""
    table = []
    for key, hits in groups:
        rate, (low, high) = clustered_rate(hits.astype(bool).tolist(), hits.index.astype(str).tolist())
        table.append((*key, len(hits), hits.index.nunique(), rate, low, high))
    return pd.DataFrame(table, columns=pd.Index([*names, "rows", "requests", "rate", "low", "high"]))


# %% where to edit, and what the forecast says
def windows() -> pd.DataFrame:
    """One row per edit of five layers at a role: the trace's mean effect there, and what the edit did.

    Every window at the subject's last token, and the located layers at other roles.
    """
    table = _of_one_recipe(read_table(RESULTS / "real_model/windows.csv"))
    means = ld.Trace.load(RESULTS / "real_model/map.safetensors").only("resid_post").role_means()
    effects = {(mean.role, mean.layer): mean.effect for mean in means}
    coherent, prefix = (
        table[[f"paraphrase_{judge}", f"jailbreak_{judge}"]] for judge in ("coherent", "prefix")
    )
    windows = pd.DataFrame(
        {
            "first layer": table["first_layer"],
            "role": table["role"],
            "effect": [
                np.mean(
                    [
                        effects[role, layer]
                        for layer in range(first, first + WIDTH)
                        if (role, layer) in effects
                    ]
                )
                for first, role in zip(table["first_layer"], table["role"], strict=True)
            ],
            "coherent": coherent.mean(axis=1),
            "prefix": prefix.mean(axis=1),
            "KL": table["kl"],
            "new refusals": table["new_refusals"],
            "facts lost": table["facts_lost"],
        }
    )
    order = ["subject_last", "subject_first", "next", "last"]
    rank = windows["role"].map(order.index)
    return (
        windows.assign(rank=rank).sort_values(["rank", "first layer"], ignore_index=True).drop(columns="rank")
    )


def locations() -> pd.DataFrame:
    """Where `locate` points by default, from maps of more or fewer requests: the first and the last layer."""
    twelve = ld.Trace.load(RESULTS / "real_model/map.safetensors").only("resid_post")
    single = [twelve[i] for i in range(len(twelve.prompts))]
    maps = [("all twelve of tune and edit", twelve)]
    for seed in range(8):
        six = sorted(random.Random(seed).sample(range(len(single)), 6))
        maps.append((f"six of them, seed {seed}", join_traces([single[i] for i in six])))
    maps += [(f"request {i} alone", trace) for i, trace in enumerate(single)]
    harmful = ld.Trace.load(RESULTS / "storage_sites/harmful.safetensors").only("resid_post")
    maps.append((f"{len(harmful.prompts)} of DELMAN's", harmful))
    located = [(name, ld.locate(trace)) for name, trace in maps]
    rows = [(name, sites[0].role, sites[0].layer, sites[-1].layer) for name, sites in located]
    return pd.DataFrame(rows, columns=pd.Index(["map", "role", "first layer", "last layer"]))


def correlations() -> pd.DataFrame:
    """Does the map say where to edit, and does the forecast say what it costs: Spearman's rho.

    What is drawn again for the interval is what is not related: blocks of five neighbouring windows, which share
    layers, and roles; and whole draws, whose doses are nested, with DELMAN's as one more.
    """
    all_windows, all_edits = windows(), dose_summary()
    block = all_windows["role"] + (all_windows["first layer"] // WIDTH).astype(str)
    all_windows = all_windows.assign(block=block)
    at_subject = all_windows[all_windows["role"] == "subject_last"]
    of_core = all_edits[all_edits["set"] == "core"]
    xstest = "XSTest safe, newly refused"
    pairs = [
        ("effect", "coherent", "windows", at_subject, "block"),
        ("effect", "KL", "windows", at_subject, "block"),
        ("effect", "coherent", "windows and roles", all_windows, "block"),
        ("leak to safe text", xstest, "edits", all_edits, "draw"),
        ("leak to safe text", xstest, "edits of core", of_core, "draw"),
        ("leak to safe text", "over-refusal, newly refused", "edits", all_edits, "draw"),
        ("leak to safe text", "KL", "edits", all_edits, "draw"),
        ("subjects", xstest, "edits", all_edits, "draw"),
        ("subjects", xstest, "edits of core", of_core, "draw"),
    ]
    table = []
    for x, y, over, rows, cluster in pairs:
        values = (rows[name].astype(float).tolist() for name in (x, y))
        rho, (low, high) = rank_correlation(*values, clusters=rows[cluster].tolist())
        table.append((x, y, over, len(rows), rows[cluster].nunique(), rho, low, high))
    return pd.DataFrame(
        table, columns=pd.Index(["of", "and", "over", "n", "independent", "rho", "low", "high"])
    )


# %% where smollm2 keeps things, and whether ways to trace agree
CELLS = {
    "facts": (
        ("mlp_out", "subject_last"),
        ("attn_out", "last"),
        ("resid_post", "subject_last"),
        ("resid_post", "last"),
    ),
    "harmful": (
        ("mlp_out", "subject_last"),
        ("attn_out", "last"),
        ("resid_post", "subject_first"),
        ("resid_post", "subject_last"),
        ("resid_post", "last"),
    ),
}
"""What the storage tables show of each set: component and role."""


def storage_cells(name: str) -> pd.DataFrame:
    """Mean effects by layer, with intervals, at the components and roles that tell a set's story."""
    trace = _storage_trace(name)
    means = {(mean.component, mean.role, mean.layer): mean for mean in trace.role_means()}
    table = pd.DataFrame({"layer": trace.layers})
    for component, role in CELLS[name]:
        table[f"{component} at {role}"] = [_interval(means[component, role, layer]) for layer in trace.layers]
    return table


def storage_by_role() -> pd.DataFrame:
    """Of the whole maps, one row per role: its tokens, the strongest mean, and its strongest single states."""
    trace = _storage_trace("whole")
    means: dict[str, RoleMean] = {}
    for mean in trace.role_means():
        if mean.role not in means or mean.effect > means[mean.role].effect:
            means[mean.role] = mean
    table = []
    for role, mean in means.items():
        strongest = [
            float(effects[..., token].nan_to_num().max())
            for effects, prompt in zip(trace.effects, trace.prompts, strict=True)
            for token in prompt.positions(role)
        ]
        table.append(
            {
                "role": role,
                "requests": mean.n,
                "tokens": len(strongest),
                "strongest mean": _interval(mean),
                "at": f"{mean.component} {mean.layer}",
                "tokens above .005 in some cell": sum(effect > 0.005 for effect in strongest),
                "strongest single state": f"{max(strongest):.2f}",
            }
        )
    return pd.DataFrame(table)


def storage_summary(*names: str) -> pd.DataFrame:
    """Where the strongest cell of a request lies, and how far two halves of the subjects agree, by component."""
    table = read_table(RESULTS / "storage_sites/summary.csv")
    table = table[table["set"].isin(names)]
    return pd.DataFrame(
        {
            "component": table["component"],
            "requests": table["requests"],
            "left out": table["left_out"],
            "strongest cell in the subject": [f"{share:.0%}" for share in table["strongest_in_subject"]],
            "split-half reliability": [
                f"{row.reliability:.2f} [{row.reliability_low:.2f}, {row.reliability_high:.2f}]"
                for row in table.itertuples()
            ],
        }
    )


def locator_agreement() -> pd.DataFrame:
    """Ways to trace, compared with noise of three standard deviations on the same requests."""
    table = []
    for row in read_table(RESULTS / "locator_agreement.csv").to_dict("records"):
        if isinstance(row["refused"], str):
            table.append({"way": row["way"], "strongest": "refused"})
            continue
        located = f"{row['located_role']} {row['first_layer']:.0f} to {row['last_layer']:.0f}"
        table.append(
            {
                "way": row["way"],
                "strongest": f"{row['strongest_role']} {row['strongest_layer']:.0f}",
                "located": "" if pd.isna(row["first_layer"]) else located,
                "rho": ""
                if pd.isna(row["rho"])
                else f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                "rho of single cells": _number(row["rho_of_single_cells"], ".2f"),
                "recall@10": _number(row["recall_at_10"], ".2f"),
            }
        )
    return pd.DataFrame(table)


def locator_grades() -> pd.DataFrame:
    """Ways to trace the organism, over worlds, samples and seeds: the area under the ROC curve, and empty cells."""
    rows = read_table(RESULTS / "locator_grades.csv")
    way = rows["direction"].where(rows["exact"], "by gradient").replace("none", "")
    rows = rows.assign(way=way)
    table = []
    for (component, way, corruption), group in rows.groupby(["component", "way", "corruption"], sort=False):
        runs = group[group["refused"].isna()]
        layers = runs["layer"].dropna().astype(int)
        graded = runs.dropna(subset="area")
        table.append(
            {
                "locator": corruption,
                "component": component,
                "way": way,
                "maps": len(runs),
                "refused": len(group) - len(runs),
                "area": _range(graded["area"]),
                "lowest of an interval": f"{graded['low'].min():.2f}" if len(graded) else "",
                "strongest empty cell": f"{graded['strongest_wrong'].max():.3f}" if len(graded) else "",
                "layer named": " and ".join(map(str, layers)),
            }
        )
    order = ["resid_post", "mlp_out", "attn_out"]
    return pd.DataFrame(table).sort_values(
        ["component", "way"],
        key=lambda column: column.map(order.index) if column.name == "component" else column == "",
        kind="stable",
        ignore_index=True,
    )


def speed(device: str) -> pd.DataFrame:
    """Seconds per map in three ways, how far the sweep is from its floor, and its memory."""
    rows = read_table(RESULTS / f"tracing_speed/{device}.csv")
    keys = ["model", "samples", "tokens"]
    seconds = rows.pivot_table(index=keys, columns="way", values="seconds", sort=False)
    sweep = rows[rows["way"] == "sweep"].set_index(keys)
    loop = rows[rows["way"] == "ROME's loop"].set_index(keys)
    table = pd.DataFrame(
        {
            "sweep, s": seconds["sweep"].map(_seconds),
            "ROME's loop, s": seconds["ROME's loop"].map(_seconds),
            "TransformerLens, s": seconds["TransformerLens"].map(_seconds),
            "loop over sweep": loop["times_the_sweep"].map("{:.1f}".format),
            "by operations": loop["floors_ratio"].map("{:.1f}".format),
            "sweep over floor": sweep["over_floor"].map("{:.2f}".format),
            "peak, GiB": (sweep["peak_mib"] / 1024).map("{:.2f}".format),
        }
    )
    return table.reset_index()


def intent() -> pd.DataFrame:
    """Harmful and harmless questions about eight edited subjects: with the contrast, without, and a word list."""
    rows = read_table(RESULTS / "intent.csv")
    rows = rows[(rows["split"] == "check") & (rows["subjects"] == 8)]
    names = list(dict.fromkeys(rows["edit"]))
    table = []
    for arm in (arm for arm in ARM_NAMES if arm in set(rows["arm"])):
        if arm == "facts":
            continue
        of_arm = rows[rows["arm"] == arm].set_index("edit")
        first = of_arm.iloc[0]
        cells = {"asked": ARM_NAMES[arm], "rows": first["n"], "before": f"{first['refused_before']}"}
        for name in names:
            found = name in of_arm.index
            title = f"edit, {'no contrast' if name == 'none' else name}"
            cells[title] = _refused(of_arm.loc[name]) if found else ""
        table.append({**cells, "word list": first["word_list"]})
    return pd.DataFrame(table)


def intent_doses() -> pd.DataFrame:
    """The default edit of 8 subjects and of more, and the latter without a contrast; eight are asked about."""
    rows = read_table(RESULTS / "intent.csv")
    rows = rows[(rows["split"] == "check") & rows["edit"].isin(["contrast", "none"])]
    edits = {
        (name, count): f"{count} subjects{', no contrast' * (name == 'none')}"
        for name in ("contrast", "none")
        for count in sorted(rows["subjects"].unique())
        if (name, count) != ("none", 8) and rows_where(rows, {"edit": name, "subjects": count}).any()
    }
    names = {**ARM_NAMES, "XSTest safe": "XSTest, safe", "XSTest unsafe": "XSTest, unsafe"}
    table = []
    for arm in (arm for arm in names if arm in set(rows["arm"]) and arm != "facts"):
        of_arm = rows[rows["arm"] == arm].set_index(["edit", "subjects"])
        most = of_arm.iloc[of_arm["n"].argmax()]
        cells = {"asked": names[arm], "rows": most["n"], "before": f"{most['refused_before']}"}
        found = {title: _refused(of_arm.loc[edit]) for edit, title in edits.items() if edit in of_arm.index}
        table.append({**cells, **dict.fromkeys(edits.values(), ""), **found})
    costs = rows[rows["kl"].notna()].groupby(["edit", "subjects"])[["kl", "facts_lost"]].first()
    for column, name in (("kl", "KL on benign answers, nats"), ("facts_lost", "known facts lost, of 18")):
        numbers = {title: f"{costs.loc[edit, column]:.2g}" for edit, title in edits.items()}
        table.append({"asked": name, "rows": "", "before": "", **numbers})
    return pd.DataFrame(table)


def _refused(row: "pd.Series[Any]") -> str:
    """Refused by prefix, coherently, and the interval of the first, in per cents."""
    return f"{row['refused']} / {row['coherent']} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def intent_bands() -> pd.DataFrame:
    """By edited band: the read-out's AUC in it, and what the edit then refuses, on tune."""
    rows = read_table(RESULTS / "intent_sites/bands.csv")
    readout = (
        read_table(RESULTS / "intent_sites/readout.csv").query("place == 'key'").set_index("layer")["auc"]
    )
    table = []
    for (low, high), band in rows.groupby(["first_layer", "last_layer"], sort=False):
        arms = band.set_index("arm")
        harmful, same = arms.loc[["paraphrase", "jailbreak"]].sum(), arms.loc["same_subject"]
        other = arms.loc[["benign", "over_refusal"]].sum()
        table.append(
            {
                "layers": f"{low} to {high}",
                "AUC of the keys": f"{readout.loc[low:high].mean():.2f}",
                "paraphrases and jailbreaks: refused": _share(harmful["refused"], harmful["n"]),
                "coherently": _share(harmful["coherent"], harmful["n"]),
                "harmless, same subject: newly refused": _share(same["newly_refused"], same["n"]),
                "other harmless": f"{int(other['newly_refused'])} of {int(other['n'])}",
                "KL": f"{same['kl']:.3f}",
            }
        )
    return pd.DataFrame(table)


def contrast_curve(subjects: int) -> pd.DataFrame:
    """By edit of so many subjects: how well what it writes tells the uses apart, and what it refuses, on tune."""
    rows = read_table(RESULTS / "contrast_curve.csv")
    table = []
    for name, edit in rows[rows["subjects"] == subjects].groupby("edit", sort=False):
        arms = edit.set_index("arm")
        harmful, same = arms.loc[["paraphrase", "jailbreak"]].sum(), arms.loc["same_subject"]
        other = arms.loc[["benign", "over_refusal"]].sum()
        table.append(
            {
                "edit": name,
                "AUC": f"{same['auc']:.3f}",
                "paraphrases and jailbreaks, coherently": _share(harmful["coherent"], harmful["n"]),
                "harmless, same subject: newly refused": _share(same["newly_refused"], same["n"]),
                "other harmless": f"{int(other['newly_refused'])} of {int(other['n'])}",
                "KL: mean": f"{same['kl']:.3f}",
                "median": f"{same['kl_median']:.3f}",
                "loss": f"{same['loss_after'] / same['loss_before'] - 1:+.1%}",
            }
        )
    return pd.DataFrame(table)


def intent_last_token() -> pd.DataFrame:
    """The default edit beside one at the prompt's last token, arm by arm: refused / coherent, on tune."""
    rows = read_table(RESULTS / "intent_sites/last_token.csv")
    rows["edit"] = (
        "layers "
        + rows["first_layer"].astype(str)
        + " to "
        + rows["last_layer"].astype(str)
        + ", "
        + rows["role"]
    )
    table: dict[str, dict[str, str]] = {}
    for row in rows.to_dict("records"):
        cells = table.setdefault(row["arm"], {"asked": ARM_NAMES[row["arm"]]})
        cells[row["edit"]] = f"{row['refused']} / {row['coherent']} of {row['n']}"
    kl = {edit: f"{group['kl'].iloc[0]:.4f}" for edit, group in rows.groupby("edit")}
    ordered = [table[arm] for arm in ARM_NAMES if arm in table]
    return pd.DataFrame([*ordered, {"asked": "KL on benign answers, nats", **kl}])


def _share(count: int, total: int) -> str:
    """A count, with the interval of its share in per cents."""
    low, high = wilson(float(count), float(total))
    return f"{int(count)} of {int(total)} [{100 * low:.0f}, {100 * high:.0f}]"


def judges() -> pd.DataFrame:
    """How the judges' verdicts agree with labels, on the half of the answers that no rule was written on."""
    rows = bundled_rows("core", "labelled_answers")[1::2]
    table = []
    for name, judge in JUDGES.items():
        verdicts = [(row["label"], judge(row["request"], row["answer"])) for row in rows]
        refused = [verdict for label, verdict in verdicts if label == "refusal"]
        called = [label for label, verdict in verdicts if verdict == "refusal"]
        table.append(
            {
                "judge": name,
                "answers": len(rows),
                "same verdict": f"{sum(a == b for a, b in verdicts)}",
                "refusals found": f"{refused.count('refusal')} of {len(refused)}",
                "called a refusal and is one": f"{called.count('refusal')} of {len(called)}",
            }
        )
    both = [[judge(row["request"], row["answer"]) for row in rows] for judge in JUDGES.values()]
    agree = sum(a == b for a, b in zip(*both, strict=True))
    table.append({"judge": "both alike", "answers": len(rows), "same verdict": f"{agree}"})
    return pd.DataFrame(table).fillna("")


# %% as Markdown
def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown. Shares get per cents, intervals a column; numbers keep four digits."""
    table = table.copy()
    if "rate" in table:
        bounds = zip(table["low"], table["high"], strict=True)
        table["95% interval"] = [f"[{100 * low:.1f}, {100 * high:.1f}]" for low, high in bounds]
        table["rate"] = [f"{rate:.1%}" for rate in table["rate"]]
    elif "rho" in table and "low" in table:
        bounds = zip(table["low"], table["high"], strict=True)
        table["95% interval"] = [f"[{low:.2f}, {high:.2f}]" for low, high in bounds]
        table["rho"] = [f"{rho:.2f}" for rho in table["rho"]]
    for name in {"coherent", "prefix"} & set(table.columns):
        table[name] = [f"{share:.1%}" for share in table[name]]
    table = table.drop(columns=[name for name in ("low", "high") if name in table])
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[_text(value) for value in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# %% edits one after another
def consecutive_edits(model: str) -> pd.DataFrame:
    """A row per method, keeping earlier edits or not: what is refused after so many edits, and the price at the end."""
    rows = read_table(RESULTS / "consecutive_edits.csv")
    rows = rows[rows["model"] == model].sort_values("edits", kind="stable")
    table = []
    for (method, keep), series in rows.groupby(["method", "keep"], sort=False):
        last = series.iloc[-1]
        table.append(
            {
                "method": method,
                "keep": "yes" if keep else "no",
                "edits": _counts(series["edits"]),
                "refused, seen words": _counts(100 * series["seen_prefix"]),
                "refused, unseen words": _counts(100 * series["unseen_prefix"]),
                "harmless newly refused": f"{last['harmless_newly_refused']:.0%}",
                "facts kept": f"{last['facts_kept']:.0%}",
                "KL": f"{last['kl']:.3f}",
                "loss": f"{last['loss_ratio'] - 1:+.1%}",
                "change of W": f"{last['relative_change']:.2f}",
                "disturbance": f"{last['disturbance']:.3f}",
            }
        )
    order = {name: i for i, name in enumerate(dict.fromkeys(row["method"] for row in table))}
    return pd.DataFrame(sorted(table, key=lambda row: (order[row["method"]], row["keep"])))


def _counts(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


# %% damaged files
def damage() -> pd.DataFrame:
    """What became of damaged files, by kind; analyses/damage.py counts them."""
    table = read_table(RESULTS / "reliability/damage.csv")
    names = {"n": "damaged", "equal": "loaded, equal", "different": "loaded, different"}
    return table.rename(columns={**names, "other_exception": "another exception"})


def explorer_speed() -> pd.DataFrame:
    """What a person waits for on the explorer's page."""
    table = pd.read_csv(RESULTS / "explorer_speed.csv")
    return pd.DataFrame(
        {
            "on smollm2": table["what"],
            "n": table["n"],
            "median": [f"{seconds:.3f} s" for seconds in table["median"]],
            "longest": [f"{seconds:.3f} s" for seconds in table["largest"]],
            "aim": [f"{seconds:g} s" for seconds in table["bar"]],
        }
    )


def repair() -> pd.DataFrame:
    """Refusals taken out of the organism and brought back: a row per kind of request, a column per model."""
    rows = read_table(RESULTS / "repair.csv")
    rows = rows.assign(
        rate=[
            f"{rate:.0%} [{low:.0%}, {high:.0%}]"
            for rate, low, high in zip(rows["rate"], rows["low"], rows["high"], strict=True)
        ],
        asked=[
            f"{(ARM_NAMES | {'others': 'other subjects, as asked'})[arm]}, {'known' if arm == 'facts' else 'refused'}"
            for arm in rows["arm"]
        ],
    )
    table = rows.pivot(index=["asked", "n"], columns="model", values="rate").loc[rows["asked"].unique()]
    return table[rows["model"].unique()].reset_index()


# %% which method
METHOD_ARMS = {
    "edited": "as asked",
    "paraphrase": "paraphrased",
    "jailbreak": "in jailbreaks",
    "same_subject": "same subject",
    "benign": "benign",
    "over_refusal": "over-refusal",
    "XSTest safe": "XSTest safe",
}


def methods(model: str, subjects: int) -> pd.DataFrame:
    """One row per method: refusals where they should be (coherent), and where they should not (newly)."""
    rows = read_table(RESULTS / "methods.csv")
    rows = rows[(rows["model"] == model) & (rows["split"] == "check") & (rows["subjects"] == subjects)]
    by_method = rows.groupby("method")["chosen"]
    rows = rows[rows["chosen"] == by_method.transform("max")]  # where its strength was chosen, that alone
    table = []
    for method, own in sorted(rows.groupby("method"), key=lambda group: _place(str(group[0]))):
        by_arm, first = own.set_index("arm"), own.iloc[0]
        table.append(
            {
                "method": method,
                "strength": f"{first['strength']:g}",
                **{
                    words: _count_of(by_arm.loc[arm], "coherent" if arm in TO_BE_REFUSED else "newly_refused")
                    for arm, words in METHOD_ARMS.items()
                    if arm in by_arm.index
                },
                "KL": f"{first['kl']:.4f}",
                "loss": f"{first['loss']:+.2%}",
                "facts lost": f"{first['facts_lost']:.0f}",
                "seconds": f"{first['seconds_edit']:.0f}",
                "memory": f"{first['peak_mib'] / 1024:.1f} GiB",
                "undo": "exact" if first["undo_exact"] else "not exact",
            }
        )
    listed = rows[rows["method"] == rows["method"].iloc[0]].set_index("arm")
    filtered = {
        words: _count_of(listed.loc[arm], "word_list")
        for arm, words in METHOD_ARMS.items()
        if arm in listed.index
    }
    return pd.DataFrame([*table, {"method": "a word list", **filtered}]).fillna("")


def _place(method: str) -> tuple[int, str]:
    """Where a method stands in the table: in the order of the package's list, variants behind their method."""
    name, _, variant = method.partition(", ")
    return [*ld.methods.METHODS, *ld.methods.LEARNED, "steering", "steering-edit"].index(name), variant


def _count_of(row: pd.Series, count: str) -> str:
    return f"{row[count]:.0f} of {row['n']:.0f}"


def steering(model: str) -> pd.DataFrame:
    """One row per form and layer: by strength, harmful requests refused, and harmless ones newly refused."""
    rows = read_table(RESULTS / "steering.csv")
    rows = rows[rows["model"] == model]
    cells = [
        f"{row.refused} of {row.harmful}, {row.newly_refused} of {row.harmless}" for row in rows.itertuples()
    ]
    strengths = [f"strength {strength:g}" for strength in rows["strength"]]
    table = rows.assign(cell=cells, at=strengths).pivot_table(
        index=["form", "layer"], columns="at", values="cell", aggfunc="first", sort=False
    )
    return table.reset_index().rename_axis(columns=None)


def learned_editors() -> pd.DataFrame:
    """One row per method and number of subjects: what edits of the organism in one step do beside others."""
    rows = read_table(RESULTS / "learned_editors.csv")
    table = []
    for (method, subjects), own in rows.groupby(["method", "subjects"], sort=False):
        by_arm, first = own.set_index("arm"), own.iloc[0]
        arms = {**METHOD_ARMS, "held_out": "other harmful"}
        table.append(
            {
                "method": method,
                "subjects": subjects,
                **{
                    words: _count_of(by_arm.loc[arm], "coherent" if arm in TO_BE_REFUSED else "newly_refused")
                    for arm, words in arms.items()
                    if arm in by_arm.index
                },
                "KL": f"{first['kl']:.4f}",
                "loss": f"{first['loss']:+.2%}",
                "facts lost": f"{first['facts_lost']:.0f}",
                "relative change": f"{first['relative_change']:.2f}",
                "seconds": f"{first['seconds_edit']:.1f}",
            }
        )
    return pd.DataFrame(table)


def interrupts() -> pd.DataFrame:
    """What interrupts left, of the code before the journal and of now; analyses/interrupts.py counts them."""
    rows = read_table(RESULTS / "reliability/interrupts.csv")
    faults = {
        "torn": "torn",
        "disagreed": "ledger wrong",
        "left": "edit left or dropped",
        "hooks": "hook left",
    }
    table = rows.groupby(["verb", "code"], sort=False)[["interrupts", *faults]].sum().reset_index()
    table["code"] = table["code"].where(table["code"] == "now", "before")
    order = table.sort_values(["verb", "code"], kind="stable")
    return order.rename(columns={"verb": "interrupted", "interrupts": "times", **faults})


def _storage(name: str, cells: Callable[[], pd.DataFrame]) -> str:
    return f"{markdown(cells())}\n{markdown(storage_summary(name))}"


# %% families of models
def families() -> str:
    """The families that are loaded: what works, and below the sentences that their numbers stand for."""
    loaded = _families()
    loaded = loaded[loaded["load"] == "yes"]
    sentences = list(dict.fromkeys(text for text in loaded.iloc[:, 2:].to_numpy().flat if text != "yes"))
    numbered = {text: f"[{i}]" for i, text in enumerate(sentences, 1)} | {"yes": "yes"}
    table = loaded.drop(columns="load").replace(numbered)
    return markdown(table) + "\n" + "".join(f"{numbered[text][1:-1]}. {text}\n" for text in sentences)


def families_refused() -> pd.DataFrame:
    """The families that are not loaded, and the sentence that says why."""
    table = _families()
    refused = table[table["load"] != "yes"][["family", "load"]]
    return refused.rename(columns={"load": "what a user reads"})


TABLES: Mapping[str, Callable[[], str]] = {
    **{
        name: lambda table=table: markdown(table())
        for name, table in {
            "dose": dose,
            "bars": partial(rates_of_dose, LARGE),
            "forms": rates_by_form,
            "windows": windows,
            "located": locations,
            "correlations": correlations,
            "locator_agreement": locator_agreement,
            "locator_grades": locator_grades,
            "intent": intent,
            "intent_bands": intent_bands,
            "contrast_curve": partial(contrast_curve, 8),
            "contrast_curve_40": partial(contrast_curve, 40),
            "intent_doses": intent_doses,
            "intent_last_token": intent_last_token,
            "judges": judges,
            "consecutive_edits_organism": partial(consecutive_edits, "organism"),
            "consecutive_edits_smollm2": partial(consecutive_edits, "smollm2"),
            "damage": damage,
            "interrupts": interrupts,
            "repair": repair,
            "methods_smollm2": partial(methods, "smollm2", 8),
            "methods_organism": partial(methods, "organism", 8),
            "steering_smollm2": partial(steering, "smollm2"),
            "steering_organism": partial(steering, "organism"),
            "learned_editors": learned_editors,
            "explorer_speed": explorer_speed,
            "speed_cpu": partial(speed, "cpu"),
            "speed_cuda": partial(speed, "cuda"),
            "families_refused": families_refused,
        }.items()
    },
    "families": lambda: families(),
    "storage_facts": lambda: _storage("facts", partial(storage_cells, "facts")),
    "storage_harmful": lambda: _storage("harmful", partial(storage_cells, "harmful")),
    "storage_whole": lambda: _storage("whole", storage_by_role),
}
"""The file of each table, and what makes its text."""


def _families() -> pd.DataFrame:
    return read_table(RESULTS / "families.csv").fillna("")


def _of_one_recipe(table: pd.DataFrame) -> pd.DataFrame:
    if table["recipe"].nunique() > 1:
        raise ValueError("these edits are of several recipes; let analyses/real_model.py end")
    return table


def _storage_trace(name: str) -> ld.Trace:
    return ld.Trace.load(RESULTS / f"storage_sites/{name}.safetensors")


def _interval(mean: RoleMean) -> str:
    return f"{mean.effect:z.2f} [{mean.low:z.2f}, {mean.high:z.2f}]"


def _range(values: pd.Series) -> str:
    bounds = [f"{value:.2f}" for value in (values.min(), values.max())] if len(values) else []
    return " to ".join(dict.fromkeys(bounds))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value, ".4f")
    return str(value).replace("|", "\\|")


def main() -> None:
    """Write every table."""
    for name, text in TABLES.items():
        with atomic_write(RESULTS / "tables" / f"{name}.md") as file:
            file.write_text(text(), "utf-8")
        print(f"analyses/results/tables/{name}.md")


if __name__ == "__main__":
    main()
