"""What a figure was made of: the sidecar that lies beside its files, so that it can be made again."""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

_PACKAGES = ("lens-defense", "torch", "transformer-lens", "transformers", "plotly", "kaleido")
_HASH_LETTERS = 16


def sidecar(
    figure: go.Figure, *, inches: float, sources: Iterable[str | os.PathLike[str]], seed: Any
) -> dict[str, Any]:
    """The command, seed, versions and hashes of a figure, the same on every run.

    Args:
        figure: as it is saved; what its `layout.meta` says of the data is taken over.
        inches: its width in print.
        sources: files that the figure was made from.
        seed: of the data; None leaves what the figure says of its corruption.

    Raises:
        ValueError: a source cannot be read.
    """
    layout: Any = figure.layout
    origin = layout.meta if isinstance(layout.meta, Mapping) else {}
    return {
        "command": command(),
        "seed": _seed(origin) if seed is None else seed,
        "origin": dict(origin),
        "data": hashlib.sha256(_data(figure)).hexdigest()[:_HASH_LETTERS],
        "sources": {Path(file).name: _file_hash(Path(file)) for file in sources},
        "versions": {"python": platform.python_version(), **_versions()},
        "inches": inches,
    }


def command() -> str:
    """How the running program was started, without the folders of this machine; a notebook has no command."""
    program = Path(sys.argv[0] if sys.argv else "")
    if "ipykernel" in program.name or not program.name or program.name == "-c":
        return "interactive"
    if program.suffix != ".py":
        return " ".join([program.name, *sys.argv[1:]])
    here = Path.cwd()
    inside = program.resolve().is_relative_to(here)
    name = program.resolve().relative_to(here).as_posix() if inside else program.name
    return " ".join(["python", name, *sys.argv[1:]])


def _seed(origin: Mapping[str, Any]) -> int | None:
    """The seed that a corruption's words end with."""
    match = re.search(r"\bseed (\d+)$", str(origin.get("corruption", "")))
    return int(match[1]) if match else None


def _data(figure: go.Figure) -> bytes:
    """The numbers and words that a figure draws, as bytes."""
    return json.dumps(json.loads(str(figure.to_json()))["data"], sort_keys=True).encode()


def _file_hash(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:_HASH_LETTERS]
    except OSError as error:
        raise ValueError(f"{file}, a source of the figure, cannot be read ({error.strerror})") from error


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
