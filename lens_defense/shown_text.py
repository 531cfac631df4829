"""Text of a user, a model or a file as it is shown: on a terminal, in a notebook, on a page, in a figure.

It is shown and never obeyed: control characters (ESC begins a terminal's commands) and those that turn the
direction of writing get a shape, and what is too long is cut.
"""

import unicodedata
from collections.abc import Iterable

NAME_LETTERS = 80
"""The most that is shown of a name: of a subject, a title, a model."""
TEXT_LETTERS = 10_000
"""The most that is shown of any text but a program."""
CODE_LETTERS = 100_000
"""The most that is shown of a program: a cut one does not run, so who writes it keeps below."""


def shown(text: object, letters: int = NAME_LETTERS) -> str:
    """A text as one line that is safe to print and at most so long."""
    return visible_text(truncate(str(text), letters))


def one_line(error: object, letters: int = 200) -> str:
    """An error's message, mostly a library's, without line breaks, cut."""
    return " ".join(str(error).split())[:letters]


def shown_names(names: Iterable[object], most: int = 8) -> str:
    """The first of some names, between commas."""
    listed = [*names]
    return ", ".join(map(shown, listed[:most])) + (" ..." if len(listed) > most else "")


def visible_text(text: str) -> str:
    """Give a shape to characters that have none: newlines, tabs, control and direction characters."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _INVISIBLE
        else character
        for character in text.replace("\n", "↵").replace("\t", "⇥")
    )


_INVISIBLE = {0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
"""Characters that have no width, or turn the text after them round (Unicode's Bidi_Control)."""


def visible_token(text: str, letters: int) -> str:
    """A token with its spaces visible, cut; an empty one has a sign too."""
    dotted = "".join("·" if unicodedata.category(letter) == "Zs" else letter for letter in text)
    return visible_text(truncate(dotted, letters)) or "∅"


def truncate(text: str, letters: int) -> str:
    """Cut a text to so many letters, the last one an ellipsis where letters are left out."""
    return text if len(text) <= letters else text[: letters - 1] + "…"
