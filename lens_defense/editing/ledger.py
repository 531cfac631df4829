"""The Ledger: the one place that changes a model for good, one edit on top of another, undone bit for bit."""

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.edit_plan import Edit
from lens_defense.models.mlp_output import WeightChange, apply_change_, standing_changes, undo_change_


class Ledger:
    """The edits that stand in a model. Each apply, undo and redo happens whole or not at all."""

    def __init__(self, model: TransformerBridge) -> None:
        """Open a ledger on a model that no edit stands in.

        Raises:
            ValueError: an edit stands in the model already, through another ledger or an open `applied`.
        """
        if standing_changes(model):
            raise ValueError(
                "an edit already stands in this model; go on with the ledger that applied it, or undo "
                "it first"
            )
        self.model = model
        self._done: list[tuple[Edit, WeightChange]] = []
        self._undone: list[Edit] = []

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that stand, oldest first."""
        return tuple(edit for edit, _ in self._done)

    def apply(self, edit: Edit) -> None:
        """Make an edit's change, on top of those that stand; what was undone cannot be redone after it.

        Raises:
            ValueError: the edit was planned on other weights, the result would not be finite, or an
                edit stands in the model that this ledger did not make; no weight was changed.
        """
        self._apply(edit)
        self._undone.clear()

    def undo(self) -> Edit:
        """Take the last edit back; every bit is as before it.

        Raises:
            ValueError: nothing stands, or something else changed the weights since.
        """
        if not self._done:
            raise ValueError("there is nothing to undo in this ledger")
        edit, change = self._done[-1]
        try:
            undo_change_(self.model, change)
        finally:  # an interrupt is raised when the change is taken back
            if change not in standing_changes(self.model):
                self._done.pop()
                self._undone.append(edit)
        return edit

    def redo(self) -> Edit:
        """Make the edit again that was undone last.

        Raises:
            ValueError: nothing was undone since the last apply.
        """
        if not self._undone:
            raise ValueError("there is nothing to redo in this ledger")
        self._apply(self._undone[-1])
        return self._undone.pop()

    def _apply(self, edit: Edit) -> None:
        changes = [change for _, change in self._done]
        if list(standing_changes(self.model)) != changes:
            raise ValueError("an edit stands in the model that this ledger did not make; undo it first")
        try:
            edit.require_same_model(self.model)
            self._done.append((edit, apply_change_(self.model, edit.deltas())))
        except BaseException:
            for change in standing_changes(self.model)[len(changes) :]:
                undo_change_(self.model, change)
            raise

    def __repr__(self) -> str:
        lines = [f"Ledger of {self.model.cfg.model_name}: edits that stand: {len(self._done)}"]
        lines += [
            f"  {i}. {edit.method}, layers {edit.layers[0]} to {edit.layers[-1]}, rank {edit.rank}: "
            + ", ".join(edit.subjects[:6])
            + (" ..." if len(edit.subjects) > 6 else "")
            for i, edit in enumerate(self.edits, 1)
        ]
        return "\n".join(lines)
