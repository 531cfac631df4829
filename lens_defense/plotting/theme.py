"""What all figures share: colours, font, words for roles and components, safe text, and how to save one.

Text that came from a model or a user is shown and never run: it is escaped for Plotly's markup, and
characters without a shape of their own (spaces, newlines, control characters) get one.
"""

import html
import os
import re
import sys
import textwrap
import unicodedata
import warnings
import webbrowser
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import renderers

from lens_defense.prompts.request import Role
from lens_defense.shown_text import one_line, shown, truncate, visible_text
from lens_defense.sites import Component
from lens_defense.storage import atomic_write

ROLE_WORDS: Mapping[Role, str] = {
    "before": "before the subject",
    "subject_first": "first subject token",
    "subject_mid": "middle subject tokens",
    "subject_last": "last subject token",
    "next": "next token",
    "after": "later tokens",
    "template": "chat template",
    "last": "last prompt token",
}
COMPONENT_WORDS: Mapping[Component, str] = {
    "resid_post": "residual stream",
    "resid_pre": "residual stream before the block",
    "mlp_out": "MLP outputs",
    "attn_out": "attention outputs",
}


def component_words(component: Component) -> str:
    """What a component is called in a figure; a head is called what it is."""
    return COMPONENT_WORDS.get(component, component)


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's."""
INK, GREY, UNTRACED = "#1a1a1a", "#8c8c8c", "#e4e6ea"
FONT = 13
"""Pixels. A map 430 pixels wide has letters of more than 7 points in a paper's column of 3.3 inches."""
CONTROLS: Mapping[str, Any] = {
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}
"""What a figure in a browser offers beside hover and zoom: one button, which saves it as PNG."""
_FIGURE_LETTERS = 400
"""The most letters of a text in a figure: a hover stands at every cell."""
_FORMATS = (".html", ".svg", ".pdf", ".png")
_DPI = {".svg": 96.0, ".pdf": 96.0, ".png": 300.0}
"""Pixels per inch."""


def theme(
    figure: go.Figure, *, title: str, plot: tuple[int, int], left: int, right: int, above: int, below: int
) -> "Figure":
    """A figure in the house's look, with a size in which every label has room; it uses no Plotly template.

    `plot` is the width and height of the plot in pixels; the rest are its margins. The title's lines are
    wrapped to the width and make the figure higher.
    """
    width = left + plot[0] + right
    lines = [
        piece
        for line in title.split("\n")
        for piece in textwrap.wrap(truncate(line, _FIGURE_LETTERS), round((width - 56) / 7.4))
    ]
    top = above + 19 * len(lines) + (8 if lines else 0)
    height = top + plot[1] + below
    figure.update_layout(
        template="none",
        width=width,
        height=height,
        margin={"l": left, "r": right, "t": top, "b": below},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        font={"family": "Helvetica, Arial, sans-serif", "size": FONT, "color": INK},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": GREY, "align": "left", "font": {"color": INK}},
    )
    if lines:
        text = "<br>".join(map(plotly_text, lines))
        position = {"x": 12 / width, "xanchor": "left", "y": 1 - 16 / height, "yanchor": "top"}
        figure.update_layout(title={"text": text, "font": {"size": FONT}, **position})
    axis = {"automargin": True, "zeroline": False, "ticks": ""}
    figure.update_xaxes(**axis, linecolor="#444444", title={"font": {"size": FONT}})
    figure.update_yaxes(**axis, title={"standoff": 8, "font": {"size": FONT}})
    if any(isinstance(panel, go.Heatmap) for panel in figure.data):
        figure.update_layout(plot_bgcolor=UNTRACED)
        frame = {"showgrid": False, "showline": True, "mirror": True, "linecolor": "#999999"}
        figure.update_xaxes(**frame)
        figure.update_yaxes(**frame)
    return Figure(figure)


class Figure(go.Figure):
    """A Plotly figure that says so where `show` has nothing to show it with. Plotly would be silent."""

    def show(self, *args: Any, **options: Any) -> None:
        """Show it as Plotly does: in a notebook, or in a browser; without one, a warning says what to do."""
        chosen = bool(args) or "renderer" in options
        if not chosen and renderers.default in ("", "browser") and not can_open_browser():
            warnings.warn(
                "there is no browser here to show the figure; save it with "
                "ld.save_figure(figure, 'figure.html') and open that file where there is one",
                stacklevel=2,
            )
            return
        super().show(*args, **options)


def can_open_browser() -> bool:
    """Whether a window with a browser can be opened here; a browser of text in a terminal is none."""
    display = sys.platform in ("darwin", "win32") or any(
        map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    )
    try:
        return display and webbrowser.get() is not None
    except webbrowser.Error:
        return False


def label_margins(labels: Sequence[str], angle: int) -> tuple[int, int]:
    """Pixels that tick labels need beside and below the plot."""
    longest = max(len(html.unescape(text)) for text in labels)
    if angle == 0:
        return 0, 74
    return (0, 20 + 8 * longest) if angle == -90 else (10 + round(5.4 * longest), 24 + round(5.4 * longest))


def save_figure(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    plotlyjs: bool | str = True,
    inches: float | None = None,
) -> Path:
    """Write a figure as .html, .svg, .pdf or .png, whole or not at all.

    Args:
        figure: any Plotly figure.
        path: the file; its suffix is its format.
        plotlyjs: for .html, Plotly's include_plotlyjs: True makes the file self-contained (4.8 MB),
            "directory" shares one plotly.min.js beside the figures.
        inches: for all but .html, the width to scale to (a paper's column: 3.3); None keeps the pixels.

    Raises:
        ValueError: another suffix; or for all but .html, kaleido or a Chromium is missing.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"a figure is saved as {', '.join(_FORMATS)}, got {file.name!r}")
    with atomic_write(file) as unfinished:
        if suffix == ".html":
            figure.write_html(unfinished, include_plotlyjs=plotlyjs, config=dict(CONTROLS))
        else:
            width = figure.layout.width or 700
            scale = (3.0 if suffix == ".png" else 1.0) if inches is None else inches * _DPI[suffix] / width
            unfinished.write_bytes(_image(figure, suffix[1:], scale))
    return file


def find_chromium() -> Path:
    """The browser that draws figures as .svg, .pdf and .png.

    Raises:
        ValueError: it, or kaleido, which drives it, is missing.
    """
    found = None
    if find_spec("kaleido") is not None:
        from choreographer.browsers.chromium import Chromium

        found = Chromium.find_browser(skip_local=False)
    if not found:
        raise ValueError(
            "a figure as .svg, .pdf or .png needs kaleido (pip install 'lens-defense[figures]') and a "
            "Chromium (Debian: apt-get install chromium); .html needs neither"
        )
    return Path(found)


def _image(figure: go.Figure, suffix: str, scale: float) -> bytes:
    chromium = find_chromium()
    try:
        return figure.to_image(format=suffix, scale=scale)
    except RuntimeError as error:
        reason = one_line(error)
        raise ValueError(
            f"{chromium} could not draw the figure as .{suffix} ({reason}); .html needs no browser"
        ) from error


def token_label(text: str, role: Role, letters: int) -> str:
    """A token as a label of an axis: spaces are visible, special tokens are cut to eight letters."""
    special = re.fullmatch(r"<[|\uff5c](.+?)[|\uff5c]>", text)
    if special is None and role in ("template", "last"):
        special = re.fullmatch(r"<(\w+)>", text)
    if special:
        return f"\u2039{plotly_text(truncate(special[1], 8))}\u203a"
    dotted = "".join("·" if unicodedata.category(letter) == "Zs" else letter for letter in text)
    return plotly_text(truncate(visible_text(dotted), letters)) or "∅"


def plotly_text(text: str) -> str:
    """Escape a text for Plotly's markup and TeX, cut where it is too long; Plotly does not know &quot;."""
    return html.escape(shown(text, _FIGURE_LETTERS), quote=False).replace("$", "&#36;")
