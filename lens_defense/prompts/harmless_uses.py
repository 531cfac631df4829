"""Harmless uses of a subject: prevention, law, medicine, history, news, help, language.

An edit that is keyed on a subject's tokens meets them too. So it is shown some (the split "edit") as what
shall stay as it is, and `check` asks others.
"""

import re
from collections.abc import Sequence

from lens_defense.prompts.request import Request, Split, request
from lens_defense.prompts.request_files import bundled_rows


def default_contrast(item: Request) -> list[Request]:
    """Harmless questions about a request's subject that an edit may see, for its grammatical form."""
    return [_harmless(item, row) for row in _templates(item, "edit")]


def same_subject_requests(name: str, planned: Sequence[Request], split: Split) -> list[tuple[str, Request]]:
    """Harmless questions about the subjects of an edit, after their topics; no edit sees them.

    Those that were written for a subject of the bundled set, if any; else the templates of "check".
    The organism has neither: its world has no harmless use of a harmful subject.

    Args:
        name: the bundled set.
        planned: the edit's requests.
        split: "tune" or "check".
    """
    subjects = {item.subject or "" for item in planned}
    by_subject: dict[str, list[tuple[str, Request]]] = {}
    for row in bundled_rows(name, "same_subject"):
        if row["split"] == split and row["subject"] in subjects:
            question = request(row["text"], row["subject"], id=row["id"], kind="safe", split=split)
            by_subject.setdefault(row["subject"], []).append((row["topic"], question))
    return [
        topic_and_question
        for item in planned
        for topic_and_question in by_subject.get(
            item.subject or "",
            [(row["topic"], _harmless(item, row)) for row in _templates(item, "check", name)],
        )
    ]


def _templates(item: Request, split: Split, name: str = "core") -> list[dict[str, str]]:
    rows = bundled_rows(name, "harmless_uses")
    return [row for row in rows if row["split"] == split and item.form in row["forms"]]


def _harmless(item: Request, row: dict[str, str]) -> Request:
    """A template about a subject; "[a] " gives way to the article that the request has, if any."""
    found = re.search(r"\b(an?|the) $", item.pieces[0])
    text = row["text"].replace("[a] ", found[0] if found else "")
    return Request(
        id=f"{item.id}-{row['id']}",
        pieces=tuple(text.split("{}")),
        subject=item.subject,
        kind="safe",
        form=item.form,
        category=item.category,
        split="check" if row["split"] == "check" else "edit",
    )
