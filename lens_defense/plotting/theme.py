"""The look that all figures share, and how one is saved: colours, font, words for axes, safe text.

Text that came from a model or a user is shown, never run: it is escaped for Plotly's markup, and
what has no shape of its own (spaces, newlines, control characters) gets one.
"""

import html
import os
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lens_defense.prompts.prompt import Role
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
"""Pixels; a demo's map is 430 wide, so in a column of 3.3 inches this is more than 7 points."""
CONTROLS: Mapping[str, Any] = {
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "toImageButtonOptions": {"format": "png", "scale": 3},
}
"""What a figure in a browser offers beside hover and zoom: one button, which saves it as PNG."""
FORMATS = (".html", ".svg", ".pdf", ".png")
DPI = {".svg": 96.0, ".pdf": 96.0, ".png": 300.0}
"""Pixels an inch."""


def theme(
    figure: go.Figure, *, title: str, plot: tuple[int, int], left: int, right: int, above: int, below: int
) -> go.Figure:
    """White ground, sans font, a size that leaves every label its room; no template is used.

    The title's lines are wrapped to the width and make the figure higher.
    """
    width = left + plot[0] + right
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, round((width - 56) / 7.4))]
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
        figure.update_layout(
            title={
                "text": "<br>".join(map(plotly_text, lines)),
                "x": 12 / width,
                "xanchor": "left",
                "y": 1 - 16 / height,
                "yanchor": "top",
                "font": {"size": FONT},
            }
        )
    figure.update_xaxes(
        automargin=True, zeroline=False, ticks="", linecolor="#444444", title={"font": {"size": FONT}}
    )
    figure.update_yaxes(
        automargin=True, zeroline=False, ticks="", title={"standoff": 8, "font": {"size": FONT}}
    )
    if any(isinstance(part, go.Heatmap) for part in figure.data):
        figure.update_layout(plot_bgcolor=UNTRACED)
        figure.update_xaxes(showgrid=False, showline=True, mirror=True, linecolor="#999999")
        figure.update_yaxes(showgrid=False, showline=True, mirror=True, linecolor="#999999")
    return figure


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
        figure: what heatmap or bars gave, or any other Plotly figure.
        path: the file; its suffix is its format.
        plotlyjs: for .html, Plotly's include_plotlyjs: True makes the file self-contained (4.8 MB),
            "directory" shares one plotly.min.js beside the figures.
        inches: for all but .html, the width to scale to (a paper's column: 3.3); None keeps the pixels.

    Raises:
        ValueError: another suffix; or for all but .html, kaleido or a Chromium is missing.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"a figure is saved as {', '.join(FORMATS)}, got {file.name!r}")
    with atomic_write(file) as unfinished:
        if suffix == ".html":
            figure.write_html(unfinished, include_plotlyjs=plotlyjs, config=dict(CONTROLS))
        else:
            wide = figure.layout.width or 700
            scale = (3.0 if suffix == ".png" else 1.0) if inches is None else inches * DPI[suffix] / wide
            unfinished.write_bytes(_image(figure, suffix[1:], scale))
    return file


def _image(figure: go.Figure, suffix: str, scale: float) -> bytes:
    needs = (
        f"a figure as .{suffix} needs kaleido (pip install 'lens-defense[figures]') and a Chromium "
        "(Debian: apt-get install chromium); .html needs neither"
    )
    if find_spec("kaleido") is None:
        raise ValueError(needs)
    from kaleido.errors import ChromeNotFoundError

    try:
        return figure.to_image(format=suffix, scale=scale)
    except RuntimeError as error:
        if isinstance(error.__context__, ChromeNotFoundError):
            raise ValueError(needs) from error
        raise


def token_label(word: str, role: str, letters: int) -> str:
    """A token as it is read on an axis: spaces visible, a template's own tokens in short."""
    own = re.fullmatch(r"<[|\uff5c](.+?)[|\uff5c]>", word)
    own = own or (re.fullmatch(r"<(\w+)>", word) if role in ("template", "last") else None)
    if own:
        return f"\u2039{plotly_text(truncate(own[1], 8))}\u203a"
    shown = "".join("·" if unicodedata.category(letter) == "Zs" else letter for letter in word)
    return plotly_text(truncate(visible_text(shown), letters)) or "∅"


def visible_text(text: str) -> str:
    """Text with a shape for what has none: newlines, tabs, control and direction characters."""
    return "".join(_shape(character) for character in text)


def truncate(text: str, letters: int) -> str:
    """Text of at most so many letters, the last one an ellipsis if some are left out."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def plotly_text(text: str) -> str:
    """Text that Plotly's markup and TeX leave as it is; Plotly knows no &quot;."""
    return html.escape(visible_text(text), quote=False).replace("$", "&#36;")


def _shape(character: str) -> str:
    if character in _SHAPES:
        return _SHAPES[character]
    unseen = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _UNSEEN
    return "\N{REPLACEMENT CHARACTER}" if unseen else character


_SHAPES = {"\n": "↵", "\t": "⇥"}
_UNSEEN = {0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
"""Characters that have no width, or turn the text after them round (Unicode's Bidi_Control)."""
