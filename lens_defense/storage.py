"""Files that appear whole or not at all, whatever stops their writing; and safetensors, read or refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write meanwhile; at the end of the `with` block it takes the file's place.

    The folder is made where it is missing; a failure leaves what was there before, and no debris.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def open_safetensors(path: str | os.PathLike[str], writer: str) -> Iterator[Any]:
    """A safetensors file, to be read.

    Args:
        path: the file.
        writer: what writes such files, for the sentence that refuses another one.

    Raises:
        ValueError: there is no such file, or it is no safetensors file.
    """
    try:
        held = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a file that {writer} wrote") from error
    with held as file:
        yield file
