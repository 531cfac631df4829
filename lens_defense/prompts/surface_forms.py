"""Other spellings of a subject: what people type by habit, by mistake, or to get past a filter.

Each family is one way to write a subject. An edit may know some of them (SEEN_BY_EDITS); the others are asked
by `check` alone, and are what "unseen spelling" means.
"""

import re
from collections.abc import Callable, Sequence

from lens_defense.prompts.request import Request

Names = Callable[[Request], Sequence[str]]
SEEN_BY_EDITS = ("capitalised", "uppercase", "plural", "quoted", "hyphenated")
"""The families that an edit makes rows of by itself."""


def default_names(request: Request) -> list[str]:
    """How else an edit should know a subject: the spellings that edits may see, and the request's aliases."""
    forms = surface_forms(request.subject or "")
    return [*(form for family, form in forms.items() if family in SEEN_BY_EDITS), *request.aliases]


def surface_forms(subject: str) -> dict[str, str]:
    """The subject in every family that gives another text than the subject's own, by family."""
    forms = {family: write(subject) for family, write in _FAMILIES.items()}
    return {family: form for family, form in forms.items() if form != subject}


def _capitalised(subject: str) -> str:
    return re.sub(r"(?<![\w'])\w", lambda match: match[0].upper(), subject)


def _plural(subject: str) -> str:
    """Of the last word, by the rules of English spelling; exceptions are not known."""
    if re.search(r"[^aeiou\W]y$", subject):
        return subject[:-1] + "ies"
    return subject + ("es" if re.search(r"(s|x|z|ch|sh)$", subject) else "s")


def _hyphenated(subject: str) -> str:
    """Hyphens for spaces; a single word is hyphenated in its middle."""
    return _at_middle(subject, "-") if " " not in subject else subject.replace(" ", "-")


def _misspelled(subject: str) -> str:
    """Two neighbouring letters of the longest word change places."""
    word = max(re.findall(r"\w+", subject), key=len)
    middle = len(word) // 2
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    return subject.replace(word, swapped, 1)


def _at_middle(subject: str, mark: str) -> str:
    word = max(re.findall(r"\w+", subject), key=len)
    middle = len(word) // 2
    return subject.replace(word, word[:middle] + mark + word[middle:], 1)


def _letter_by_letter(table: dict[str, str]) -> Callable[[str], str]:
    return lambda subject: subject.translate(str.maketrans(table))


_FAMILIES: dict[str, Callable[[str], str]] = {
    "capitalised": _capitalised,
    "uppercase": str.upper,
    "plural": _plural,
    "quoted": lambda subject: f'"{subject}"',
    "hyphenated": _hyphenated,
    "bold": lambda subject: f"**{subject}**",
    "misspelled": _misspelled,
    "zero-width": lambda subject: _at_middle(subject, "\u200b"),
    "spaced": lambda subject: " ".join(subject.replace(" ", "  ")),
    "leetspeak": _letter_by_letter({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5"}),
    "homoglyphs": _letter_by_letter({"a": "\u0430", "e": "\u0435", "o": "\u043e", "i": "\u0456"}),
}
