"""lens_defense: find where a language model keeps what it should not say, take it out, check the cost.

The path: Request -trace-> Trace -locate-> Sites -edit-> Edit -check-> Report; traces and reports go to
figures. Nothing happens at import: a name is looked up in its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_defense import sites, statistics
    from lens_defense.app.explorer.explorer import Explorer
    from lens_defense.app.report_page import save_report
    from lens_defense.checking import judges
    from lens_defense.checking.check import check
    from lens_defense.checking.defense import Defense
    from lens_defense.checking.report import Report
    from lens_defense.checking.suites import Suite, suite
    from lens_defense.editing import methods
    from lens_defense.editing.contrast import Contrast
    from lens_defense.editing.edit import edit
    from lens_defense.editing.edit_plan import Edit
    from lens_defense.editing.export.load_adapter import load_adapter
    from lens_defense.editing.ledger.ledger import Ledger
    from lens_defense.editing.solving.target_value import FitSettings
    from lens_defense.editing.steering_edit import steering_edit
    from lens_defense.editing.tuning.editor_file import load_editor
    from lens_defense.editing.tuning.train_editor import EditorTraining, train_editor
    from lens_defense.loading.load import load
    from lens_defense.loading.save import save_folder
    from lens_defense.loading.save_gguf import save_gguf
    from lens_defense.patching import corruptions, metrics
    from lens_defense.patching.trace_settings import TraceSettings
    from lens_defense.plotting import plots
    from lens_defense.plotting.heatmap import heatmap
    from lens_defense.plotting.theme import save_figure
    from lens_defense.prompts.contexts import default_contexts
    from lens_defense.prompts.corpus import read_corpus
    from lens_defense.prompts.harmless_uses import default_contrast
    from lens_defense.prompts.prompt import Prompt, tokenize
    from lens_defense.prompts.request import Request, request
    from lens_defense.prompts.request_files import requests
    from lens_defense.prompts.surface_forms import default_names
    from lens_defense.proposals.mark_subjects import mark_subjects
    from lens_defense.proposals.propose_aliases import propose_aliases
    from lens_defense.searching.edit_search import EditSearch
    from lens_defense.searching.search_edits import search_edits
    from lens_defense.sites import Site
    from lens_defense.steering.refusal_direction import refusal_direction
    from lens_defense.steering.steered import steered
    from lens_defense.tracing import lenses, map_statistics
    from lens_defense.tracing.control_sites import control_sites
    from lens_defense.tracing.locate import locate
    from lens_defense.tracing.survey import survey
    from lens_defense.tracing.trace import trace, trace_metrics
    from lens_defense.tracing.trace_result import Trace

_NAMES = {
    "loading.load": ["load"],
    "loading.save": ["save_folder"],
    "loading.save_gguf": ["save_gguf"],
    "proposals.propose_aliases": ["propose_aliases"],
    "prompts.request": ["Request", "request"],
    "prompts.prompt": ["Prompt", "tokenize"],
    "prompts.contexts": ["default_contexts"],
    "prompts.harmless_uses": ["default_contrast"],
    "prompts.surface_forms": ["default_names"],
    "prompts.request_files": ["requests"],
    "prompts.corpus": ["read_corpus"],
    "sites": ["Site"],
    "tracing.trace": ["trace", "trace_metrics"],
    "patching.trace_settings": ["TraceSettings"],
    "tracing.trace_result": ["Trace"],
    "tracing.survey": ["survey"],
    "tracing.locate": ["locate"],
    "proposals.mark_subjects": ["mark_subjects"],
    "tracing.control_sites": ["control_sites"],
    "steering.refusal_direction": ["refusal_direction"],
    "steering.steered": ["steered"],
    "editing.contrast": ["Contrast"],
    "editing.edit": ["edit"],
    "editing.solving.target_value": ["FitSettings"],
    "editing.edit_plan": ["Edit"],
    "editing.tuning.editor_file": ["load_editor"],
    "editing.tuning.train_editor": ["EditorTraining", "train_editor"],
    "editing.ledger.ledger": ["Ledger"],
    "editing.export.load_adapter": ["load_adapter"],
    "editing.steering_edit": ["steering_edit"],
    "checking.suites": ["Suite", "suite"],
    "checking.check": ["check"],
    "checking.defense": ["Defense"],
    "checking.report": ["Report"],
    "searching.search_edits": ["search_edits"],
    "searching.edit_search": ["EditSearch"],
    "plotting.heatmap": ["heatmap"],
    "plotting.theme": ["save_figure"],
    "app.explorer.explorer": ["Explorer"],
    "app.report_page": ["save_report"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_NAMESPACES = {
    "corruptions": "patching.corruptions",
    "metrics": "patching.metrics",
    "lenses": "tracing.lenses",
    "map_statistics": "tracing.map_statistics",
    "methods": "editing.methods",
    "judges": "checking.judges",
    "plots": "plotting.plots",
    "statistics": "statistics",
    "sites": "sites",
}
"""Modules under a short name, as in `ld.metrics.logit_diff`."""

__version__ = "0.2.0"
__all__ = [
    "Contrast",
    "Defense",
    "Edit",
    "EditSearch",
    "EditorTraining",
    "Explorer",
    "FitSettings",
    "Ledger",
    "Prompt",
    "Report",
    "Request",
    "Site",
    "Suite",
    "Trace",
    "TraceSettings",
    "check",
    "control_sites",
    "corruptions",
    "default_contexts",
    "default_contrast",
    "default_names",
    "edit",
    "heatmap",
    "judges",
    "lenses",
    "load",
    "load_adapter",
    "load_editor",
    "locate",
    "map_statistics",
    "mark_subjects",
    "methods",
    "metrics",
    "plots",
    "propose_aliases",
    "read_corpus",
    "refusal_direction",
    "request",
    "requests",
    "save_figure",
    "save_folder",
    "save_gguf",
    "save_report",
    "search_edits",
    "sites",
    "statistics",
    "steered",
    "steering_edit",
    "suite",
    "survey",
    "tokenize",
    "trace",
    "trace_metrics",
    "train_editor",
]


def __getattr__(name: str) -> object:
    if name in _NAMESPACES:
        return import_module(f"{__name__}.{_NAMESPACES[name]}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
