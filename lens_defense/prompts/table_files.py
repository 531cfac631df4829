"""Rows of a file, as people have it: JSON, JSON lines, CSV of every dialect, parquet, paragraphs of text.

A cell of a CSV is text, whatever it looks like: "007" stays "007" and "NA" stays "NA". An empty one is
missing.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_CELL = 10_000_000


class BadRow(ValueError):
    """A row that cannot be read; others of its file can."""


def numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file, by their lines (CSV, JSON lines) or their order, from 1.

    A row that cannot be read is given as a BadRow in its place.

    Raises:
        ValueError: there is no such file, it is of no known kind, or it cannot be read as one.
    """
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise ValueError(
            f"{path} is a file of no known kind; give one of {', '.join(FILE_KINDS)} (a spreadsheet can be "
            "saved as CSV)"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {path} (looked in {Path.cwd()}); check its name and folder")
    if kind == ".parquet":
        import pandas as pd

        table = pd.read_parquet(path)
        yield from enumerate(table.astype(object).where(table.notna(), None).to_dict("records"), 1)
        return
    text = read_text(path)
    if kind == ".txt":
        paragraphs = filter(None, map(str.strip, text.split("\n\n")))
        yield from enumerate(({"text": paragraph} for paragraph in paragraphs), 1)
    elif kind == ".json":
        yield from _json_rows(path, text)
    elif kind == ".jsonl":
        yield from _json_lines(text)
    else:
        yield from _csv_rows(path, text)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8 or UTF-16, with or without a byte order mark, or else in Windows' cp1252.

    Raises:
        ValueError: it is none of these.
    """
    data = path.read_bytes()
    by_mark = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
    marked = [encoding for mark, encoding in by_mark.items() if data.startswith(mark)]
    half_empty = data[:200].count(0) * 3 > len(data[:200])  # UTF-16 without a mark, of Latin letters
    utf_16 = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    for encoding in marked or ([utf_16] if half_empty else ["utf-8", "cp1252"]):
        try:
            return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is no text in UTF-8, UTF-16 or cp1252; save it as UTF-8")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Rows by the names in the first line; the delimiter is the one that cuts that line into most fields."""
    lines = text.split("\n")
    first = 0
    if lines[0].lower().startswith("sep=") and len(lines[0]) == 5:  # Excel says its delimiter so
        delimiter, first = lines[0][4], 1
    else:
        delimiter = max(_DELIMITERS, key=lambda mark: len(_fields(lines[0], mark)))
    csv.field_size_limit(_LONGEST_CELL)

    def reader_from(start: int) -> Any:
        return csv.reader((line + "\n" for line in lines[start:]), delimiter=delimiter, strict=True)

    start, reader = first, reader_from(first)
    names: list[str] = []
    line = first + 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # an open quote swallows all that follows: go on in the next line
            yield line, BadRow(f"not CSV ({error})")
            start, reader = line, reader_from(line)
            line += 1
            continue
        if not any(cell.strip() for cell in cells):
            pass
        elif not names:
            names = [name.strip() for name in cells]
            repeated = [name for i, name in enumerate(names) if name in names[:i]]
            if repeated:
                raise ValueError(f"{path}, line {line}: two columns are called {repeated[0]!r}")
        elif len(cells) != len(names):
            yield (
                line,
                BadRow(
                    f"{len(cells)} fields, where the first line has {len(names)}; a field that holds a "
                    f"{delimiter!r} must stand in double quotes"
                ),
            )
        else:
            yield line, {name: cell or None for name, cell in zip(names, cells, strict=True)}
        line = start + reader.line_num + 1


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except json.JSONDecodeError as error:
                yield line, BadRow(f"not JSON ({error.msg})")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """A list of rows, columns of equal length, an object with one list of rows, or an object per line."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        per_line = list(_json_lines(text))
        if any(isinstance(row, dict) for _, row in per_line):
            yield from per_line
            return
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if isinstance(rows, dict):
        lists = {name: value for name, value in rows.items() if isinstance(value, list)}
        of_objects = [value for value in lists.values() if value and isinstance(value[0], dict)]
        if len(of_objects) == 1:
            rows = of_objects[0]
        elif lists and len(set(map(len, lists.values()))) == 1:
            rows = [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list of rows is wanted, got {type(rows).__name__}")
    yield from enumerate(rows, 1)
