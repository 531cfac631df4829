"""The explorer: a form in Jupyter over the heatmap. Select cells, see the forecast, edit there, ask, undo.

A heatmap has no selection of its own, so a transparent marker lies on every cell. Work runs in the kernel's
main thread: the notebook's own interrupt stops it, and the form says whether anything was changed.
"""

import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import plotly.graph_objects as go
from plotly.callbacks import InputDeviceState
from plotly.io import renderers
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.render import template
from lens_defense.arguments import wrong_argument
from lens_defense.editing.edit import edit
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger import Ledger
from lens_defense.editing.methods import METHODS
from lens_defense.loading.loaded_model import loaded_model
from lens_defense.models.generate import generate
from lens_defense.plotting.heatmap import heatmap, site_cells
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.sites import Site, resolve_sites
from lens_defense.tracing.trace_result import Trace

try:
    import anywidget  # noqa: F401 - Plotly's FigureWidget wants it
    import ipywidgets as widgets
except ModuleNotFoundError as error:
    raise ImportError(
        f"ld.Explorer needs {error.name}, which is not installed: pip install 'lens-defense[notebook]'"
    ) from None


class Explorer:
    """What the form holds, for the kernel to read: `sites`, `edit`, `ledger`, `answers`."""

    def __init__(
        self,
        model: TransformerBridge,
        trace: Trace,
        requests: Requests,
        *,
        sites: Sequence[Site] = (),
        settings: Mapping[str, Any] = {},
        max_new_tokens: int = 40,
    ) -> None:
        """Draw the form; display the object to see it.

        Args:
            model: the model that the trace is of; no edit may stand in it.
            trace: what the map shows.
            requests: what an edit shall be about.
            sites: selected at first.
            settings: more arguments for ld.edit.
            max_new_tokens: the most tokens of an answer.
        """
        call = "ld.Explorer(model, trace, requests)"
        self.model = loaded_model(model, call)
        if not isinstance(trace, Trace):
            raise wrong_argument(call, "trace must be a Trace", trace, "ld.trace(model, requests) makes one")
        self.trace, self.requests = trace, requests_with_subjects(requests, call)
        self.settings, self.max_new_tokens = settings, max_new_tokens
        self.ledger = Ledger(model)
        self.sites: tuple[Site, ...] = ()
        self.edit: Edit | None = None
        self.answers: tuple[str, str] = ("", "")
        """The last question's answers, without and with the edits that stand."""
        self.figure = go.FigureWidget(heatmap(trace))
        self._panels = self._mark_cells()
        self._selected_at = 0.0
        self.selected_html, self.forecast_html, self.status_html, self.answers_html = (
            widgets.HTML() for _ in range(4)
        )
        self.log = widgets.Output()
        self.method = widgets.Dropdown(options=tuple(METHODS), description="method")
        self.method.observe(lambda _: self._drop_plan(), "value")
        self.question = widgets.Text(placeholder="ask anything, then press Ask", layout={"width": "70%"})
        self.buttons = {
            name: widgets.Button(description=name.capitalize(), tooltip=tip) for name, tip in _TIPS.items()
        }
        for name, button in self.buttons.items():
            button.on_click(self._guarded(getattr(self, f"do_{name}")))
        plan, apply, undo, ask = (self.buttons[name] for name in _TIPS)
        self.form = widgets.VBox(
            [
                widgets.HTML("<b>1. Select cells</b> by click (shift-click for more) or by a box"),
                *(self.figure, self.selected_html),
                widgets.HBox([widgets.HTML("<b>2. Edit there</b>"), self.method, plan, apply, undo]),
                *(self.forecast_html, self.log, self.status_html),
                widgets.HBox([widgets.HTML("<b>3. Ask</b>"), self.question, ask]),
                self.answers_html,
            ]
        )
        self.select(resolve_sites(sites, call))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The form; where pictures are wanted, also what it shows, for readers without a kernel."""
        bundle: Any = self.form._repr_mimebundle_(**options)
        if "png" in str(renderers.default):
            bundle["text/html"] = str(
                _html().picture(
                    b64encode(heatmap(self.trace, self.sites).to_image("png")).decode(),
                    self.selected_html.value,
                    self.forecast_html.value,
                    self.status_html.value,
                    self.question.value,
                    self.answers_html.value,
                )
            )
        return bundle

    def select(self, sites: Sequence[Site]) -> None:
        """Choose sites; a plan made for others is dropped."""
        for markers, cells in self._panels:
            markers.selectedpoints = None  # the browser may have marked others since: send all anew
            markers.selectedpoints = [i for i, site in enumerate(cells) if site in sites]
        self._choose(sites)

    def _choose(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(dict.fromkeys(sites))
        self.selected_html.value = str(_html().selected(self.sites))
        self._drop_plan()

    def _drop_plan(self) -> None:
        """A plan that was made for something else goes, and its forecast with it."""
        self.edit = None
        self.forecast_html.value = ""
        self._show()

    def do_plan(self) -> None:
        """Plan an edit at the selected sites, and show its forecast."""
        self._drop_plan()
        method = str(self.method.value)
        self.edit = edit(self.model, self.requests, self.sites, method=method, **self.settings)
        self.forecast_html.value = self.edit._repr_html_()

    def do_apply(self) -> None:
        """Make the planned change."""
        if self.edit is None:
            raise ValueError("there is no plan for these cells yet; press Plan first")
        self.ledger.apply(self.edit)

    def do_undo(self) -> None:
        """Take the last change back, bit for bit."""
        self.ledger.undo()

    def do_ask(self) -> None:
        """Answer the question without and with the edits that stand, side by side."""
        if not self.question.value.strip():
            raise ValueError("type a question first")
        ids = tokenize(self.model.tokenizer, request(self.question.value)).ids
        edited_answer = original_answer = self._answer(ids)
        if self.ledger.edits:
            with self.ledger.set_aside():
                original_answer = self._answer(ids)
        self.answers = original_answer, edited_answer
        self.answers_html.value = str(_html().answers(*self.answers))

    def _answer(self, ids: Sequence[int]) -> str:
        (answer_ids,) = generate(self.model, [ids], max_new_tokens=self.max_new_tokens)
        return decode_answer(self.model.tokenizer, answer_ids)

    def _mark_cells(self) -> list[tuple[Any, tuple[Site, ...]]]:
        """Panel by panel, a transparent marker on each cell, and the site that each stands for."""
        panels = []
        drawn: Any = self.figure.data
        maps = [part for part in drawn if part.type == "heatmap"]
        for panel, (xs, ys, sites) in enumerate(site_cells(self.trace)):
            markers = go.Scatter(
                x=xs,
                y=ys,
                mode="markers",
                marker={"size": 16, "color": "rgba(0,0,0,0)", "symbol": "square"},
                selected={"marker": {"color": "rgba(0,0,0,.75)", "size": 9}},
                unselected={"marker": {"color": "rgba(0,0,0,0)"}},
                hovertext=[maps[panel].hovertext[y][x] for x, y in zip(xs, ys, strict=True)],
                hoverinfo="text",  # what has no hover cannot be clicked either
                showlegend=False,
            )
            self.figure.add_trace(markers, row=1, col=panel + 1)
            added: Any = self.figure.data[-1]
            added.on_selection(self._clicked)
            added.on_click(self._clicked)
            added.on_deselect(self._deselected)
            panels.append((added, sites))
        self.figure.layout.on_change(self._boxed, "selections")
        buttons = {"add": ["select2d"], "remove": list(_REMOVED_BUTTONS)}
        self.figure.update_layout(clickmode="event+select", dragmode="select", modebar=buttons)
        return panels

    def _clicked(self, markers: Any, points: Any, device: Any) -> None:
        """A click sends two messages: all that is selected now, which counts, and the cell.

        A hover may displace one of them. So the cell is used only where no selection came just before.
        """
        cells = next(sites for panel_markers, sites in self._panels if panel_markers is markers)
        clicked = [cells[i] for i in points.point_inds]
        in_other_panels = [site for site in self.sites if site not in cells]
        if not isinstance(device, InputDeviceState):
            self._selected_at = time.monotonic()
            self._choose([*in_other_panels, *clicked])
        elif time.monotonic() - self._selected_at > _SECONDS_PER_CLICK:
            selected = (set(self.sites) if device.shift else set()) ^ set(clicked)
            self.select([*in_other_panels, *(site for site in cells if site in selected)])

    def _deselected(self, *_: Any) -> None:
        """A double click off the cells. On a cell its click displaces this message and selects the cell."""
        self._selected_at = time.monotonic()
        self._choose(())

    def _boxed(self, layout: Any, _: Any) -> None:
        """The layout keeps the boxes that are drawn, and no hover can displace it."""
        boxes = layout.to_plotly_json().get("selections", ()) or ()
        if boxes:
            self._choose(
                [
                    site
                    for markers, cells in self._panels
                    for x, y, site in zip(markers.x, markers.y, cells, strict=True)
                    if any(_within(box, markers.xaxis or "x", x, y) for box in boxes)
                ]
            )

    def _guarded(self, action: Callable[[], None]) -> Callable[[Any], None]:
        """A button's work: progress in the log, one sentence where it fails or is interrupted."""

        def pressed(_: Any) -> None:
            message, standing = "", self.ledger.edits
            with self._busy(), self.log, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                try:
                    action()
                    message = " ".join(str(warning.message) for warning in caught)
                except ValueError as error:
                    message = str(error)
                except KeyboardInterrupt:
                    unchanged = self.ledger.edits == standing
                    message = "stopped; nothing was changed" if unchanged else "stopped after the change"
                except Exception as error:  # the log would swallow it, and is cleared
                    message = f"{type(error).__name__}: {error}"
            self._show(message)

        return pressed

    @contextmanager
    def _busy(self) -> Iterator[None]:
        for button in self.buttons.values():
            button.disabled = True
        self.status_html.value = "working; the notebook's interrupt stops it ..."
        try:
            yield
        finally:
            self.log.clear_output()
            for button in self.buttons.values():
                button.disabled = False

    def _show(self, message: str = "") -> None:
        self.status_html.value = str(_html().status(message, len(self.ledger.edits)))


_TIPS = {
    "plan": "plan an edit at the selected cells; nothing is changed yet",
    "apply": "make the planned change",
    "undo": "take the last change back, bit for bit",
    "ask": "answer the question before and now",
}
_SECONDS_PER_CLICK = 1.0
"""Within which the two messages of a click come."""
_REMOVED_BUTTONS = (
    "sendChartToCloud",
    "lasso",
    "zoom",
    "pan",
    "zoomin",
    "zoomout",
    "autoscale",
    "resetscale",
)
"""Buttons over the map that would get in the way of selecting."""


def _html() -> Any:
    """The macros of the template."""
    return template("explorer.html.j2").module


def _within(box: Mapping[str, Any], axis: str, x: int, y: int) -> bool:
    (left, right), (low, high) = sorted((box["x0"], box["x1"])), sorted((box["y0"], box["y1"]))
    return box.get("xref", "x") == axis and left <= x <= right and low <= y <= high
