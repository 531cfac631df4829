"""What `lens-defense ledger` does: look at a ledger's folder, take edits off, replay it on a fresh copy."""

from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.ledger.ledger_folder import LedgerFolder, LedgerState, without_entry
from lens_defense.loading.load import load
from lens_defense.loading.save import save_folder
from lens_defense.shown_text import shown


def show(folder: Path, console: Console) -> None:
    """What stands, an edit per line. Requests are counted by category, not named."""
    state = _state(folder)
    console.print(
        f"{escape(shown(state.model))}, {len(state.entries)} edits; unedited: {state.fingerprint.weights}"
    )
    if not state.entries:
        return
    table = Table(box=box.SIMPLE)
    for name in ("", "method", "layers", "at", "strength", "requests", "attached", "applied"):
        table.add_column(name)
    for number, entry in enumerate(state.entries, 1):
        categories = ", ".join(f"{shown(name)} {count}" for name, count in entry.categories.items())
        attached = ", ".join(Path(name).suffix.removeprefix(".") for name in entry.attached)
        row = (number, entry.method, f"{entry.layers[0]} to {entry.layers[-1]}", entry.role)
        values = (*row, f"{entry.strength:g}", categories, attached, entry.applied)
        table.add_row(*(escape(shown(value)) for value in values))
    console.print(table)


def drop(folder: Path, number: int, console: Console) -> None:
    """Take an edit off; its file stays in the folder."""
    ledger_folder = LedgerFolder(folder)
    state = without_entry(_state(folder, ledger_folder), number)
    ledger_folder.write(state)
    console.print(f"{len(state.entries)} edits stand in {escape(shown(folder))}; no model was changed")


def replay(folder: Path, model: str, out: Path, dtype: torch.dtype, console: Console) -> None:
    """Make the edits again on a fresh copy, and write it as a Hugging Face folder."""
    _state(folder)
    ledger = Ledger(load(model, dtype=dtype), folder)
    save_folder(ledger.model, out)
    console.print(f"{escape(shown(out))}: {escape(shown(model))} with {len(ledger.edits)} edits")


def diff(folder: Path, console: Console) -> None:
    """By layer, how much the edits that stand change together."""
    ledger_folder = LedgerFolder(folder)
    edits = [ledger_folder.edit(entry) for entry in _state(folder, ledger_folder).entries]
    table = Table(box=box.SIMPLE)
    for name in ("layer", "edits", "rank", "norm of the change"):
        table.add_column(name)
    for layer in sorted({layer for edit in edits for layer in edit.layers}):
        of_layer = [edit for edit in edits if layer in edit.layers]
        change = sum(
            (edit.deltas()[layer].double() for edit in of_layer), torch.zeros((), dtype=torch.float64)
        )
        rank = sum(edit.left[layer].shape[1] for edit in of_layer)
        table.add_row(str(layer), str(len(of_layer)), str(rank), f"{float(change.norm()):.4g}")
    console.print(table)


def _state(folder: Path, ledger_folder: LedgerFolder | None = None) -> LedgerState:
    state = (ledger_folder or LedgerFolder(folder)).state() if folder.exists() else None
    if state is None:
        raise ValueError(f"there is no ledger in {folder}; ld.Ledger(model, folder) opens one")
    return state
