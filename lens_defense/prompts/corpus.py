"""Corpora: texts that say what a model's keys look like in general (the covariance C of ROME and MEMIT)."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from lens_defense.prompts.request_files import read_rows
from lens_defense.prompts.table_files import BadRow


class CorpusText(NamedTuple):
    """A user's turn and its answer; without an answer, plain running text."""

    user: str
    assistant: str = ""


Corpus = Sequence[CorpusText]


class Texts(list[CorpusText]):
    """A corpus that shows how much it is, and not all that it holds."""

    def __repr__(self) -> str:
        letters = sum(len(text.user) + len(text.assistant) for text in self)
        return f"corpus of {len(self)} texts, {letters:,} characters"


def read_corpus(source: str | os.PathLike[str] = "core", *, rows: int = 2000) -> Corpus:
    """Read a corpus: the rows of a source with `text`, or with `user` and `assistant`.

    Args:
        source: a source of rows, see `read_rows`.
        rows: the most texts taken of a hub data set.

    Raises:
        ValueError: there is no such corpus, it is empty, or a row of it is no object.
    """
    texts = []
    for place, row in read_rows(source, "corpus", limit=rows):
        if isinstance(row, BadRow):
            raise ValueError(f"{place}: {row}")
        user = str(row.get("user") or row.get("text") or "")
        texts.append(CorpusText(user, str(row.get("assistant") or "")))
    texts = Texts(text for text in texts if text.user)
    if not texts:
        raise ValueError(f"the corpus {str(source)!r} is empty")
    return texts
