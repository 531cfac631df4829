"""The figures under one name: `ld.plots`."""

from lens_defense.plotting.effect_curves import effect_curves
from lens_defense.plotting.heatmap import head_heatmap, heatmap
from lens_defense.plotting.rate_bars import rate_bars
from lens_defense.plotting.search_front import search_front
from lens_defense.plotting.theme import save_figure

__all__ = ["effect_curves", "head_heatmap", "heatmap", "rate_bars", "save_figure", "search_front"]
