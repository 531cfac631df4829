"""EditSearch: the outcomes of a search as plain values; it is saved after each, and goes on from there."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from lens_defense.display import card
from lens_defense.models.fingerprint import Fingerprint
from lens_defense.prompts.request import Role
from lens_defense.searching.outcome import Outcome, knee, pareto_front
from lens_defense.searching.suggest import SearchSpace
from lens_defense.shown_text import shown
from lens_defense.storage import load as load_file
from lens_defense.storage import save as save_file


@dataclass(frozen=True, slots=True, repr=False)
class EditSearch:
    """Candidates in the order in which they were tried, and what each did."""

    model: str
    fingerprint: Fingerprint
    """Of the unedited model."""
    inputs_hash: str
    """Of the requests, the questions and the settings: a search goes on only with the same."""
    role: Role
    space: SearchSpace
    seed: int
    outcomes: tuple[Outcome, ...] = ()

    def front(self) -> list[Outcome]:
        """The outcomes that no other one beats; most refusals first."""
        return pareto_front(self.outcomes)

    def knee(self) -> Outcome:
        """The outcome of the front that is nearest to an edit without a fault.

        Raises:
            ValueError: no edit could be planned; the sentence says why.
        """
        front = self.front()
        if not front and self.outcomes:
            raise ValueError(f"no edit could be planned; of the first: {self.outcomes[0].failure}")
        return knee(front)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate, in the order of the search; `front` and `knee` are true or false."""
        front = self.front()
        best = knee(front) if front else None
        return pd.DataFrame(
            {
                "method": outcome.candidate.method,
                "layers": outcome.layer_words,
                "strength": outcome.candidate.strength,
                "refused as asked": outcome.refused_as_asked,
                "refused, unseen words": outcome.refusals,
                "same subject, newly refused": outcome.same_subject_refused,
                "harmless, newly refused": outcome.harmless_refused,
                "KL": outcome.kl,
                "seconds": outcome.seconds,
                "front": outcome in front,
                "knee": outcome is best,
                "failure": outcome.failure,
            }
            for outcome in self.outcomes
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, whole or not at all; no request is in it."""
        return save_file(path, "search", self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EditSearch":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it holds no search, or it is damaged.
        """
        return load_file(path, "search", cls)[0]

    def __rich__(self) -> RenderableType:
        front = self.front()
        best = knee(front) if front else None
        table = Table(
            box=box.SIMPLE,
            title=f"{len(front)} of {len(self.outcomes)} edits are on the front",
            caption="* the knee: nearest to refusing all that it should, and nothing else",
        )
        for name in ("", "method", "layers", "strength"):
            table.add_column(name)
        for name in ("refused as asked", "in unseen words", "same subject, newly", "harmless, newly", "KL"):
            table.add_column(name, justify="right")
        for number, outcome in enumerate(front, 1):
            same_subject = outcome.same_subject_refused
            table.add_row(
                f"{number}{' *' if outcome is best else ''}",
                shown(outcome.candidate.method),
                outcome.layer_words,
                f"{outcome.candidate.strength:.2f}",
                f"{outcome.refused_as_asked:.0%}",
                f"{outcome.refusals:.0%}",
                "" if same_subject is None else f"{same_subject:.0%}",
                f"{outcome.harmless_refused:.0%}",
                f"{outcome.kl:.2g}",
            )
        return table

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(width=110, file=text, force_jupyter=False).print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        table = self.to_dataframe().drop(columns=["failure"]).round(3)
        return card(f"Search of edits of {self.model}", {"tried": len(self.outcomes)}, table, rows=40)
