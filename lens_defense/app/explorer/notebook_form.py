"""What a notebook shows of an explorer: the page, and a picture and sentences where no page can live.

A notebook is saved, and read without a kernel or on a site that runs nothing. JupyterLab shows an error in
the place of a widget that it does not have, so the static form is an output of its own. The page hides it.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping
from secrets import token_hex
from typing import Any

from plotly.io import renderers

from lens_defense.app.explorer.page_state import EVENT, PageState
from lens_defense.app.explorer.page_values import to_be_saved
from lens_defense.app.render import template
from lens_defense.plotting.print_size import PIXELS_PER_INCH
from lens_defense.plotting.theme import DPI


class NotebookForms:
    """The page and the static form of one explorer, wherever a notebook shows it.

    The static form is what stood there when its cell ran, until somebody uses the page: from then on it is
    kept in step.
    """

    def __init__(self, state: PageState, draw: Callable[[], bytes]) -> None:
        """Make the forms; nothing is shown yet.

        Args:
            state: an Explorer.
            draw: gives its map as a PNG, or b"" where there is none.
        """
        self.state, self.draw = state, draw
        self.id = token_hex(8)
        self.widget: Any = None
        self._picture = b""
        self._missing = ""
        self._shown: dict[str, Any] = {}
        self._used = False

    def bundle(self, **options: Any) -> dict[str, Any]:
        """Both forms by MIME type, as things stand; `options` are those of a widget."""
        page = self._page(options)
        return {**page, **self._static()}

    def show(self) -> None:
        """Show the static form as an output of the cell that runs, and the page as another."""
        from IPython.display import display

        page = self._page({})
        if not self._shown:
            self.state.listen(self._follow)
        self._shown = self._static()
        display(self._shown, raw=True, display_id=self.id)
        if page:
            display(page, raw=True)

    def _static(self) -> dict[str, Any]:
        html = template("explorer.html.j2").render(
            id=self.id,
            picture=b64encode(self._picture).decode(),
            width=_screen_pixels(self._picture) if self._picture else 0,
            missing=self._missing,
            **to_be_saved(self.state.parts),
        )
        return {"text/plain": repr(self.state), "text/html": html}

    def _page(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a notebook shows the page by, without the widget's own sentence; nothing without anywidget."""
        self._picture = self.draw() if wants_pictures() else b""
        try:
            from lens_defense.app.explorer.widget import ExplorerWidget
        except ImportError as error:
            self._missing = str(error)
            return {}
        if self.widget is None or self.widget.closed:
            self.widget = ExplorerWidget(self.state, self.id)
        bundle = self.widget._repr_mimebundle_(**options)
        data: dict[str, Any] = bundle[0] if isinstance(bundle, tuple) else bundle
        return {kind: value for kind, value in data.items() if not kind.startswith("text/")}

    def _follow(self, name: str, value: Any) -> None:
        """Renew the outputs, but not while work goes on."""
        done = name == f"{EVENT}done"
        self._used |= done
        if not self._used or self.state.parts.get("job"):
            return
        if not (done or name in ("sites", "stack") or (name == "job" and not value)):
            return
        bundle = self._static()
        if self._shown and bundle != self._shown:
            from IPython.display import update_display

            self._shown = bundle
            update_display(bundle, raw=True, display_id=self.id)


def wants_pictures() -> bool:
    """Whether figures are shown as pictures here, for readers without a kernel."""
    return "png" in str(renderers.default)


def _screen_pixels(png: bytes) -> int:
    """How wide a figure saved for print is on a screen: as it was laid out."""
    return round(int.from_bytes(png[16:20], "big") * PIXELS_PER_INCH / DPI[".png"])
