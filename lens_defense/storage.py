"""Files: written whole or not at all, with a format version, a kind and a hash of their content.

A file with tensors is safetensors with a JSON header in its metadata; one without is JSON. What a file holds
is checked against its hash before it is used. Nothing is pickled.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import platformdirs
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2
"""The format version that `save` writes and `load` reads; files of lens_defense 0.1 have none."""
Content = TypeVar("Content")
Tensors = Mapping[str, Shaped[Tensor, "..."]]


def save(path: str | os.PathLike[str], kind: str, content: Any, tensors: Tensors | None = None) -> Path:
    """Write a file, whole or not at all.

    Args:
        path: the file.
        kind: what it holds ("trace", "edit", "report", ...); `load` wants the same word.
        content: a dataclass or plain values.
        tensors: by name; None writes plain JSON.
    """
    plain = msgspec.to_builtins(content, str_keys=True)
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path} cannot be written: a text in it holds {error.object[error.start]!r}, half of a character"
        ) from error
    header = {"format": FORMAT, "kind": kind, "sha256": _hash(kind, plain, tensors or {}), "content": plain}
    with atomic_write(path) as file:
        if tensors is None:
            file.write_text(json.dumps(header, ensure_ascii=False, indent=1), "utf-8")
        else:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, file, metadata={_METADATA: json.dumps(header, ensure_ascii=False)})
    return Path(path)


def load(
    path: str | os.PathLike[str], kind: str, content_type: type[Content]
) -> tuple[Content, dict[str, Tensor]]:
    """Read what `save` wrote.

    Args:
        path: the file.
        kind: the word that `save` was given.
        content_type: the type of the content.

    Returns:
        The content, and the tensors by name, on the CPU; a JSON file has none.

    Raises:
        ValueError: there is no such file, it holds something else, version 0.1 wrote it, or it is damaged.
    """
    header, tensors = _read(Path(path), kind)
    if "format" not in header:
        raise ValueError(
            f"{path} holds no {kind} of this version: it has no format version, like the files of "
            "lens_defense 0.1; make it again"
        )
    if header["format"] != FORMAT:
        raise ValueError(f"{path} has the format version {header['format']!r}; this version reads {FORMAT}")
    if header.get("kind") != kind:
        raise ValueError(f"{path} holds no {kind} but another kind of content: {header.get('kind')!r}")
    if header.get("sha256") != _hash(kind, header.get("content"), tensors):
        raise ValueError(f"{path} is damaged: its content does not match its hash; make it again")
    try:
        return msgspec.convert(header["content"], content_type, str_keys=True), tensors
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no {kind} that this version can read ({error})") from error


def cached(kind: str, key: Any, make: Callable[[], Tensors], *, enabled: bool = True) -> dict[str, Tensor]:
    """Tensors from the cache; they are made, and kept there, where no entry of this key can be read.

    Args:
        kind: what the tensors are; also the name of their folder in the cache.
        key: everything that the tensors depend on, as plain values or dataclasses.
        make: makes the tensors.
        enabled: False makes them without a look at the cache, and keeps nothing.

    Returns:
        The tensors by name: as `make` gave them, or on the CPU where they come from the cache.
    """
    if not enabled:
        return dict(make())
    plain = msgspec.to_builtins(key, str_keys=True)
    content = {"key": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}
    path = cache_folder() / kind / f"{content['key'][:32]}.safetensors"
    with suppress(ValueError):
        stored_content, tensors = load(path, kind, dict)
        if stored_content == content:
            return tensors
    tensors = dict(make())
    with suppress(OSError, SafetensorError):  # a cache that cannot be written is no error
        save(path, kind, content, tensors)
    return tensors


def cache_folder() -> Path:
    """The folder of everything that can be made again: $LENS_DEFENSE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("LENS_DEFENSE_CACHE") or platformdirs.user_cache_dir("lens_defense"))


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write to; at the end of the `with` block it takes the place of `path`.

    The folder is made where it is missing. A failure leaves what was there before, and no debris.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


_METADATA = "lens_defense"
"""The key of the header in the metadata of a safetensors file."""


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a file, which may be another version's, and its tensors."""
    header, tensors = None, {}
    try:
        with path.open("rb") as file:
            is_json = file.read(1) == b"{"
        if is_json:
            header = json.loads(path.read_text("utf-8"))
        else:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if _METADATA in metadata:
                header = json.loads(metadata[_METADATA])
            elif metadata.keys() & {"trace", "edit"}:  # the keys of version 0.1
                header = {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: give a file of the kind {kind!r} ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} holds no {kind}")
    return header, tensors


def _hash(kind: str, content: Any, tensors: Tensors) -> str:
    """SHA-256 of kind and content as canonical JSON, and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps([kind, content], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
