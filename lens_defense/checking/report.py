"""Check: what an edit did and what it cost, before and after, on the same rows; and the Report of it.

The edit is made, measured and unmade. Every rate has an interval (intervals.py: Wilson, by subject)
and every pair a p-value (McNemar's test, by subject). Cost: KL to the original over its own greedy
tokens on benign requests, and the loss on neutral text.
"""

import html
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from lens_defense.checking.judges import Judge, coherent, prefix
from lens_defense.checking.suites import ARMS
from lens_defense.statistics import clustered_rate, mean_interval, paired_p_value
from lens_defense.storage import atomic_write

KL_TOKENS = 16
"""Tokens of the original's greedy answer that the KL is the mean over."""
JUDGES: Mapping[str, Judge] = {"prefix": prefix, "coherent": coherent}
MEASURES = {"knows": ("facts",)}
"""Measures that are not a judge's, and the arms of which they are the first thing to read."""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One question, before and after. Answers to harmful requests are a dozen words at most."""

    arm: str
    id: str
    cluster: str
    family: str
    before: str
    after: str
    verdicts_before: Mapping[str, str]
    """By judge: refusal, broken or answer; where the true answer is known also "knows": yes or no."""
    verdicts_after: Mapping[str, str]

    def hit(self, measure: str, *, after: bool) -> bool:
        """Whether the row counts for a measure."""
        verdict = (self.verdicts_after if after else self.verdicts_before).get(measure)
        return verdict in ("refusal", "yes")


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What a check saw, as plain numbers."""

    title: str
    suite: str
    split: str
    rows: tuple[ReportRow, ...]
    kl: tuple[float, ...]
    """For each benign row, nats a token over the original's answer; empty without an edit."""
    kl_first: tuple[float, ...]
    """The same for the first token alone."""
    loss_before: tuple[float, ...]
    """For each neutral text, nats a token."""
    loss_after: tuple[float, ...]
    dropped: int
    """Rows left out because the edit had seen their text."""
    edited: bool = True

    def rates(self) -> pd.DataFrame:
        """One row an arm and measure: n, clusters, before, low, high, after, low, high, p."""
        table = [
            self._rate(arm, measure)
            for arm in ARMS
            if any(row.arm == arm for row in self.rows)
            for measure in (*JUDGES, *(m for m in MEASURES if self._read(arm, m)))
        ]
        return pd.DataFrame(table)

    def rate(self, arm: str, measure: str = "coherent", *, after: bool = True) -> float:
        """The share of an arm's rows that count for a measure."""
        hits = [row.hit(measure, after=after) for row in self.rows if row.arm == arm]
        return sum(hits) / len(hits) if hits else math.nan

    def new_refusals(self, measure: str = "prefix") -> int:
        """Harmless rows (benign, safe) that were answered before and are refused now."""
        return sum(
            row.hit(measure, after=True) and not row.hit(measure, after=False)
            for row in self.rows
            if row.arm in ("benign", "safe")
        )

    def facts_lost(self) -> int:
        """Facts that were known before and are not now."""
        return sum(
            row.hit("knows", after=False) and not row.hit("knows", after=True)
            for row in self.rows
            if row.arm == "facts"
        )

    def costs(self) -> pd.DataFrame:
        """One row a cost: KL, KL of the first token, loss before and after; mean, low, high, n."""
        named = {
            f"KL on benign answers, {KL_TOKENS} tokens": self.kl,
            "KL on benign answers, first token": self.kl_first,
            "loss on neutral text, before": self.loss_before,
            "loss on neutral text, after": self.loss_after,
        }
        rows = [
            (name, sum(values) / len(values), *mean_interval(values), len(values))
            for name, values in named.items()
            if values
        ]
        return pd.DataFrame(rows, columns=pd.Index(["cost", "mean", "low", "high", "n"]))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a question."""
        flat = []
        for row in self.rows:
            fields = asdict(row)
            for when in ("before", "after"):
                for judge, verdict in fields.pop(f"verdicts_{when}").items():
                    fields[f"{judge} {when}"] = verdict
            flat.append(fields)
        return pd.DataFrame(flat)

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, whole or not at all."""
        with atomic_write(path) as file:
            file.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1), "utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote."""
        fields = json.loads(Path(path).read_text("utf-8"))
        rows = tuple(ReportRow(**row) for row in fields.pop("rows"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(rows=rows, **{**fields, **lists})

    def __rich__(self) -> RenderableType:
        return rate_table(self)

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(width=110, file=text, force_jupyter=False).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        rates = formatted_rates(self).to_html(index=False)
        return f"<b>{html.escape(self.title)}</b>{rates}{self.costs().round(4).to_html(index=False)}"

    def _read(self, arm: str, measure: str) -> bool:
        return any(measure in row.verdicts_before for row in self.rows if row.arm == arm)

    def _rate(self, arm: str, measure: str) -> dict[str, Any]:
        rows = [row for row in self.rows if row.arm == arm]
        clusters = [row.cluster for row in rows]
        fields: dict[str, Any] = {"arm": arm, "measure": measure, "n": len(rows)}
        fields["clusters"] = len(set(clusters))
        hits = {when: [row.hit(measure, after=when == "after") for row in rows] for when in _WHEN}
        for when in _WHEN if self.edited else ("before",):
            rate, (low, high) = clustered_rate(hits[when], clusters)
            fields |= {when: rate, f"{when} low": low, f"{when} high": high}
        if self.edited:
            fields["p"] = paired_p_value(hits["before"], hits["after"], clusters)
        return fields


_WHEN = ("before", "after")


def formatted_rates(report: Report) -> pd.DataFrame:
    """The rates as a reader wants them: percent with intervals, arms in words."""
    shown = []
    for row in report.rates().to_dict("records"):
        if row["arm"] == "facts" and row["measure"] != "knows":
            continue
        cells = {"arm": ARM_NAMES[row["arm"]], "measure": MEASURE_NAMES[row["measure"]]}
        cells["n"] = f"{row['n']}" + (f" ({row['clusters']} subjects)" if row["clusters"] < row["n"] else "")
        for when in _WHEN if report.edited else ("before",):
            low, high = row[f"{when} low"], row[f"{when} high"]
            cells[when] = f"{row[when]:.0%} [{low:.0%}, {high:.0%}]"
        if report.edited:
            cells["p"] = "<.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
        shown.append(cells)
    return pd.DataFrame(shown)


ARM_NAMES = {
    "edited": "as asked",
    "wording": "unseen wording",
    "wrapper": "unseen wrapper",
    "unseen": "unseen subjects",
    "benign": "benign requests",
    "safe": "safe requests",
    "facts": "facts",
}
MEASURE_NAMES = {"prefix": "refused", "coherent": "refused, coherent", "knows": "known"}


def rate_table(report: Report) -> Table:
    """The table of a report for a terminal of 80 columns."""
    caption = "; ".join(f"{r['cost']} {r['mean']:.4f}" for r in report.costs().to_dict("records"))
    table = Table(title=escape(report.title), caption=caption, caption_justify="left", box=box.SIMPLE)
    table.padding = (0, 1, 0, 0)
    rates = formatted_rates(report)
    last = ""
    for name in rates.columns:
        table.add_column(str(name), no_wrap=True)
    for row in rates.itertuples(index=False):
        arm, measure, n, *rest = map(str, row)
        short = measure.removeprefix("refused, ")
        table.add_row(
            "" if arm == last else arm,
            short,
            n.replace(" subjects", ""),
            *(c.replace("%,", ",").replace("%]", "]") for c in rest),
        )
        last = arm
    return table
