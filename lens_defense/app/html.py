"""Values as HTML: every text in it is escaped, and what cannot be seen is made visible."""

import html
from collections.abc import Sequence

from lens_defense.plotting.theme import visible_text


def table_of(
    headers: Sequence[object], rows: Sequence[Sequence[object]], groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table; groups name columns that belong together, each with its number of columns."""
    over = "".join(f"<th colspan='{span}'>{escaped(name)}</th>" for name, span in groups)
    head = "".join(f"<th>{escaped(name)}</th>" for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<tr class='groups'>{over}</tr>" if groups else ""
    return f"<div class='wide'><table><thead>{top}<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def escaped(value: object) -> str:
    """Any value as text."""
    return html.escape(visible_text(str(value)))


def escaped_lines(text: str) -> str:
    """Text whose line breaks stay."""
    return "\n".join(escaped(line) for line in text.split("\n"))


def listed(layers: Sequence[int]) -> str:
    """Layers in words: a run by its ends."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
