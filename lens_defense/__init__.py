"""lens_defense: find where a language model keeps what it should not say, take it out, check the cost.

The one path: Request -trace-> Trace -locate-> Sites -edit-> Edit -check-> Report; trace and report go
to figures. Nothing happens at import: names are found in their modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_defense.app.explorer import Explorer
    from lens_defense.app.report_page import save_report
    from lens_defense.checking.check import check
    from lens_defense.checking.report import Report
    from lens_defense.checking.suites import Suite, suite
    from lens_defense.editing.edit import edit
    from lens_defense.editing.edit_plan import Edit
    from lens_defense.editing.ledger import Ledger
    from lens_defense.models.load import load, save_folder
    from lens_defense.plotting.heatmap import heatmap
    from lens_defense.plotting.theme import save_figure
    from lens_defense.prompts.prompt import Prompt, Request, prompt, request
    from lens_defense.prompts.request_files import requests
    from lens_defense.sites import Site
    from lens_defense.tracing.corruptions import noise, replacement
    from lens_defense.tracing.locate import locate
    from lens_defense.tracing.trace import trace
    from lens_defense.tracing.trace_result import Trace

_HOME = {
    "load": "models.load",
    "save_folder": "models.load",
    "Request": "prompts.prompt",
    "Prompt": "prompts.prompt",
    "request": "prompts.prompt",
    "prompt": "prompts.prompt",
    "requests": "prompts.request_files",
    "Site": "sites",
    "noise": "tracing.corruptions",
    "replacement": "tracing.corruptions",
    "Trace": "tracing.trace_result",
    "trace": "tracing.trace",
    "locate": "tracing.locate",
    "Edit": "editing.edit_plan",
    "edit": "editing.edit",
    "Ledger": "editing.ledger",
    "Explorer": "app.explorer",
    "Suite": "checking.suites",
    "suite": "checking.suites",
    "Report": "checking.report",
    "check": "checking.check",
    "heatmap": "plotting.heatmap",
    "save_figure": "plotting.theme",
    "save_report": "app.report_page",
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
    "save_report",
    "suite",
    "trace",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
