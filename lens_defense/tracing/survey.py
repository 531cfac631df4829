"""Surveys: traces of many requests, one file each, so that nothing is lost or done twice.

A file is named by what it holds: the request, the settings and the model's weights. A survey that was stopped
at any moment goes on with the requests that have no file yet, whatever was added, taken out or moved.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from lens_defense.models.given_model import Model, given_model
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.given_requests import Requests, requests_with_subjects
from lens_defense.prompts.request import Request, UnfitRequest
from lens_defense.storage import atomic_write
from lens_defense.tracing.corruptions import Corruption, GaussianNoise
from lens_defense.tracing.metrics import Metric, answer_logprob
from lens_defense.tracing.trace import changed_settings, describe, trace_metrics
from lens_defense.tracing.trace_result import Trace, join_traces
from lens_defense.tracing.trace_settings import TraceSettings

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

    A request that cannot be traced on this model gets a note in the place of a trace.

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
        ValueError: a request that no trace may see, or a setting that trace does not know.
    """
    model, requests = given_model(model, _CALL), requests_with_subjects(requests, _CALL)
    folder = Path(folder)
    settings, corruption = changed_settings(settings, changes), corruption or GaussianNoise()
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = weights_fingerprint(model)
    how = [fingerprint, asdict(settings), _in_full(corruption), describe(metric)]
    files = [folder / f"{_key(request, how)}.safetensors" for request in requests]
    looked_at: list[Path] = []
    wanted = len(requests) if enough is None else min(enough, len(requests))
    with tqdm(total=wanted, desc="survey", unit="request", disable=not progress) as bar:
        for request, file in zip(requests, files, strict=True):
            if enough is not None and sum(path.exists() for path in looked_at) >= enough:
                break
            looked_at.append(file)
            if not file.exists() and not _note(file).exists():
                try:
                    results = trace_metrics(
                        model, [request], {"metric": metric}, settings,
                        corruption=corruption, fingerprint=fingerprint, progress=False,
                    )  # fmt: skip
                    results["metric"].save(file)
                except UnfitRequest as error:
                    with atomic_write(_note(file)) as note:
                        note.write_text(json.dumps({"request": request.id, "refused": str(error)}), "utf-8")
            bar.update(enough is None or file.exists())
            bar.refresh()  # files that are there already go by too fast to be shown
    traces = [Trace.load(file) for file in looked_at if file.exists()]
    notes = [json.loads(_note(file).read_text("utf-8")) for file in looked_at if _note(file).exists()]
    refused = {note["request"]: note["refused"] for note in notes}
    return SurveyResult(join_traces(traces) if traces else None, refused)


def _in_full(corruption: Corruption) -> str:
    """A corruption with all of its fields, where it is a dataclass."""
    return repr(corruption) if is_dataclass(corruption) else describe(corruption)


def _key(request: Request, how: Sequence[Any]) -> str:
    text = json.dumps([asdict(request), *how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _note(file: Path) -> Path:
    return file.with_suffix(".json")
