"""lens_defense: find where a language model keeps what it should not say, take it out, check the cost.

The one path: Request -trace-> Trace -locate-> Sites -edit-> Edit -check-> Report; trace and report go
to figures. Nothing happens at import: names are found in their modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_defense.checks import check
    from lens_defense.corruptions import noise, replacement
    from lens_defense.editors import edit
    from lens_defense.edits import Edit
    from lens_defense.explorers import Explorer
    from lens_defense.ledgers import Ledger
    from lens_defense.locators import locate
    from lens_defense.models import load, save_folder
    from lens_defense.pages import save_page
    from lens_defense.plots import heatmap
    from lens_defense.prompts import Prompt, Request, prompt, request
    from lens_defense.readers import requests
    from lens_defense.reports import Report
    from lens_defense.sites import Site
    from lens_defense.suites import Suite, suite
    from lens_defense.themes import save_figure
    from lens_defense.tracers import trace
    from lens_defense.traces import Trace

_HOME = {
    "load": "models",
    "save_folder": "models",
    "Request": "prompts",
    "Prompt": "prompts",
    "request": "prompts",
    "prompt": "prompts",
    "requests": "readers",
    "Site": "sites",
    "noise": "corruptions",
    "replacement": "corruptions",
    "Trace": "traces",
    "trace": "tracers",
    "locate": "locators",
    "Edit": "edits",
    "edit": "editors",
    "Ledger": "ledgers",
    "Explorer": "explorers",
    "Suite": "suites",
    "suite": "suites",
    "Report": "reports",
    "check": "checks",
    "heatmap": "plots",
    "save_figure": "themes",
    "save_page": "pages",
}

__version__ = "0.1.0"
__all__ = [
    "Edit",
    "Explorer",
    "Ledger",
    "Prompt",
    "Report",
    "Request",
    "Site",
    "Suite",
    "Trace",
    "check",
    "edit",
    "heatmap",
    "load",
    "locate",
    "noise",
    "prompt",
    "replacement",
    "request",
    "requests",
    "save_figure",
    "save_folder",
    "save_page",
    "suite",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
