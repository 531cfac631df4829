"""What all figures share: colours, font, words for roles and components, safe text, and how to save one.

Text that came from a model or a user is shown and never run: it is escaped for Plotly's markup, and
characters without a shape of their own (spaces, newlines, control characters) get one.
"""

import hashlib
import html
import json
import os
import re
import sys
import textwrap
import unicodedata
import warnings
import webbrowser
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.io import renderers

from lens_defense.plotting.print_size import (
    FONT,
    LEAST_POINTS,
    Width,
    fitting_width,
    laid_out_pixels,
    print_inches,
    print_pixels,
    smallest_letters,
)
from lens_defense.plotting.provenance import sidecar
from lens_defense.plotting.vector_cells import with_vector_cells
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
FAMILY = "Arial, Helvetica, Liberation Sans, sans-serif"
"""Three fonts whose letters are equally wide, so that a figure has the same layout on every system."""
CONTROLS: Mapping[str, Any] = {
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}
"""What a figure in a browser offers beside hover and zoom: one button, which saves it as PNG."""
_FIGURE_LETTERS = 400
"""The most letters of a text in a figure: a hover stands at every cell."""
_LINE = 18
"""Pixels from line to line."""
DPI = {".svg": 96.0, ".pdf": 96.0, ".png": 300.0}
"""Of what is printed, by suffix: pixels per inch."""


def theme(
    figure: go.Figure,
    *,
    title: str,
    plot: tuple[int, int],
    left: int,
    right: int,
    above: int,
    below: int,
    note: str = "",
) -> "Figure":
    """A figure in the house's look, with a size in which every label has room; it uses no Plotly template.

    `plot` is the width and height of the plot in pixels; the rest are its margins. The lines of the title and
    of the note, which stands at the foot, are wrapped to the width and make the figure higher.
    """
    width = left + plot[0] + right
    lines, note_lines = (_wrapped(text, round((width - 30) / 6.6)) for text in (title, note))
    top = above + _LINE * len(lines) + (10 if lines else 0)
    foot = below + _LINE * len(note_lines) + (4 if note_lines else 0)
    height = top + plot[1] + foot
    figure.update_layout(
        template="none",
        width=width,
        height=height,
        margin={"l": left, "r": right, "t": top, "b": foot},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        font={"family": FAMILY, "size": FONT, "color": INK},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": GREY, "align": "left", "font": {"color": INK}},
    )
    if lines:
        text = "<br>".join(map(plotly_text, lines))
        position = {"x": 12 / width, "xanchor": "left", "y": 1 - 16 / height, "yanchor": "top"}
        figure.update_layout(title={"text": text, "font": {"size": FONT}, **position})
    if note_lines:
        figure.add_annotation(
            name="note",
            text="<br>".join(map(plotly_text, note_lines)),
            x=0,
            y=0,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="top",
            xshift=12 - left,
            yshift=-below,
            align="left",
            font={"color": "#555555"},
            showarrow=False,
        )
    axis = {"automargin": True, "zeroline": False, "ticks": ""}
    figure.update_xaxes(**axis, linecolor="#444444", title={"standoff": 6, "font": {"size": FONT}})
    figure.update_yaxes(**axis, title={"standoff": 8, "font": {"size": FONT}})
    if any(isinstance(panel, go.Heatmap) for panel in figure.data):
        figure.update_layout(plot_bgcolor=UNTRACED)
        frame = {"showgrid": False, "showline": True, "mirror": True, "linecolor": "#999999"}
        figure.update_xaxes(**frame)
        figure.update_yaxes(**frame)
    return Figure(figure)


def _wrapped(text: str, letters: int) -> list[str]:
    return [
        piece
        for line in text.split("\n")
        for piece in textwrap.wrap(truncate(line, _FIGURE_LETTERS), letters)
    ]


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


def save_figure(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    width: Width | float | None = None,
    sources: Iterable[str | os.PathLike[str]] = (),
    seed: Any = None,
    plotlyjs: bool | str = True,
) -> Path:
    """Write a figure for a paper: without a suffix as .svg, .pdf, .png, and a .json that says what made it.

    With a suffix (.svg, .pdf, .png, or .html to look at in a browser) only that file. Each is written
    whole or not at all. Printed at its width, a figure of this package has letters of 8 points; one laid out
    wider is scaled down, and a warning says so where its letters become smaller than 6 points. Cells of maps
    are vectors, fonts are embedded in the PDF, and the same figure gives the same bytes.

    Args:
        figure: any Plotly figure.
        path: the file; or without a suffix, what all files of the figure are called.
        width: "column" (3.25 inches), "page" (6.75) or inches. None takes the narrower one that the figure
            goes into as it is laid out. .html keeps the pixels.
        sources: files that the figure was made from; the .json has their hashes.
        seed: for the .json. None takes that of the trace's corruption.
        plotlyjs: for .html, Plotly's include_plotlyjs: True makes the file self-contained (4.8 MB),
            "directory" shares one plotly.min.js beside the figures.

    Returns:
        The path as it was given.

    Raises:
        ValueError: another suffix or width; a source that cannot be read; or for all but .html, kaleido or a
            Chromium is missing.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in ("", ".html", *DPI):
        raise ValueError(
            f"a figure is saved as .html, .svg, .pdf or .png, or without a suffix as the last three; "
            f"got {file.name!r}"
        )
    if suffix == ".html":
        with atomic_write(file) as unfinished:
            figure.write_html(unfinished, include_plotlyjs=plotlyjs, config=dict(CONTROLS))
        return file
    inches = print_inches(width or fitting_width(figure))
    printed = _printed(figure, inches)
    if suffix:
        _write_static(printed, file, inches)
        return file
    origin = sidecar(figure, inches=inches, sources=sources, seed=seed)
    for ending in DPI:
        _write_static(printed, file.with_name(file.name + ending), inches)
    with atomic_write(file.with_name(f"{file.name}.json")) as unfinished:
        unfinished.write_text(json.dumps(origin, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return file


def _printed(figure: go.Figure, inches: float) -> go.Figure:
    """The figure as it goes to paper: at least as wide as its print wants, maps as vectors, fixed ids."""
    printed = with_vector_cells(figure)
    printed.layout.width = max(laid_out_pixels(figure), print_pixels(inches))
    points = smallest_letters(printed, inches)
    if round(points, 1) < LEAST_POINTS:
        warnings.warn(
            f"at {inches:g} inches the smallest letters of this figure are {points:.1f} points high, and "
            f"below {LEAST_POINTS:g} they cannot be read: save it wider, or draw it for this width, as in "
            'ld.heatmap(trace, width="column")',
            stacklevel=3,
        )
    parts: Any = printed.data
    for i, part in enumerate(parts):
        part.uid = f"part{i}"
    return printed


def _write_static(figure: go.Figure, file: Path, inches: float) -> None:
    suffix = file.suffix.lower()
    image = _image(figure, suffix[1:], inches * DPI[suffix] / laid_out_pixels(figure))
    with atomic_write(file) as unfinished:
        unfinished.write_bytes(_DETERMINISTIC.get(suffix, bytes)(image))


def _with_fixed_ids(svg: bytes) -> bytes:
    """An SVG whose ids come from its content; Plotly draws new ones each time."""
    random_id = re.search(rb'id="topdefs-([0-9a-f]+)"', svg)
    if random_id is None:
        return svg
    anywhere = re.compile(rb"(?:(?<![0-9.])|(?<=legend[0-9]))" + random_id[1])  # in no number
    content_id = hashlib.sha256(anywhere.sub(b"", svg)).hexdigest()[:8].encode()
    return anywhere.sub(b"f" + content_id, svg)  # two figures of one page must not share an id


def _without_dates(pdf: bytes) -> bytes:
    """A PDF that does not say when it was made; its length stays."""
    return re.sub(rb"(?<=Date \(D:)\d{14}", b"20000101000000", pdf)


_DETERMINISTIC = {".svg": _with_fixed_ids, ".pdf": _without_dates}
"""By suffix, what makes the bytes depend on the figure alone."""


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
