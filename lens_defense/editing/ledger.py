"""The Ledger: the one place that changes a model for good, one edit on top of another, undone bit for bit."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import wrong_argument
from lens_defense.editing.edit_plan import Edit, adapter_of
from lens_defense.editing.model_card import Measured, write_card
from lens_defense.loading.loaded_model import loaded_model
from lens_defense.loading.save import write_folder
from lens_defense.models.mlp_output import (
    apply_change_,
    original_weights_fingerprint,
    output_modules,
    refuse_other_originals,
    remove_change_,
    set_aside_,
    standing_changes,
    take_back_,
    undo_change_,
)
from lens_defense.models.restoring_block import RestoringBlock
from lens_defense.models.weight_journal import Maker, UndoneEdit, WeightChange, journal_of
from lens_defense.shown_text import shown, shown_names


class Ledger:
    """The edits that stand in a model. Each apply, undo, redo and remove happens whole or not at all.

    What stands is read from the model's journal, which is written before the weights are. So an interrupt
    leaves either the state before or the state after, and `edits` says which.
    """

    def __init__(self, model: TransformerBridge) -> None:
        """Open a ledger on a model that no edit stands in.

        Raises:
            ValueError: an edit stands in the model already, through another ledger or an open `applied`.
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
        self._call_watchers()

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
        self._call_watchers()
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
        self._call_watchers()

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
        self._call_watchers()
        return edit

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
        maker = Maker(threading.get_ident())

        def write_original_weights() -> TransformerBridge:
            set_aside_(self.model, maker)
            return self.model

        return RestoringBlock(write_original_weights, partial(take_back_, self.model, maker), maker)

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

    def _call_watchers(self) -> None:
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
