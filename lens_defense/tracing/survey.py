"""Surveys: traces of many requests, one file each, so that nothing is lost or done twice.

A file is named by what it holds: the request, the settings and the model's weights. A survey that was stopped
at any moment goes on with the requests that have no file yet, whatever was added, taken out or moved.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.prompt import Request, UnfitRequest, validated_requests
from lens_defense.storage import atomic_write
from lens_defense.tracing.metrics import answer_logprob
from lens_defense.tracing.trace import trace, traces
from lens_defense.tracing.trace_result import Trace, join_traces


class SurveyResult(NamedTuple):
    """What a survey found."""

    trace: Trace | None
    """All traces as one, in the order of the requests; None where every request was refused."""
    refused: Mapping[str, str]
    """Why, by the ids of the requests that could not be traced."""


def survey(
    model: TransformerBridge,
    requests: Sequence[Request],
    out: Path,
    *,
    enough: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> SurveyResult:
    """Trace every request that has no file in a folder yet, and join what is there.

    A request that cannot be traced on this model gets a note in the place of a trace.

    Args:
        model: the model.
        requests: what is asked.
        out: the folder; each file in it is written whole or not at all.
        enough: stop when so many have a trace; None takes every request.
        progress: shows a bar with the time left.
        settings: of trace; plain values, since they name the files.

    Raises:
        ValueError: a request that no trace may see, or a setting's value that trace does not know.
    """
    requests = validated_requests(requests)
    out.mkdir(parents=True, exist_ok=True)
    weights = weights_fingerprint(model)
    about = json.dumps([weights, _DEFAULTS | settings], sort_keys=True)
    by = {"": settings.pop("metric", answer_logprob)}
    places = [out / _key(item, about) for item in requests]
    seen: list[Path] = []
    wanted = len(requests) if enough is None else min(enough, len(requests))
    with tqdm(total=wanted, desc="survey", unit="request", disable=not progress) as bar:
        for item, place in zip(requests, places, strict=True):
            if enough is not None and sum(_file(one).exists() for one in seen) >= enough:
                break
            seen.append(place)
            if not _file(place).exists() and not _note(place).exists():
                try:
                    told = traces(model, [item], by, weights=weights, progress=False, **settings)
                    told[""].save(_file(place))
                except UnfitRequest as error:
                    with atomic_write(_note(place)) as note:
                        note.write_text(json.dumps({"request": item.id, "refused": str(error)}), "utf-8")
            bar.update(enough is None or _file(place).exists())
            bar.refresh()  # those that are there already go by too fast to be shown
    held = [Trace.load(_file(place)) for place in seen if _file(place).exists()]
    notes = [json.loads(_note(place).read_text("utf-8")) for place in seen if _note(place).exists()]
    refused = {note["request"]: note["refused"] for note in notes}
    return SurveyResult(join_traces(held) if held else None, refused)


_DEFAULTS = {
    name: one.default
    for name, one in signature(trace).parameters.items()
    if one.default is not one.empty and not callable(one.default) and name not in ("progress", "max_bytes")
}
"""Of trace; named in a file's name too, so that what other defaults made is not taken for these."""


def _key(item: Request, about: str) -> str:
    text = json.dumps(item.to_json(), sort_keys=True) + about
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(place: Path) -> Path:
    return place.with_name(f"{place.name}.safetensors")


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")
