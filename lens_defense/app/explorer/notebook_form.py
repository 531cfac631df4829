"""What a notebook shows of an explorer: the page, and a picture and sentences where no page can live.

A notebook is saved, and read without a kernel or on a site that runs nothing. JupyterLab shows an error in
the place of a widget that it does not have, so the static form is an output of its own. The page hides it.
"""

from base64 import b64encode
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from plotly.io import renderers

from lens_defense.app.explorer.page_state import EVENT, PageState
from lens_defense.app.explorer.page_values import to_be_saved
from lens_defense.app.render import template
from lens_defense.plotting.print_size import PIXELS_PER_INCH
from lens_defense.plotting.theme import DPI


class StaticForm:
    """The static form of one explorer, wherever the notebook shows it.

    It is what stood there when its cell ran, until somebody uses the page: from then on it is kept in step.
    """

    def __init__(self, state: PageState) -> None:
        """Make the form; nothing is shown yet."""
        self.state = state
        self.id = token_hex(8)
        self.picture = b""
        self.missing = ""
        self._shown: dict[str, Any] = {}
        self._used = False

    def bundle(self) -> dict[str, Any]:
        """The form by MIME type, as things stand."""
        html = template("explorer.html.j2").render(
            id=self.id,
            picture=b64encode(self.picture).decode(),
            width=_screen_pixels(self.picture) if self.picture else 0,
            missing=self.missing,
            **to_be_saved(self.state.parts),
        )
        return {"text/plain": repr(self.state), "text/html": html}

    def show(self) -> None:
        """Show the form as an output of the cell that runs."""
        from IPython.display import display

        if not self._shown:
            self.state.listen(self._follow)
        self._shown = self.bundle()
        display(self._shown, raw=True, display_id=self.id)

    def _follow(self, name: str, value: Any) -> None:
        """Renew the outputs, but not while work goes on."""
        done = name == f"{EVENT}done"
        self._used |= done
        if not self._used or self.state.parts.get("job"):
            return
        if not (done or name in ("sites", "stack") or (name == "job" and not value)):
            return
        bundle = self.bundle()
        if self._shown and bundle != self._shown:
            from IPython.display import update_display

            self._shown = bundle
            update_display(bundle, raw=True, display_id=self.id)


def _screen_pixels(png: bytes) -> int:
    """How wide a figure saved for print is on a screen: as it was laid out."""
    return round(int.from_bytes(png[16:20], "big") * PIXELS_PER_INCH / DPI[".png"])


def wants_pictures() -> bool:
    """Whether figures are shown as pictures here, for readers without a kernel."""
    return "png" in str(renderers.default)


def page_form(widget: Any, options: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The widget's own form alone, without its sentence."""
    bundle = widget._repr_mimebundle_(**options)
    data: dict[str, Any] = bundle[0] if isinstance(bundle, tuple) else bundle
    return {kind: value for kind, value in data.items() if not kind.startswith("text/")}
