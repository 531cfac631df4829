"""A suite is data: what a model is asked to see what an edit did, and what it cost.

Arms: edited (the requests as asked), wording (the same subjects in templates), wrapper (the same
requests inside jailbreak wrappers), unseen (other harmful subjects), benign, safe (dangerous words,
harmless meaning), facts (one-word questions), and neutral text beside them.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lens_defense.prompts.prompt import Request, Split, request
from lens_defense.prompts.request_files import BUNDLED_SETS, bundled_rows, requests

Arm = Literal["edited", "wording", "wrapper", "unseen", "benign", "safe", "facts"]
ARMS: tuple[Arm, ...] = get_args(Arm)
HARMFUL_ARMS: tuple[Arm, ...] = ("edited", "wording", "wrapper", "unseen")
ABOUT_THE_EDIT: tuple[Arm, ...] = ("edited", "wording", "wrapper")
"""Arms whose rows count only for the subjects that an edit is about."""


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One row of a suite."""

    arm: Arm
    request: Request
    family: str = ""
    """Which template, or which family of wrapper, was used."""
    answers: tuple[str, ...] = ()
    """For facts: words of which one must occur."""

    @property
    def cluster(self) -> str:
        """What is counted as one trial: the subject, or the request without one."""
        return self.request.subject or self.request.id


@dataclass(frozen=True, slots=True)
class Suite:
    """Rows by arm, and neutral text for the loss."""

    name: str
    split: Split
    items: tuple[SuiteItem, ...]
    neutral: tuple[str, ...]

    def small(self, *, wordings: int = 3, wrappers: int = 3, harmless: int = 40) -> "Suite":
        """Fewer templates and wrapper families, and fewer benign and safe rows; the same every time.

        Args:
            wordings: how many templates are kept.
            wrappers: how many wrappers are kept.
            harmless: how many rows of each of benign and safe are kept.
        """
        most = {"wording": wordings, "wrapper": wrappers}
        families = {
            arm: list(dict.fromkeys(i.family for i in self.items if i.arm == arm))[:count]
            for arm, count in most.items()
        }
        kept = [i for i in self.items if i.arm not in most or i.family in families[i.arm]]
        for arm in ("benign", "safe"):
            rows = [item for item in kept if item.arm == arm]
            drawn = set(random.Random(0).sample(range(len(rows)), min(harmless, len(rows))))
            left = {id(item) for j, item in enumerate(rows) if j not in drawn}
            kept = [item for item in kept if id(item) not in left]
        return replace(self, items=tuple(kept))

    def about(self, planned: Sequence[Request], seen: Iterable[str]) -> tuple["Suite", int]:
        """The rows that count for an edit, and how many were dropped because the edit saw their text.

        Args:
            planned: the edit's requests; they make the arm "edited", and keep their own rows.
            seen: every text whose keys or values the edit used.
        """
        subjects = {item.subject for item in planned}
        texts = set(seen)
        about = [i for i in self.items if i.arm not in ABOUT_THE_EDIT or i.request.subject in subjects]
        about = [i for i in about if i.arm != "unseen" or i.request.subject not in subjects]
        asked = {i.request.text for i in about if i.arm == "edited"}
        extra = [SuiteItem("edited", item) for item in planned if item.text not in asked]
        fresh = [i for i in about if i.arm in ("edited", "facts") or i.request.text not in texts]
        dropped = len(about) - len(fresh)
        return replace(self, items=(*extra, *fresh)), dropped

    def for_requests(self, planned: Sequence[Request]) -> "Suite":
        """The same suite about other requests: their wordings and wrappers from this suite's split."""
        if self.name not in BUNDLED_SETS:
            return self
        rest = tuple(item for item in self.items if item.arm not in ABOUT_THE_EDIT)
        families = {item.family for item in self.items if item.arm in ("wording", "wrapper")}
        about = _about(self.name, planned, self.split)
        kept = (item for item in about if item.arm == "edited" or item.family in families)
        return replace(self, items=(*kept, *rest))


def suite(name: str = "core", *, split: Split = "check") -> Suite:
    """A bundled suite.

    Args:
        name: "core" or "organism".
        split: "check" measures; "tune" is what defaults are chosen on, with templates and wrappers
            that edits may see.

    Raises:
        ValueError: there is no such suite or split.
    """
    if name not in BUNDLED_SETS or split not in ("check", "tune"):
        raise ValueError(
            f"there is no suite {name!r} with the split {split!r}; there are {', '.join(BUNDLED_SETS)} with "
            "'check' or 'tune'"
        )
    planned = requests(name, split="edit" if split == "check" else "tune")
    items = list(_about(name, planned, split))
    if split == "check":
        items += [SuiteItem("unseen", item) for item in requests(name, split="check")]
    else:
        others = requests(name, split="edit")
        items += [SuiteItem("unseen", item) for item in others[len(others) * 3 // 4 :]]
    for kind in ("benign", "safe"):
        items += [SuiteItem(kind, item) for item in requests(name, split=split, kind=kind)]
    for row in bundled_rows(name, "facts"):
        asked = request(row["text"], id=row["id"], kind="benign", split=split)
        items.append(SuiteItem("facts", asked, answers=tuple(row["answers"])))
    neutral = [row["text"] for row in bundled_rows(name, "neutral") if row["split"] == split]
    return Suite(name=name, split=split, items=tuple(items), neutral=tuple(neutral))


def _about(name: str, planned: Sequence[Request], split: Split) -> list[SuiteItem]:
    """The arms about an edit's subjects: as asked, in templates, in wrappers of a split."""
    half = "check" if split == "check" else "edit"
    templates = [row for row in bundled_rows(name, "templates") if row["split"] == half]
    wrappers = [row for row in bundled_rows(name, "wrappers") if row["split"] == half]
    items = [SuiteItem("edited", item) for item in planned]
    for row in templates:
        fitting = [item for item in planned if item.form in row["forms"]]
        items += [SuiteItem("wording", item.reworded(row["text"]), row["id"]) for item in fitting]
    for row in wrappers:
        named = f"{row['family']} ({row['id']})"
        items += [SuiteItem("wrapper", item.wrapped(row["text"]), named) for item in planned]
    return items
