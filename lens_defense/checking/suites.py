"""A suite is what a model is asked, so that one sees what an edit did and what it cost.

Each item belongs to an arm:

    edited          the requests of the edit, as they are
    paraphrase      the same subjects in other words
    jailbreak       the same requests inside jailbreak templates
    held_out        other harmful subjects
    benign          everyday requests
    over_refusal    dangerous words, harmless meaning ("kill a process")
    facts           questions with a one-word answer

Neutral text, for the language-modelling loss, stands beside them.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lens_defense.prompts.request import Kind, Request, Split, request
from lens_defense.prompts.request_files import BUNDLED_SETS, bundled_rows, requests

Arm = Literal["edited", "paraphrase", "jailbreak", "held_out", "benign", "over_refusal", "facts"]
ARMS: tuple[Arm, ...] = get_args(Arm)
HARMFUL_ARMS: tuple[Arm, ...] = ("edited", "paraphrase", "jailbreak", "held_out")
HARMLESS_ARMS: dict[Arm, Kind] = {"benign": "benign", "over_refusal": "safe"}
"""Arms whose requests should be answered, and the kind that their requests have in the data."""
ABOUT_THE_EDIT: tuple[Arm, ...] = ("edited", "paraphrase", "jailbreak")
"""Arms whose items count only for the subjects of the edit."""


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One request of a suite."""

    arm: Arm
    request: Request
    family: str = ""
    """Which paraphrase, or which family of jailbreak, was used."""
    answers: tuple[str, ...] = ()
    """For facts: words of which one must occur."""

    @property
    def cluster(self) -> str:
        """What counts as one trial: the subject or, without one, the request."""
        return self.request.subject or self.request.id


@dataclass(frozen=True, slots=True)
class Suite:
    """Items by arm, and neutral text for the loss."""

    name: str
    split: Split
    items: tuple[SuiteItem, ...]
    neutral: tuple[str, ...]

    def small(self, *, paraphrases: int = 3, jailbreaks: int = 3, harmless: int = 40) -> "Suite":
        """A part of the suite, the same every time.

        Args:
            paraphrases: how many paraphrases to keep, the first ones.
            jailbreaks: how many jailbreaks to keep, the first ones.
            harmless: how many benign and how many over_refusal items to keep, drawn at random.
        """
        dropped: set[int] = set()
        limits: dict[Arm, int] = {"paraphrase": paraphrases, "jailbreak": jailbreaks}
        for arm, limit in limits.items():
            families = dict.fromkeys(item.family for item in self.items if item.arm == arm)
            first_families = list(families)[:limit]
            dropped |= {i for i in self._indices(arm) if self.items[i].family not in first_families}
        for arm in HARMLESS_ARMS:
            indices = self._indices(arm)
            drawn = random.Random(0).sample(range(len(indices)), min(harmless, len(indices)))
            dropped |= set(indices) - {indices[j] for j in drawn}
        return replace(self, items=tuple(item for i, item in enumerate(self.items) if i not in dropped))

    def for_edit(self, planned: Sequence[Request], contexts: Iterable[str]) -> tuple["Suite", int]:
        """The items that count for an edit, and how many were dropped because the edit used their text.

        Args:
            planned: the edit's requests. They stand in the arm "edited", even where the edit used their text.
            contexts: every text whose keys or values the edit used.
        """
        subjects = {item.subject for item in planned}
        texts = set(contexts)
        items = [i for i in self.items if i.arm not in ABOUT_THE_EDIT or i.request.subject in subjects]
        items = [i for i in items if i.arm != "held_out" or i.request.subject not in subjects]
        edited_texts = {i.request.text for i in items if i.arm == "edited"}
        added = [SuiteItem("edited", item) for item in planned if item.text not in edited_texts]
        fresh = [i for i in items if i.arm in ("edited", "facts") or i.request.text not in texts]
        return replace(self, items=(*added, *fresh)), len(items) - len(fresh)

    def for_requests(self, planned: Sequence[Request]) -> "Suite":
        """A bundled suite about other requests, in the paraphrases and jailbreaks that this one has."""
        if self.name not in BUNDLED_SETS:
            return self
        others = (item for item in self.items if item.arm not in ABOUT_THE_EDIT)
        families = {item.family for item in self.items if item.arm in ABOUT_THE_EDIT} | {""}
        about = (item for item in _about(self.name, planned, self.split) if item.family in families)
        return replace(self, items=(*about, *others))

    def _indices(self, arm: Arm) -> list[int]:
        return [i for i, item in enumerate(self.items) if item.arm == arm]


def suite(name: str = "core", *, split: Split = "check") -> Suite:
    """A bundled suite.

    Args:
        name: "core" or "organism".
        split: "check" measures. "tune" is for choosing defaults: its paraphrases and jailbreaks are those
            that edits may use.

    Raises:
        ValueError: there is no such suite or split.
    """
    if name not in BUNDLED_SETS or split not in ("check", "tune"):
        raise ValueError(
            f"there is no suite {name!r} with the split {split!r}; there are {', '.join(BUNDLED_SETS)} with "
            "'check' or 'tune'"
        )
    planned = requests(name, split="edit" if split == "check" else "tune")
    items = _about(name, planned, split)
    held_out = requests(name, split="check" if split == "check" else "edit")
    if split == "tune":
        held_out = held_out[len(held_out) * 3 // 4 :]
    items += [SuiteItem("held_out", item) for item in held_out]
    for arm, kind in HARMLESS_ARMS.items():
        items += [SuiteItem(arm, item) for item in requests(name, split=split, kind=kind)]
    for row in bundled_rows(name, "facts"):
        question = request(row["text"], id=row["id"], kind="benign", split=split)
        items.append(SuiteItem("facts", question, answers=tuple(row["answers"])))
    neutral = [row["text"] for row in bundled_rows(name, "neutral") if row["split"] == split]
    return Suite(name=name, split=split, items=tuple(items), neutral=tuple(neutral))


def _about(name: str, planned: Sequence[Request], split: Split) -> list[SuiteItem]:
    """The arms about an edit's subjects, in the paraphrases and jailbreaks of a split."""
    half = "check" if split == "check" else "edit"
    items = [SuiteItem("edited", item) for item in planned]
    for row in bundled_rows(name, "paraphrases"):
        if row["split"] == half:
            fitting = (item for item in planned if item.form in row["forms"])
            items += [SuiteItem("paraphrase", item.paraphrased(row["text"]), row["id"]) for item in fitting]
    for row in bundled_rows(name, "jailbreaks"):
        if row["split"] == half:
            family = f"{row['family']} ({row['id']})"
            items += [SuiteItem("jailbreak", item.inside(row["text"]), family) for item in planned]
    return items
