"""Check: what an edit did and what it cost, before and after, on the same rows; and the Report of it.

The edit is made, measured and unmade. Every rate has an interval (intervals.py: Wilson, by subject)
and every pair a p-value (McNemar's test, by subject). Cost: KL to the original over its own greedy
tokens on benign requests, and the loss on neutral text.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from rich.console import Console, RenderableType
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.edits import Edit
from lens_defense.generations import generate
from lens_defense.intervals import clustered_rate, mean_interval, paired_p_value
from lens_defense.judges import Judge, coherent, knows, prefix
from lens_defense.patches import device_of, left_padded, run
from lens_defense.prompts import decode, dozen, plain_ids, prompt
from lens_defense.suites import ARMS, HARMFUL_ARMS, Item, Suite
from lens_defense.suites import suite as named_suite

KL_TOKENS = 16
"""Tokens of the original's greedy answer that the KL is the mean over."""
JUDGES: Mapping[str, Judge] = {"prefix": prefix, "coherent": coherent}
MEASURES = {"knows": ("facts",)}
"""Measures that are not a judge's, and the arms that they are read on."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question, before and after. Answers to harmful requests are a dozen words at most."""

    arm: str
    id: str
    cluster: str
    family: str
    before: str
    after: str
    verdicts_before: Mapping[str, str]
    """By judge: refusal, broken or answer; for facts also "knows": yes or no."""
    verdicts_after: Mapping[str, str]

    def hit(self, measure: str, *, after: bool) -> bool:
        """Whether the row counts for a measure."""
        verdict = (self.verdicts_after if after else self.verdicts_before).get(measure)
        return verdict in ("refusal", "yes")


@dataclass(frozen=True, slots=True)
class Report:
    """What a check saw, as plain numbers."""

    title: str
    suite: str
    split: str
    rows: tuple[Row, ...]
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
            for measure in (*JUDGES, *(m for m, arms in MEASURES.items() if arm in arms))
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
        file = Path(path)
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1), "utf-8")
        unfinished.replace(file)
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote."""
        fields = json.loads(Path(path).read_text("utf-8"))
        rows = tuple(Row(**row) for row in fields.pop("rows"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(rows=rows, **{**fields, **lists})

    def __rich__(self) -> RenderableType:
        return rate_table(self)

    def __str__(self) -> str:
        console = Console(width=110, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
        console.print(self)
        console.file.close()
        return console.export_text()

    def _repr_html_(self) -> str:
        rates = shown_rates(self).to_html(index=False)
        return f"<b>{self.title}</b>{rates}{self.costs().round(4).to_html(index=False)}"

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


def check(
    model: TransformerBridge,
    edit: Edit | None,
    suite: Suite | str = "core",
    *,
    tokens: int = 24,
    title: str = "",
    before: Sequence[str] | None = None,
    progress: bool = True,
) -> Report:
    """Measure a model with and without an edit; afterwards no bit differs.

    Args:
        model: the model that the edit was planned on.
        edit: the plan; None measures the model as it is, about the suite's own subjects.
        suite: rows, or the name of a bundled suite.
        tokens: the most tokens of an answer.
        title: what the report is called.
        before: the full answers of the unedited model, from `answers` on the same rows, to save a run.
        progress: shows a bar.

    Raises:
        ValueError: the edit was planned on other weights, or there is no such suite.
    """
    asked = named_suite(suite) if isinstance(suite, str) else suite
    dropped = 0
    if edit is not None:
        seen = {text for texts in edit.contexts for text in texts}
        asked, dropped = asked.for_requests(edit.requests).about(edit.requests, seen)
    made: Callable[[], AbstractContextManager[Any]] = (
        (lambda: edit.applied(model)) if edit is not None else nullcontext
    )
    with tqdm(total=0, desc="check", unit="answer", disable=not progress) as bar:
        first = list(before) if before is not None else answers(model, asked, tokens, bar)
        if len(first) != len(asked.items):
            raise ValueError(f"{len(first)} answers were given for {len(asked.items)} rows")
        second = first
        if edit is not None:
            with made():
                second = answers(model, asked, tokens, bar)
    benign = [i for i, item in enumerate(asked.items) if item.arm == "benign"]
    kl: list[tuple[float, float]] = []
    loss_before = neutral_losses(model, asked.neutral)
    loss_after: list[float] = []
    if edit is not None:
        kl = _divergences(model, made, [asked.items[i] for i in benign], [first[i] for i in benign])
        with made():
            loss_after = neutral_losses(model, asked.neutral)
    return Report(
        title=title or ("the model as it is" if edit is None else f"{edit.method}"),
        suite=asked.name,
        split=asked.split,
        rows=tuple(_row(*three) for three in zip(asked.items, first, second, strict=True)),
        kl=tuple(mean for mean, _ in kl),
        kl_first=tuple(start for _, start in kl),
        loss_before=tuple(loss_before),
        loss_after=tuple(loss_after),
        dropped=dropped,
        edited=edit is not None,
    )


def answers(model: TransformerBridge, suite: Suite, tokens: int, bar: "tqdm[Any] | None" = None) -> list[str]:
    """The model's greedy answers to a suite's rows, in full: to be judged, not to be kept."""
    bar = bar if bar is not None else tqdm(disable=True)
    bar.total = (bar.total or 0) + len(suite.items)
    asked = [prompt(model.tokenizer, item.request).ids for item in suite.items]
    told = generate(model, asked, tokens=tokens, progress=bar.update)
    return [decode(model.tokenizer, ids) for ids in told]


@torch.no_grad()
def neutral_losses(model: TransformerBridge, texts: Sequence[str]) -> list[float]:
    """Mean loss of each text's tokens, as running text, in nats."""
    losses = []
    for text in texts:
        ids = torch.tensor([plain_ids(model.tokenizer, text)], device=device_of(model))
        logits = run(model, ids, keep=ids.shape[1]).logits[0, :-1].float()
        losses.append(float(cross_entropy(logits, ids[0, 1:])))
    return losses


@torch.no_grad()
def _divergences(
    model: TransformerBridge,
    made: Callable[[], AbstractContextManager[Any]],
    items: Sequence[Item],
    told: Sequence[str],
    batch: int = 16,
) -> list[tuple[float, float]]:
    """KL(original || edited) of each row, teacher-forced on the original's answer: mean, first token."""
    out: list[tuple[float, float]] = []
    rows = [_forced(model, item, text) for item, text in zip(items, told, strict=True)]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids, mask = left_padded([[*asked, *answer] for asked, answer in part], device_of(model))
        keep = KL_TOKENS + 1

        def log_probabilities(
            ids: Tensor = ids, mask: Tensor = mask, keep: int = keep
        ) -> Float[Tensor, "row kept vocab"]:
            return run(model, ids, mask=mask, keep=keep).logits.float().log_softmax(-1)

        original = log_probabilities()
        with made():
            changed = log_probabilities()
        kl = (original.exp() * (original - changed)).sum(-1)
        for row, (_, answer) in zip(kl, part, strict=True):
            steps = row[len(row) - 1 - len(answer) : len(row) - 1]
            out.append((float(steps.mean()), float(steps[0])))
    return out


def _forced(model: TransformerBridge, item: Item, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt and the first tokens of its answer."""
    met = prompt(model.tokenizer, item.request)
    answer = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return met.ids, answer[:KL_TOKENS] or (model.tokenizer.eos_token_id,)


def _row(item: Item, before: str, after: str) -> Row:
    kept = dozen if item.arm in HARMFUL_ARMS else str
    return Row(
        arm=item.arm,
        id=item.request.id,
        cluster=item.cluster,
        family=item.family,
        before=kept(before),
        after=kept(after),
        verdicts_before=_verdicts(item, before),
        verdicts_after=_verdicts(item, after),
    )


def _verdicts(item: Item, answer: str) -> dict[str, str]:
    verdicts = {name: str(judge(item.request.text, answer)) for name, judge in JUDGES.items()}
    if item.answers:
        verdicts["knows"] = "yes" if knows(item.answers, answer) else "no"
    return verdicts


def shown_rates(report: Report) -> pd.DataFrame:
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
    "edited": "edited, as asked",
    "wording": "edited, unseen wording",
    "wrapper": "edited, unseen wrapper",
    "unseen": "unseen subjects",
    "benign": "benign requests",
    "safe": "safe, but dangerous words",
    "facts": "facts",
}
MEASURE_NAMES = {"prefix": "refused", "coherent": "refused, coherent", "knows": "known"}


def rate_table(report: Report) -> Table:
    """The table of a report for a terminal."""
    rates = shown_rates(report)
    caption = "; ".join(f"{r['cost']} {r['mean']:.4f}" for r in report.costs().to_dict("records"))
    table = Table(title=report.title, caption=caption, caption_justify="left")
    last = ""
    for name in rates.columns:
        table.add_column(str(name), no_wrap=True)
    for row in rates.itertuples(index=False):
        arm, *rest = map(str, row)
        table.add_row("" if arm == last else arm, *rest)
        last = arm
    return table
