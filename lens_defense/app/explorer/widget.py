"""The explorer's page as a widget: JupyterLab, Notebook 7, VS Code, Colab, marimo."""

from base64 import b64encode
from typing import Any

from plotly.io import renderers

from lens_defense.app.explorer.page_files import page_module, page_style
from lens_defense.app.explorer.page_state import EVENT, PageState, hand_over
from lens_defense.app.render import template
from lens_defense.plotting.print_size import PIXELS_PER_INCH
from lens_defense.plotting.theme import DPI

try:
    import anywidget
    import traitlets
except ModuleNotFoundError as error:
    raise ImportError(
        f"ld.Explorer needs {error.name} to be shown in a notebook, and it is not installed: "
        "pip install 'lens-defense[notebook]'"
    ) from None


class ExplorerWidget(anywidget.AnyWidget):
    """A trait per part; commands of the page come as custom messages, events go as such."""

    _esm = page_module()
    _css = page_style()

    def __init__(self, state: PageState) -> None:
        """Show a state, and follow it."""
        traits = {name: traitlets.Any().tag(sync=True) for name in state.parts}
        self.add_traits(**traits)
        super().__init__(**state.parts)
        self._state = state
        state.listen(self._follow)
        self.on_msg(self._asked)

    def _follow(self, name: str, value: Any) -> None:
        if name.startswith(EVENT):
            self.send({"event": name.removeprefix(EVENT), **value})
        else:
            self.set_trait(name, value)

    def _asked(self, _widget: Any, message: Any, _buffers: Any) -> None:
        hand_over(self._state, message)


def notebook_bundle(
    widget: ExplorerWidget, text: str, picture: bytes | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What a notebook shows: the page, and for readers without a kernel a picture and what stands."""
    bundle: Any = widget._repr_mimebundle_(**options)
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    parts = {name: getattr(widget, name) for name in ("sites", "plan", "stack", "talk")}
    data["text/plain"] = text
    data["text/html"] = template("explorer.html.j2").render(
        picture=b64encode(picture).decode() if picture else "",
        width=_screen_pixels(picture) if picture else 0,
        **parts,
    )
    return data


def _screen_pixels(png: bytes) -> int:
    """How wide a figure saved for print is on a screen: as it was laid out."""
    return round(int.from_bytes(png[16:20], "big") * PIXELS_PER_INCH / DPI[".png"])


def wants_pictures() -> bool:
    """Whether figures are shown as pictures here, for readers without a kernel."""
    return "png" in str(renderers.default)
