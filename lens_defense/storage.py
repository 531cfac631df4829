"""Files and folders: written whole or not at all, with a format version and a hash of all that is in them.

A file with tensors is safetensors with a JSON header in its metadata; one without is JSON. Both carry a seal:
the SHA-256 of the file's bytes, taken while zeros stand in the hash's own place. No bit of a sealed file can
change unseen, and nothing of it is read before the seal is checked. A folder of a model, whose files are not
ours to shape, has a sealed manifest with the hash of each. Nothing is pickled.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import platformdirs
import safetensors.torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 3
"""The format version that `save` writes and `load` reads."""
MANIFEST = "lens_defense.json"
"""The name of a folder's manifest."""
Content = TypeVar("Content")
Tensors = Mapping[str, Shaped[Tensor, "..."]]
_log = logging.getLogger("lens_defense")


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
    header = {SEAL: UNSEALED, "format": FORMAT, "kind": kind, "content": plain}  # the seal comes first
    with atomic_write(path) as file:
        if tensors is None:
            file.write_text(json.dumps(header, ensure_ascii=False, indent=1), "utf-8")
        else:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            metadata = {_METADATA: json.dumps(header, ensure_ascii=False)}
            safetensors.torch.save_file(contiguous, file, metadata=metadata)
        seal(file)
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
        The content, and the tensors by name, copies in memory on the CPU; a JSON file has none.

    Raises:
        ValueError: there is no such file, it holds something else, is another version's, or is damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a file of the kind {kind!r}"
        ) from error
    whole = seal_holds(data)
    if whole is None:
        raise ValueError(
            f"{path} holds no {kind} that this version can read: it is another kind of file, of an older "
            "version, or damaged; make it again"
        )
    if not whole:
        raise ValueError(f"{path} is damaged: its bytes do not match their hash; make it again")
    try:
        header, tensors = _parsed(data)
        version, file_kind = header["format"], header["kind"]
        if version == FORMAT and file_kind == kind:
            return msgspec.convert(header["content"], content_type, str_keys=True), tensors
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} holds no {kind} that this version can read ({error}); make it again"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has the format version {version!r}, and this version reads {FORMAT}; make it again"
        )
    raise ValueError(_other_kind(path, str(file_kind), kind))


def require_shapes(
    path: str | os.PathLike[str], tensors: Tensors, shapes: Mapping[str, tuple[int | str, ...]]
) -> None:
    """Refuse tensors that do not have the names and shapes that a file's content wants.

    Args:
        path: the file, for the sentence.
        tensors: by name.
        shapes: by name, what each tensor must have: sizes, or words for sizes that must be the same wherever
            the word stands.

    Raises:
        ValueError: a tensor is missing, not expected, or of another shape.
    """
    sizes: dict[str, int] = {}
    differing = sorted(tensors.keys() ^ shapes.keys())
    for name in tensors.keys() & shapes.keys():
        shape, expected_shape = tuple(tensors[name].shape), shapes[name]
        if len(shape) != len(expected_shape) or any(
            size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for size, axis in zip(shape, expected_shape, strict=True)
        ):
            differing.append(name)
    if differing:
        raise ValueError(
            f"{path} holds tensors that do not fit its content: {', '.join(differing)}; make it again"
        )


def cached(kind: str, key: Any, make: Callable[[], Tensors], *, enabled: bool = True) -> dict[str, Tensor]:
    """Tensors from the cache; they are made, and kept there, where no whole entry of this key is found.

    An entry that is damaged or another key's is replaced, and the log says so. Where two write the same entry
    the last one's stays; a cache that cannot be written is no error.

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
    content = {"key": hash_of(key)}
    path = cache_folder() / kind / f"{content['key'][:32]}.safetensors"
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder may not be read
        with suppress(ValueError):
            stored_content, tensors = load(path, kind, dict)
            if stored_content == content:
                return tensors
        notice(f"the cache's {path} is damaged or not what its name says; it is made anew")
    tensors = dict(make())
    with suppress(OSError, SafetensorError):
        save(path, kind, content, tensors)
    return tensors


def hash_of(value: Any) -> str:
    """SHA-256 of plain values or dataclasses: of their JSON with sorted keys."""
    plain = msgspec.to_builtins(value, str_keys=True)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def notice(sentence: str) -> None:
    """Say something that a user should know and need do nothing about."""
    _log.warning(sentence)


def cache_folder() -> Path:
    """The folder of everything that can be made again: $LENS_DEFENSE_CACHE, or the user's cache folder.

    Raises:
        ValueError: the variable is not set, and there is no home folder.
    """
    try:
        return Path(os.environ.get("LENS_DEFENSE_CACHE") or platformdirs.user_cache_dir("lens_defense"))
    except RuntimeError as error:
        raise ValueError(
            "there is no home folder to keep a cache in; set LENS_DEFENSE_CACHE to a folder"
        ) from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write to; at the end of the `with` block it takes the place of `path`.

    The folder is made where it is missing. A failure leaves what was there before, and no debris. The mode
    is what the umask allows, whatever the writer's library sets.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished_in(target.parent)
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, about: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder that appears whole or not at all, with a manifest.

    Args:
        folder: its place, which must be free or an empty folder.
        about: what the manifest says of it beside the hashes.

    Yields:
        The folder to write to; it is renamed to `folder` at the end.

    Raises:
        FileExistsError: something was written there meanwhile; it stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished_in(folder.parent)
    unfinished.mkdir()
    try:
        yield unfinished
        write_manifest(unfinished, about)
        mode = unfinished.stat().st_mode & 0o666  # what the umask allows
        for file in unfinished.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        try:
            unfinished.rename(folder)
        except OSError as error:  # a rename replaces nothing but an empty folder
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileExistsError(f"{folder} exists and is not empty") from error
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_folder(path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> Iterator[Path]:
    """An `atomic_folder` at a place that somebody named.

    Raises:
        ValueError: the folder exists and is not empty, now or when everything is written; nothing is written
            over.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name a new folder")
    try:
        with atomic_folder(folder, about) as unfinished:
            yield unfinished
    except FileExistsError as error:
        raise ValueError(
            f"{folder} was written by something else meanwhile, and that was left as it is; name a new folder"
        ) from error


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What a folder's manifest holds."""

    files: Mapping[str, str]
    """By path inside the folder, the SHA-256 of each file that a loader may read."""
    about: Mapping[str, str]


def write_manifest(folder: Path, about: Mapping[str, str] | None = None) -> Path:
    """Write the manifest of the files that lie in a folder now."""
    return save(folder / MANIFEST, "folder", _Manifest(_hashes(folder), about or {}))


def hash_files(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, by path inside their folder, in order; several at once."""
    files = sorted(path for path in files if path.is_file())
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        hashes = list(threads.map(_hash_of_file, files))
    return {file.relative_to(folder).as_posix(): value for file, value in zip(files, hashes, strict=True)}


def check_manifest(folder: Path) -> None:
    """Refuse a folder whose files are not those of its manifest; one without a manifest passes.

    Notes and licences are not listed and may be added: only files with an ending that a loader looks for are.

    Raises:
        ValueError: a file differs, is missing, or was added; or the manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        return
    recorded_hashes = load(folder / MANIFEST, "folder", _Manifest)[0].files
    hashes = _hashes(folder)
    for name in sorted(recorded_hashes.keys() | hashes.keys()):
        if name not in recorded_hashes:
            fault = "was added to the folder after it was saved"
        elif name not in hashes:
            fault = "is missing from the folder"
        elif hashes[name] != recorded_hashes[name]:
            fault = "is not as it was saved"
        else:
            continue
        raise ValueError(
            f"{folder / name} {fault} ({MANIFEST} has the hashes): take a whole copy of the folder, or "
            f"delete {MANIFEST} if the change is yours"
        )


def discard_folder(folder: Path) -> None:
    """Take a folder away at one stroke, so that no one meets half of it."""
    aside = _unfinished_in(folder.parent)
    with suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


SEAL = "lens_defense_sha256"
"""The key of a seal: in a JSON header, or in the metadata of a file of another format, near its beginning."""
UNSEALED = "0" * 64
"""What stands in a seal's place while the hash is taken."""
_SEALED = re.compile(SEAL.encode() + rb".{1,16}?([0-9a-f]{64})", re.DOTALL)
_SEAL_WITHIN = 65536
"""Bytes from a file's beginning in which its seal stands."""


def seal(file: Path) -> None:
    """Write the hash of a file into it, in the place of the zeros of UNSEALED that follow the key SEAL."""
    with file.open("r+b") as stream:
        place = _SEALED.search(stream.read(_SEAL_WITHIN))
        if place is None or place[1] != UNSEALED.encode():
            raise ValueError(f"{file} has no place for a seal")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(place.start(1))
        stream.write(digest.encode())


def had_seal(data: Any) -> bool:
    """Whether a file without a seal once had one: its writer puts `lens_defense_format` beside it."""
    return _METADATA.encode() in data[:_SEAL_WITHIN]


def seal_holds(data: Any) -> bool | None:
    """Whether a file's bytes match the seal in them; None where they have no seal.

    Args:
        data: bytes, or a map of a file.
    """
    place = _SEALED.search(data, 0, _SEAL_WITHIN)
    if place is None:
        return None
    with memoryview(data) as view:
        digest = hashlib.sha256(view[: place.start(1)])
        digest.update(UNSEALED.encode())
        digest.update(view[place.end(1) :])
    return digest.hexdigest().encode() == place[1]


def _other_kind(path: str | os.PathLike[str], file_kind: str, expected_kind: str) -> str:
    """A sentence that names what a file holds, and what reads it."""
    kinds = (file_kind, expected_kind)
    a_file, an_expected = (f"an {kind}" if kind[0] in "aeiou" else f"a {kind}" for kind in kinds)
    reader = _READERS.get(file_kind)
    advice = f"read it with {reader}" if reader else "give another file"
    return f"{path} holds {a_file}, not {an_expected}: {advice}"


_READERS = {
    "trace": "ld.Trace.load",
    "edit": "ld.Edit.load",
    "report": "ld.Report.load",
    "editor": "ld.load_editor",
}
"""What reads a kind of file that people save."""
_METADATA = "lens_defense"
"""The key of the header in the metadata of a safetensors file."""
_LOADED_ENDINGS = {
    *(".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".gguf"),
    *(".model", ".tiktoken", ".txt", ".py"),
}
"""Of files that a loader of models may look for."""
_UNFINISHED = ".unfinished"
_DAY = 86400
"""Seconds after which an unfinished file is one of a writer that was killed."""


def _parsed(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """The header of a whole file, and its tensors."""
    if data.startswith(b"{"):
        return json.loads(data), {}
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8:end])["__metadata__"][_METADATA]), safetensors.torch.load(data)


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of what a manifest lists, by path inside the folder."""
    files = [path for path in folder.rglob("*") if path.suffix in _LOADED_ENDINGS]
    return hash_files(folder, [path for path in files if path != folder / MANIFEST])


def _hash_of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unfinished_in(folder: Path) -> Path:
    """A new name for what is not yet finished; what killed writers left there long ago is removed."""
    for old in folder.glob(f".*{_UNFINISHED}"):
        with suppress(OSError):  # another process may have been quicker
            if time.time() - old.stat().st_mtime > _DAY:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return folder / f".{secrets.token_hex(8)}{_UNFINISHED}"
