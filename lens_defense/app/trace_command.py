"""The work of `lens-defense trace`: a survey of many requests, and its mean map in files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import typer

from lens_defense.loading.load import load
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.patching.patch_grid import resolve_components, resolve_layers
from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.theme import save_figure
from lens_defense.prompts.request import Request
from lens_defense.sites import Site
from lens_defense.storage import atomic_write
from lens_defense.tracing.locate import locate
from lens_defense.tracing.survey import survey
from lens_defense.tracing.trace_result import Trace

_SHOWN = 5
"""Refused requests that are named on the screen."""


def trace_to_folder(
    name: str,
    requests: Sequence[Request],
    settings: TraceSettings,
    out: Path,
    *,
    samples: int,
    formats: Sequence[str],
    device: str | None,
    dtype: torch.dtype,
) -> None:
    """Trace requests, one file each in `out`/traces, and write their mean map.

    Raises:
        ValueError: the model has not what the settings name, no request can be traced, or nothing has a
            positive effect; the map is written all the same then.
    """
    model = load(name, device=device, dtype=dtype)
    resolve_layers(settings.layers, model.cfg.n_layers)  # refused before a folder is made
    resolve_components(model, settings.components)
    corruption = GaussianNoise(samples=samples)
    trace, refused = survey(model, requests, out / "traces", settings, corruption=corruption)
    if trace is None:
        reason = next(iter(refused.values()))
        raise ValueError(f"none of these requests could be traced; of the first: {reason}")
    trace.save(out / "trace.safetensors")
    _say_refused(refused, out / "traces")
    try:
        sites, obstacle = locate(trace), None
    except ValueError as error:  # the map shows why
        sites, obstacle = (), error
    files = [_save_map(trace, sites, out / f"map.{suffix}") for suffix in dict.fromkeys(formats)]
    typer.echo(f"{len(trace.prompts)} requests traced; open {', '.join(map(str, files))}")
    if obstacle:
        raise obstacle
    typer.echo(f"strongest sites: {', '.join(map(str, sites))}")


def _say_refused(refused: Mapping[str, str], folder: Path) -> None:
    for id, reason in list(refused.items())[:_SHOWN]:
        typer.echo(f"not traced: {id}: {reason}")
    if len(refused) > _SHOWN:
        typer.echo(f"not traced: {len(refused) - _SHOWN} more; {folder}/*.json says why")


def _save_map(trace: Trace, sites: Sequence[Site], file: Path) -> Path:
    """The mean map as a figure, or its numbers as a table, by the file's suffix."""
    if file.suffix not in (".csv", ".json"):
        return save_figure(heatmap(trace, sites), file)
    table = trace.by_role()
    text = table.to_csv(index=False) if file.suffix == ".csv" else table.to_json(orient="records", indent=1)
    with atomic_write(file) as unfinished:
        unfinished.write_text(str(text), "utf-8")
    return file
