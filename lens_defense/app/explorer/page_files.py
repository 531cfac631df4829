"""The page's own files: one ES module of a few plain scripts, and its style. There is no build step."""

from functools import cache
from importlib.resources import files

_SCRIPTS = ("dom.js", "map.js", "steps.js", "ask.js", "check.js", "page.js")
"""In the order in which they use one another."""
_FOLDER = files("lens_defense.app.explorer") / "page"


@cache
def page_module() -> str:
    """The module, whose default export has `render({model, el})` as anywidget calls it."""
    return "\n".join((_FOLDER / name).read_text("utf-8") for name in _SCRIPTS)


@cache
def page_style() -> str:
    """The style; every rule begins with the page's own class, so that it can stand in a notebook."""
    return (_FOLDER / "explorer.css").read_text("utf-8")


@cache
def local_script() -> str:
    """What connects the page at a local address with its server."""
    return (_FOLDER / "local.js").read_text("utf-8")
