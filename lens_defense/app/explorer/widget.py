"""The explorer's page as a widget: JupyterLab, Notebook 7, VS Code, Colab, marimo.

Parts change in the worker's thread too, while another cell runs. That is sound: ipykernel sends the messages
of all threads through one queue, and the explorer tells of one part at a time.
"""

from typing import Any

from lens_defense.app.explorer.page_files import page_module, page_style
from lens_defense.app.explorer.page_state import EVENT, PageState, hand_over
from lens_defense.app.explorer.page_values import SHORTENED, to_be_saved

try:
    import anywidget
    import traitlets
except ModuleNotFoundError as error:
    raise ImportError(
        f"ld.Explorer needs {error.name} to be shown in a notebook, and it is not installed: "
        "pip install 'lens-defense[notebook]'"
    ) from None


class ExplorerWidget(anywidget.AnyWidget):
    """A trait per part; commands of the page come as custom messages, events go as such.

    A notebook may save the traits, and answers to harmful questions are not to be saved. So their trait has
    the first dozen words, and the page is told the whole beside it.
    """

    _esm = page_module()
    _css = page_style()

    def __init__(self, state: PageState, static_form: str = "") -> None:
        """Show a state, and follow it until `close`.

        Args:
            state: an Explorer.
            static_form: the id of the outputs that the page stands for, and hides.
        """
        self.closed = False
        self._state = state
        self._unfollow: Any = None
        traits = {name: traitlets.Any().tag(sync=True) for name in state.parts}
        self.add_traits(**traits, static_form=traitlets.Unicode(static_form).tag(sync=True))
        super().__init__(**to_be_saved(state.parts))
        self.on_msg(self._asked)
        self._unfollow = state.listen(self._follow)

    def close(self) -> None:
        """Take the page away, and stop listening."""
        self.closed = True
        if self._unfollow is not None:
            self._unfollow()
        super().close()

    def _follow(self, name: str, value: Any) -> None:
        if name.startswith(EVENT):
            self.send({"event": name.removeprefix(EVENT), **value})
            return
        if name in SHORTENED:
            self.send({"event": "whole", "part": name, "value": value})
        self.set_trait(name, to_be_saved({name: value})[name])

    def _asked(self, _widget: Any, message: Any, _buffers: Any) -> None:
        if message == {"tell": "whole"}:
            self._state.listen(self._follow)()  # each part as it is now
        else:
            hand_over(self._state, message)
