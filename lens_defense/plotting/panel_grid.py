"""Where the panels of a map stand: how many side by side, how wide their cells are, and where the bar goes.

All in pixels. A map takes the narrowest width that it can be read at: a paper's column, or its page. Panels
that do not fit side by side wrap.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lens_defense.plotting.print_size import FONT, LEAST_POINTS, POINTS, Width, print_pixels

LEFT, RIGHT = 50, 84
"""Margins: layers and their title; the colour bar."""
_BETWEEN, _OWN_BAR = 22, 64
"""From panel to panel; the same with a colour bar of each panel's own."""
_LETTER = 0.5 * FONT
"""The mean width of a letter."""
_LEAST_CELL = FONT + 1
"""The least width of a cell under a label that stands upright."""
_LEAST_FONT = FONT * LEAST_POINTS / POINTS
_HEIGHTS = {1: 300, 2: 190}
"""The most pixels of a panel's height, by how many panels stand above one another; more are _LOW high."""
_LOW = 150


@dataclass(frozen=True, slots=True)
class PanelGrid:
    """Panels of the same size, row by row."""

    panels: int
    across: int
    width: int
    """Of a panel."""
    height: int
    between: int
    above: int
    """Room over each panel for its name and the subject's bracket."""
    columns: int
    """Of a panel's cells."""
    right: int
    """Margin for the colour bar."""

    @property
    def down(self) -> int:
        """Rows of panels."""
        return -(-self.panels // self.across)

    @property
    def _between_rows(self) -> int:
        return self.above + 12

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of all panels together, without the room over the first row."""
        return (
            self.across * (self.width + self.between) - self.between,
            self.down * (self.height + self._between_rows) - self._between_rows,
        )

    def domain(self, panel: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The span of a panel from left to right and from bottom to top, as shares of all panels' size."""
        row, column = divmod(panel, self.across)
        across, down = self.size
        left = column * (self.width + self.between)
        top = down - row * (self.height + self._between_rows)
        return (left / across, (left + self.width) / across), ((top - self.height) / down, top / down)

    def is_first(self, panel: int) -> bool:
        """Whether a panel begins a row: it shows the layers."""
        return panel % self.across == 0

    def is_lowest(self, panel: int) -> bool:
        """Whether no panel stands below: it shows the columns' labels."""
        return panel + self.across >= self.panels


@dataclass(frozen=True, slots=True)
class Labels:
    """How the columns are labelled."""

    angle: int
    font: int | float
    stride: int
    """Every so many columns have a label."""

    def pixels(self, labels: Sequence[str]) -> int:
        """The room that the labels need below the panels."""
        texts = [html.unescape(label) for label in labels]
        if self.angle:
            return 14 + round(0.55 * self.font * max(map(len, texts)))
        return 12 + 17 * max(len(text.split(" ")) for text in texts)


def panel_grid(
    panels: int,
    labels: Sequence[str],
    layers: int,
    width: Width | float | None,
    *,
    own_bars: bool,
    above: int,
) -> PanelGrid:
    """The grid of a map.

    Args:
        panels: how many.
        labels: of a panel's columns.
        layers: rows of a panel.
        width: what it is drawn for. None takes a column where all panels fit side by side there, else a page.
        own_bars: whether each panel has a colour bar.
        above: pixels over each panel.
    """
    between = _OWN_BAR if own_bars else _BETWEEN
    right = _OWN_BAR + 18 if own_bars else RIGHT

    def panel_width(pixels: int, across: int) -> int:
        return (pixels - LEFT - right - between * (across - 1)) // across

    widths = [print_pixels(name) for name in ((width,) if width is not None else ("column", "page"))]
    least = len(labels) * _least_cell(labels)
    choices = [(pixels, panels) for pixels in widths]
    choices += [(widths[-1], across) for across in range(panels - 1, 0, -1) if panels % across == 0]
    pixels, across = next((choice for choice in choices if panel_width(*choice) >= least), (widths[-1], 1))
    high = _HEIGHTS.get(panels // across, _LOW)
    return PanelGrid(
        panels,
        across,
        width=max(panel_width(pixels, across), 40),
        height=max(min(26 * layers, high), min(high, 130)),
        between=between,
        above=above,
        columns=len(labels),
        right=right,
    )


def column_labels(grid: PanelGrid, labels: Sequence[str]) -> Labels:
    """Flat where every word fits its column, else upright; smaller, and then fewer, where they are many."""
    cell = grid.width / grid.columns
    if _longest_word(labels) * _LETTER + 2 <= cell:
        return Labels(0, FONT, 1)
    font = min(FONT, max(_LEAST_FONT, cell - 1))
    return Labels(-90, font, math.ceil(font / cell))


def _least_cell(labels: Sequence[str]) -> float:
    """The least width of a cell: of one that stands under words, a share of the longest word."""
    many_words = any(" " in label for label in labels)
    return min(24.0, _longest_word(labels) * _LETTER) if many_words else float(_LEAST_CELL)


def _longest_word(labels: Sequence[str]) -> int:
    return max((len(word) for label in labels for word in html.unescape(label).split(" ")), default=1)
