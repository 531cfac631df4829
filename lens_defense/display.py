"""What an object shows of itself: a card in a notebook, a table in a Markdown file."""

import re
from collections.abc import Mapping
from html import escape

import pandas as pd

from lens_defense.shown_text import shown

_STYLE = """<style>
.ld-card {font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.45; max-width: 76em}
.ld-card h4 {margin: .2em 0; font-size: 14px}
.ld-card p {margin: .2em 0; opacity: .75}
.ld-card table {border-collapse: collapse; margin: .5em 0}
.ld-card th, .ld-card td {padding: .15em 1em .15em 0; text-align: left; border: 0; white-space: pre-wrap}
.ld-card th {border-bottom: 1px solid currentColor; font-weight: 600}
.ld-card td {border-bottom: 1px solid rgba(128, 128, 128, .25); font-variant-numeric: tabular-nums}
</style>"""


def card(title: str, facts: Mapping[str, object], *tables: pd.DataFrame, rows: int = 12) -> str:
    """HTML that is legible on light and dark pages.

    Args:
        title: the heading.
        facts: shown in a line, by their names.
        tables: under it.
        rows: the most rows of a table that are shown; from a longer one the first and the last.
    """
    line = "; ".join(f"{escape(name)} {escape(str(value))}" for name, value in facts.items())
    body = "".join(table.to_html(index=False, border=0, max_rows=rows, na_rep="") for table in tables)
    return f'{_STYLE}<div class="ld-card"><h4>{escape(shown(title))}</h4><p>{line}</p>{body}</div>'


def markdown_table(table: pd.DataFrame) -> str:
    """A table for a Markdown file; nothing in its cells is read as Markdown or HTML."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[cell if cell == "---" else markdown_text(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def markdown_text(value: object) -> str:
    """A text as one line of a Markdown file; nothing in it is read as Markdown or HTML."""
    text = "" if value is None else shown(value, _CELL_LETTERS)
    return re.sub(r"([\\`*_<>#|~]|(?<=])[(\[])", r"\\\1", text)  # after ] alone, a bracket makes a link


_CELL_LETTERS = 400
