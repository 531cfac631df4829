"""The result of a check: every answer's verdict before and after an edit, with rates, p-values and costs.

Every rate has a 95% interval (Wilson's) and every change a p-value (McNemar's test), both with related rows
counted as related, by subject: see statistics.py. Cost is the KL divergence to the unedited model on its own
answers to benign requests, and the loss on neutral text.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from lens_defense.checking.judges import Judge, Verdict, coherent, prefix
from lens_defense.checking.suites import ARMS, HARMLESS_ARMS, Arm
from lens_defense.display import card, markdown_table, markdown_text
from lens_defense.shown_text import shown
from lens_defense.statistics import clustered_rate, mean_interval, paired_p_value
from lens_defense.storage import load as load_file
from lens_defense.storage import save as save_file

KL_TOKENS = 16
"""The KL is the mean over this many tokens of the unedited model's greedy answer."""
JUDGES: Mapping[str, Judge] = {"prefix": prefix, "coherent": coherent}
"""Measures of refusal. The third measure, "knows", is read where the true answer is known."""
ARM_NAMES: Mapping[Arm, str] = {
    "edited": "edited requests",
    "paraphrase": "paraphrases",
    "jailbreak": "jailbreaks",
    "multi_turn": "after earlier turns",
    "prefill": "answer begun already",
    "plain": "without chat template",
    "surface": "unseen spellings",
    "surface_seen": "seen spellings",
    "alias": "unseen other names",
    "alias_seen": "seen other names",
    "held_out": "held-out subjects",
    "same_subject": "harmless, same subject",
    "benign": "benign requests",
    "over_refusal": "over-refusal",
    "facts": "facts",
}
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MEASURE_NAMES = {"prefix": "refused", "coherent": "refused, coherent", "knows": "known"}
_WHEN = ("before", "after")


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One request of the suite, before and after. Answers to harmful requests are cut to a dozen words."""

    arm: Arm
    id: str
    cluster: str
    family: str
    before: str
    after: str
    verdicts_before: Mapping[str, str]
    """By judge: "refusal", "broken" or "answer"; where the true answer is known, "knows": "yes" or "no"."""
    verdicts_after: Mapping[str, str]
    on_word_list: bool = False
    """Whether an edited subject occurs in it, so that a filter by a list of words would refuse it."""

    def hit(self, measure: str, *, after: bool) -> bool:
        """Whether the row counts for a measure: it was refused or, for "knows", answered correctly."""
        verdict = (self.verdicts_after if after else self.verdicts_before).get(measure)
        return verdict in ("refusal", "yes")


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What a check measured, as plain values."""

    title: str
    suite: str
    split: str
    rows: tuple[ReportRow, ...]
    kl: tuple[float, ...]
    """Per benign row: nats per token, mean over the unedited model's answer. Empty without an edit."""
    kl_first: tuple[float, ...]
    """The same for the answer's first token alone."""
    loss_before: tuple[float, ...]
    """Per neutral text: nats per token."""
    loss_after: tuple[float, ...]
    dropped: int
    """How many rows were left out because the edit had used their text."""
    edited: bool = True
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What was bound into the chat template: a system prompt ("system"), arguments of the template."""

    def rates(self) -> pd.DataFrame:
        """One row per arm and measure: n, clusters, before, low, high, after, low, high, p, word list.

        The word list is the share that a filter refuses which refuses whatever names an edited subject.
        """
        return pd.DataFrame(
            [self._rate(arm, measure) for arm in ARMS if self._of(arm) for measure in self._measures(arm)]
        )

    def rate(self, arm: Arm, measure: str = "coherent", *, after: bool = True) -> float:
        """The share of an arm's rows that count for a measure; NaN without rows."""
        hits = [row.hit(measure, after=after) for row in self._of(arm)]
        return sum(hits) / len(hits) if hits else math.nan

    def new_refusals(self, measure: str = "prefix", arms: Sequence[Arm] = tuple(HARMLESS_ARMS)) -> int:
        """How many rows of some arms were answered before and are refused after.

        Args:
            measure: the judge.
            arms: benign and over_refusal unless others are named; same_subject is never among these.
        """
        return sum(
            row.hit(measure, after=True) and not row.hit(measure, after=False)
            for arm in arms
            for row in self._of(arm)
        )

    def verdicts(self, judge: str = "coherent", *, after: bool = True) -> pd.DataFrame:
        """One row per arm: n, and how many answers are a refusal, a deflection, an answer, broken."""
        table = []
        for arm in ARMS:
            rows = self._of(arm)
            counts = Counter((row.verdicts_after if after else row.verdicts_before)[judge] for row in rows)
            if rows:
                table.append({"arm": arm, "n": len(rows), **{name: counts[name] for name in VERDICTS}})
        return pd.DataFrame(table)

    def facts_lost(self) -> int:
        """How many facts were known before and are not known after."""
        return sum(
            row.hit("knows", after=False) and not row.hit("knows", after=True) for row in self._of("facts")
        )

    def costs(self) -> pd.DataFrame:
        """One row per cost (KL, KL of the first token, loss before and after): mean, low, high, n."""
        costs = {
            f"KL on benign answers, {KL_TOKENS} tokens": self.kl,
            "KL on benign answers, first token": self.kl_first,
            "loss on neutral text, before": self.loss_before,
            "loss on neutral text, after": self.loss_after,
        }
        rows = [
            (name, sum(values) / len(values), *mean_interval(values), len(values))
            for name, values in costs.items()
            if values
        ]
        return pd.DataFrame(rows, columns=pd.Index(["cost", "mean", "low", "high", "n"]))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per request, a column per verdict."""
        table = []
        for row in self.rows:
            fields = asdict(row)
            for when in _WHEN:
                verdicts = fields.pop(f"verdicts_{when}")
                fields |= {f"{judge} {when}": verdict for judge, verdict in verdicts.items()}
            table.append(fields)
        return pd.DataFrame(table)

    def to_markdown(self) -> str:
        """The rates and the costs as Markdown tables: no request, no answer, no title."""
        lines = f"Suite {markdown_text(self.suite)}, split {self.split}, {len(self.rows)} answers.\n\n"
        costs = self.costs().round(4)
        return lines + "\n".join(
            markdown_table(table) for table in (formatted_rates(self), costs) if len(table)
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, whole or not at all."""
        return save_file(path, "report", self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it holds no report, or it is damaged.
        """
        return load_file(path, "report", cls)[0]

    def __rich__(self) -> RenderableType:
        return _terminal_table(self)

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(width=110, file=text, force_jupyter=False).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        facts = {"suite": self.suite, "split": self.split, "answers": len(self.rows)}
        return card(self.title, facts, formatted_rates(self), self.costs().round(4), rows=80)

    def _of(self, arm: Arm) -> list[ReportRow]:
        return [row for row in self.rows if row.arm == arm]

    def _measures(self, arm: Arm) -> list[str]:
        return list({measure: None for row in self._of(arm) for measure in (*JUDGES, *row.verdicts_before)})

    def _rate(self, arm: Arm, measure: str) -> dict[str, Any]:
        rows = self._of(arm)
        clusters = [row.cluster for row in rows]
        fields = {"arm": arm, "measure": measure, "n": len(rows), "clusters": len(set(clusters))}
        hits = {when: [row.hit(measure, after=when == "after") for row in rows] for when in _WHEN}
        for when in _WHEN if self.edited else _WHEN[:1]:
            rate, (low, high) = clustered_rate(hits[when], clusters)
            fields |= {when: rate, f"{when} low": low, f"{when} high": high}
        if self.edited:
            fields["p"] = paired_p_value(hits["before"], hits["after"], clusters)
        fields["word list"] = sum(row.on_word_list for row in rows) / len(rows)
        return fields


def formatted_rates(report: Report) -> pd.DataFrame:
    """The rates as text: arms in words, percentages with intervals; of the facts, only what is known."""
    table = []
    for row in report.rates().to_dict("records"):
        if row["arm"] == "facts" and row["measure"] != "knows":
            continue
        subjects = f" ({row['clusters']} subjects)" if row["clusters"] < row["n"] else ""
        cells = {
            "arm": ARM_NAMES[row["arm"]],
            "measure": MEASURE_NAMES.get(row["measure"], f"refused, {shown(row['measure'])}"),
            "n": f"{row['n']}{subjects}",
        }
        for when in _WHEN if report.edited else _WHEN[:1]:
            cells[when] = f"{row[when]:.0%} [{row[f'{when} low']:.0%}, {row[f'{when} high']:.0%}]"
        if report.edited:
            cells["p"] = "<.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
        cells["word list"] = f"{row['word list']:.0%}" if row["measure"] == "prefix" else ""
        table.append(cells)
    return pd.DataFrame(table)


def _terminal_table(report: Report) -> Table:
    """The rates, narrow enough for a terminal of 80 columns, and the costs under them."""
    caption = "; ".join(f"{row['cost']} {row['mean']:.4f}" for row in report.costs().to_dict("records"))
    table = Table(title=escape(shown(report.title)), caption=caption, caption_justify="left", box=box.SIMPLE)
    table.padding = (0, 1, 0, 0)
    rates = formatted_rates(report)
    for name in rates.columns:
        table.add_column(str(name), no_wrap=True)
    last_arm = ""
    for row in rates.itertuples(index=False):
        arm, measure, n, *cells = map(str, row)
        cells = [cell.replace("%,", ",").replace("%]", "]") for cell in cells]
        arm_cell = "" if arm == last_arm else arm
        table.add_row(
            arm_cell,
            escape(measure.removeprefix("refused, ")),
            n.replace(" subjects", ""),
            *map(escape, cells),
        )
        last_arm = arm
    return table
