"""Reading request sets: the package's own by name, JSONL, CSV, parquet, hub data sets, DELMAN's JSON.

A row needs `text`, and for a harmful request its `subject`; other fields are those of Request. Rows
of the DELMAN release (`requested_rewrite` with `prompt_adv`, `subject`, `target_new`) are read as
they stand, without their "Q: ... A:".
"""

import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from lens_defense.prompts.prompt import Kind, Request, Split, request

BUNDLED_SETS = ("core", "organism")
"""The names of the request sets that the package brings."""
_FIELDS = frozenset(Request.__slots__) - {"pieces"}


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
        name: "core", "organism", a .jsonl, .json, .csv or .parquet file, or the name of a hub data set.
        split: which part of a set that is split; a row without a split belongs to "edit".
        kind: harmful gives concrete things first; benign and safe all rows as they stand.
        distinct: of harmful requests about one subject keep the first alone, as an edit wants them.
        text_field: the column that holds the request.
        subject_field: the column that holds its subject.

    Raises:
        ValueError: there is no such set, or a row is bad; file, line and field are named.
    """
    rows = [_request(row, where, text_field, subject_field) for where, row in _rows(os.fspath(name))]
    chosen = [row for row in rows if row.split == split and row.kind == kind]
    if kind != "harmful":
        return chosen
    first = {row.subject or row.text: row for row in reversed(chosen)}
    kept = [row for row in chosen if not distinct or first[row.subject or row.text] is row]
    return sorted(kept, key=lambda row: not row.concrete)


def bundled_rows(name: str, part: str) -> list[dict[str, Any]]:
    """The rows of one JSONL file of a bundled set, for example ("core", "templates")."""
    text = files("lens_defense").joinpath(f"data/{name}/{part}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a set, with a sentence's worth of where it stands."""
    if name in BUNDLED_SETS:
        for i, row in enumerate(bundled_rows(name, "requests"), 1):
            yield f"{name}, line {i}", row
        return
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
        if not path.is_file():
            raise ValueError(f"there is no file {path}; bundled sets: {', '.join(BUNDLED_SETS)}")
        yield from file_rows(path)
        return
    from datasets import load_dataset

    try:
        parts = load_dataset(name)
    except Exception as error:
        raise ValueError(
            f"{name!r} is no bundled set ({', '.join(BUNDLED_SETS)}), no file (.jsonl, .json, .csv, .parquet), "
            f"and the hub does not give it: {' '.join(str(error).split())[:200]}"
        ) from error
    for part, table in parts.items():
        own = part if part in get_args(Split) else "edit"
        for i, row in enumerate(table, 1):
            yield f"{name}, {part}, row {i}", {"split": own, **dict(row)}


def file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a .jsonl, .json, .csv or .parquet file, with where it stands.

    Raises:
        ValueError: a row is no object; the file and the line are named.
    """
    if path.suffix == ".json":
        yield from enumerate_rows(path, _parsed(path, path.read_text("utf-8"), 1), first=1)
    elif path.suffix == ".jsonl":
        for i, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip():
                yield f"{path}, line {i}", _mapping(_parsed(path, line, i), path, i)
    else:
        import pandas as pd

        read = pd.read_csv if path.suffix == ".csv" else pd.read_parquet
        table = read(path)
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        yield from enumerate_rows(path, rows, first=2 if path.suffix == ".csv" else 1)


def enumerate_rows(path: Path, rows: Any, *, first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a list, numbered from `first`."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"{path}: a list of rows is wanted, got {type(rows).__name__}")
    for i, row in enumerate(rows, first):
        yield f"{path}, line {i}", _mapping(row, path, i)


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON ({error.msg})") from error


def _mapping(row: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {line}: an object with fields is wanted, got {row!r}")
    return row


def _request(row: dict[str, Any], where: str, text_field: str, subject_field: str) -> Request:
    if isinstance(row.get("requested_rewrite"), dict):
        return _delman(row["requested_rewrite"], row.get("case_id"), where)
    fields = {name: value for name, value in row.items() if name in _FIELDS and value is not None}
    text, subject = row.get(text_field), row.get(subject_field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the field {text_field!r} must be some text, got {text!r}")
    if subject is not None and (not isinstance(subject, str) or not subject.strip()):
        raise ValueError(f"{where}: the field {subject_field!r} must be some text, got {subject!r}")
    fields.pop("subject", None)
    for name, allowed in (("concrete", bool), *((f, str) for f in _FIELDS - {"concrete", "id"})):
        if name in fields and not isinstance(fields[name], allowed):
            raise ValueError(f"{where}: the field {name!r} must be {allowed.__name__}, got {fields[name]!r}")
    try:
        return request(text, subject, **{**fields, "id": str(fields.get("id", where.split("/")[-1]))})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _delman(row: dict[str, Any], case: Any, where: str) -> Request:
    text, subject = row.get("prompt_adv"), row.get("subject")
    if not isinstance(text, str) or "{}" not in text:
        raise ValueError(f"{where}: the field 'prompt_adv' must hold {{}}, got {text!r}")
    if not isinstance(subject, str) or not subject.strip():
        raise ValueError(f"{where}: the field 'subject' must be some text, got {subject!r}")
    pieces = text.removeprefix("Q:").removesuffix("A:").strip().split("{}")
    return Request(
        id=f"delman-{case}",
        pieces=tuple(pieces),
        subject=subject,
        concrete=False,
        safe_target=row.get("target_new"),
    )
