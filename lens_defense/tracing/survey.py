"""Surveys: traces of many requests, one file each, so that nothing is lost or done twice.

A file is named by what it holds: the request, the settings and the model's fingerprint, and is believed if it
is whole and holds that; else it is made anew. A survey that was stopped
at any moment goes on with the requests that have no file yet, whatever was added, taken out or moved.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import Fingerprint, model_fingerprint
from lens_defense.patching.corruptions import Corruption, GaussianNoise
from lens_defense.patching.metrics import Metric, answer_logprob
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.progress import ProgressBar
from lens_defense.prompts.request import Request, UnfitRequest
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects, resolve_requests
from lens_defense.storage import load as load_file
from lens_defense.storage import notice
from lens_defense.storage import save as save_file
from lens_defense.tracing.trace import changed_settings, describe, trace_metrics
from lens_defense.tracing.trace_result import Trace, join_traces

_CALL = "ld.survey(model, requests, folder)"


class SurveyResult(NamedTuple):
    """What a survey found."""

    trace: Trace | None
    """All traces as one, in the order of the requests; None where every request was refused."""
    refused: Mapping[str, str]
    """Why, by the ids of the requests that could not be traced."""


def survey(
    model: Model,
    requests: Requests,
    folder: str | os.PathLike[str],
    settings: TraceSettings | None = None,
    *,
    corruption: Corruption | None = None,
    metric: Metric = answer_logprob,
    enough: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> SurveyResult:
    """Trace every request that has no file in a folder yet, and join what the folder holds.

    A request that cannot be traced on this model gets a note in the place of a trace; one without a subject
    is left out. Both are among the refused.

    Args:
        model: as of trace.
        requests: as of trace.
        folder: where the files are; each is written whole or not at all.
        settings: as of trace.
        corruption: as of trace; its words name the files.
        metric: as of trace; its name is part of the files' names.
        enough: stop when so many have a trace; None takes every request.
        progress: shows a bar with the time left.
        changes: single fields of the settings.

    Raises:
        ValueError: no request has a subject, one is of the split "check", or trace does not know a setting.
    """
    model, folder, all_requests = resolve_model(model, _CALL), Path(folder), resolve_requests(requests, _CALL)
    marked = [item for item in all_requests if item.subject]
    requests = requests_with_subjects(marked or all_requests, _CALL)
    settings, corruption = changed_settings(settings, changes), corruption or GaussianNoise()
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = model_fingerprint(model)
    how = [asdict(fingerprint), asdict(settings), _in_full(corruption), describe(metric)]
    files = [folder / f"{_key(request, how)}.safetensors" for request in requests]
    traces: list[Trace] = []
    refused = {
        item.id: "it has no subject; see ld.mark_subjects" for item in all_requests if not item.subject
    }
    wanted = len(requests) if enough is None else min(enough, len(requests))
    with ProgressBar("survey", wanted, unit="request", shown=progress) as bar:
        for request, file in zip(requests, files, strict=True):
            if enough is not None and len(traces) >= enough:
                break
            found = _kept(file, request, fingerprint)
            if found is None:
                try:
                    found = trace_metrics(
                        model, [request], {"metric": metric}, settings,
                        corruption=corruption, fingerprint=fingerprint, progress=False,
                    )["metric"]  # fmt: skip
                    found.save(file)
                except UnfitRequest as error:
                    found = str(error)
                    save_file(_note(file), "refusal of a request", _Refusal(request.id, found))
            if isinstance(found, Trace):
                traces.append(found)
            else:
                refused[request.id] = found
            bar.update(int(enough is None or isinstance(found, Trace)))
            bar.refresh()  # files that are there already go by too fast to be shown
    return SurveyResult(join_traces(traces) if traces else None, refused)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What a note holds."""

    request: str
    refused: str


def _kept(file: Path, request: Request, fingerprint: Fingerprint) -> Trace | str | None:
    """What a survey's folder has of a request: its trace, or why it has none; None where neither is there."""
    for path in (file, _note(file)):
        if not path.exists():
            continue
        try:
            if path == file:
                trace = Trace.load(path)
                if [p.request for p in trace.prompts] == [request] and trace.fingerprint == fingerprint:
                    return trace
            else:
                note, _ = load_file(path, "refusal of a request", _Refusal)
                if note.request == request.id:
                    return note.refused
        except ValueError:
            pass
        notice(f"the survey's {path} is damaged or not what its name says; it is made anew")
    return None


def _in_full(corruption: Corruption) -> str:
    """A corruption with all of its fields, where it is a dataclass."""
    return repr(corruption) if is_dataclass(corruption) else describe(corruption)


def _key(request: Request, how: Sequence[Any]) -> str:
    text = json.dumps([asdict(request), *how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _note(file: Path) -> Path:
    return file.with_suffix(".json")
