"""Tables of results: tidy CSV, one row per measurement, in which a script replaces what it made anew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lens_defense.storage import atomic_write


def read_table(path: Path) -> pd.DataFrame:
    """A table of results; an empty one where there is no file."""
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def rows_where(table: pd.DataFrame, key: Mapping[str, Any]) -> "pd.Series[bool]":
    """Which rows have these values in these columns; none where a column is missing."""
    matches = pd.Series(True, index=table.index)
    for column, value in key.items():
        matches &= table[column].eq(value) if column in table else False
    return matches


def replace_rows(
    path: Path, key: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, digits: int | None = None
) -> None:
    """Write rows in the place of those that have the same key; the file is written whole or not at all."""
    table = read_table(path)
    table = pd.concat([table[~rows_where(table, key)], pd.DataFrame([{**key, **row} for row in rows])])
    table = table.convert_dtypes()
    with atomic_write(path) as file:
        (table if digits is None else table.round(digits)).to_csv(file, index=False)
