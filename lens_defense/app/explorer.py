"""The explorer: a form in Jupyter over the heatmap. Select cells, see the forecast, edit there, ask, undo.

A transparent marker lies on every cell, because a heatmap itself has no selection. Work runs in the
kernel's main thread, so the notebook's own interrupt stops it; nothing is changed then.
"""

import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.callbacks import InputDeviceState
from plotly.io import renderers
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.edit import METHODS, edit
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger import Ledger
from lens_defense.models.generate import generate
from lens_defense.plotting.heatmap import heatmap, site_cells
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import Request, prompt, request
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


class Explorer:
    """What the form holds, for the kernel to read: `sites`, `edit`, `ledger`, `told`."""

    def __init__(
        self,
        model: TransformerBridge,
        trace: Trace,
        requests: Sequence[Request],
        *,
        sites: Sequence[Site] = (),
        settings: dict[str, Any] | None = None,
        tokens: int = 40,
    ) -> None:
        """Draw the form; display the object to see it.

        Args:
            model: the model that the trace is of; no edit may stand in it.
            trace: what the map shows.
            requests: what an edit shall be about.
            sites: selected at first.
            settings: more arguments for ld.edit.
            tokens: the most tokens of an answer.
        """
        self.model, self.trace, self.requests = model, trace, tuple(requests)
        self.settings, self.tokens = settings or {}, tokens
        self.ledger = Ledger(model)
        self.sites: tuple[Site, ...] = ()
        self.edit: Edit | None = None
        self._selected_at = 0.0
        self.told: tuple[str, str] = ("", "")
        """The last question's answers, without and with what stands."""
        self.figure = go.FigureWidget(heatmap(trace))
        self._cells = self._mark_cells()
        self.chosen = widgets.HTML()
        self.forecast = widgets.HTML()
        self.status = widgets.HTML()
        self.log = widgets.Output()
        self.method = widgets.Dropdown(options=METHODS, description="method")
        self.method.observe(lambda _: self._forget(), "value")
        self.question = widgets.Text(placeholder="ask anything, then press Ask", layout={"width": "70%"})
        self.answers = widgets.HTML()
        self.buttons = {
            name: widgets.Button(description=name.capitalize(), tooltip=tip) for name, tip in _TIPS.items()
        }
        for name, button in self.buttons.items():
            button.on_click(self._guarded(getattr(self, f"do_{name}")))
        plan, apply, undo, ask = (self.buttons[name] for name in _TIPS)
        self.form = widgets.VBox(
            [
                widgets.HTML("<b>1. Select cells</b> by click (shift-click for more) or by a box"),
                *(self.figure, self.chosen),
                widgets.HBox([widgets.HTML("<b>2. Edit there</b>"), self.method, plan, apply, undo]),
                *(self.forecast, self.log, self.status),
                widgets.HBox([widgets.HTML("<b>3. Ask</b>"), self.question, ask]),
                self.answers,
            ]
        )
        self.select(sites)

    def _repr_mimebundle_(self, **wanted: Any) -> dict[str, Any]:
        """The form; and where pictures are asked for, what it shows, for readers without a kernel."""
        told: Any = self.form._repr_mimebundle_(**wanted)
        if "png" in str(renderers.default):
            picture = b64encode(heatmap(self.trace, self.sites).to_image("png")).decode()
            told["text/html"] = "".join(
                [
                    f"<img alt='the map with its selected cells' src='data:image/png;base64,{picture}'>",
                    f"<p>{self.chosen.value}</p>{self.forecast.value}<p>{self.status.value}</p>",
                    f"<p>{escape(self.question.value)}</p>{self.answers.value}",
                    "<p><i>A picture of the form: run the cell to use it.</i></p>",
                ]
            )
        return told

    def select(self, sites: Sequence[Site]) -> None:
        """Choose sites; a plan made for others is dropped."""
        wanted = set(map(_address, sites))
        for marks, here in self._cells:
            marks.selectedpoints = (
                None  # what the browser has marked since is not known here: tell it all anew
            )
            marks.selectedpoints = [i for i, site in enumerate(here) if _address(site) in wanted]
        self._choose(sites)

    def _choose(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(dict.fromkeys(sites))
        named = ", ".join(map(str, self.sites)) or "none yet"
        self.chosen.value = f"selected: {escape(named)}"
        self._forget()

    def _forget(self) -> None:
        """A plan that was made for something else is dropped, and its forecast with it."""
        self.edit = None
        self.forecast.value = ""
        self._show()

    def do_plan(self) -> None:
        """Plan an edit at the selected sites, and show its forecast."""
        self._forget()
        method: Any = self.method.value
        self.edit = edit(self.model, self.requests, self.sites, method=method, **self.settings)
        self.forecast.value = self.edit._repr_html_()

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
        asked = prompt(self.model.tokenizer, request(self.question.value)).ids
        standing = len(self.ledger.edits)
        with_edits = self._answer(asked)
        without = with_edits
        try:
            while self.ledger.edits:
                self.ledger.undo()
            without = self._answer(asked) if standing else with_edits
        finally:
            while len(self.ledger.edits) < standing:
                self.ledger.redo()
        self.told = without, with_edits
        cells = "".join(f"<td style='vertical-align:top;width:50%'>{escape(text)}</td>" for text in self.told)
        self.answers.value = f"<table><tr><th>before</th><th>now</th></tr><tr>{cells}</tr></table>"

    def _answer(self, asked: Sequence[int]) -> str:
        (ids,) = generate(self.model, [asked], tokens=self.tokens)
        return decode_answer(self.model.tokenizer, ids)

    def _mark_cells(self) -> list[tuple[Any, tuple[Site, ...]]]:
        """A transparent marker a cell, panel by panel, and the site that each stands for."""
        marked = []
        drawn: Any = self.figure.data
        maps = [one for one in drawn if one.type == "heatmap"]
        for panel, (xs, ys, here) in enumerate(site_cells(self.trace)):
            marks = go.Scatter(
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
            self.figure.add_trace(marks, row=1, col=panel + 1)
            held: Any = self.figure.data[-1]
            held.on_selection(self._clicked)
            held.on_click(self._clicked)
            held.on_deselect(self._deselected)
            marked.append((held, here))
        self.figure.layout.on_change(self._boxed, "selections")
        buttons = {"add": ["select2d"], "remove": list(_MODES)}
        self.figure.update_layout(clickmode="event+select", dragmode="select", modebar=buttons)
        return marked

    def _clicked(self, marks: Any, points: Any, device: Any) -> None:
        """Of a click two messages come: what is selected now, which counts, and the cell.

        A hover may displace one of them; so the cell is taken where nothing has told just before.
        """
        here = next(sites for held, sites in self._cells if held is marks)
        told = [here[i] for i in points.point_inds]
        others = [site for site in self.sites if site not in here]
        if not isinstance(device, InputDeviceState):
            self._selected_at = time.monotonic()
            self._choose([*others, *told])
        elif time.monotonic() - self._selected_at > _ONE_CLICK:
            before = set(map(_address, self.sites)) if device.shift else set()
            wanted = before ^ set(map(_address, told))
            self.select([*others, *(site for site in here if _address(site) in wanted)])

    def _deselected(self, *_: Any) -> None:
        """A double click off the cells; on one its click displaces this message, and the cell is selected."""
        self._selected_at = time.monotonic()
        self._choose(())

    def _boxed(self, layout: Any, _: Any) -> None:
        """The layout keeps the boxes that are drawn, and no hover can displace it."""
        boxes = layout.to_plotly_json().get("selections", ()) or ()
        inside = [
            site
            for marks, here in self._cells
            for x, y, site in zip(marks.x, marks.y, here, strict=True)
            if any(_within(box, marks.xaxis or "x", x, y) for box in boxes)
        ]
        if boxes:
            self._choose(inside)

    def _guarded(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """A button's work: progress in the log, one sentence where it fails or is interrupted."""

        def pressed(_: Any) -> None:
            said = ""
            with self._busy(), self.log, warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                try:
                    act()
                    said = " ".join(str(one.message) for one in warned)
                except ValueError as error:
                    said = str(error)
                except KeyboardInterrupt:
                    said = "stopped; nothing was changed"
                except Exception as error:  # the log would swallow it, and is cleared
                    said = f"{type(error).__name__}: {error}"
            self._show(said)

        return pressed

    @contextmanager
    def _busy(self) -> Iterator[None]:
        for button in self.buttons.values():
            button.disabled = True
        self.status.value = "working; the notebook's interrupt stops it ..."
        try:
            yield
        finally:
            self.log.clear_output()
            for button in self.buttons.values():
                button.disabled = False

    def _show(self, said: str = "") -> None:
        stands = len(self.ledger.edits)
        self.status.value = (
            f"<span style='color:#b2182b'>{escape(said)}</span> " if said else ""
        ) + f"edits that stand: {stands}"


_TIPS = {
    "plan": "plan an edit at the selected cells; nothing is changed yet",
    "apply": "make the planned change",
    "undo": "take the last change back, bit for bit",
    "ask": "answer the question before and now",
}


_ONE_CLICK = 1.0
"""Seconds within which the two messages of a click come."""
_MODES = ("sendChartToCloud", "lasso", "zoom", "pan", "zoomin", "zoomout", "autoscale", "resetscale")
"""Buttons over the map that would get in the way of selecting."""


def _within(box: dict[str, Any], axis: str, x: int, y: int) -> bool:
    (left, right), (low, high) = sorted((box["x0"], box["x1"])), sorted((box["y0"], box["y1"]))
    return box.get("xref", "x") == axis and left <= x <= right and low <= y <= high


def _address(site: Site) -> tuple[str, int, str]:
    return site.component, site.layer, site.role
