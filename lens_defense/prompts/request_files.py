"""Request sets and corpora from every source: the package's own, files, hub data sets, DELMAN's JSON.

A row of a request set needs `text`, and for a harmful request its `subject`; other fields are those of
Request. Rows of the DELMAN release (`requested_rewrite` with `prompt_adv`, `subject`, `target_new`) are read
as they stand, without their "Q: ... A:".
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from lens_defense.prompts.request import Kind, Request, Split, request

BUNDLED_SETS = ("core", "organism")
"""The names of the request sets that the package brings."""


def requests(
    name: str | os.PathLike[str],
    *,
    split: Split = "edit",
    kind: Kind = "harmful",
    distinct: bool = True,
    text_field: str = "text",
    subject_field: str = "subject",
) -> list[Request]:
    """Read a request set.

    Args:
        name: a source of rows, see `read_rows`.
        split: which part of the set; a row without a split belongs to "edit".
        kind: "harmful" gives concrete things first; "benign" and "safe" give all rows in their order.
        distinct: keep only the first of several harmful requests about one subject, as an edit wants them.
        text_field: the column that holds the request.
        subject_field: the column that holds its subject.

    Raises:
        ValueError: there is no such set, or a row is bad; file, line and field are named.
    """
    all_requests = [_request(row, place, text_field, subject_field) for place, row in read_rows(name)]
    if name in BUNDLED_SETS:
        all_requests = [replace(item, aliases=_bundled_aliases(str(name), item)) for item in all_requests]
    chosen = [item for item in all_requests if item.split == split and item.kind == kind]
    if kind != "harmful":
        return chosen
    if distinct:
        first: dict[str, Request] = {}
        for item in chosen:
            first.setdefault(item.subject or item.text, item)
        chosen = list(first.values())
    return sorted(chosen, key=lambda item: not item.concrete)


def _bundled_aliases(name: str, item: Request) -> tuple[str, ...]:
    """Other names of a request's subject that an edit may use."""
    rows = bundled_rows(name, "aliases")
    return tuple(row["alias"] for row in rows if row["split"] == "edit" and row["subject"] == item.subject)


def read_rows(
    source: str | os.PathLike[str], table: str = "requests", *, limit: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a source, after the place where it stands, in words ("core, line 3").

    Args:
        source: "core", "organism", a .jsonl, .json, .csv, .parquet or .txt file (each paragraph is a `text`),
            or the name of a hub data set.
        table: which rows of a bundled set, see `bundled_rows`.
        limit: take so many rows of a hub data set's split "train", streamed; None takes all its splits.

    Raises:
        ValueError: there is no such source, or a row is no object; the file and the line are named.
    """
    path = Path(source)
    if source in BUNDLED_SETS:
        for i, row in enumerate(bundled_rows(str(source), table), 1):
            yield f"{source}, line {i}", row
    elif path.suffix in _FILE_KINDS or path.is_file():
        yield from _file_rows(path)
    else:
        yield from _hub_rows(os.fspath(source), limit)


@cache
def bundled_rows(name: str, table: str) -> list[dict[str, Any]]:
    """The rows of one file of a bundled set (requests, paraphrases, ...); none where it has no such."""
    file = files("lens_defense").joinpath(f"data/{name}/{table}.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


_FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_FIELDS = frozenset(Request.__slots__) - {"pieces"}


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in _FILE_KINDS:
        raise ValueError(f"{path} is a file of no known kind; give one of {', '.join(_FILE_KINDS)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; bundled sets: {', '.join(BUNDLED_SETS)}")
    unit = "paragraph" if path.suffix == ".txt" else "line"
    for i, row in _numbered_rows(path):
        place = f"{path}, {unit} {i}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: an object with fields is wanted, got {row!r}")
        yield place, row


def _numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, by their lines (CSV, JSONL) or their order, from 1."""
    if path.suffix == ".txt":
        paragraphs = filter(None, map(str.strip, path.read_text("utf-8").split("\n\n")))
        yield from enumerate(({"text": paragraph} for paragraph in paragraphs), 1)
    elif path.suffix == ".jsonl":
        for line, text in enumerate(path.read_text("utf-8").split("\n"), 1):
            if text.strip():
                yield line, _parsed(path, text, line)
    elif path.suffix == ".json":
        rows = _parsed(path, path.read_text("utf-8"), 1)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a list of rows is wanted, got {type(rows).__name__}")
        yield from enumerate(rows, 1)
    else:
        import pandas as pd

        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        yield from enumerate(rows, 2 if path.suffix == ".csv" else 1)


def _parsed(path: Path, text: str, line: int) -> Any:
    """JSON that starts at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error


def _hub_rows(name: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a hub data set; its tables "edit", "tune" and "check" are those splits, others are "edit"."""
    from datasets import load_dataset

    try:
        if limit is None:
            tables = load_dataset(name)
        else:
            tables = {"train": load_dataset(name, split="train", streaming=True).take(limit)}
        for table_name, table in tables.items():
            split = table_name if table_name in get_args(Split) else "edit"
            for i, row in enumerate(table, 1):
                yield f"{name}, {table_name}, row {i}", {"split": split, **dict(row)}
    except Exception as error:
        raise ValueError(
            f"{name!r} is no bundled set ({', '.join(BUNDLED_SETS)}), no file ({', '.join(_FILE_KINDS)}), "
            f"and the hub does not give it: {' '.join(str(error).split())[:200]}"
        ) from error


def _request(row: dict[str, Any], place: str, text_field: str, subject_field: str) -> Request:
    """A row as a Request; `place` says where it stands."""
    if isinstance(row.get("requested_rewrite"), dict):
        return _delman_request(row["requested_rewrite"], row.get("case_id"), place)
    fields = {name: value for name, value in row.items() if name in _FIELDS and value is not None}
    text, subject = row.get(text_field), row.get(subject_field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: the field {text_field!r} must be some text, got {text!r}")
    if subject is not None and (not isinstance(subject, str) or not subject.strip()):
        raise ValueError(f"{place}: the field {subject_field!r} must be some text, got {subject!r}")
    fields.pop("subject", None)
    for name, value in fields.items():
        if name in _LISTS:
            fields[name] = _LISTS[name](value, place)
            continue
        field_type = object if name == "id" else bool if name in ("concrete", "plain") else str
        if not isinstance(value, field_type):
            raise ValueError(f"{place}: the field {name!r} must be {field_type.__name__}, got {value!r}")
    try:
        return request(text, subject, **{**fields, "id": str(fields.get("id", place.split("/")[-1]))})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _names(value: Any, place: str) -> tuple[str, ...]:
    """Aliases: a list, or one text with semicolons between them, as in a CSV file."""
    names = value.split(";") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: the field 'aliases' must be a list of names, got {value!r}")
    return tuple(name.strip() for name in names if name.strip())


def _turns(value: Any, place: str) -> tuple[tuple[str, str], ...]:
    """Earlier turns: pairs of what the user and the assistant said."""
    pairs: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise ValueError(f"{place}: the field 'earlier' must be a list of [user, assistant], got {value!r}")
    return tuple((user, assistant) for user, assistant in pairs)


_LISTS = {"aliases": _names, "earlier": _turns}


def _delman_request(row: dict[str, Any], case: Any, place: str) -> Request:
    """A row of the DELMAN release as a Request."""
    text, subject = row.get("prompt_adv"), row.get("subject")
    if not isinstance(text, str) or "{}" not in text:
        raise ValueError(f"{place}: the field 'prompt_adv' must hold {{}}, got {text!r}")
    if not isinstance(subject, str) or not subject.strip():
        raise ValueError(f"{place}: the field 'subject' must be some text, got {subject!r}")
    return Request(
        id=f"delman-{case}",
        pieces=tuple(text.removeprefix("Q:").removesuffix("A:").strip().split("{}")),
        subject=subject,
        concrete=False,
        safe_target=row.get("target_new"),
    )
