"""HTML from the templates in app/templates: text is escaped and cut, and what has no shape gets one."""

from functools import cache, partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from lens_defense.shown_text import CODE_LETTERS, TEXT_LETTERS, shown, truncate, visible_text


@cache
def template(name: str) -> Template:
    """A template by its file name; call its `render`, or the macros of its `module`."""
    environment = Environment(
        autoescape=True,
        finalize=_visible,
        loader=PackageLoader("lens_defense.app"),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["lines"] = _lines
    environment.filters["code"] = partial(_lines, letters=CODE_LETTERS)
    return environment.get_template(name)


def _visible(value: Any) -> Any:
    return value if isinstance(value, Markup) else shown(value, TEXT_LETTERS)


def _lines(text: str, letters: int = TEXT_LETTERS) -> Markup:
    """Text whose line breaks stay."""
    lines = truncate(text, letters).split("\n")
    return Markup("\n").join(escape(visible_text(line)) for line in lines)
