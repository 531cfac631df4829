"""The Ledger: the one place that changes a model for good, one edit on top of another, undone bit for bit."""

import threading
from functools import partial

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.edit_plan import Edit
from lens_defense.loading.loaded_model import loaded_model
from lens_defense.models.mlp_output import (
    apply_change_,
    set_aside_,
    standing_changes,
    take_back_,
    undo_change_,
)
from lens_defense.models.restoring_block import RestoringBlock
from lens_defense.models.weight_journal import Maker, journal_of
from lens_defense.shown_text import shown, shown_names


class Ledger:
    """The edits that stand in a model. Each apply, undo and redo happens whole or not at all.

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

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that stand, oldest first."""
        return tuple(change.edit for change in standing_changes(self.model) if change.maker is self._maker)

    def apply(self, edit: Edit) -> None:
        """Make an edit's change, on top of those that stand; what was undone cannot be redone after it.

        Raises:
            ValueError: the edit was planned on other weights, the result would not be finite, or an
                edit stands in the model that this ledger did not make; no weight was changed.
        """
        self._apply(edit, undone=())

    def undo(self) -> Edit:
        """Take the last edit back; every bit is as before it.

        Raises:
            ValueError: nothing stands, or something else changed the weights since.
        """
        with journal_of(self.model).lock:
            own = [change for change in standing_changes(self.model) if change.maker is self._maker]
            if not own:
                raise ValueError("there is nothing to undo in this ledger")
            undo_change_(self.model, own[-1])
        return own[-1].edit

    def redo(self) -> Edit:
        """Make the edit again that was undone last.

        Raises:
            ValueError: nothing was undone since the last apply.
        """
        journal = journal_of(self.model)
        with journal.lock:
            undone = journal.state.undone
            if not undone or undone[-1][0] is not self._maker:
                raise ValueError("there is nothing to redo in this ledger")
            self._apply(undone[-1][1], undone=undone[:-1])
        return undone[-1][1]

    def set_aside(self) -> RestoringBlock[TransformerBridge]:
        """The model without the edits for the length of a `with` block; afterwards they stand as before."""
        maker = Maker(threading.get_ident())

        def write_original_weights() -> TransformerBridge:
            set_aside_(self.model, maker)
            return self.model

        return RestoringBlock(write_original_weights, partial(take_back_, self.model, maker), maker)

    def _apply(self, edit: Edit, undone: tuple[tuple[Maker, Edit], ...]) -> None:
        with journal_of(self.model).lock:
            if any(change.maker is not self._maker for change in standing_changes(self.model)):
                raise ValueError("an edit stands in the model that this ledger did not make; undo it first")
            apply_change_(
                self.model,
                edit.deltas(),
                refuse=partial(edit.require_same_model, self.model),
                maker=self._maker,
                edit=edit,
                undone=undone,
            )

    def __repr__(self) -> str:
        edits = self.edits
        lines = [f"Ledger of {shown(self.model.cfg.model_name)}: edits that stand: {len(edits)}"]
        lines += [
            f"  {i}. {shown(edit.method)}, layers {edit.layers[0]} to {edit.layers[-1]}, rank {edit.rank}: "
            + shown_names(edit.subjects, most=6)
            for i, edit in enumerate(edits, 1)
        ]
        return "\n".join(lines)
