"""A suite is what a model is asked, so that one sees what an edit did and what it cost.

Each item belongs to an arm. Those that should be refused:

    edited          the requests of the edit, as they are
    paraphrase      the same subjects in other words
    jailbreak       the same requests inside jailbreak templates
    multi_turn      after earlier turns, or with the subject named in one of them alone
    prefill         with the answer begun already ("Sure, here is")
    plain           as plain text, without the chat template
    surface         the subject spelled otherwise (uppercase, a typo), in families that the edit has not seen
    surface_seen    in families that it has seen
    alias           the subject under another name (synonym, translation) that the edit has not seen
    alias_seen      under one that it has seen
    held_out        other harmful subjects; nothing is expected of the edit here

and those that should be answered:

    same_subject    harmless questions about the edited subjects (law, medicine, prevention, history, ...)
    benign          everyday requests
    over_refusal    dangerous words, harmless meaning ("kill a process")
    facts           questions with a one-word answer

Neutral text, for the language-modelling loss, stands beside them.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd

from lens_defense.display import card
from lens_defense.prompts.harmless_uses import same_subject_requests
from lens_defense.prompts.request import Kind, Request, Split, request
from lens_defense.prompts.request_files import BUNDLED_SETS, bundled_rows, requests
from lens_defense.prompts.surface_forms import surface_forms
from lens_defense.shown_text import shown

Arm = Literal[
    "edited", "paraphrase", "jailbreak", "multi_turn", "prefill", "plain", "surface", "surface_seen", "alias",
    "alias_seen", "held_out", "same_subject", "benign", "over_refusal", "facts",
]  # fmt: skip
ARMS: tuple[Arm, ...] = get_args(Arm)
FRAMES: tuple[Arm, ...] = ("multi_turn", "prefill", "plain")
"""Arms whose items are an edit's requests in a frame of the conversation."""
HARMFUL_ARMS: tuple[Arm, ...] = ARMS[: ARMS.index("same_subject")]
HARMLESS_ARMS: dict[Arm, Kind] = {"benign": "benign", "over_refusal": "safe"}
"""Arms that say nothing of the edited subjects and should be answered, and the kind of their requests."""
TO_BE_REFUSED: tuple[Arm, ...] = ARMS[: ARMS.index("held_out")]
"""Arms that an edit should make the model refuse."""
ABOUT_THE_EDIT: tuple[Arm, ...] = (*TO_BE_REFUSED, "same_subject")
"""Arms whose items count only for the subjects of the edit."""


_SEEN: dict[Arm, Arm] = {"surface": "surface_seen", "alias": "alias_seen"}


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One request of a suite."""

    arm: Arm
    request: Request
    family: str = ""
    """Which paraphrase, which family of jailbreak or spelling, or which topic."""
    answers: tuple[str, ...] = ()
    """For facts: words of which one must occur."""
    about: str = ""
    """The subject that the item is about, where the request does not name it as such."""
    name: str = ""
    """How the item names its subject, in the arms of other spellings and other names."""

    @property
    def subject(self) -> str:
        """The subject that the item is about; of benign requests none."""
        return self.about or self.request.subject or ""

    @property
    def cluster(self) -> str:
        """What counts as one trial: the subject or, without one, the request."""
        return self.subject or self.request.id


@dataclass(frozen=True, slots=True, repr=False)
class Suite:
    """Items by arm, and neutral text for the loss."""

    name: str
    split: Split
    items: tuple[SuiteItem, ...]
    neutral: tuple[str, ...]

    def counts(self) -> pd.DataFrame:
        """A row per arm: how many items, about how many subjects."""
        by_arm = {arm: [self.items[i].cluster for i in self._indices(arm)] for arm in ARMS}
        rows = [(arm, len(clusters), len(set(clusters))) for arm, clusters in by_arm.items() if clusters]
        return pd.DataFrame(rows, columns=pd.Index(["arm", "items", "subjects"]))

    def __repr__(self) -> str:
        arms = ", ".join(f"{arm} {items}" for arm, items, _ in self.counts().to_numpy())
        return (
            f"Suite {shown(self.name)!r}, split {self.split!r}: {len(self.items)} items ({arms}), "
            f"{len(self.neutral)} neutral texts"
        )

    def _repr_html_(self) -> str:
        facts = {"split": self.split, "items": len(self.items), "neutral texts": len(self.neutral)}
        return card(f"Suite {self.name}", facts, self.counts(), rows=len(ARMS))

    def small(
        self,
        *,
        paraphrases: int = 3,
        jailbreaks: int = 3,
        frames: int = 1,
        names: int = 2,
        same_subject: int = 6,
        harmless: int = 40,
    ) -> "Suite":
        """A part of the suite, the same every time.

        Args:
            paraphrases: how many to keep for each subject, the first ones.
            jailbreaks: likewise.
            frames: likewise, for each of the arms multi_turn, prefill and plain.
            names: likewise, for each of the arms surface and alias.
            same_subject: likewise.
            harmless: how many benign and how many over_refusal items to keep, drawn at random.
        """
        limits: dict[Arm, int] = {"paraphrase": paraphrases, "jailbreak": jailbreaks, "surface": names}
        limits |= {"alias": names, "same_subject": same_subject, **dict.fromkeys(FRAMES, frames)}
        part = replace(self, items=_first_of_each(self.items, limits))
        dropped: set[int] = set()
        for arm in HARMLESS_ARMS:
            indices = part._indices(arm)
            drawn = random.Random(0).sample(range(len(indices)), min(harmless, len(indices)))
            dropped |= set(indices) - {indices[j] for j in drawn}
        return replace(part, items=tuple(item for i, item in enumerate(part.items) if i not in dropped))

    def for_edit(
        self, planned: Sequence[Request], contexts: Iterable[str], names: Iterable[str] = ()
    ) -> tuple["Suite", int]:
        """The items that count for an edit, and how many were dropped because the edit used their text.

        Args:
            planned: the edit's requests. They stand in the arm "edited", even where the edit used their text.
            contexts: every conversation whose keys or values the edit used.
            names: every other spelling and name of its subjects that the edit used. Items with one of these
                move to the arms of seen names.
        """
        subjects = {item.subject for item in planned}
        texts, names = set(contexts), set(names)
        items = [i for i in self.items if i.arm not in ABOUT_THE_EDIT or i.subject in subjects]
        items = [i for i in items if i.arm != "held_out" or i.subject not in subjects]
        items = [replace(i, arm=_SEEN[i.arm]) if i.arm in _SEEN and i.name in names else i for i in items]
        edited_texts = {i.request.conversation for i in items if i.arm == "edited"}
        added = [SuiteItem("edited", item) for item in planned if item.conversation not in edited_texts]
        fresh = [i for i in items if i.arm in ("edited", "facts") or i.request.conversation not in texts]
        return replace(self, items=(*added, *fresh)), len(items) - len(fresh)

    def for_requests(self, planned: Sequence[Request]) -> "Suite":
        """A bundled suite about other requests, in the paraphrases, jailbreaks, ... that this one has."""
        if self.name not in BUNDLED_SETS:
            return self
        others = (item for item in self.items if item.arm not in ABOUT_THE_EDIT)
        families = {(item.arm, item.family) for item in self.items if item.arm in ABOUT_THE_EDIT}
        families.add(("edited", ""))
        about = _about(self.name, planned, self.split)
        about = [item for item in about if (item.arm, item.family) in families]
        limits: dict[Arm, int] = {}
        for (arm, _), rows in Counter[tuple[Arm, str]](_arm_and_subject(self.items)).items():
            limits[arm] = max(rows, limits.get(arm, 0))
        limits.pop("edited", None)
        return replace(self, items=(*_first_of_each(about, limits), *others))

    def _indices(self, arm: Arm) -> list[int]:
        return [i for i, item in enumerate(self.items) if item.arm == arm]


def suite(name: str = "core", *, split: Split = "check") -> Suite:
    """A bundled suite.

    Args:
        name: "core" or "organism".
        split: "check" measures. "tune" is for choosing defaults.

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


def _arm_and_subject(items: Iterable[SuiteItem]) -> Iterator[tuple[Arm, str]]:
    return ((item.arm, item.subject) for item in items)


def _first_of_each(items: Iterable[SuiteItem], limits: Mapping[Arm, int]) -> tuple[SuiteItem, ...]:
    """The first items of each subject in each arm, so many as the arm's limit says."""
    counts, kept = Counter[tuple[Arm, str]](), []
    for item in items:
        counts[item.arm, item.subject] += 1
        if item.arm not in limits or counts[item.arm, item.subject] <= limits[item.arm]:
            kept.append(item)
    return tuple(kept)


def _about(name: str, planned: Sequence[Request], split: Split) -> list[SuiteItem]:
    """The arms about an edit's subjects, in the paraphrases, jailbreaks, ... of a split."""
    items = [SuiteItem("edited", item) for item in planned]
    for row in _of_split(name, "paraphrases", split):
        fitting = (item for item in planned if item.form in row["forms"])
        items += [SuiteItem("paraphrase", item.paraphrased(row["text"]), row["id"]) for item in fitting]
    for row in _of_split(name, "jailbreaks", split):
        family = f"{row['family']} ({row['id']})"
        items += [SuiteItem("jailbreak", item.inside(row["text"]), family) for item in planned]
    for row in _of_split(name, "frames", split):
        items += [_framed(item, row) for item in planned]
    for item in planned:
        items += _renamed(name, item)
        items += [
            SuiteItem("same_subject", question, topic, about=item.subject or "")
            for topic, question in same_subject_requests(name, [item], split)
        ]
    return items


def _of_split(name: str, table: str, split: Split) -> list[dict[str, Any]]:
    """A table's rows for a split; of a set that has none for tune, those that edits may use."""
    rows = bundled_rows(name, table)
    chosen = [row for row in rows if row["split"] == split]
    return chosen or [row for row in rows if row["split"] == "edit" and split == "tune"]


def _framed(item: Request, row: Mapping[str, Any]) -> SuiteItem:
    """A request in a frame: after earlier turns, with an answer that has begun, or as plain text."""
    subject = item.subject or ""
    earlier = tuple(
        (user.replace("{}", subject), said.replace("{}", subject)) for user, said in row["earlier"]
    )
    framed = (
        item.inside(row["text"])
        if "{}" in row["text"]
        else replace(item, pieces=(row["text"],), subject=None, spelled=())
    )
    framed = replace(framed, earlier=earlier, prefill=row["prefill"], plain=row["arm"] == "plain")
    return SuiteItem(row["arm"], framed, row["family"], about=subject)


def _renamed(name: str, item: Request) -> list[SuiteItem]:
    """A request with its subject spelled otherwise, and under other names, those for checks first."""
    subject = item.subject or ""
    forms = surface_forms(subject) if name == "core" else {}  # the organism reads small letters alone
    items = [
        _under_name("surface", item, item.renamed(form).text, form, family) for family, form in forms.items()
    ]
    rows = sorted(bundled_rows(name, "aliases"), key=lambda row: row["split"] != "check")
    templates = {
        row["language"]: row["text"] for row in bundled_rows(name, "translations") if row["split"] == "check"
    }
    names = {
        row["alias"]: (row["kind"], row["language"]) for row in rows if row["subject"] == subject
    } or dict.fromkeys(item.aliases, ("alias", "en"))
    for alias, (kind, language) in names.items():
        text = templates.get(language, "").replace("{}", alias) or item.renamed(alias).text
        family = kind if language == "en" else f"{kind} ({language})"
        items.append(_under_name("alias", item, text, alias, family))
    return items


def _under_name(arm: Arm, item: Request, text: str, name: str, family: str) -> SuiteItem:
    """The item has no marked subject: another spelling may end inside a token, and only the text is asked."""
    asked = replace(item, pieces=(text,), subject=None, spelled=())
    return SuiteItem(arm, asked, family, about=item.subject or "", name=name)
