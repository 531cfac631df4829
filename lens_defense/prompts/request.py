"""A Request is the text that is asked, with its harmful subject marked. No tokenizer is known here.

Tokenized, it becomes a Prompt, whose tokens have one role each (`Role`). Where a token could have several, it
has the first of ROLES. A role carries over to other prompts, where a position does not.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lens_defense.shown_text import NAME_LETTERS, truncate

Role = Literal["last", "subject_last", "subject_first", "subject_mid", "next", "template", "before", "after"]
Kind = Literal["harmful", "benign", "safe"]
Form = Literal["noun", "gerund", "verb phrase"]
Split = Literal["edit", "tune", "check"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Every role; of several that a token could have, the first counts."""
READING_ORDER: tuple[Role, ...] = (
    "before",
    "subject_first",
    "subject_mid",
    "subject_last",
    "next",
    "after",
    "template",
    "last",
)
"""Every role, in the order in which a prompt is read."""
_UNSPACED_SCRIPTS = (
    *("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE"),
)
"""By the first word of their letters' names. Korean has spaces, and particles that stick to a word."""


class UnfitRequest(ValueError):
    """A request that cannot be asked of one model as it is, or not be traced there; others can."""


@dataclass(frozen=True, slots=True, repr=False)
class Request:
    """What a model is asked; the subject is the part that carries the harm."""

    id: str
    pieces: tuple[str, ...]
    """The text around the subject: one piece more than the subject has occurrences."""
    subject: str | None = None
    spelled: tuple[str, ...] = ()
    """How the subject stands in the text, place by place ("Ricin"); empty where always as in `subject`."""
    kind: Kind = "harmful"
    """safe means dangerous words and a harmless meaning."""
    category: str = ""
    form: Form = "noun"
    concrete: bool = True
    """A thing ("ricin"), not an act ("shoplifting")."""
    split: Split = "edit"
    target: str | None = None
    """The known answer, where there is one (ROME's facts)."""
    safe_target: str | None = None
    """The refusal to plant; None takes the editor's own."""
    counterfactual: str | None = None
    """A harmless subject of the same token length, for token replacement."""
    aliases: tuple[str, ...] = ()
    """Other names of the subject: synonyms, descriptions, translations."""
    earlier: tuple[tuple[str, str], ...] = ()
    """What was said before, as turns of user and assistant."""
    prefill: str = ""
    """How the assistant's answer begins already."""
    plain: bool = False
    """Asked as plain text, without the chat template that the model may have."""

    def __post_init__(self) -> None:
        turns = [text for turn in self.earlier for text in turn]
        others = self.subject, self.target, self.safe_target, self.counterfactual, *self.aliases
        for text in (self.id, *self.pieces, *self.spelled, *turns, self.prefill, *others):
            refuse_surrogates(text or "")
        for value, literal in ((self.kind, Kind), (self.form, Form), (self.split, Split)):
            if value not in get_args(literal):
                raise ValueError(f"request {self.id!r}: {value!r} is none of {', '.join(get_args(literal))}")
        if self.subject is None and len(self.pieces) != 1:
            raise ValueError(f"request {self.id!r} has {len(self.pieces)} pieces and no subject")
        if self.subject is not None and (not self.subject.strip() or len(self.pieces) < 2):
            raise ValueError(
                f"request {self.id!r}: the subject {self.subject!r} must be some text that occurs "
                "in the request"
            )
        if self.spelled and len(self.spelled) != len(self.pieces) - 1:
            raise ValueError(
                f"request {self.id!r} spells its subject {len(self.spelled)} times and has it "
                f"{len(self.pieces) - 1} times"
            )

    @property
    def occurrences(self) -> tuple[str, ...]:
        """The subject as it stands in the text, place by place."""
        return self.spelled or (self.subject or "",) * (len(self.pieces) - 1)

    @property
    def text(self) -> str:
        """The request as the user types it."""
        return self.pieces[0] + "".join(map("".join, zip(self.occurrences, self.pieces[1:], strict=True)))

    @property
    def conversation(self) -> str:
        """All that the model reads of it, by which two requests are the same: the text, where that is all."""
        turns = [text for turn in self.earlier for text in turn]
        parts = [*(["plain"] if self.plain else []), *turns, self.text, self.prefill]
        return "\n".join(filter(None, parts))

    def __repr__(self) -> str:
        """The text with its subject in brackets; control characters are escaped, long texts cut."""
        marked = self.pieces[0] + "".join(
            f"[{subject}]{piece}" for subject, piece in zip(self.occurrences, self.pieces[1:], strict=True)
        )
        kind = "" if self.kind == "harmful" else f", {self.kind}"
        return f"Request({truncate(self.id, NAME_LETTERS)!r}, {truncate(marked, _REPR_LETTERS)!r}{kind})"

    def paraphrased(self, template: str) -> "Request":
        """The same subject in other words; `{}` in the template stands for the subject."""
        if self.subject is None:
            raise ValueError(f"request {self.id!r} has no subject to put into {template!r}")
        return replace(self, pieces=tuple(template.split("{}")), spelled=())

    def renamed(self, name: str) -> "Request":
        """The same request under another name of its subject."""
        return replace(self, subject=name, spelled=())

    def inside(self, template: str) -> "Request":
        """The same request inside other text; `{}` in the template stands for the request."""
        if template.count("{}") != 1:
            raise ValueError(f"a template holds {{}} once, in the request's place; got {template!r}")
        start, end = template.split("{}")
        pieces = (start + self.pieces[0], *self.pieces[1:])
        return replace(self, pieces=(*pieces[:-1], pieces[-1] + end))


_REPR_LETTERS = 300
"""The most that is shown of a request's text."""


def refuse_surrogates(text: str) -> None:
    """Refuse halves of characters (lone surrogates), which no tokenizer reads and no file holds.

    Raises:
        ValueError: there is one.
    """
    if text.isascii():
        return
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise ValueError(
            f"the text {truncate(text, NAME_LETTERS)!r} holds {half!r}, half of a character; read it again "
            "as UTF-8, or take that out"
        )


def request(text: str, subject: str | None = None, *, id: str = "", **fields: Any) -> Request:
    """A Request from plain text; the subject is found at word boundaries, wherever it occurs, in any case.

    Raises:
        ValueError: the subject does not occur in the text as a word or phrase of its own.
    """
    name = id or text[:40]
    if subject is None:
        return Request(id=name, pieces=(text,), **fields)
    phrase = word_pattern(subject)
    pieces = tuple(phrase.split(text)) if subject.strip() else (text,)
    if len(pieces) < 2:
        raise ValueError(
            f"request {name!r}: the subject {truncate(subject, NAME_LETTERS)!r} does not occur in the text "
            f"{truncate(text, _REPR_LETTERS)!r}; mark the words of the text that carry the harm"
        )
    found = tuple(phrase.findall(text))
    spelled = found if any(spelling != subject for spelling in found) else ()
    return Request(id=name, pieces=pieces, subject=subject, spelled=spelled, **fields)


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds a word or phrase of its own, in any case; where words need no spaces, also inside others."""
    before = "" if is_unspaced(word[:1]) else r"(?<!\w)"
    after = "" if is_unspaced(word[-1:]) else r"(?!\w)"
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)


def is_unspaced(letter: str) -> bool:
    """Whether a letter belongs to a script whose words stand, or may stand, without a space between them."""
    return unicodedata.name(letter, "").startswith(_UNSPACED_SCRIPTS) if letter else False
