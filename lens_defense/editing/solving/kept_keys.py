"""The keys that an edit writes at, kept so that later edits leave them alone: recursive least squares.

An edit keeps of each layer rows K with K^T K = the weighted sum of k k^T over all keys that its method was
given, harmless uses too. A later one is given the rows of those before it as one more group of keys, at which
nothing new is to be written:

    Delta_t = R_t^T K_t (lambda C + sum over s <= t of K_s^T K_s)^-1

R_t is what the model as it stands does not write yet. With one layer, one key per request and given targets
the changes of MEMIT one by one add up to its change of all at once. The paper of AlphaEdit has such rows too
(Fang et al. 2025, K_p); what the other methods do with them is in methods/.

The rows are the keys as the edit read them. What later edits change in lower layers changes the keys of
higher ones a little, and that is not followed.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import wrong_argument
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.methods import KeyGroup
from lens_defense.shown_text import shown_names

Keep = Ledger | Edit | Sequence[Edit]
"""Edits whose keys a new one leaves alone."""


def key_rows(groups: Iterable[KeyGroup]) -> Float[Tensor, "row d_in"]:
    """Rows whose Gram matrix is that of all rows of the groups, no more than a key is wide."""
    return _compressed(torch.cat([group.rows for group in groups])).float().cpu()


def kept_rows(edits: Sequence[Edit], layers: Iterable[int]) -> dict[int, Float[Tensor, "_ d_in"]]:
    """By layer, the rows of earlier edits together, in float64; a layer that none of them changes has none.

    Args:
        edits: each with its rows, as `edits_to_keep` gives them.
        layers: those of the new edit.
    """
    found = {
        layer: [edit.key_rows[layer].double() for edit in edits if layer in edit.key_rows] for layer in layers
    }
    return {layer: _compressed(torch.cat(rows)) for layer, rows in found.items() if rows}


def edits_to_keep(keep: Keep, model: TransformerBridge, call: str) -> tuple[Edit, ...]:
    """The edits that are to be kept.

    Args:
        keep: a ledger, an edit or several.
        model: the model that they stand in.
        call: the right call, for an error.

    Raises:
        ValueError: the ledger or an edit is of another model, or an edit does not know its keys.
        TypeError: it is something else.
    """
    if isinstance(keep, Ledger) and keep.model.original_model is not model.original_model:
        raise ValueError("keep is a ledger of another model; give the one that the edits stand in")
    edits = keep.edits if isinstance(keep, Ledger) else (keep,) if isinstance(keep, Edit) else keep
    if not isinstance(edits, Sequence) or not all(isinstance(edit, Edit) for edit in edits):
        raise wrong_argument(call, "keep must be a Ledger, an Edit or several", keep)
    for edit in edits:
        edit.require_same_model(model, weights=False)
        if not edit.key_rows:
            raise ValueError(
                f"the edit of {shown_names(edit.subjects)} does not know its keys, so it cannot be kept: a "
                "method that tunes or an older version planned it, or it is an adapter; plan it again with a "
                "method that solves, or leave it out of keep"
            )
    return tuple(edits)


def _compressed(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "_ d_in"]:
    """The rows, or the triangle R of their QR decomposition where that has fewer: R^T R = rows^T rows."""
    return torch.linalg.qr(rows.double(), mode="r").R if len(rows) > rows.shape[1] else rows
