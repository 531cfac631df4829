"""Request sets and corpora from every source: the package's own, files, hub data sets, rows in hand.

A row of a request set needs a text, and for a harmful request its subject; other fields are those of Request.
Published sets are read as they stand: the columns of HarmBench, AdvBench, JailbreakBench, StrongREJECT,
XSTest, SORRY-Bench and others are known by name, and so are the JSON rows of DELMAN, CounterFact and zsRE.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import Any, get_args

from lens_defense.prompts.request import Kind, Request, Split, request
from lens_defense.prompts.table_files import FILE_KINDS, BadRow, numbered_rows
from lens_defense.shown_text import one_line, shown

BUNDLED_SETS = ("core", "organism")
"""The names of the request sets that the package brings."""
Row = dict[str, Any]
Source = str | os.PathLike[str] | Iterable[Any]
TEXT_COLUMNS = (
    *("text", "prompt", "question", "request", "goal", "behavior", "forbidden_prompt", "turns"),
    *("instruction", "query", "input", "src"),
)
"""Names under which the text of a request is known, in any case; the first that a row has counts."""
_OTHER_NAMES = {
    "id": ("behaviorid", "question_id", "case_id", "id_v2"),
    "category": ("semanticcategory", "type"),
    "kind": ("label",),
}
"""By field of a Request, what published sets call it."""
_SHOWN_ROWS = 3


def requests(
    source: Source,
    *,
    split: Split = "edit",
    kind: Kind = "harmful",
    distinct: bool = True,
    text: str | None = None,
    subject: str | Callable[[Row], str | None] = "subject",
    limit: int | None = None,
    strict: bool = False,
) -> list[Request]:
    """Read a request set.

    A row that cannot be read is left out, and a warning says where it stands and why.

    Args:
        source: the name of a set or a file, see `read_rows`; or rows in hand: a DataFrame, a data set, a list
            of dicts.
        split: only rows of this split are given; a row without a split belongs to "edit".
        kind: only rows of this kind; a row without a kind is "harmful", but one that is labelled safe or
            benign is that. Harmful rows come with concrete things first, others in their order.
        distinct: keep only the first of several harmful requests about one subject, as an edit wants them.
        text: the column that holds the request; None takes the first of TEXT_COLUMNS that a row has.
        subject: the column that holds its subject, or a function from a row to it. A set without subjects is
            read without, with a warning; an edit and a trace need them, and `ld.mark_subjects` proposes some.
        limit: the most requests that are given; None gives all.
        strict: whether a row that cannot be read is an error.

    Raises:
        ValueError: there is no such set; or no row can be read, or with `strict` one cannot: file, line and
            field are named.
    """
    for name, value, values in (("split", split, get_args(Split)), ("kind", kind, get_args(Kind))):
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")
    all_requests, columns = _requests_and_columns(source, text, subject, strict=strict)
    chosen = chosen_requests(all_requests, split, kind, distinct)
    if kind == "harmful" and chosen and not any(item.subject for item in chosen):
        warnings.warn(
            f"these requests have no subjects, which a trace and an edit need; the columns are "
            f"{', '.join(map(repr, columns))}. Say which one holds them (subject='column', or a function "
            "from a row), or let ld.mark_subjects(model, requests) propose them",
            stacklevel=2,
        )
    return chosen[:limit]


def every_request(
    source: Source,
    *,
    text: str | None = None,
    subject: str | Callable[[Row], str | None] = "subject",
    strict: bool = False,
) -> list[Request]:
    """Every row of a request set that can be read, of every split and kind; arguments as of `requests`."""
    return _requests_and_columns(source, text, subject, strict=strict)[0]


def chosen_requests(
    all_requests: Sequence[Request], split: Split, kind: Kind, distinct: bool
) -> list[Request]:
    """The requests of one split and kind; arguments as of `requests`."""
    chosen = [item for item in all_requests if item.split == split and item.kind == kind]
    if kind == "harmful":
        if distinct:
            first: dict[str, Request] = {}
            for item in chosen:
                first.setdefault(item.subject or item.text, item)
            chosen = list(first.values())
        chosen.sort(key=lambda item: not item.concrete)
    return chosen


def _bundled_aliases(name: str, item: Request) -> tuple[str, ...]:
    """Other names of a request's subject that an edit may use."""
    rows = bundled_rows(name, "aliases")
    return tuple(row["alias"] for row in rows if row["split"] == "edit" and row["subject"] == item.subject)


def rows_in_hand(source: Any) -> list[Any] | None:
    """The rows of a table of pandas or polars, or the parts of a collection; None for anything else."""
    if hasattr(source, "itertuples"):
        return source.to_dict("records")
    if hasattr(source, "to_dicts"):
        return source.to_dicts()
    is_model = hasattr(source, "named_parameters")
    return list(source) if isinstance(source, Iterable) and not is_model else None


def row_in_hand(row: Mapping[str, Any]) -> Row:
    """A row in hand; what pandas shows as NaN is missing."""
    return {
        str(name): None if isinstance(value, float) and isnan(value) else value for name, value in row.items()
    }


def _requests_and_columns(
    source: Source, text: str | None, subject: str | Callable[[Row], str | None], *, strict: bool
) -> tuple[list[Request], list[str]]:
    """Every request of a source, and the columns that its rows have."""
    all_requests: list[Request] = []
    problems: list[str] = []
    columns: dict[str, None] = {}
    for place, row in read_rows(source):
        columns |= dict.fromkeys(row if isinstance(row, Mapping) else ())
        try:
            all_requests.append(request_from_row(row, place, text, subject))
        except ValueError as error:
            if strict:
                raise
            problems.append(str(error))
    if problems and not all_requests:
        raise ValueError(problems[0])
    if problems:
        examples = "; ".join(problems[:_SHOWN_ROWS]) + ("; ..." if len(problems) > _SHOWN_ROWS else "")
        warnings.warn(
            f"{len(problems)} of {len(problems) + len(all_requests)} rows were left out: "
            f"{shown(examples, 2000)}",
            stacklevel=3,
        )
    if isinstance(source, str) and source in BUNDLED_SETS:
        all_requests = [replace(item, aliases=_bundled_aliases(source, item)) for item in all_requests]
    return all_requests, list(columns)


def read_rows(
    source: Source, table: str = "requests", *, limit: int | None = None
) -> Iterator[tuple[str, Row | BadRow]]:
    """Every row of a source, after the place where it stands, in words ("core, line 3").

    In the place of a row of a file that cannot be read stands a BadRow.

    Args:
        source: "core", "organism", a .jsonl, .json, .csv, .tsv, .parquet or .txt file (each paragraph is a
            `text`), the name of a hub data set, or rows in hand.
        table: which rows of a bundled set, see `bundled_rows`.
        limit: take so many rows of a hub data set's split "train", streamed; None takes all its splits.

    Raises:
        ValueError: there is no such source.
    """
    if not isinstance(source, str | os.PathLike):
        for i, row in enumerate(rows_in_hand(source) or (), 1):
            known = isinstance(row, Mapping)
            yield (
                f"row {i}",
                row_in_hand(row) if known else BadRow(f"an object with fields is wanted, got {row!r}"),
            )
        return
    path = Path(source)
    if source in BUNDLED_SETS:
        for i, row in enumerate(bundled_rows(str(source), table), 1):
            yield f"{source}, line {i}", row
    elif path.suffix.lower() in FILE_KINDS or path.is_file():
        yield from _file_rows(path)
    else:
        yield from _hub_rows(os.fspath(source), limit)


@cache
def bundled_rows(name: str, table: str) -> list[dict[str, Any]]:
    """The rows of one file of a bundled set (requests, paraphrases, ...); none where it has no such."""
    file = files("lens_defense").joinpath(f"data/{name}/{table}.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


_FIELDS = frozenset(Request.__slots__) - {"pieces", "spelled"}


def _file_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    unit = {".txt": "paragraph", ".json": "row", ".parquet": "row"}.get(path.suffix.lower(), "line")
    for i, row in numbered_rows(path):
        if not isinstance(row, dict | BadRow):
            row = BadRow(f"an object with fields is wanted, got {row!r}")
        yield f"{path}, {unit} {i}", row


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
            f"{name!r} is no bundled set ({', '.join(BUNDLED_SETS)}), no file ({', '.join(FILE_KINDS)}), "
            f"and the hub does not give it: {one_line(error)}"
        ) from error


def request_from_row(
    row: Row | BadRow,
    place: str,
    text_column: str | None = None,
    subject_of: str | Callable[[Row], str | None] = "subject",
) -> Request:
    """A row as a Request; `place` says where it stands."""
    if isinstance(row, BadRow):
        raise ValueError(f"{place}: {row}")
    if isinstance(row.get("requested_rewrite"), dict):
        return _rewrite_request(row["requested_rewrite"], row.get("case_id"), place)
    by_lower = {str(column).lower(): value for column, value in row.items() if value is not None}
    names = (text_column,) if text_column else TEXT_COLUMNS
    column = next((name for name in names if name in row or name in by_lower), None)
    if column is None:
        raise ValueError(
            f"{place}: no column is called {', '.join(map(repr, names))}; there are "
            f"{', '.join(map(repr, row)) or 'none'}; say which one holds the request, as in "
            f"text={next(iter(row), '')!r} (--text-field {next(iter(row), 'NAME')})"
        )
    text = row.get(column, by_lower.get(column))
    text = text[0] if isinstance(text, list) and len(text) == 1 else text  # SORRY-Bench: a list of turns
    if isinstance(text, str) and (
        context := by_lower.get("contextstring")
    ):  # as HarmBench puts them together
        text = f"{context}\n\n---\n\n{text}"
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: the field {column!r} must be some text, got {text!r}")
    subject = subject_of(row) if callable(subject_of) else row.get(subject_of)
    if subject is not None and (not isinstance(subject, str) or not subject.strip()):
        name = "subject" if callable(subject_of) else subject_of
        raise ValueError(f"{place}: the field {name!r} must be some text, got {subject!r}")
    fields = _other_fields(by_lower, place, is_text=column)
    try:
        return request(text, subject, **fields)
    except ValueError as error:
        reason = str(error).removeprefix(f"request {fields['id']!r}: ")
        raise ValueError(f"{place}: {reason}") from error


def _other_fields(by_lower: Mapping[str, Any], place: str, *, is_text: str) -> dict[str, Any]:
    """The fields of a Request beside text and subject, under their own names or those of published sets.

    Raises:
        ValueError: a value is of another type than its field.
    """
    fields = {name: by_lower[name] for name in _FIELDS - {"subject"} if name in by_lower and name != is_text}
    for name, others in _OTHER_NAMES.items():
        found = next((by_lower[other] for other in others if other in by_lower), None)
        if found is not None and (name != "kind" or str(found).lower() in _LABELS):
            fields.setdefault(name, _LABELS[found.lower()] if name == "kind" else found)
    for name, value in fields.items():
        if name in _LISTS:
            fields[name] = _LISTS[name](value, place)
        elif name in ("concrete", "plain"):
            fields[name] = _TRUTHS.get(str(value).lower())
            if fields[name] is None:
                raise ValueError(f"{place}: the field {name!r} must be bool, got {value!r}")
        elif name != "id" and not isinstance(value, str):
            raise ValueError(f"{place}: the field {name!r} must be str, got {value!r}")
    return {**fields, "id": str(fields.get("id", place.split("/")[-1]))}


_LABELS: dict[str, Kind] = {"safe": "safe", "unsafe": "harmful", "harmful": "harmful", "benign": "benign"}
"""The kinds behind the labels of published sets."""
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


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


def _rewrite_request(row: Row, case: Any, place: str) -> Request:
    """A row of DELMAN's release, or of CounterFact, as a Request."""
    field = "prompt_adv" if "prompt_adv" in row or "prompt" not in row else "prompt"
    text, subject, new = row.get(field), row.get("subject"), row.get("target_new")
    if not isinstance(text, str) or "{}" not in text:
        raise ValueError(f"{place}: the field {field!r} must hold {{}}, got {text!r}")
    if not isinstance(subject, str) or not subject.strip():
        raise ValueError(f"{place}: the field 'subject' must be some text, got {subject!r}")
    known = row.get("target_true")
    return Request(
        id=f"{'delman' if field == 'prompt_adv' else 'rewrite'}-{case}",
        pieces=tuple(text.removeprefix("Q:").removesuffix("A:").strip().split("{}")),
        subject=subject,
        concrete=False,
        target=known.get("str") if isinstance(known, dict) else None,
        safe_target=new.get("str") if isinstance(new, dict) else new,
    )
