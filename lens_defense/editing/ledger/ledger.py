"""The Ledger: the one place that changes a model for good, one edit on top of another, undone bit for bit."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import wrong_argument
from lens_defense.editing.edit_plan import Edit, adapter_of
from lens_defense.editing.export.model_card import Measured, write_card
from lens_defense.editing.ledger.ledger_folder import LedgerEntry, LedgerFolder, LedgerState, Saveable
from lens_defense.loading.loaded_model import loaded_model
from lens_defense.loading.save import write_folder
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.mlp_output import (
    apply_change_,
    original_weights_fingerprint,
    output_modules,
    refuse_other_originals,
    remove_change_,
    standing_changes,
    undo_change_,
    without_changes,
)
from lens_defense.models.restoring_block import RestoringBlock
from lens_defense.models.weight_journal import Maker, UndoneEdit, WeightChange, journal_of
from lens_defense.shown_text import one_line, shown, shown_names


class Ledger:
    """The edits that stand in a model. Each apply, undo, redo and remove happens whole or not at all.

    What stands is read from the model's journal, which is written before the weights are. So an interrupt
    leaves either the state before or the state after, and `edits` says which. With a folder it lasts: a
    process that is killed leaves the folder in the state before or after, and a new ledger replays it.
    """

    def __init__(self, model: TransformerBridge, folder: str | os.PathLike[str] | None = None) -> None:
        """Open a ledger on a model that no edit stands in.

        Args:
            model: the model.
            folder: keeps what stands, as it changes: a new folder, or one of an earlier ledger of the same
                model, whose edits are then made again, in their order, to the same bits. None keeps nothing.

        Raises:
            ValueError: an edit stands in the model already, through another ledger or an open `applied`; the
                folder is of another model, or damaged.
        """
        loaded_model(model, "ld.Ledger(model)")
        if standing_changes(model):
            raise ValueError(
                "an edit already stands in this model; go on with the ledger that applied it, or undo "
                "it first"
            )
        self.model = model
        self._maker = Maker()
        self._watchers: dict[object, Callable[[], object]] = {}
        self._entries: dict[Edit, LedgerEntry] = {}
        self.folder = LedgerFolder(folder) if folder is not None else None
        if self.folder is not None:
            self._state = self._open(self.folder)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that stand, oldest first."""
        return tuple(change.edit for change in self._own_changes())

    @property
    def undone(self) -> tuple[Edit, ...]:
        """The edits that were undone or removed and can be made again; `redo` takes the last."""
        return tuple(item.edit for item in self._own_undone())

    def apply(self, edit: Edit) -> None:
        """Make an edit's change, on top of those that stand; what was taken back cannot be redone after it.

        Raises:
            ValueError: the edit was planned on other weights, the result would not be finite, or an
                edit stands in the model that this ledger did not make; no weight was changed.
        """
        self._apply(edit, (), partial(edit.require_same_model, self.model))
        self._changed()

    def undo(self) -> Edit:
        """Take the last edit back; every bit is as before it.

        Raises:
            ValueError: nothing stands, or something else changed the weights since.
        """
        with journal_of(self.model).lock:
            own = self._own_changes()
            if not own:
                raise ValueError("there is nothing to undo in this ledger")
            undo_change_(self.model, own[-1])
        self._changed()
        return own[-1].edit

    def remove(self, edit: Edit) -> None:
        """Take an edit out, wherever it stands: every bit is as if only the others had been applied in order.

        The later edits are made again as they are. Where they share layers with this one they were planned on
        weights that held it: what they do may differ from their forecasts, and a new plan is more exact.

        An edit that is removed joins `undone` as the last, like one that is undone. So `redo` makes it again
        first, on top of all that stands and not in its old place, and then what was taken back before it.

        Args:
            edit: one of `edits`; where it stands twice, the later one goes.

        Raises:
            ValueError: the edit does not stand here, an edit stands in the model that this ledger did not
                make, something else changed the weights since, or the result would not be finite; no weight
                was changed.
            TypeError: this is no Edit.
        """
        if not isinstance(edit, Edit):
            raise wrong_argument("ledger.remove(edit)", "edit must be one of ledger.edits", edit)
        with journal_of(self.model).lock:
            own = [change for change in self._own_changes() if change.edit is edit]
            if not own:
                raise ValueError("this edit does not stand in this ledger; ledger.edits has those that do")
            self._refuse_others()
            remove_change_(self.model, own[-1], Edit.deltas)
        self._changed()

    def redo(self) -> Edit:
        """Make the edit again, on top, that was undone or removed last.

        Raises:
            ValueError: nothing was taken back since the last apply, something else changed the weights since,
                the result would not be finite, or an edit stands in the model that this ledger did not make;
                no weight was changed.
        """
        with journal_of(self.model).lock:
            undone = self._own_undone()
            if not undone:
                raise ValueError("there is nothing to redo in this ledger")
            edit = undone[-1].edit

            def refuse() -> None:
                edit.require_same_model(self.model, weights=False)
                refuse_other_originals(self.model, undone[-1])

            self._apply(edit, undone[:-1], refuse)
        self._changed()
        return edit

    def attach(self, edit: Edit, *, trace: Saveable | None = None, report: Saveable | None = None) -> None:
        """Keep what an edit was planned on or checked by beside it, in the ledger's folder.

        Args:
            edit: one of `edits`.
            trace: the map that its sites were found in.
            report: what a check of it measured.

        Raises:
            ValueError: the ledger has no folder, or the edit does not stand.
        """
        if self.folder is None:
            raise ValueError("this ledger keeps nothing; open it with a folder: ld.Ledger(model, folder)")
        if not any(edit is standing for standing in self.edits):
            raise ValueError("this edit does not stand in this ledger; ledger.edits has those that do")
        for content, ending in ((trace, ".safetensors"), (report, ".json")):
            if content is not None:
                entry = self._entry(self.folder, edit)
                self._entries[edit] = self.folder.attach(entry, content, ending)
        self._keep()

    def watch(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call a function after each apply, undo, redo and remove of this ledger.

        It is called by the thread of the verb, once the change stands and the journal's lock is free. What it
        raises goes to whoever called the verb: the change stands all the same, and watchers that were added
        later are not called. An interrupt can come between a change and the call, so read `edits` after one.

        Args:
            callback: without arguments; it may use the ledger.

        Returns:
            A function that ends it.
        """
        registration = object()
        self._watchers[registration] = callback

        def unwatch() -> None:
            self._watchers.pop(registration, None)

        return unwatch

    def set_aside(self) -> RestoringBlock[TransformerBridge]:
        """The model without the edits for the length of a `with` block; afterwards they stand as before."""
        return without_changes(self.model)

    def to_peft(self, folder: str | os.PathLike[str]) -> Path:
        """Write the edits that stand as one LoRA adapter, their ranks one after another: see `Edit.to_peft`.

        It belongs on the model without them, and equals the edited weights up to their rounding.

        Raises:
            ValueError: no edit stands in this ledger, or one does that it did not make; otherwise as
                `Edit.to_peft`.
        """
        with journal_of(self.model).lock:
            edits = self._require_edits("ledger.to_peft(folder)")
            layers = sorted({layer for edit in edits for layer in edit.layers})
            weights = original_weights_fingerprint(self.model, layers)
            fingerprint = replace(edits[0].fingerprint, weights=weights)
        return adapter_of(edits, folder, fingerprint)

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        report: Measured | None = None,
        name_subjects: bool = False,
    ) -> Path:
        """Write the edited model as a Hugging Face folder with a model card and the hashes of its files.

        The folder is as `ld.save_folder` writes it: only the tensors of edited layers differ from the
        source's. Every tensor is written in the precision that the model was loaded in, so load it in the
        source's, as with `dtype=torch.bfloat16`, where the others shall be the same bytes. README.md says
        what was edited, by which settings, and what was measured; `sha256sum -c SHA256SUMS` checks the files.

        Args:
            folder: a new or empty folder.
            report: what a check of these edits measured, as `ld.check(model, ledger)` gives it.
            name_subjects: whether the card names the subjects; else it counts them by category.

        Raises:
            ValueError: no edit stands in this ledger, or one does that it did not make; the folder exists and
                is not empty.
            TypeError: the report is something else.
        """
        call = "ledger.export(folder, report=report)"
        if report is not None and not isinstance(report, Measured):
            raise wrong_argument(call, "report must be a Report, as ld.check gives it", report)
        with journal_of(self.model).lock:
            edits = self._require_edits(call)
            layers = sorted({layer for edit in edits for layer in edit.layers})
            original: Any = self.model.original_model
            add_card = partial(
                write_card,
                edits=edits,
                model=str(self.model.cfg.model_name),
                base=str(original.config._name_or_path),
                dtype=str(original.dtype).removeprefix("torch."),
                modules=[module.name for module in output_modules(self.model, layers).values()],
                report=report,
                name_subjects=name_subjects,
            )
            return write_folder(self.model, folder, add_card)

    def _require_edits(self, call: str) -> tuple[Edit, ...]:
        """The edits that stand, where there are some, and nobody else's."""
        self._refuse_others()
        if not self.edits:
            raise ValueError(f"no edit stands in this ledger; apply one before {call}")
        return self.edits

    def _apply(self, edit: Edit, undone: tuple[UndoneEdit, ...], refuse: Callable[[], None]) -> None:
        with journal_of(self.model).lock:
            self._refuse_others()
            apply_change_(
                self.model, edit.deltas(), refuse=refuse, maker=self._maker, edit=edit, undone=undone
            )

    def _open(self, folder: LedgerFolder) -> LedgerState:
        """Make the edits again that stand in a folder; what it held."""
        fingerprint = model_fingerprint(self.model)
        state = folder.state() or LedgerState(str(self.model.cfg.model_name), fingerprint)
        differing = state.fingerprint.differing(fingerprint, "weights", "config", "tokenizer")
        if differing:
            raise ValueError(
                f"{folder.path} is the ledger of {shown(state.model)} with other {differing}; open it on a "
                "fresh copy of that model"
            )
        edits = [folder.edit(entry) for entry in state.entries]
        try:
            for edit, entry in zip(edits, state.entries, strict=True):
                self._apply(edit, (), partial(edit.require_same_model, self.model, weights=False))
                self._entries[edit] = entry
        except BaseException:
            while self._own_changes():
                undo_change_(self.model, self._own_changes()[-1])
            raise
        return state

    def _keep(self) -> None:
        """Write what stands to the folder, if there is one."""
        if self.folder is None:
            return
        try:
            entries = tuple(self._entry(self.folder, edit) for edit in self.edits)
            self._state = replace(self._state, entries=entries)
            self.folder.write(self._state)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the change stands in the model, but {self.folder.path} still holds the state before it "
                f"({one_line(error)}); the next change is written with this one"
            ) from error

    def _entry(self, folder: LedgerFolder, edit: Edit) -> LedgerEntry:
        if edit not in self._entries:
            self._entries[edit] = folder.entry(edit)
        return self._entries[edit]

    def _changed(self) -> None:
        self._keep()
        for callback in tuple(self._watchers.values()):
            callback()

    def _own_changes(self) -> tuple[WeightChange, ...]:
        return tuple(change for change in standing_changes(self.model) if change.maker is self._maker)

    def _own_undone(self) -> tuple[UndoneEdit, ...]:
        return tuple(item for item in journal_of(self.model).state.undone if item.maker is self._maker)

    def _refuse_others(self) -> None:
        if any(change.maker is not self._maker for change in standing_changes(self.model)):
            raise ValueError("an edit stands in the model that this ledger did not make; undo it first")

    def __repr__(self) -> str:
        edits = self.edits
        lines = [f"Ledger of {shown(self.model.cfg.model_name)}: edits that stand: {len(edits)}"]
        lines += [
            f"  {i}. {shown(edit.method)}, layers {edit.layers[0]} to {edit.layers[-1]}, rank {edit.rank}"
            + ("" if edit.strength == 1 else f", strength {edit.strength:g}")
            + f": {shown_names(edit.subjects, most=6)}"
            for i, edit in enumerate(edits, 1)
        ]
        return "\n".join(lines)
