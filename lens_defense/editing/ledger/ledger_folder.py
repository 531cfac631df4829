"""A ledger's folder: the edits that stand in a model, kept so that a fresh copy gets the same bits.

    ledger.json                    what stands, in order, and on which model; written whole or not at all
    edits/<hash>.safetensors       an edit each, as `Edit.save` writes it
    attached/<hash>.<ending>       a trace or a report that belongs to an edit

An edit's file is written before ledger.json names it. So a process that is killed at any moment leaves the
state before or the state after, at most with a file that nothing names.
"""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

from lens_defense.editing.edit_plan import Edit
from lens_defense.models.fingerprint import Fingerprint
from lens_defense.prompts.request import Role
from lens_defense.storage import atomic_write, hash_of, load, save

LEDGER_FILE = "ledger.json"
_KIND = "ledger"
_PACKAGES = ("lens-defense", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One edit that stands: what it is, and the hashes of all that belongs to it."""

    file: str
    """Of the edit, inside the folder."""
    sha256: str
    """Of that file."""
    method: str
    layers: tuple[int, ...]
    role: Role
    strength: float
    categories: Mapping[str, int]
    """How many requests of each category are edited; the requests themselves are in the edit's file."""
    requests_sha256: str
    settings_sha256: str
    versions: Mapping[str, str]
    """Of the packages that the edit was applied with."""
    applied: str
    """When, in UTC."""
    attached: Mapping[str, str] = field(default_factory=dict)
    """By file inside the folder, the SHA-256 of a trace or a report that belongs to the edit."""


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What ledger.json holds."""

    model: str
    fingerprint: Fingerprint
    """Of the model without any edit."""
    entries: tuple[LedgerEntry, ...] = ()
    """Of the edits that stand, oldest first."""


@runtime_checkable
class Saveable(Protocol):
    """A Trace or a Report."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a file."""
        ...


class LedgerFolder:
    """The folder of one ledger, as one process sees it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Look at a folder; nothing is written yet, and it need not exist."""
        self.path = Path(path)
        self._file = self.path / LEDGER_FILE
        self._seen = self._bytes()

    def state(self) -> LedgerState | None:
        """What the folder holds; nothing where there is no ledger yet.

        Raises:
            ValueError: ledger.json is damaged, or of another version.
        """
        if not self._file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(
                    f"{self.path} is no ledger's folder: it has no {LEDGER_FILE}; name a new folder"
                )
            return None
        self._seen = self._bytes()
        return load(self._file, _KIND, LedgerState)[0]

    def edit(self, entry: LedgerEntry) -> Edit:
        """The edit of an entry.

        Raises:
            ValueError: its file is missing, or not the one that was applied.
        """
        file = self.path / entry.file
        if not file.is_file() or _sha256(file.read_bytes()) != entry.sha256:
            raise ValueError(
                f"{file} is missing or not as it was applied: bring back the file, or drop the edit with "
                "lens-defense ledger drop"
            )
        return Edit.load(file)

    def entry(self, edit: Edit) -> LedgerEntry:
        """Write an edit's file, and make its entry; ledger.json is not touched."""
        with TemporaryDirectory() as folder:
            data = edit.save(Path(folder) / "edit.safetensors").read_bytes()
        name = self._keep("edits", data, ".safetensors")
        categories: dict[str, int] = {}
        for request in edit.requests:
            category = request.category or "without a category"
            categories[category] = categories.get(category, 0) + 1
        return LedgerEntry(
            file=name,
            sha256=_sha256(data),
            method=edit.method,
            layers=edit.layers,
            role=edit.role,
            strength=edit.strength,
            categories=categories,
            requests_sha256=hash_of(edit.requests),
            settings_sha256=hash_of(edit.settings),
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            applied=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def attach(self, entry: LedgerEntry, content: Saveable, ending: str) -> LedgerEntry:
        """Write a trace or a report beside an edit; the entry with its hash. ledger.json is not touched."""
        with TemporaryDirectory() as folder:
            data = content.save(Path(folder) / f"attached{ending}").read_bytes()
        name = self._keep("attached", data, ending)
        return replace(entry, attached={**entry.attached, name: _sha256(data)})

    def write(self, state: LedgerState) -> None:
        """Write what stands.

        Raises:
            ValueError: another process wrote to the folder since this one looked; nothing was written.
        """
        if self._bytes() != self._seen:
            raise ValueError(
                f"{self.path} was changed by another process since it was opened here; open it anew on a "
                "fresh copy of the model"
            )
        save(self._file, _KIND, state)
        self._seen = self._bytes()

    def _keep(self, folder: str, data: bytes, ending: str) -> str:
        """Write bytes under their hash; the name inside the folder."""
        name = f"{folder}/{_sha256(data)[:16]}{ending}"
        with atomic_write(self.path / name) as file:
            file.write_bytes(data)
        return name

    def _bytes(self) -> bytes:
        return self._file.read_bytes() if self._file.is_file() else b""


def without_entry(state: LedgerState, number: int) -> LedgerState:
    """The state without one entry, counted from 1; -1 is the last.

    Raises:
        ValueError: there is no such entry.
    """
    entries: Sequence[LedgerEntry] = state.entries
    index = len(entries) - 1 if number == -1 else number - 1
    if not 0 <= index < len(entries):
        raise ValueError(
            f"the ledger has no edit {number}: {len(entries)} stand" if entries else "no edit stands"
        )
    return replace(state, entries=(*entries[:index], *entries[index + 1 :]))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
